"""Which numbers of a training batch are not finite, in words and as a file."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from kdvit.data import ImageDataModule
from kdvit.files import write_whole
from kdvit.structures import Batch

SHOWN = 5


class SeenBatch(NamedTuple):
    """A batch and its loss terms; more than one make a step if gradients are accumulated."""

    number: int
    batch: Batch
    terms: dict[str, Tensor]


def bad_terms(trainer: pl.Trainer, pl_module: Any, seen: SeenBatch) -> list[str]:
    """Says which terms of a batch are not finite, and whether images or the teacher's outputs for them are not."""
    values = {name: float(term) for name, term in seen.terms.items()}
    bad = [f"loss term {name!r} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if not bad:
        return []
    for source, output in {"the image": seen.batch.image, **_teacher_outputs(trainer, pl_module, seen.batch)}.items():
        lost = output.flatten(1).isfinite().all(dim=1).logical_not()
        if lost.any():
            return [f"{' and '.join(bad)} as {source} is not finite ({place(trainer, seen, lost)})"]
    return [f"{' and '.join(bad)} ({place(trainer, seen)})"]


def _teacher_outputs(trainer: pl.Trainer, pl_module: Any, batch: Batch) -> dict[str, Tensor]:
    with trainer.precision_plugin.forward_context():
        output = pl_module.teacher_output(batch)
    if output is None:
        return {}
    layers, _ = pl_module.teacher_request()
    whose = "the teacher's" if batch.teacher is None else "the cached teacher's"
    hint = ""
    if str(trainer.precision).startswith("16"):
        hint = " (in float16, which ends at 65504: bf16-mixed and 32-true reach further)"
    named = {f"{whose} layer {layer}{hint}": map for layer, map in zip(layers, output.features, strict=True)}
    return named if output.logits is None else {**named, f"{whose} output of logits{hint}": output.logits}


def bad_gradients(pl_module: Any) -> list[str]:
    """Returns the names of the parameters whose gradient is not finite; all ranks call it together."""
    gradients = ((name, p.grad) for name, p in pl_module.named_parameters())
    return [name for name, gradient in gradients if gradient is not None and not bool(gradient.isfinite().all())]


def described(names: list[str], pl_module: Any) -> str:
    """Says of which parameters the gradient is not finite."""
    if not names:
        return "the norm of the gradient"
    known = sum(p.grad is not None for p in pl_module.parameters())
    return f"the gradient of {'every parameter' if len(names) == known else _listed(names)}"


def place(trainer: pl.Trainer, seen: SeenBatch, among: Tensor | None = None) -> str:
    """Names a batch, and its images or some of them."""
    images = (seen.batch.index if among is None else seen.batch.index[among]).tolist()
    text = f"batch {seen.number}, training images {_listed(images)}"
    paths = _paths(trainer, images[:SHOWN])
    return f"{text}: {', '.join(paths)}" if paths else text


def save(file: Path, trainer: pl.Trainer, step: int, seen: list[SeenBatch], gradients: list[str]) -> None:
    """Writes the batches of a step as plain tensors and types, to be read with `weights_only=True`.

    Raises:
        OSError: If the disk is full, or cannot be written to.
    """
    batches = [
        {
            "batch": each.number,
            "image": each.batch.image.cpu(),
            "target": each.batch.target.cpu(),
            "index": each.batch.index.cpu(),
            "paths": _paths(trainer, each.batch.index.tolist()),
            "teacher": None if each.batch.teacher is None else _plain(each.batch.teacher),
            "terms": {name: float(term) for name, term in each.terms.items()},
        }
        for each in seen
    ]
    content = io.BytesIO()
    torch.save({"step": step, "batches": batches, "gradients": gradients}, content)
    write_whole(file, content.getbuffer())


def _plain(output: Any) -> dict[str, Any]:
    logits = None if output.logits is None else output.logits.cpu()
    return {"logits": logits, "features": [feature.cpu() for feature in output.features]}


def _paths(trainer: pl.Trainer, images: list[int]) -> list[str]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    return [data.path(image, "train") for image in images] if isinstance(data, ImageDataModule) else []


def _listed(values: list[Any]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return f"{', '.join(map(str, values[:SHOWN]))}{more}"
