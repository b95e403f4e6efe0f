"""A plan beside the machine that it is checked on: cores, memory, GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdvit.models import Network
from kdvit.models.cost import ForwardCost, forward_cost, parameter_count
from kdvit.runtime.processes import planned_processes
from kdvit.tables import as_size
from kdvit.training.module import DistillationModule

PROGRAM = 0.9e9
"""Bytes of a process before it has a network: Python, torch, Lightning."""
WORKER = 0.1e9
"""Bytes of a loader worker of its own; the rest it shares with its process."""
PREFETCHED = 2
"""Batches that a worker has ready."""


def cores() -> int:
    """Returns the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int | None:
    """Returns the bytes of memory of this machine or its container; None where that is not told."""
    try:
        kilobytes = Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]
    except (OSError, IndexError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    limited = limit.read_text().strip() if limit.is_file() else ""
    return min([1024 * int(kilobytes), *([int(limited)] if limited.isdecimal() else [])])


def network_costs(module: DistillationModule) -> dict[Network, ForwardCost]:
    """Measures what an image costs the student and each teacher."""
    return {each: forward_cost(each) for each in (module.student, *(each.network for each in module.teachers.values()))}


def process_bytes(
    module: DistillationModule, costs: Mapping[Network, ForwardCost], batch_size: int, workers: int
) -> tuple[float, float]:
    """Estimates the memory of one training process in float32, to about a third.

    Networks: 16 bytes a trained parameter (weight, gradient, two moments of Adam's), 4 a frozen one. Activations: what
    autograd keeps of an image's forward pass, times the batch; of a teacher, which keeps nothing, twice those of one
    of its layers. Batches: the one in use, and two that each worker has ready.

    Returns:
        Bytes of networks and activations, which are the GPU's where there is one, and bytes of the rest.
    """
    trained = parameter_count(module.student) + parameter_count(module.distillers)
    frozen = [each.network for each in module.teachers.values()]
    image = 4 * 3 * module.image_format.size[0] * module.image_format.size[1]
    of_teachers = max((2 * costs[each].kept_bytes / max(each.depth, 1) for each in frozen), default=0)
    networks = 16 * trained + 4 * sum(map(parameter_count, frozen))
    activations = batch_size * (costs[module.student].kept_bytes + of_teachers + image)
    return networks + activations, PROGRAM + workers * (WORKER + PREFETCHED * batch_size * image)


def beside_machine(
    module: DistillationModule, costs: Mapping[Network, ForwardCost], batch_size: int, workers: int, trainer: Any
) -> tuple[str, list[str]]:
    """Compares a plan with this machine.

    Args:
        module: What will train.
        costs: Of its networks.
        batch_size: Images a process and step.
        workers: Of each process.
        trainer: Options of the Trainer that will train.

    Returns:
        What the plan takes of what there is, and warnings.
    """
    gpus = torch.cuda.device_count()
    on_gpus = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and gpus > 0)
    processes = planned_processes(trainer.devices, 1) or (max(gpus, 1) if on_gpus else 1)
    ours, rest = process_bytes(module, costs, batch_size, workers)
    if "16" in str(trainer.precision):
        ours *= 0.6  # activations of half the size, weights as before
    needed = processes * (rest if on_gpus else ours + rest)
    there, running = memory(), processes * (1 + workers)
    told = f"training processes: {processes}, processes that load images: {processes * workers}, on {cores()} cores"
    told += f"; about {as_size(needed)}{f' of {as_size(there)}' if there else ''}"
    told += f", and {as_size(ours)} on each GPU" if on_gpus else f", {as_size(needed / processes)} a process"
    warnings = []
    if on_gpus and gpus < processes:
        warnings.append(f"{processes} GPUs are planned, and this machine has {gpus}: set --trainer.devices.")
    if running > 2 * cores():
        warnings.append(
            f"{running} processes would share {cores()} cores: lower --trainer.devices, --data.init_args.num_workers."
        )
    if there and needed > 0.9 * there:
        warnings.append(
            f"it would take about {as_size(needed)}, and this machine has {as_size(there)}: lower --trainer.devices, "
            "--data.init_args.batch_size or --data.init_args.num_workers."
        )
    if on_gpus and gpus > 0 and ours > (card := torch.cuda.get_device_properties(0).total_memory):
        warnings.append(f"a process would take about {as_size(ours)} of a GPU's {as_size(card)}: lower the batch_size.")
    return told, warnings
