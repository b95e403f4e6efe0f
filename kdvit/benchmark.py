"""What networks cost, side by side: parameters, FLOPs, latency, throughput."""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from kdvit.config_files import find_config
from kdvit.messages import UserError
from kdvit.models import Network, TimmNetwork, load_student
from kdvit.models.cost import forward_flops, parameter_count
from kdvit.models.timm_model import create_timm_model
from kdvit.structures import subclasses


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
    width = max(len("network"), *(len(cost.name) for cost in costs))
    print(f"{'network':<{width}}  parameters  GFLOP  latency (ms)  images/s at {batch_size}")
    for cost in costs:
        print(
            f"{cost.name:<{width}}  {cost.parameters:>10,}  {cost.gflops:>5.3g}  {cost.latency_ms:>12.2f}  "
            f"{cost.images_per_second:>12.0f}"
        )
    if out:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        content = {"machine": {**machine, "torch": torch.__version__}, "batch_size": batch_size}
        Path(out).write_text(json.dumps({**content, "networks": [cost._asdict() for cost in costs]}, indent=1) + "\n")


def find_networks(name: str) -> list[tuple[str, Network]]:
    """Returns the networks behind a name, with random weights where it says nothing of weights.

    Raises:
        UserError: If there is nothing of that name.
    """
    config = Path(find_config(name))
    try:
        if config.suffix in (".yaml", ".yml"):
            return _of_config(config)
        if Path(name).exists():
            return [(name, load_student(name))]
        return [(name, TimmNetwork(create_timm_model(name)))]
    except (ValueError, OSError, TypeError) as error:
        raise UserError(str(error)) from error


def _of_config(file: Path) -> list[tuple[str, Network]]:
    model = yaml.safe_load(file.read_text())["model"]
    classes = subclasses(Network)
    found = []
    for role in ("student", "teacher"):
        if model.get(role):
            name = model[role]["class_path"].rpartition(".")[2]
            if name not in classes:
                raise ValueError(f"{str(file)!r}: {role} {name!r} is none of {', '.join(sorted(classes))}.")
            make: Any = classes[name]
            network: Network = make(**{**model[role].get("init_args", {}), "pretrained": False})
            found.append((f"{file.stem}: {role}", network))
    return found


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
