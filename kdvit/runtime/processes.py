"""The processes of a run: as many as the run is for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only

from kdvit.errors import UserError

T = TypeVar("T")
SHELLS = ("bash", "interactive")  # Lightning takes a Slurm job of such a name for a shell, and does not see Slurm


def is_first_process() -> bool:
    """Tells whether this is the first process of a run, by its environment and before Lightning has joined them."""
    node = "0" if {"RANK", "SLURM_PROCID"} & {*os.environ} else os.environ.get("NODE_RANK", "0")
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


def end_launched(trainer: pl.Trainer | None, seconds: float = 0) -> None:
    """Ends the processes that this one has launched: asks them to stop, and gives them time; kills what then lives."""
    processes = getattr(getattr(getattr(trainer, "strategy", None), "launcher", None), "procs", ())
    for each in processes if seconds else ():
        each.terminate()
    for each in processes:
        with suppress(subprocess.TimeoutExpired):
            each.wait(seconds)
        each.kill()


def require_whole_networks(trainer: pl.Trainer) -> None:
    """Raises UserError under a strategy that splits networks, such as FSDP: a measurement would see a part of one."""
    if not isinstance(trainer.strategy, (DDPStrategy, SingleDeviceStrategy)):
        raise UserError(
            f"trainer.strategy {type(trainer.strategy).__name__} splits networks over the processes, and this command "
            "needs them whole in each. Set --trainer.strategy ddp, or, to train and evaluate a student that is split "
            "(FSDP2), sharded."
        )


def require_all_processes(trainer: pl.Trainer) -> None:
    """Raises UserError if torchrun or Slurm has started more or fewer processes than the Trainer is for.

    Each would train alone and write the same files, or all would wait for one that never comes.
    """
    devices, nodes = trainer.num_devices, trainer.num_nodes
    require_all_tasks(devices * nodes)
    if TorchElasticEnvironment.detect() and TorchElasticEnvironment().world_size() != devices * nodes:
        raise UserError(
            f"torchrun has started {TorchElasticEnvironment().world_size()} process(es) of this run, and "
            f"trainer.devices x trainer.num_nodes is {devices} x {nodes}. Start one process for each device, and set "
            "--trainer.devices to those of one machine and --trainer.num_nodes to the machines."
        )


def planned_processes(devices: int | str | Sequence[int | str] | None, num_nodes: int) -> int | None:
    """Returns how many processes a Trainer's `devices` and `num_nodes` make; None where the machine of the run decides.

    Examples:
        >>> [planned_processes(devices, num_nodes=2) for devices in (4, "4", "0,3", [0, 1, 3], "auto", -1, None)]
        [8, 8, 4, 6, None, None, None]
    """
    if isinstance(devices, str) and "," in devices:
        devices = [each for each in devices.split(",") if each.strip()]
    if devices is not None and not isinstance(devices, (int, str)):
        return len(devices) * num_nodes
    return int(str(devices)) * num_nodes or None if str(devices).strip().isdecimal() else None


def require_all_tasks(planned: int | None) -> None:
    """Raises UserError if Slurm has not started just the processes that a run will be made of.

    Else each would train by itself in the same run directory, or one would wait for the others for ever.

    Args:
        planned: Devices times nodes; None where the machine decides.
    """
    if "SLURM_NTASKS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # without srun there is no step
    name = os.environ.get("SLURM_JOB_NAME")
    if name in SHELLS:
        if started > 1:
            raise UserError(
                f"srun has started {started} processes, but Lightning takes a job named {name!r} for a shell, and each "
                "would train by itself. Give another name: `srun --job-name=kdvit ...`."
            )
    elif planned not in (None, started):
        raise UserError(
            f"Slurm has started {started} of the {planned} processes of this run (trainer.devices x "
            "trainer.num_nodes): start it with srun, `srun --nodes=NUM_NODES --ntasks-per-node=DEVICES ...`, or with "
            "`kdvit slurm`."
        )


def gather(trainer: pl.Trainer, ours: T) -> list[T]:
    """Gathers a value from every rank, in their order; all call it together."""
    if trainer.world_size == 1:
        return [ours]
    every: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(every, ours)
    return every


class SameCheckpoint(pl.Callback):
    """Refuses a run whose ranks have found different checkpoints to go on from, as where one sees the files late.

    Args:
        path: What this rank has found; None to start anew.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compares, before anything is read or written."""
        first = trainer.strategy.broadcast(self.path)
        if not trainer.strategy.reduce_boolean_decision(first == self.path, all=True):
            here = f"rank {trainer.global_rank} finds {self.path or 'none'}, rank 0 {first or 'none'}"
            raise UserError(
                f"The processes do not go on from the same checkpoint: {here}. Let all machines see the same files in "
                f"{trainer.default_root_dir!r}, and give the command again."
            )
