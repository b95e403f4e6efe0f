"""What a network costs: parameters, floating-point operations and time."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from kdvit.models.network import Network

WARM_UP = 3
"""Rounds that do not count."""


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """Returns the number of parameters; on request without those that are frozen."""
    return sum(each.numel() for each in module.parameters() if each.requires_grad or not trainable)


@torch.enable_grad()  # without it, torch's module tracker trips over views of parameters, such as CaiT's class token
def forward_flops(network: Network) -> int:
    """Counts the operations of one image's logits; a multiply-add counts as 2.

    Attention is counted with its plain kernel, since torch's counter reports 0 for the fused one on the CPU.
    """
    with network.evaluating(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(network.blank_image())
    return int(counter.get_total_flops())


@torch.inference_mode()
def round_times_ms(networks: Sequence[Network], batch_size: int = 1, rounds: int = 50) -> list[list[float]]:
    """Times networks by turns, each once a round, so that whatever else the machine does meets all alike.

    The order is drawn anew for each round, as a network may leave the caches and the clock rate to the next. The first
    three rounds warm up and do not count. A terminal is shown a progress bar.

    Args:
        networks: In eval; each on its own device and in its own precision.
        batch_size: Images at once.
        rounds: How often each is timed.

    Returns:
        For each network the milliseconds of a batch in each round.
    """
    images = [network.blank_image().expand(batch_size, -1, -1, -1).contiguous() for network in networks]
    times: list[list[float]] = [[] for _ in networks]
    numbers = range(len(networks))
    turns = [i for n in range(WARM_UP + rounds) for i in random.Random(n).sample(numbers, len(numbers))]
    for i in tqdm(turns, f"Timing {batch_size} at once", disable=None, leave=False):
        start = time.perf_counter()
        networks[i](images[i])
        if images[i].device.type != "cpu":
            torch.accelerator.synchronize(images[i].device)
        times[i].append(1000 * (time.perf_counter() - start))
    return [each[WARM_UP:] for each in times]
