"""`kdvit benchmark`: what networks cost, side by side."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from kdvit.cli.config_files import find_config
from kdvit.tables import text_table

CONFIGS = (".yaml", ".yml")


def benchmark(networks: list[str], batch_size: PositiveInt = 32, out: str | None = None) -> None:
    """Show parameters, FLOPs, latency and throughput of networks side by side; of a Lift student also folded.

    Args:
        networks: Names of timm, exported folders, checkpoints, or configs (student and teacher of each).
        batch_size: Images at once, for the throughput.
        out: A JSON file for the numbers and the machine.

    Example:
        kdvit benchmark deit_tiny_patch16_224 lift.yaml
    """
    files = {name: find_config(name) for name in networks if name.endswith(CONFIGS)}
    import torch

    from kdvit.cli.lookup import find_networks
    from kdvit.models.cost import forward_flops, latency_ms, parameter_count

    costs = []
    for name, network in (pair for each in networks for pair in _and_folded(find_networks(each, files.get(each)))):
        costs.append(
            {
                "name": name,
                "parameters": parameter_count(network.eval()),
                "gflops": forward_flops(network) / 1e9,
                "latency_ms": latency_ms(network),
                "images_per_second": 1000 * batch_size / latency_ms(network, batch_size, repeats=10),
            }
        )
    head = ("network", "parameters", "GFLOP", "latency (ms)", f"images/s at {batch_size}")
    formats = ("{}", "{:,}", "{:.3g}", "{:.2f}", "{:.0f}")
    rows = [[form.format(value) for form, value in zip(formats, cost.values(), strict=True)] for cost in costs]
    print(text_table(head, rows))
    if out:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        content = {"machine": {**machine, "torch": torch.__version__}, "batch_size": batch_size, "networks": costs}
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def _and_folded(networks: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields networks by name, and after a Lift what it is once folded."""
    from kdvit.models import LiftViT

    for name, network in networks:
        yield name, network
        if isinstance(network, LiftViT) and "lift" in network.named_layers():
            yield f"{name}, folded", network.folded()
