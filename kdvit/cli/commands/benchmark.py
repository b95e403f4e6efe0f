"""What networks cost, side by side: parameters, FLOPs, latency, throughput."""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from kdvit.cli.config_files import find_config
from kdvit.cli.lookup import find_network, read_experiment
from kdvit.models import Network, TimmTeacher
from kdvit.models.cost import forward_flops, parameter_count
from kdvit.tables import text_table


class Cost(NamedTuple):
    """What one network costs.

    Attributes:
        name: How the user named it.
        parameters: Number of parameters.
        gflops: Operations of one image's logits in 1e9; a multiply-add counts as 2.
        latency_ms: Median time of one image, in milliseconds.
        images_per_second: At the batch size of the benchmark.
    """

    name: str
    parameters: int
    gflops: float
    latency_ms: float
    images_per_second: float


def benchmark(names: list[str], batch_size: int = 32, out: str | None = None) -> None:
    """Prints the costs of networks as a table.

    Args:
        names: timm model names, exported folders, checkpoints, or configs (whose student and teacher both count).
        batch_size: Images at once, for the throughput.
        out: A JSON file to write, with the machine.

    Raises:
        UserError: If a name is none of these.
    """
    costs = [measure(name, network, batch_size) for each in names for name, network in find_networks(each)]
    head = ("network", "parameters", "GFLOP", "latency (ms)", f"images/s at {batch_size}")
    rows = [
        (
            each.name,
            f"{each.parameters:,}",
            f"{each.gflops:.3g}",
            f"{each.latency_ms:.2f}",
            f"{each.images_per_second:.0f}",
        )
        for each in costs
    ]
    print(text_table(head, rows))
    if out:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        content = {"machine": {**machine, "torch": torch.__version__}, "batch_size": batch_size}
        Path(out).write_text(json.dumps({**content, "networks": [cost._asdict() for cost in costs]}, indent=1) + "\n")


def find_networks(name: str) -> list[tuple[str, Network]]:
    """Returns the networks behind a name, with random weights where it says nothing of weights.

    Raises:
        UserError: If there is nothing of that name.
    """
    if Path(find_config(name)).suffix not in (".yaml", ".yml"):
        return [(name, find_network(name, pretrained=False, kind=TimmTeacher))]
    random = {"pretrained": False}
    found = read_experiment(name, ("student", "teacher"), {"student": random, "teacher": random})
    stem, roles = Path(name).stem, {"student": found.student, "teacher": found.teacher}
    return [(f"{stem}: {role}", network) for role, network in roles.items() if network is not None]


def measure(name: str, network: Network, batch_size: int) -> Cost:
    """Measures a network on the device that it is on."""
    network.eval()
    single = latency_ms(network)
    batch = latency_ms(network, batch_size, repeats=10)
    flops = forward_flops(network)
    return Cost(name, parameter_count(network), flops / 1e9, single, 1000 * batch_size / batch)


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
