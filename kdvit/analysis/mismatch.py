"""What a teacher/student pair suffers from, and what to do about it.

The measurements are the paper's (arXiv:2511.15572, sections on per-image SVD and dataset PCA); the rule is kdvit's:

- *need* is the number of shared axes that hold 95 % of the energy of 99 % of the teacher's images (PCA p99), *rank* the
  number of directions that hold as much of one image alone (SVD p99), *rotation* their ratio, *have* the width of the
  student's map.
- have >= need: no remedy. A linear map of the student's channels can hold what matters of the teacher's.
- have < need and have < rank: WideLast at the teacher's width. The lifted map of one image has at most the rank of the
  student's tokens, so that Lift could not hold even a single image.
- have < need otherwise: the encoding mismatch of the paper. WideLast at the teacher's width, which gained more there
  (78.23 against 77.53 % for DeiT-Tiny from CaiT-S24), if it costs at most a third more parameters and operations, as it
  does there; else Lift at the teacher's width.

Its limits: it rests on one pair of one paper and on linear subspaces; 95 % and the third are conventions; it says nothing
of logit distillation, which works beside any of them, nor of how much is gained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from kdvit.analysis.geometry import LayerReport, p99
from kdvit.models import LiftViT, Network, WideLastViT
from kdvit.models.cost import forward_flops, parameter_count

LEVEL = 0.95
AFFORDABLE = 4 / 3
REMEDIES: dict[str, type[LiftViT] | type[WideLastViT]] = {"Lift": LiftViT, "WideLast": WideLastViT}
OF_A_REMEDY = ("width", "num_heads")

Remedy = Literal["none", "Lift", "WideLast"]


class Cost(NamedTuple):
    """What a student costs.

    Attributes:
        student: "as it is", "Lift" or "WideLast".
        width: Width of the map that is distilled.
        parameters: Number of parameters.
        flops: Operations of one image's logits; a multiply-add counts as 2.
    """

    student: str
    width: int
    parameters: int
    flops: int


class Advice(NamedTuple):
    """What to do about a pair.

    Attributes:
        remedy: "none", "Lift" or "WideLast".
        width: Width of the map that is distilled.
        have: Width of the student's map as it is.
        need: Shared axes that hold 95 % of the energy of 99 % of the teacher's images.
        rank: Directions that hold as much of one image alone.
        teacher_width: Channels of the teacher's map.
        held: Share of the energy that the `have` leading shared axes hold of 99 % of the images.
        why: The verdict in words.
        costs: Of the student as it is and with each remedy that it can have.
    """

    remedy: Remedy
    width: int
    have: int
    need: float
    rank: float
    teacher_width: int
    held: float
    why: str
    costs: list[Cost]

    @property
    def rotation(self) -> float:
        """Shared axes over directions of one image."""
        return self.need / self.rank

    def to_json(self) -> dict[str, Any]:
        """Returns plain types."""
        return {**self._asdict(), "rotation": self.rotation, "costs": [cost._asdict() for cost in self.costs]}

    def facts(self) -> list[str]:
        """Returns what the verdict rests on, a sentence each."""
        return [
            f"The teacher's map has {self.teacher_width} channels. 99 % of the images keep 95 % of their energy in "
            f"{self.need:.0f} axes that all share (dataset PCA).",
            f"One image alone needs {self.rank:.0f} directions for that (per-image SVD): the images' subspaces turn from "
            f"each other, and all together take {self.rotation:.1f} times as many.",
            f"The student's map has {self.have} channels. The {min(self.have, self.teacher_width)} leading shared axes hold "
            f"{100 * self.held:.1f} % of the energy, or more, of 99 % of the images.",
        ]

    def table(self) -> str:
        """Returns the costs as a table."""
        lines = [f"{'student':<10}  distilled width  parameters  GFLOP"]
        lines += [
            f"{cost.student:<10}  {cost.width:>15}  {cost.parameters:>10,}  {cost.flops / 1e9:>5.3g}"
            for cost in self.costs
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([*self.facts(), f"Advice: {self.why}", "", self.table()])


def advise(teacher: LayerReport, student: Network, have: int) -> Advice:
    """Returns the advice on a pair; see the rule on top of this file.

    Args:
        teacher: What was measured at the teacher's layer that is distilled.
        student: The student.
        have: Channels of the student's map that faces it.
    """
    need, rank = p99(teacher.pca_dimension(LEVEL)), p99(teacher.svd_rank(LEVEL))
    costs = [
        Cost("as it is", have, parameter_count(student), forward_flops(student)),
        *remedy_costs(student, teacher.width),
    ]
    remedy, why = _verdict(have, need, rank, teacher.width, costs)
    held = float(np.percentile(teacher.pca_energy[:, min(have, teacher.width) - 1], 1))
    width = have if remedy == "none" else teacher.width
    return Advice(remedy, width, have, need, rank, teacher.width, held, why, costs)


def _verdict(have: int, need: float, rank: float, target: int, costs: list[Cost]) -> tuple[Remedy, str]:
    by_name = {cost.student: cost for cost in costs}
    if have >= target:
        return (
            "none",
            "nothing to change. The student's map is as wide as the teacher's: distil it directly (FeatureDistiller).",
        )
    if have >= need:
        return "none", (
            f"nothing to change. {have} channels can hold the {need:.0f} axes that matter: distil with FeatureDistiller and "
            "projector: linear."
        )
    if "WideLast" not in by_name:
        return "none", (
            f"{have} channels cannot hold {need:.0f} axes, an encoding mismatch; but Lift and WideLast are made for timm's "
            "VisionTransformer, and this student is none. Distil logits (LogitDistiller), or take a vision transformer."
        )
    short = f"{have} channels cannot hold {need:.0f} axes"
    if have < rank:
        return "WideLast", (
            f"WideLast at width {target}. {short}, nor the {rank:.0f} directions of single images: the lifted map of an image "
            "has no more rank than the student's tokens, so that Lift would not do."
        )
    wide, narrow = by_name["WideLast"], by_name["as it is"]
    ratio = max(wide.parameters / narrow.parameters, wide.flops / narrow.flops)
    if ratio <= AFFORDABLE or "Lift" not in by_name:
        return "WideLast", (
            f"WideLast at width {target}. {short}, an encoding mismatch, and WideLast, which gained most in the paper, costs "
            f"at most {ratio:.2f} times the student's parameters and operations. Lift is the cheaper choice."
        )
    return "Lift", (
        f"Lift at width {target}. {short}, an encoding mismatch; WideLast, which gained more in the paper, would cost "
        f"{ratio:.2f} times the student's parameters or operations."
    )


def remedy_costs(student: Network, width: int) -> list[Cost]:
    """Returns the costs of a student with each remedy that its architecture allows."""
    costs = []
    for name in REMEDIES:
        try:
            remedied = REMEDIES[name](**remedy_args(student), width=width)
        except (ValueError, TypeError):  # not a VisionTransformer, or not one of timm's
            continue
        costs.append(Cost(name, width, parameter_count(remedied), forward_flops(remedied)))
    return costs


def remedy_args(student: Network) -> dict[str, Any]:
    """Returns the arguments of a student's narrow architecture, without those of a remedy that it may have."""
    given: Mapping[str, Any] = getattr(student, "init_args", None) or {}
    return {name: value for name, value in given.items() if name not in OF_A_REMEDY}


