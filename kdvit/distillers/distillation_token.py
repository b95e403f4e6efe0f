"""DeiT's distillation token: a second head learns from the teacher (arXiv:2012.12877, section 4)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from kdvit.distillers.logit import LogitObjective, hard_kd, soft_kd
from kdvit.distillers.weights import Weight
from kdvit.structures import Layer, ViTOutput

Mode = Literal["hard", "soft"]


class DistillationTokenDistiller(LogitObjective):
    """Distillation token: a student's second head follows the teacher, while its class head learns from the labels.

    The student is one with two tokens and two heads, such as deit_tiny_distilled_patch16_224, also with WideLast. While
    it trains with this objective, the task loss, `train/acc1` and other objectives on logits see the class head alone;
    it predicts by the mean of both heads, as timm's does in eval. (timm's `TokenDistillationTask`; DeiT's runs weigh
    both losses by 0.5: `task_weight: 0.5` beside `weight: 0.5`.)

    Args:
        weight: Factor of this term in the total loss; 0.5 in DeiT's runs.
        mode: "hard" takes the teacher's most probable class as the label, which is better in the paper (its table 3);
            "soft" its probabilities.
        temperature: Softens both distributions, in "soft"; 3 in the paper.
        kwargs: Those of LogitObjective.

    Raises:
        ValueError: If an option is unknown or out of range; at `build`, if student and teacher have different classes.
            The student refuses where it has no distillation head.
    """

    student_layers: tuple[Layer, ...] = ("distillation_logits",)

    def __init__(self, weight: Weight = 1.0, mode: Mode = "hard", temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(weight, temperature, **kwargs)
        if mode not in get_args(Mode):
            raise ValueError(f"DistillationTokenDistiller: mode must be hard or soft, got {mode!r}.")
        if mode == "hard" and temperature != 1.0:
            raise ValueError(
                f"DistillationTokenDistiller: hard labels have no temperature; got mode 'hard' and {temperature}."
            )
        self.mode = mode

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns `hard_kd` or `soft_kd` of the distillation head's logits."""
        ours, theirs = self.logits(student._replace(logits=student.features[0].flatten(1)), teacher)
        return hard_kd(ours, theirs) if self.mode == "hard" else soft_kd(ours, theirs, self.temperature)
