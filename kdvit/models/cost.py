"""What a network costs: parameters and floating-point operations."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kdvit.models.network import Network


def parameter_count(module: nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.enable_grad()  # without it, torch's module tracker trips over views of parameters, such as CaiT's class token
def forward_flops(network: Network) -> int:
    """Counts the operations of one image's logits; a multiply-add counts as 2.

    Attention is counted with its plain kernel, since torch's counter reports 0 for the fused one on the CPU.
    """
    with network.evaluating(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(network.blank_image())
    return int(counter.get_total_flops())
