"""Networks without a head: what of a student is then trained, and what cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kdvit.errors import some
from kdvit.models import Network
from kdvit.structures import Layer, OutputShapes


def leave_unreached(student: Network, layers: Sequence[Layer], logits: bool) -> list[str]:
    """Freezes the parameters of a student that no objective reaches, such as a norm behind the last distilled layer.

    They would stay as they are in any case; but several processes wait for the gradient of each that is not frozen.

    Args:
        student: The student.
        layers: Its layers that objectives read.
        logits: Whether they read its logits.

    Returns:
        What is left, in a sentence; nothing where all are reached.
    """
    with student.evaluating(), torch.enable_grad():
        output = student(student.blank_image(), layers, logits)
        read = [each.sum() for each in (*output.features, output.logits) if each is not None]
        named = {name: each for name, each in student.named_parameters() if each.requires_grad}
        found = torch.autograd.grad(sum(read), list(named.values()), allow_unused=True) if read and named else ()
    idle = [name for name, gradient in zip(named, found, strict=False) if gradient is None]
    for name in idle:
        named[name].requires_grad_(False)
    return [f"No objective reaches {some(idle)} of the student: they stay as they are."] if idle else []


def require_logits(pair: Mapping[str, OutputShapes]) -> None:
    """Raises ValueError if student or teacher of an objective that reads logits has no head."""
    for side, shapes in pair.items():
        if shapes.classes is None:
            raise ValueError(
                f"it reads logits, and the {side} has no head (num_classes: 0). Distil features (FeatureDistiller, "
                "LiftDistiller, WideLastDistiller, RKDDistiller), or give a network with a head. (An objective of your "
                "own that reads none says so by needs_teacher_logits = False.)"
            )
