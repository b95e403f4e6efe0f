"""Logit distillation, soft (Hinton et al., arXiv:1503.02531) and hard (DeiT, arXiv:2012.12877)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.distillers.base import Distiller
from kdvit.distillers.classes import Classes, require_same_classes, share_classes
from kdvit.distillers.weights import Weight
from kdvit.structures import OutputShapes, ViTOutput, at_least_float32


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

    Examples:
        >>> import torch
        >>> soft_kd(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.)
    """
    ours, theirs = (F.log_softmax(at_least_float32(logits) / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def hard_kd(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student against the teacher's most probable class.

    Args:
        student: Logits ``[B, K]``.
        teacher: Logits ``[B, K]``.
    """
    return F.cross_entropy(at_least_float32(student), teacher.argmax(dim=1))


def standardized(logits: Tensor) -> Tensor:
    """Logits ``[B, K]`` with mean 0 and standard deviation 1 over the classes (arXiv:2403.01427, equation 10)."""
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)


class LogitObjective(Distiller):
    """What objectives on logits share: a temperature, and one set of classes.

    With `classes`, both logits are cut down to the classes that are mapped before anything else, so that each softmax,
    standardisation and most probable class is over these alone: the student is told nothing of its other classes, and
    the teacher's probabilities are those given that the class is one of them, for images of any class.

    Args:
        weight: Factor of this term in the total loss.
        temperature: Softens both distributions.
        classes: By default all, which must be the same in the same order. Else a mapping from classes of the teacher to
            classes of the student, each by index (a number) or name (text), or "by_name" for those that have the same
            name. The student's names are the data's; the teacher's are known where kdvit or timm has exported it, and
            for timm's published ImageNet weights, whose names are WordNet ids.
        teacher: Name of the teacher, where there are several.

    Raises:
        ValueError: If the temperature is not positive or `classes` names none; at `build`, if student and teacher have
            different classes, or a class that is named is not there.
    """

    student_classes: Tensor
    teacher_classes: Tensor

    def __init__(
        self,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        classes: Classes | None = None,
        teacher: str | None = None,
    ) -> None:
        super().__init__(weight, teacher)
        if temperature <= 0:
            raise ValueError(f"{type(self).__name__}: temperature must be greater than 0, got {temperature}.")
        if classes is not None and classes != "by_name" and not (isinstance(classes, dict) and classes):
            raise ValueError(
                f"{type(self).__name__}: classes must be by_name or a mapping from the teacher's to the student's, got "
                f"{classes!r}."
            )
        self.temperature, self.classes = temperature, classes
        self._conversions: list[str] = []

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Checks that both networks have the same classes, or finds those that are mapped."""
        try:
            if self.classes is None:
                require_same_classes(student, teacher)
                return
            shared = share_classes(self.classes, student, teacher)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error
        these = f"{len(shared.student)} of the student's {student.classes} and the teacher's {teacher.classes} classes"
        self._conversions = [f"softmax over {these}"]
        self.register_buffer("student_classes", torch.tensor(shared.student), persistent=False)
        self.register_buffer("teacher_classes", torch.tensor(shared.teacher), persistent=False)

    def conversions(self) -> list[str]:
        """Says which classes are distilled, if not all are."""
        return self._conversions

    def logits(self, student: ViTOutput, teacher: ViTOutput) -> tuple[Tensor, Tensor]:
        """Returns the logits of both, each ``[B, K]``, of the classes that are distilled, in the student's order."""
        assert student.logits is not None
        assert teacher.logits is not None
        if self.classes is None:
            return student.logits, teacher.logits
        return student.logits[:, self.student_classes], teacher.logits[:, self.teacher_classes]


class LogitDistiller(LogitObjective):
    """Logit distillation: the student's class probabilities follow the teacher's.

    Args:
        weight: Factor of this term in the total loss; the paper's runs give it 0.9 and the task loss 0.1.
        temperature: Softens both distributions; 1 in the paper's runs.
        hard: Use the teacher's most probable class as the label, instead of its probabilities.
        standardize: Standardise both logits before they are softened (arXiv:2403.01427, with temperature 2 and weight
            9), so that the student need not match the range of the teacher's. Its gradient grows as one over the
            spread of the student's logits: where a head begins at zero, clip it (``--trainer.gradient_clip_val 1``).
        kwargs: Those of LogitObjective.

    Raises:
        ValueError: If the temperature is not positive, or something is set beside `hard`; at `build`, if student and
            teacher have different classes, or a class that is named is not there.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        hard: bool = False,
        standardize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(weight, temperature, **kwargs)
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
