"""kdvit's step without a Trainer: forward, losses, backward, optimizer, under bfloat16 autocast."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from kdvit import DistillationModule
from kdvit.distillers import Distiller, FeatureDistiller, LiftDistiller, LogitDistiller, WideLastDistiller
from kdvit.models import LiftViT, Network, TimmStudent, TimmTeacher, WideLastViT, avoid_slow_attention
from kdvit.structures import Batch, ImageFormat, ViTOutput
from kdvit.training.optim import OptimizerOptions, parameter_groups

STUDENT, TEACHER = "deit_tiny_patch16_224", "cait_s24_224"
PAIRS: dict[str, tuple[Callable[..., Network], Callable[[float], Distiller]]] = {
    "Lift": (partial(LiftViT, width=384), LiftDistiller),
    "WideLast": (partial(WideLastViT, width=384), WideLastDistiller),
    "phi_s": (TimmStudent, partial(FeatureDistiller, projector="phi_s")),
}


def image_format(size: int) -> ImageFormat:
    """Returns ImageNet's normalisation at a size."""
    return ImageFormat((size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Unlogged(DistillationModule):
    """A module outside a Trainer, where no step is logged."""

    def _is_logged_step(self) -> bool:
        return False


def build(method: str, with_teacher: bool = True, size: int = 224, depth: int = 24) -> Unlogged:
    """Returns the published pair with random weights: soft KD and the method's map; or the student on labels."""
    torch.manual_seed(0)
    network, objective = PAIRS[method]
    student = network(STUDENT, img_size=size)
    avoid_slow_attention(student, torch.device("cpu"), torch.bfloat16)
    teacher = (
        TimmTeacher(TEACHER, pretrained=False, img_size=size, model_args={"depth": depth}) if with_teacher else None
    )
    distillers = {"logit": LogitDistiller(0.9), "map": objective(0.2)} if with_teacher else None
    module = Unlogged(student, teacher, distillers, label_smoothing=0.1, image_format=image_format(size))
    return module.train()


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
    optimizer = OptimizerOptions(lr_base_batch=None).build(parameter_groups([module], 0.05), 1, fused=True)

    def run() -> float:
        start = time.perf_counter()
        given = batch if stored is None else batch._replace(teacher=stored())
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_step(given, 0)
        optimizer.zero_grad()
        loss.backward()
        share()
        optimizer.step()
        return time.perf_counter() - start

    return run
