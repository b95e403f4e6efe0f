"""`kdvit benchmark`: what networks cost, side by side."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from kdvit.cli.config_files import require_configs, require_writable
from kdvit.cli.messages import unforeseen
from kdvit.errors import shown
from kdvit.tables import text_table

TYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ROUNDS, BATCH_ROUNDS = 50, 10
"""How often each network is timed on an image, and on a batch."""


def benchmark(
    networks: list[str],
    batch_size: PositiveInt = 32,
    threads: PositiveInt | None = None,
    precision: Literal["float32", "bf16", "fp16"] = "float32",
    device: str = "cpu",
    out: str | None = None,
) -> None:
    """Show parameters, FLOPs, latency and throughput of networks side by side; of a Lift student also folded.

    The networks are timed by turns, each once a round, after a warm-up; one without a head to its pooled features. All
    are held in memory at once.

    Args:
        networks: Names of timm, exported folders, checkpoints, import paths such as torchvision.models.resnet18, or
            configs (student and teacher of each).
        batch_size: Images at once, for the throughput.
        threads: Of the CPU; by default as many as torch takes.
        precision: Of weights and images while they are timed.
        device: Where they are timed, such as cuda.
        out: A JSON file for the numbers, each round's included, and the machine.

    Examples:
        kdvit benchmark deit_tiny_patch16_224 lift.yaml
    """
    require_configs(networks)
    require_writable(out)
    import torch

    from kdvit.cli.lookup import find_networks
    from kdvit.models.cost import forward_cost, parameter_count, round_times_ms

    if threads:
        torch.set_num_threads(threads)
    with shown((RuntimeError, AssertionError), prefix=f"--device {device!r}: "):
        torch.empty(0, device=device)
    named = [pair for each in networks for pair in _and_folded(find_networks(each))]
    found = [network.eval() for _, network in named]
    with unforeseen("A network cannot be run."):
        costs = [{"parameters": parameter_count(each), "gflops": forward_cost(each).flops / 1e9} for each in found]
    for each in found:
        each.to(device, getattr(torch, TYPES[precision]))
    for cost, times in zip(costs, round_times_ms(found, rounds=ROUNDS), strict=True):
        cost |= _spread("latency_ms", times)
    for cost, times in zip(costs, round_times_ms(found, batch_size, BATCH_ROUNDS), strict=True):
        cost |= _spread("images_per_second", [1000 * batch_size / each for each in times])
    results = [{"name": name, **cost} for (name, _), cost in zip(named, costs, strict=True)]
    machine = {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "torch": torch.__version__,
    }
    print(
        f"Median (quartiles) of {ROUNDS} rounds of one image and {BATCH_ROUNDS} of {batch_size}, every network once a "
        f"round. {machine['device']}, {machine['threads']} threads, {precision}."
    )
    print(_table(results, batch_size))
    if out:
        content = {"machine": machine, "batch_size": batch_size, "networks": results}
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def _spread(name: str, values: list[float]) -> dict[str, Any]:
    """Returns the median of a network's rounds by its name, the quartiles, and each round."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: median, f"{name}_quartiles": [low, high], f"{name}_rounds": values}


def _table(results: list[dict[str, Any]], batch_size: int) -> str:
    rows = []
    for each in results:
        latency, rate = (
            f"{each[name]:{form}} ({each[f'{name}_quartiles'][0]:{form}}-{each[f'{name}_quartiles'][1]:{form}})"
            for name, form in (("latency_ms", ".2f"), ("images_per_second", ".1f"))
        )
        rows.append((each["name"], f"{each['parameters']:,}", f"{each['gflops']:.3g}", latency, rate))
    return text_table(("network", "parameters", "GFLOP", "latency (ms)", f"images/s at {batch_size}"), rows)


def _and_folded(networks: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields networks by name, and after a Lift what it is once folded."""
    from kdvit.models import LiftViT

    for name, network in networks:
        yield name, network
        if isinstance(network, LiftViT) and network.folds:
            yield f"{name}, folded", network.folded()
