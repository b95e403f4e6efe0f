"""`kdvit benchmark`: what networks cost, side by side."""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kdvit.cli.config_files import find_config
from kdvit.tables import text_table

if TYPE_CHECKING:
    from kdvit.models import Network

CONFIGS = (".yaml", ".yml")


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


def benchmark(networks: list[str], batch_size: int = 32, out: str | None = None) -> None:
    """Show parameters, FLOPs, latency and throughput of networks side by side.

    Args:
        networks: Names of timm, exported folders, checkpoints, or configs (student and teacher of each).
        batch_size: Images at once, for the throughput.
        out: A JSON file for the numbers and the machine.

    Example:
        kdvit benchmark deit_tiny_patch16_224 lift.yaml
    """
    files = {name: find_config(name) for name in networks if name.endswith(CONFIGS)}
    import torch

    costs = [
        measure(name, network, batch_size)
        for each in networks
        for name, network in find_networks(each, files.get(each))
    ]
    head = ("network", "parameters", "GFLOP", "latency (ms)", f"images/s at {batch_size}")
    rows = [
        (c.name, f"{c.parameters:,}", f"{c.gflops:.3g}", f"{c.latency_ms:.2f}", f"{c.images_per_second:.0f}")
        for c in costs
    ]
    print(text_table(head, rows))
    if out:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        content = {"machine": {**machine, "torch": torch.__version__}, "batch_size": batch_size}
        Path(out).write_text(json.dumps({**content, "networks": [cost._asdict() for cost in costs]}, indent=1) + "\n")


def find_networks(name: str, config: str | None = None) -> list[tuple[str, Network]]:
    """Returns the networks behind a name, with random weights where it says nothing of weights.

    Args:
        name: As the user types it.
        config: The file, if it is a config.

    Raises:
        UserError: If there is nothing of that name.
    """
    from kdvit.cli.lookup import find_network, read_experiment
    from kdvit.models import TimmTeacher

    if config is None:
        return [(name, find_network(name, pretrained=False, kind=TimmTeacher))]
    found = read_experiment(config, random=("student", "teacher"))
    roles = {"student": found.student, "teacher": found.teacher}
    return [(f"{Path(name).stem}: {role}", network) for role, network in roles.items() if network is not None]


def measure(name: str, network: Network, batch_size: int) -> Cost:
    """Measures a network on the device that it is on."""
    from kdvit.models.cost import forward_flops, parameter_count

    network.eval()
    single = latency_ms(network)
    batch = latency_ms(network, batch_size, repeats=10)
    flops = forward_flops(network)
    return Cost(name, parameter_count(network), flops / 1e9, single, 1000 * batch_size / batch)


def latency_ms(network: Network, batch_size: int = 1, repeats: int = 50) -> float:
    """Returns the median time of a batch, in milliseconds, on the device of the network."""
    import torch

    image = network.blank_image().expand(batch_size, -1, -1, -1).contiguous()
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 3):
            start = time.perf_counter()
            network(image)
            if image.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])
