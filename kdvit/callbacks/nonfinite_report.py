"""Which numbers of a training batch are not finite, in words and as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from kdvit.data import ImageDataModule
from kdvit.errors import some
from kdvit.runtime.checkpoints import WholeCheckpointIO
from kdvit.structures import Batch


class SeenBatch(NamedTuple):
    """A batch and its loss terms; more than one make a step if gradients are accumulated."""

    number: int
    batch: Batch
    terms: dict[str, Tensor]


def bad_terms(trainer: pl.Trainer, pl_module: Any, seen: SeenBatch) -> list[str]:
    """Says which terms of a batch are not finite, and whether its images or the teacher's outputs are not."""
    bad = [f"loss term {name!r} is {float(term)}" for name, term in seen.terms.items() if not term.isfinite()]
    if not bad:
        return []
    for source, values in _sources(trainer, pl_module, seen.batch).items():
        lost = ~values.flatten(1).isfinite().all(dim=1)
        if lost.any():
            return [f"{' and '.join(bad)} as {source} is not finite ({place(trainer, seen, lost)})"]
    return [f"{' and '.join(bad)} ({place(trainer, seen)})"]


def _sources(trainer: pl.Trainer, pl_module: Any, batch: Batch) -> dict[str, Tensor]:
    with trainer.precision_plugin.forward_context():
        outputs = pl_module.distillers.ask(pl_module.teachers, batch)
    named = {"the image": batch.image}
    for name, (logits, features) in outputs.items():
        whose = f"the {'' if batch.teacher is None else 'cached '}{pl_module.teachers[name].label}'s"
        layers = [f"{whose} layer {each.layer}" for each in pl_module.distillers.requests[name].maps]
        named |= dict(zip(layers, features, strict=True))
        named |= {} if logits is None else {f"{whose} output of logits": logits}
    return named


def bad_gradients(pl_module: Any) -> list[str]:
    """Returns the names of the parameters whose gradient is not finite; all ranks call it together."""
    gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
    return [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]


def place(trainer: pl.Trainer, seen: SeenBatch, among: Tensor | None = None) -> str:
    """Names a batch, and its images or some of them."""
    images = (seen.batch.index if among is None else seen.batch.index[among]).tolist()
    data = trainer.datamodule  # type: ignore[attr-defined]
    paths = [data.path(image, "train") for image in images[:4]] if isinstance(data, ImageDataModule) else []
    return f"batch {seen.number}, training images {some(map(str, images))}{': ' * bool(paths)}{', '.join(paths)}"


def save(file: Path, step: int, seen: list[SeenBatch], gradients: list[str]) -> None:
    """Writes the batches of a step as plain tensors and types, to be read with `weights_only=True`.

    Raises:
        OSError: If the disk is full, or cannot be written to.
    """
    batches = []
    for number, batch, terms in seen:
        teacher = None if batch.teacher is None else batch.teacher._asdict()
        batches.append({"batch": number, **batch._asdict(), "teacher": teacher, "terms": terms})
    content = {"step": step, "batches": batches, "gradients": gradients}
    WholeCheckpointIO().save_checkpoint(move_data_to_device(content, "cpu"), file)
