"""What is logged of a training step and of a validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from kdvit.structures import Batch, ViTOutput
from kdvit.training.calibration import calibrate


@torch.no_grad()
def log_step(module: Any, target: Tensor, student: ViTOutput, teachers: Mapping[str, ViTOutput], loss: Tensor) -> None:
    """Notes for the log the loss of a batch, its terms raw and weighted, what distillers measure, and the accuracy.

    Args:
        module: The `DistillationModule`.
        target: Class indices ``[B]``, or probabilities ``[B, K]``.
        student: Its output.
        teachers: Those of the teachers, by name.
        loss: The weighted sum.
    """
    values = {"loss": loss}
    if module.supervised:
        classes = target if target.ndim == 1 else target.argmax(dim=1)
        values["acc1"] = (student.logits.argmax(dim=1) == classes).float().mean()  # type: ignore[union-attr]
    weighted = {f"{name}_weighted": weight * module.last_terms[name] for name, weight in module.weights().items()}
    measured = module.distillers.metrics(student, teachers)
    module.step_means.add({**values, **module.last_terms, **weighted, **measured})


def log_means(module: Any, more: Mapping[str, Any]) -> None:
    """Logs what `log_step` has noted of a step, as means over its batches and all ranks, and more beside it.

    As tensors of the host: Lightning reads what stands in the progress bar in every step that follows.
    """
    for name, value in {**module.step_means.take(module.trainer.world_size), **more}.items():
        module.log(f"train/{name}", torch.as_tensor(value), prog_bar=name in ("loss", "acc1"))


@torch.no_grad()
def log_objectives(
    module: Any, network: nn.Module, batch: Batch, teachers: Mapping[str, ViTOutput] | None = None, suffix: str = ""
) -> Mapping[str, ViTOutput]:
    """Logs the objectives of a student on a held-out batch: `val/loss`, each unweighted term, what distillers measure.

    All are means over batches, weighted by their images, over all ranks; the loss has the weights of the epoch.

    Args:
        module: The `DistillationModule`.
        network: Its student, or an average of that.
        batch: The batch.
        teachers: The outputs of the teachers for it, by name, if they are known.
        suffix: Of the names in the log.

    Returns:
        The outputs of the teachers.
    """
    objectives = module.distillers
    if module.trainer.sanity_checking:  # before the start of the training, which does it otherwise
        calibrate(objectives, module.teachers, module.trainer)
    teachers = teachers or objectives.ask(module.teachers, batch)
    own = next(network.parameters())  # an average has a precision of its own
    student = network(batch.image.to(own.device, own.dtype), objectives.student_layers).at_least_float32()
    with torch.autocast(module.device.type, enabled=False):
        terms = objectives.terms(student, teachers, batch.target)
        loss = torch.stack([weight * terms[name] for name, weight in module.weights().items()]).sum()
        values = {**terms, **objectives.metrics(student, teachers)}
    stage = _stage(module)
    images = {"batch_size": len(batch.image), "sync_dist": True}
    module.log(f"{stage}/loss{suffix}", loss, prog_bar=stage == "val", **images)
    module.log_dict({f"{stage}/{name}{suffix}": value for name, value in values.items()}, **images)
    return teachers


def log_scores(module: Any, scores: MetricCollection, suffix: str = "") -> None:
    """Logs scores of the module's validation or test over all ranks, and resets them."""
    stage = _stage(module)
    named = {f"{stage}/{name}{suffix}": value for name, value in scores.compute().items()}
    module.log_dict(named, prog_bar=stage == "val" and not suffix, sync_dist=True)
    scores.reset()


def _stage(module: Any) -> str:
    return "test" if module.trainer.testing else "val"
