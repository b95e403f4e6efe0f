"""Decoupled knowledge distillation (DKD, arXiv:2203.08679)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.distillers.logit import LogitObjective
from kdvit.distillers.weights import Weight
from kdvit.structures import OutputShapes, ViTOutput, at_least_float32


def dkd(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """Soft KD in two parts that are weighted apart (equations 4 to 7).

    ``temperature^2 * (alpha * TCKD + beta * NCKD)``, averaged over the batch: TCKD is the divergence of the two numbers
    "target class or not", NCKD that of the probabilities among the other classes alone.

    Args:
        student: Logits ``[B, K]``.
        teacher: Logits ``[B, K]``.
        target: Class indices ``[B]``.
        alpha: Weight of the target class.
        beta: Weight of the other classes.
        temperature: Divides both logits.
    """
    of_target = F.one_hot(target, student.shape[1]).bool()
    binary, others = [], []
    for logits in map(at_least_float32, (student, teacher)):
        log_probability = F.log_softmax(logits / temperature, dim=1)
        not_target = log_probability.masked_fill(of_target, -torch.inf).logsumexp(dim=1)
        binary.append(torch.stack([log_probability[of_target], not_target], dim=1))
        others.append(log_probability[~of_target].view(len(logits), -1).log_softmax(dim=1))
    target_part, other_part = (
        F.kl_div(ours, theirs, reduction="batchmean", log_target=True) for ours, theirs in (binary, others)
    )
    return temperature**2 * (alpha * target_part + beta * other_part)


class DKDDistiller(LogitObjective):
    """DKD: target class and other classes are distilled apart. Of soft targets, the largest class counts.

    Args:
        weight: Factor of this term in the total loss.
        alpha: Weight of the target class.
        beta: Weight of the other classes; 8 for CIFAR-100 in the paper, 0.5 for ImageNet.
        temperature: Softens both distributions; 4 for CIFAR-100 in the paper, 1 for ImageNet.
        kwargs: Those of LogitObjective. All classes of the student must be among `classes`, as the target is one.

    Raises:
        ValueError: If a number is out of range; at `build`, if student and teacher have different classes, or a class
            of the student is not among `classes`.
    """

    needs_labels: ClassVar[bool] = True

    def __init__(
        self,
        weight: Weight = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(weight, temperature, **kwargs)
        if alpha < 0 or beta < 0:
            raise ValueError(f"DKDDistiller: alpha and beta must be 0 or more, got {alpha} and {beta}.")
        self.alpha, self.beta = alpha, beta

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Finds the classes; the target may be any of the student's."""
        super().build(student, teacher)
        if self.classes is not None and len(self.student_classes) != student.classes:
            raise ValueError(
                f"DKDDistiller: classes has {len(self.student_classes)} of the student's {student.classes} classes, "
                "and an image's own must be one of them. Name a class of the teacher for each, or use LogitDistiller."
            )

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns `dkd` of the logits."""
        classes = target if target.ndim == 1 else target.argmax(dim=1)
        return dkd(*self.logits(student, teacher), classes, self.alpha, self.beta, self.temperature)
