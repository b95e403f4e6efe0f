"""What a network costs: parameters, floating-point operations and time."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm.auto import tqdm

from kdvit.models.network import Network
from kdvit.structures import Layer

WARM_UP = 3
"""Rounds that do not count."""
UNCOUNTED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)  # type: ignore[no-untyped-call]
}
"""The CPU's fused attention, which torch's counter takes for nothing."""


class ForwardCost(NamedTuple):
    """What one image costs, to the logits; without a head to the pooled features, or the last block's.

    Attributes:
        flops: Floating-point operations; a multiply-add counts as 2.
        kept_bytes: What autograd would keep of them, without weights, in the network's precision.
    """

    flops: int
    kept_bytes: int


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """Returns the number of parameters; on request without those that are frozen."""
    return sum(each.numel() for each in module.parameters() if each.requires_grad or not trainable)


def forward_cost(network: Network) -> ForwardCost:
    """Measures one pass of a blank image, in eval."""
    cost, has_logits = _cost(network, ())
    return cost if has_logits else _cost(network, (network.end_layer(),))[0]


@torch.enable_grad()
def _cost(network: Network, layers: tuple[Layer, ...]) -> tuple[ForwardCost, bool]:
    kept: dict[int, int] = {}
    weights = {each.untyped_storage().data_ptr() for each in network.parameters()}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with network.evaluating(), counter, saved_tensors_hooks(keep, lambda value: value):
        output = network(network.blank_image().requires_grad_(), layers)
    return ForwardCost(int(counter.get_total_flops()), sum(kept.values())), output.logits is not None


@torch.inference_mode()
def round_times_ms(networks: Sequence[Network], batch_size: int = 1, rounds: int = 50) -> list[list[float]]:
    """Times networks by turns, each once a round, so that whatever else the machine does meets all alike.

    Each runs as far as `ForwardCost` says. The order is drawn anew for each round, as a network may leave the caches
    and the clock rate to the next. The first three rounds warm up and do not count. A terminal is shown a progress bar.

    Args:
        networks: In eval; each on its own device and in its own precision.
        batch_size: Images at once.
        rounds: How often each is timed.

    Returns:
        For each network the milliseconds of a batch in each round.
    """
    images = [network.blank_image().expand(batch_size, -1, -1, -1).contiguous() for network in networks]
    ends = [
        () if network(image).logits is not None else (network.end_layer(),)
        for network, image in zip(networks, images, strict=True)
    ]
    times: list[list[float]] = [[] for _ in networks]
    numbers = range(len(networks))
    turns = [i for n in range(WARM_UP + rounds) for i in random.Random(n).sample(numbers, len(numbers))]
    for i in tqdm(turns, f"Timing {batch_size} at once", disable=None, leave=False):
        start = time.perf_counter()
        networks[i](images[i], ends[i])
        if images[i].device.type != "cpu":
            torch.accelerator.synchronize(images[i].device)
        times[i].append(1000 * (time.perf_counter() - start))
    return [each[WARM_UP:] for each in times]
