"""What a run is planned to be, in numbers, and what of it cannot be."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from shutil import disk_usage
from typing import Any

from kdvit.data.sampling import ViewSampler
from kdvit.errors import UserError
from kdvit.files import existing
from kdvit.models.cost import parameter_count
from kdvit.runtime.checkpoints import StepCheckpoint, require_between_steps
from kdvit.runtime.processes import planned_processes
from kdvit.tables import as_size
from kdvit.training.module import DistillationModule
from kdvit.training.schedule import limited, planned_length

Rows = list[tuple[str, str]]


def describe_plan(
    module: DistillationModule, loader: Any, trainer: Any, saved: Sequence[StepCheckpoint]
) -> tuple[Rows, list[str]]:
    """Describes batches, steps, learning rate and checkpoints of a run.

    Args:
        module: The module to train.
        loader: Of its training images.
        trainer: The Trainer's options.
        saved: What writes checkpoints.

    Returns:
        A row a fact, and what can be, and will hardly be meant: a long warm-up, too large a batch, too small a disk.

    Raises:
        UserError: If an epoch has no batch, a validation would never be due or come amid a step, or the run directory
            cannot be written.
    """
    options, batches = module.optimizer_options, trainer.accumulate_grad_batches
    processes = planned_processes(trainer.devices, trainer.num_nodes)
    size = loader.batch_size * (processes or 1)
    global_batch = size * batches
    scaled = f"{options.lr:g} x {global_batch} / {options.lr_base_batch}"
    known = "an unknown number of processes, counted as 1" if processes is None else f"{processes} processes"
    rate, (epoch, images) = options.scaled_lr(global_batch), _epoch(loader, processes or 1, trainer)
    checkpoints, warnings = _checkpoints(module, epoch, trainer, saved)
    rows = [
        ("global batch", f"{global_batch} = {loader.batch_size} images x {known} x {batches} accumulated batches"),
        *([] if epoch is None else [("images an epoch", f"{images:,}")]),
        *_length(module, epoch, trainer, rate),
        (
            "optimizer",
            f"{options.name}, learning rate {rate:.3g} ({'unscaled' if options.lr_base_batch is None else scaled}), "
            f"weight decay {options.weight_decay:g}",
        ),
        ("checkpoints", checkpoints),
    ]
    if epoch is None:
        return rows, warnings
    if images < global_batch:
        warnings.append(
            f"a global batch of {global_batch} is more than the {images:,} images of an epoch: lower the batch_size."
        )
    length = planned_length(trainer.max_epochs or -1, trainer.max_steps, -(-epoch // batches))
    fault = module.schedule_options.fault(length)
    return rows, [*warnings, *([fault] if fault else [])]


def _epoch(loader: Any, processes: int, trainer: Any) -> tuple[int | None, int]:
    """Returns the batches of an epoch and process, and its images; None for a stream, whose length nobody knows."""
    sampler, batch = loader.sampler, loader.batch_size
    try:
        images = sampler.size if isinstance(sampler, ViewSampler) else len(sampler)
    except TypeError:
        return None, 0
    share = math.ceil(images / processes)
    if isinstance(sampler, ViewSampler):
        share = sampler.share(processes, batch * trainer.accumulate_grad_batches)
    whole, limit = share // batch if loader.drop_last else math.ceil(share / batch), trainer.limit_train_batches
    batches = limited(whole, limit)
    if batches == 0:
        raise UserError(f"trainer.limit_train_batches {limit} leaves none of the {whole} batches of an epoch.")
    every = trainer.val_check_interval
    if isinstance(every, int) and every > batches and trainer.check_val_every_n_epoch is not None:
        raise UserError(
            f"trainer.val_check_interval is {every}, and an epoch has {batches} batches: no validation would be held. "
            "Lower it, or set trainer.check_val_every_n_epoch: null to count over epochs."
        )
    if isinstance(every, int | float) and trainer.limit_val_batches != 0:
        apart = every if isinstance(every, int) else max(int(batches * every), 1)
        over_epochs = trainer.check_val_every_n_epoch is None
        require_between_steps(apart, batches, trainer.accumulate_grad_batches, over_epochs)
    if (trainer.check_val_every_n_epoch or 1) > (trainer.max_epochs or -1) > 0:
        raise UserError(
            f"trainer.check_val_every_n_epoch is {trainer.check_val_every_n_epoch}, and the run has "
            f"{trainer.max_epochs} epochs: no validation would be held, and there would be no best.ckpt. Lower it."
        )
    return batches, min(images, processes * min(batches * batch, share))


def _length(module: DistillationModule, epoch: int | None, trainer: Any, rate: float) -> Rows:
    if epoch is None:
        return [("steps an epoch", "unknown: the training images are a stream")]
    an_epoch = -(-epoch // trainer.accumulate_grad_batches)
    epochs, limit = trainer.max_epochs or -1, trainer.max_steps
    length = planned_length(epochs, limit, an_epoch)
    steps = length.epochs * an_epoch if limit < 1 else min(limit, length.epochs * an_epoch)
    schedule = module.schedule_options
    rates = schedule.rates(rate, length)
    highest = rates.index(max(rates))
    text = (
        f"{schedule.name} by {schedule.interval}: {rates[0]:.3g} at first, {rates[highest]:.3g} at {schedule.interval} "
    )
    text += f"{highest}, {rates[-1]:.3g} at last"
    warmup = schedule.warmup(length)
    warm_steps = min(steps, warmup * (an_epoch if schedule.interval == "epoch" else 1))
    text += f"; warm-up of {warmup} {schedule.interval}s, {warm_steps:,} steps"
    return [
        ("steps an epoch", f"{an_epoch}"),
        ("run", f"{length.epochs} epochs, {steps:,} steps"),
        ("learning rate", text),
    ]


def _checkpoints(
    module: DistillationModule, epoch: int | None, trainer: Any, saved: Sequence[StepCheckpoint]
) -> tuple[str, list[str]]:
    """Tells the checkpoints to come and the disk that they need, and warns where it has too little room."""
    root = Path(trainer.default_root_dir)
    there = existing(root)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"trainer.default_root_dir: {str(root)!r} cannot be made or written to.")
    trained = parameter_count(module.student) + parameter_count(module.distillers)
    a_file = 3 * 4 * trained  # bytes: the weights, and two moments of Adam's
    an_epoch = -(-(epoch or 1) // trainer.accumulate_grad_batches)
    length = planned_length(trainer.max_epochs or -1, trainer.max_steps, an_epoch)
    files = sum(each.files(length.epochs, length.epochs * an_epoch) for each in saved)
    needed, free = (files + 1) * a_file, disk_usage(there).free
    told = (
        f"{files} in {root / 'checkpoints'}, about {as_size(a_file)} each; with one that is being written "
        f"{as_size(needed)}"
    )
    short = (
        f"the checkpoints need {as_size(needed)}, and {there} has {as_size(free)} free: lower checkpoint.save_top_k."
    )
    return told, [short] if needed > free else []


def free_disk(root: Path) -> str:
    """Tells how much is free where a run is written."""
    return f"{as_size(disk_usage(existing(root)).free)} where the run is written"
