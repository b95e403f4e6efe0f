"""Logit distillation, soft (Hinton et al., arXiv:1503.02531) and hard (DeiT, arXiv:2012.12877)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdvit.distillers.base import Distiller
from kdvit.distillers.weights import Weight
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


def standardized(logits: Tensor) -> Tensor:
    """Logits ``[B, K]`` with mean 0 and standard deviation 1 over the classes (arXiv:2403.01427, equation 10)."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)


class LogitObjective(Distiller):
    """What objectives on logits share: a temperature, and one set of classes.

    Args:
        weight: Factor of this term in the total loss.
        temperature: Softens both distributions.

    Raises:
        ValueError: If the temperature is not positive; at `build`, if student and teacher have different classes.
    """

    def __init__(self, weight: Weight = 1.0, temperature: float = 1.0) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise ValueError(f"{type(self).__name__}: temperature must be greater than 0, got {temperature}.")
        self.temperature = temperature

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Checks that both networks tell apart the same number of classes."""
        if student.classes != teacher.classes:
            raise ValueError(
                f"{type(self).__name__} needs one set of classes, but the student has {student.classes} classes and "
                f"the teacher {teacher.classes}. Use a teacher trained on the student's classes, or distill features "
                "instead (FeatureDistiller, LiftDistiller, WideLastDistiller)."
            )

    def logits(self, student: ViTOutput, teacher: ViTOutput) -> tuple[Tensor, Tensor]:
        """Returns the logits of both, each ``[B, K]``."""
        assert student.logits is not None
        assert teacher.logits is not None
        return student.logits, teacher.logits


class LogitDistiller(LogitObjective):
    """Logit distillation: the student's class probabilities follow the teacher's.

    Args:
        weight: Factor of this term in the total loss; the paper's runs give it 0.9 and the task loss 0.1.
        temperature: Softens both distributions; 1 in the paper's runs.
        hard: Use the teacher's most probable class as the label, instead of its probabilities.
        standardize: Standardise both logits before they are softened (arXiv:2403.01427, with temperature 2 and weight
            9), so that the student need not match the range of the teacher's.

    Raises:
        ValueError: If the temperature is not positive, or something is set beside `hard`; at `build`, if student and
            teacher tell apart different numbers of classes.
    """

    def __init__(
        self, weight: Weight = 1.0, temperature: float = 1.0, hard: bool = False, standardize: bool = False
    ) -> None:
        super().__init__(weight, temperature)
        if hard and (temperature != 1.0 or standardize):
            raise ValueError(
                f"LogitDistiller: hard labels have no temperature and no range; got hard=True, "
                f"temperature={temperature}, standardize={standardize}."
            )
        self.hard, self.standardize = hard, standardize

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns `soft_kd` or `hard_kd` of the logits."""
        ours, theirs = self.logits(student, teacher)
        if self.hard:
            return hard_kd(ours, theirs)
        if self.standardize:
            ours, theirs = standardized(ours), standardized(theirs)
        return soft_kd(ours, theirs, self.temperature)
