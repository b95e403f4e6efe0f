"""The contract of a distiller as one call, for kdvit's own tests and those of other projects."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kdvit.distillers import Distiller
from kdvit.structures import OutputShapes, SharedBasis, ViTOutput


def check_distiller(
    distiller: Distiller,
    student: tuple[tuple[int, int, int], ...] | None = None,
    teacher: tuple[tuple[int, int, int], ...] | None = None,
    classes: int = 10,
) -> None:
    """Builds a distiller on random outputs and checks every promise that `DistillationModule` relies on.

    A float32 scalar, finite and repeatable; unweighted; a gradient for the student and its own parameters and none for
    the teacher; no parameter made after `build`; inputs left as they were; target probabilities accepted as well as
    indices; a state dict that goes round.

    Args:
        distiller: A fresh distiller, not built yet.
        student: ``(C, H, W)`` of each of its `student_layers`; by default ``(12, 4, 4)`` each.
        teacher: ``(C, H, W)`` of each of its `teacher_layers`; by default ``(12, 4, 4)`` each.
        classes: Number of classes K.

    Raises:
        AssertionError: If a promise is broken; the message says which.

    Example:
        >>> from kdvit.distillers import LogitDistiller
        >>> check_distiller(LogitDistiller(weight=0.9))
    """
    ours = OutputShapes(classes, student or ((12, 4, 4),) * len(distiller.student_layers))
    theirs = OutputShapes(
        classes if distiller.needs_teacher_logits else None, teacher or ((12, 4, 4),) * len(distiller.teacher_layers)
    )
    distiller.build(ours, theirs)
    _calibrate(distiller, theirs)
    parameters = list(distiller.parameters())
    generator = torch.Generator().manual_seed(0)
    inputs = _random_output(ours, generator, grad=True), _random_output(theirs, generator, grad=False)
    target = torch.arange(4) % classes
    before = copy.deepcopy([_tensors(output) for output in inputs])

    loss = distiller(*inputs, target)
    _promise(isinstance(loss, Tensor) and loss.ndim == 0, "forward must return a scalar tensor")
    _promise(loss.dtype == torch.float32, f"the loss must be float32, it is {loss.dtype}")
    _promise(bool(torch.isfinite(loss)), f"the loss must be finite, it is {loss}")
    _promise(torch.equal(loss, distiller(*inputs, target)), "the same inputs must give the same loss")
    _promise(len(list(distiller.parameters())) == len(parameters), "parameters must be made in build, not in forward")
    for output, old in zip(inputs, before, strict=True):
        same = all(torch.equal(a, b) for a, b in zip(_tensors(output), old, strict=True))
        _promise(same, "forward must not edit its inputs in place")

    loss.backward()
    reached = any(x.grad is not None and bool(x.grad.any()) for x in _tensors(inputs[0]))
    _promise(reached, "the student must receive a gradient")
    for name, parameter in distiller.named_parameters():
        _promise(parameter.grad is not None, f"the parameter {name} must receive a gradient")

    _check_weight(distiller, inputs, target, loss)
    probabilities = torch.nn.functional.one_hot(target, classes).float()
    _promise(distiller(*inputs, probabilities).ndim == 0, "targets may be probabilities [B, K] (Mixup)")
    for name, value in distiller.metrics(*inputs).items():
        _promise(value.ndim == 0, f"the metric {name} must be a scalar")
    distiller.load_state_dict(distiller.state_dict())


def _calibrate(distiller: Distiller, teacher: OutputShapes) -> None:
    """Gives a distiller random axes of the teacher, if it wants any, as a run does before its first step."""
    if distiller.is_calibrated():
        return
    generator = torch.Generator().manual_seed(0)
    bases = []
    for width, _, _ in teacher.features:
        axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        bases.append(SharedBasis(torch.linspace(2, 0.1, width).double(), axes, torch.ones(width).double()))
    distiller.calibrate(bases)
    _promise(distiller.is_calibrated(), "calibrate must be remembered by is_calibrated, so that a run calls it once")


def _check_weight(distiller: Distiller, inputs: tuple[ViTOutput, ViTOutput], target: Tensor, loss: Tensor) -> None:
    weight, distiller.weight = distiller.weight, 1000.0
    _promise(
        torch.equal(loss, distiller(*inputs, target)),
        "forward must not apply the weight: DistillationModule does, once",
    )
    distiller.weight = weight


def _promise(kept: bool, message: str) -> None:
    if not kept:
        raise AssertionError(message)


def _random_output(shapes: OutputShapes, generator: torch.Generator, grad: bool) -> ViTOutput:
    def draw(*shape: int) -> Tensor:
        return torch.randn(4, *shape, generator=generator).requires_grad_(grad)

    logits = None if shapes.classes is None else draw(shapes.classes)
    return ViTOutput(logits, tuple(draw(*shape) for shape in shapes.features))


def _tensors(output: ViTOutput) -> list[Tensor]:
    return [*([] if output.logits is None else [output.logits]), *output.features]
