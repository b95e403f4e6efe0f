"""Logit distillation, soft (Hinton et al., arXiv:1503.02531) and hard (DeiT, arXiv:2012.12877)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdvit.distillers.base import Distiller
from kdvit.structures import OutputShapes, ViTOutput


def soft_kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of softened class probabilities, times the squared temperature.

    The sum over classes is averaged over the *batch*. (Averaged over all elements, as some public code does, the loss
    is K times too weak.)

    Args:
        student: Logits ``[B, K]``.
        teacher: Logits ``[B, K]``.
        temperature: Divides both logits.

    Returns:
        ``temperature ** 2 * KL(softmax(teacher / temperature) || softmax(student / temperature))``.

    Example:
        >>> import torch
        >>> soft_kd(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.)
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def hard_kd(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student against the teacher's most probable class.

    Args:
        student: Logits ``[B, K]``.
        teacher: Logits ``[B, K]``.
    """
    return F.cross_entropy(student, teacher.argmax(dim=1))


class LogitDistiller(Distiller):
    """Logit distillation: the student's class probabilities follow the teacher's.

    Args:
        weight: Factor of this term in the total loss; the paper's runs give it 0.9 and the task loss 0.1.
        temperature: Softens both distributions; 1 in the paper's runs.
        hard: Use the teacher's most probable class as the label, instead of its probabilities.

    Raises:
        ValueError: If the temperature is not positive, or is set beside `hard`; at `build`, if student and teacher
            tell apart different numbers of classes.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0, hard: bool = False) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise ValueError(f"LogitDistiller: temperature must be greater than 0, got {temperature}.")
        if hard and temperature != 1.0:
            raise ValueError(
                f"LogitDistiller: hard labels have no temperature; got hard=True, temperature={temperature}."
            )
        self.temperature = temperature
        self.hard = hard

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Checks that both networks tell apart the same number of classes."""
        if student.classes != teacher.classes:
            raise ValueError(
                f"LogitDistiller needs one set of classes, but the student has {student.classes} classes and the "
                f"teacher {teacher.classes}. Use a teacher trained on the student's classes, or distill features "
                "instead (FeatureDistiller, LiftDistiller, WideLastDistiller)."
            )

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns `soft_kd` or `hard_kd` of the logits."""
        assert student.logits is not None
        assert teacher.logits is not None
        if self.hard:
            return hard_kd(student.logits, teacher.logits)
        return soft_kd(student.logits, teacher.logits, self.temperature)
