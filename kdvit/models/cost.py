"""What a network costs: parameters, floating-point operations and time."""

from __future__ import annotations

import statistics
import time

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


@torch.inference_mode()
def latency_ms(network: Network, batch_size: int = 1, repeats: int = 50) -> float:
    """Returns the median time of a batch, in milliseconds, on the device of the network."""
    image = network.blank_image().expand(batch_size, -1, -1, -1).contiguous()
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        network(image)
        if image.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])
