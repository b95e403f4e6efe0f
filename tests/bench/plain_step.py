"""kdvit's step without a Trainer: forward, losses, backward, optimizer, under bfloat16 autocast; on CPU or GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kdvit import DistillationModule
from kdvit.distillers import Distiller, FeatureDistiller, LiftDistiller, LogitDistiller, WideLastDistiller
from kdvit.models import LiftViT, Network, TimmStudent, TimmTeacher, WideLastViT, avoid_slow_attention
from kdvit.structures import Batch, ImageFormat, ViTOutput
from kdvit.training.optim import OptimizerOptions, parameter_groups
from kdvit.training.schedule import ScheduleOptions
from tests.bench.device import CPU, timed


class Pair(NamedTuple):
    """Networks to measure: arguments of student and teacher, and the teacher's width."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    width: int


PUBLISHED = Pair({"arch": "deit_tiny_patch16_224"}, {"arch": "cait_s24_224"}, 384)


def student_of(method: str, pair: Pair = PUBLISHED) -> tuple[Network, Distiller]:
    """Returns the student of a method, and the distiller of its map."""
    if method == "Lift":
        return LiftViT(**pair.student, width=pair.width), LiftDistiller(0.2)
    if method == "WideLast":
        return WideLastViT(**pair.student, width=pair.width), WideLastDistiller(0.2)
    return TimmStudent(**pair.student), FeatureDistiller(0.2, projector="phi_s")


def image_format(size: int) -> ImageFormat:
    """Returns ImageNet's normalisation at a size."""
    return ImageFormat((size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Unlogged(DistillationModule):
    """A module outside a Trainer, where no step is logged."""

    def _is_logged_step(self) -> bool:
        return False


def build(
    method: str,
    with_teacher: bool = True,
    size: int = 224,
    pair: Pair = PUBLISHED,
    on: torch.device = CPU,
    kind: type[DistillationModule] = Unlogged,
) -> DistillationModule:
    """Returns a pair with random weights: soft KD and the method's map; or the student on labels."""
    torch.manual_seed(0)
    student, distiller = student_of(method, pair._replace(student={**pair.student, "img_size": size}))
    avoid_slow_attention(student, on, torch.bfloat16)
    teacher = TimmTeacher(**{"pretrained": False, "img_size": size, **pair.teacher}) if with_teacher else None
    distillers = {"logit": LogitDistiller(0.9), "map": distiller} if with_teacher else None
    options: dict[str, Any] = {
        "label_smoothing": 0.1,
        "image_format": image_format(size),
        "optimizer": OptimizerOptions(lr_base_batch=None),
        "schedule": ScheduleOptions(warmup_epochs=0),
    }
    return kind(student, teacher, distillers, **options).train().to(on)


def images(count: int, size: int = 224) -> Batch:
    """Returns a batch of noise."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    return Batch(pixels, torch.arange(count) % 1000, torch.arange(count))


def step(
    module: DistillationModule,
    batch: Batch,
    stored: Callable[[], ViTOutput] | None = None,
    share: Callable[[], None] = lambda: None,
) -> Callable[[], float]:
    """Returns a function that takes one step and returns its seconds.

    Args:
        module: Of `build`.
        batch: The images.
        stored: Reads the teacher's outputs, within the time of the step; None lets the teacher run.
        share: Averages the gradients over processes.
    """
    optimizer = module.optimizer_options.build(parameter_groups([module], 0.05), 1, fused=True)

    def run() -> None:
        given = batch if stored is None else batch._replace(teacher=stored())
        with torch.autocast(batch.image.device.type, torch.bfloat16):
            loss = module.training_step(given, 0)
        optimizer.zero_grad()
        loss.backward()
        share()
        optimizer.step()

    return timed(run, batch.image.device)