def advised_model(
    advice: Advice, student: Network, teacher: Mapping[str, Any], same_classes: bool, num_classes: int
) -> dict[str, Any]:
    """Returns the `model` part of a config that follows the advice.

    Args:
        advice: The advice.
        student: The student.
        teacher: The teacher's ``class_path`` and ``init_args``.
        same_classes: Whether teacher and data have the same classes, so that logits can be distilled.
        num_classes: Classes of the data.
    """
    if advice.remedy == "none":
        kind, extra = (
            type(student).__name__,
            {k: v for k, v in getattr(student, "init_args", {}).items() if k in OF_A_REMEDY},
        )
        projector = None if advice.have == advice.teacher_width else "linear"
        layer = next(iter(student.named_layers()), -1)
        feature = {"weight": 0.2, "projector": projector, "student_layers": [layer], "teacher_layers": [-1]}
        objective = {"feature": {"class_path": "FeatureDistiller", "init_args": feature}}
    else:
        kind, extra = REMEDIES[advice.remedy].__name__, {"width": advice.width}
        name = {"Lift": "lift", "WideLast": "wide_last"}[advice.remedy]
        objective = {name: {"class_path": f"{advice.remedy}Distiller", "init_args": {"weight": 0.2}}}
    logit = {"logit": {"class_path": "LogitDistiller", "init_args": {"weight": 0.9, "temperature": 1.0}}}
    args = {**remedy_args(student), **extra, "num_classes": num_classes}
    return {
        "student": {
            "class_path": kind,
            "init_args": {name: value for name, value in args.items() if value is not None},
        },
        "teacher": dict(teacher),
        "distillers": {**(logit if same_classes else {}), **objective},
        "task_weight": 0.1 if same_classes else 1.0,
    }
