"""The contract of a distiller."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from kdvit.distillers.weights import Weight, require_weight
from kdvit.structures import FixedTarget, Layer, OutputShapes, SharedBasis, ViTOutput


class Distiller(nn.Module, ABC):
    """One loss between a student and a frozen teacher. Subclass it, override `forward`, and name it in a YAML file.

    A distiller declares the layers that it wants, may create parameters in `build`, and returns an unweighted scalar.
    It never holds or runs a network, never logs, never changes the student, and is gone at inference. What it draws at
    random comes from torch's global generator: a run seeds it for each step and rank, so that a resumed run draws what
    it would have drawn.

    Args:
        weight: Factor of this term in the total loss, or a `WeightSchedule` of it over the epochs.
            `DistillationModule` applies it, once.
        teacher: Name of the teacher that `forward` gets, where there are several.

    Attributes:
        student_layers: Student feature maps wanted, in the order in which `forward` receives them.
        teacher_layers: The same for the teacher.
        needs_teacher_logits: Whether `forward` reads `teacher.logits`. Where no distiller does, the teacher stops after
            the last block that is needed.
        needs_labels: Whether `forward` reads `target`. It is -1 where images have no labels.
        calibration_images: Training images on which the principal axes of the teacher's tokens are measured, once and
            before the first step, for `calibrate`; 0 for none.

    Raises:
        ValueError: If `weight` is negative.

    Examples:
        >>> import torch
        >>> class LogitMSE(Distiller):
        ...     def forward(self, student, teacher, target):
        ...         return torch.nn.functional.mse_loss(student.logits, teacher.logits)
        >>> LogitMSE(weight=0.5)(ViTOutput(torch.zeros(2, 10)), ViTOutput(torch.ones(2, 10)), torch.zeros(2))
        tensor(1.)
    """

    student_layers: tuple[Layer, ...] = ()
    teacher_layers: tuple[Layer, ...] = ()
    needs_teacher_logits: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    calibration_images: int = 0

    def __init__(self, weight: Weight = 1.0, teacher: str | None = None) -> None:
        super().__init__()
        require_weight(weight, f"{type(self).__name__}: weight")
        self.weight, self.teacher = weight, teacher

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Checks the pair and creates the parameters that depend on it. Runs once, before optimizer and DDP.

        Args:
            student: Shapes of what `forward` will receive as `student`.
            teacher: Shapes of what `forward` will receive as `teacher`.

        Raises:
            ValueError: If this objective cannot be computed for the pair.
        """

    def calibrate(self, bases: Sequence[SharedBasis]) -> None:
        """Takes what was measured of the teacher before the first step, and keeps it in buffers.

        Called with `calibration_images`, once a run: a resumed run has the buffers in its checkpoint.

        Args:
            bases: Principal axes of the teacher's centred tokens, one for each of `teacher_layers`, float64.
        """

    def is_calibrated(self) -> bool:
        """Returns whether `calibrate` has been called, in this run or in the one that it goes on from."""
        return not self.calibration_images

    def describe_calibration(self, bases: Sequence[SharedBasis]) -> list[str]:
        """Says what a user may want to know of what was measured, a sentence each; nothing by default."""
        return []

    def fixed_targets(self) -> tuple[FixedTarget | None, ...]:
        """Says, once built, what `target` makes of each of `teacher_layers`; None where it is the map itself."""
        return (None,) * len(self.teacher_layers)

    def target(self, i: int, feature: Tensor) -> Tensor:
        """Reduces a map of the teacher to what `forward` reads of it, so that a cache can store that in its place.

        `forward` takes the one or the other, told apart by their widths.

        Args:
            i: Which of `teacher_layers` it is.
            feature: ``[B, C, H, W]``, float32.

        Returns:
            ``[B, d, H, W]``, d and what it follows from as `fixed_targets` says; by default the map.
        """
        return feature

    def conversions(self) -> list[str]:
        """Says what it converts of the pair that it is built for, a sentence each; nothing by default."""
        return []

    @abstractmethod
    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Computes the unweighted loss.

        Args:
            student: Logits ``[B, K]`` and one map ``[B, C, H, W]`` for each of `student_layers`, float32.
            teacher: The same for `teacher_layers`; without gradient.
            target: Class indices ``[B]``, or probabilities ``[B, K]`` under Mixup or CutMix; -1 without labels.

        Returns:
            A float32 scalar.
        """

    def metrics(self, student: ViTOutput, teacher: ViTOutput) -> dict[str, Tensor]:
        """Measures the pair for the log. Called without gradient, on logged steps only.

        Returns:
            Scalars by name; none by default.
        """
        return {}
