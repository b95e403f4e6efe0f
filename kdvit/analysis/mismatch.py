"""What a teacher/student pair suffers from, and what to do about it.

The measurements are the paper's (arXiv:2511.15572, sections on per-image SVD and dataset PCA); the rule is kdvit's:

- *need* is the number of shared axes that hold 95 % of the energy of 99 % of the teacher's images (PCA p99), *rank* the
  number of directions that hold as much of one image alone (SVD p99), *rotation* their ratio, *have* the width of the
  student's blocks, whether or not it has a remedy already.
- have >= need: no remedy. A linear map of the student's channels can hold what matters of the teacher's.
- have < need and have < rank: WideLast at the teacher's width. The lifted map of one image has at most the rank of the
  student's tokens, so that Lift could not hold even a single image.
- have < need otherwise: the encoding mismatch of the paper. WideLast at the teacher's width, which gained more there
  (78.23 against 77.53 % for DeiT-Tiny from CaiT-S24), if it costs at most a third more parameters and operations, as it
  does there; else Lift at the teacher's width, which costs nothing once it is trained and folded (`kdvit.models.fold`).

Its limits: it rests on one pair of one paper and on linear subspaces; 95 % and the third are conventions; it says
nothing of logit distillation, which works beside any of them, nor of how much is gained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kdvit.analysis.geometry import LEVEL, LayerReport, p99
from kdvit.distillers import FeatureDistiller, LiftDistiller, WideLastDistiller
from kdvit.models import LiftViT, Network, TimmStudent, WideLastViT
from kdvit.models.cost import forward_flops, parameter_count
from kdvit.tables import text_table

AFFORDABLE = 4 / 3
Remedy = Literal["none", "Lift", "WideLast"]
REMEDIES: dict[Remedy, type[LiftViT] | type[WideLastViT]] = {"Lift": LiftViT, "WideLast": WideLastViT}
DISTILLERS: dict[Remedy, tuple[str, type[FeatureDistiller]]] = {
    "none": ("feature", FeatureDistiller),
    "Lift": ("lift", LiftDistiller),
    "WideLast": ("wide_last", WideLastDistiller),
}
"""The map objective of each remedy, and its name in a config."""
MAP_OBJECTIVES = {
    name
    for _, kind in DISTILLERS.values()
    for name in (kind.__name__, f"kdvit.distillers.{kind.__name__}", f"{kind.__module__}.{kind.__name__}")
}
"""Class paths of them in a config."""
OF_A_REMEDY = ("width", "num_heads", "folded")


class Cost(NamedTuple):
    """What a student costs.

    Attributes:
        remedy: The remedy that it has.
        width: Width of the map that is distilled.
        parameters: Number of parameters.
        flops: Operations of one image's logits; a multiply-add counts as 2.
        num_heads: Heads of the wide block, where the head dimension does not divide the width.
        folded: Whether it is the cost of a lift that is folded after training.
    """

    remedy: Remedy
    width: int
    parameters: int
    flops: int
    num_heads: int | None = None
    folded: bool = False

    @property
    def student(self) -> str:
        """The student's name in tables."""
        return "no remedy" if self.remedy == "none" else f"{self.remedy}, folded" if self.folded else self.remedy


class Advice(NamedTuple):
    """What to do about a pair.

    Attributes:
        remedy: "none", "Lift" or "WideLast".
        width: Width of the map that is distilled.
        have: Width of the student's blocks.
        present: The remedy that the student has already, or "none".
        need: Shared axes that hold 95 % of the energy of 99 % of the teacher's images.
        rank: Directions that hold as much of one image alone.
        teacher_width: Channels of the teacher's map.
        held: Share of the energy that the `have` leading shared axes hold of 99 % of the images.
        why: The verdict in words.
        unchanged: Whether the student is as advised already.
        costs: Of the student without a remedy and with each that it can have.
    """

    remedy: Remedy
    width: int
    have: int
    present: Remedy
    need: int
    rank: int
    teacher_width: int
    held: float
    why: str
    unchanged: bool
    costs: list[Cost]

    @property
    def fits(self) -> bool:
        """Whether the student, as advised, has the channels that the teacher's map needs."""
        return self.remedy != "none" or self.have >= min(self.need, self.teacher_width)

    @property
    def rotation(self) -> float:
        """Shared axes over directions of one image."""
        return self.need / self.rank

    def to_json(self) -> dict[str, Any]:
        """Returns plain types."""
        costs = [{"student": cost.student, **cost._asdict()} for cost in self.costs]
        return {**self._asdict(), "rotation": self.rotation, "costs": costs}

    def facts(self) -> list[str]:
        """Returns what the verdict rests on, a sentence each."""
        turned = (
            f"the images' subspaces turn from each other, and all together take {self.rotation:.1f} times as many."
            if self.rotation >= 1.05
            else "the images share one subspace."
        )
        return [
            f"The teacher's map has {self.teacher_width} channels. 99 % of the images keep 95 % of their energy in "
            f"{self.need} axes that all share (dataset PCA).",
            f"One image alone needs {self.rank} directions for that (per-image SVD): {turned}",
            f"The student's blocks have {self.have} channels. The {min(self.have, self.teacher_width)} leading shared "
            f"axes hold {100 * self.held:.1f} % of the energy, or more, of 99 % of the images: a fixed target of that "
            "many (FeatureDistiller, projector: phi_s) keeps as much, and costs nothing at inference.",
        ]

    def cost_table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Returns head and rows of the table of costs."""
        rows = [(c.student, str(c.width), f"{c.parameters:,}", f"{c.flops / 1e9:.3g}") for c in self.costs]
        return ("student", "distilled width", "parameters", "GFLOP"), rows

    def __str__(self) -> str:
        return "\n".join([*self.facts(), f"Advice: {self.why}", "", text_table(*self.cost_table())])


def advise(teacher: LayerReport, student: Network) -> Advice:
    """Returns the advice on a pair; see the rule on top of this file.

    Args:
        teacher: What was measured at the teacher's layer that is distilled.
        student: The student, with or without a remedy.
    """
    present, bare = _bare(student)
    have = bare.output_shapes((-1,), logits=False).features[0][0]
    need, rank = (math.ceil(p99(values)) for values in (teacher.pca_dimension(LEVEL), teacher.svd_rank(LEVEL)))
    costs = [Cost("none", have, parameter_count(bare), forward_flops(bare)), *remedy_costs(bare, teacher.width)]
    remedy, why = _verdict(have, need, rank, teacher.width, costs)
    width = have if remedy == "none" else teacher.width
    facing = student.output_shapes(tuple(student.named_layers()) or (-1,), logits=False).features[-1][0]
    unchanged = (present, facing) == (remedy, width)
    if unchanged and remedy != "none":
        why = f"nothing to change: the student has {why}"
    elif present != "none":
        why = f"{why} (Now it has {present} at width {facing}.)"
    held = float(np.percentile(teacher.pca_energy[:, min(have, teacher.width) - 1], 1))
    return Advice(remedy, width, have, present, need, rank, teacher.width, held, why, unchanged, costs)


def _bare(student: Network) -> tuple[Remedy, Network]:
    """Returns the remedy that a student has, and the student without it."""
    for name, remedy in REMEDIES.items():
        if isinstance(student, remedy):
            return name, TimmStudent(**remedy_args(student))
    return "none", student


def _verdict(have: int, need: int, rank: int, target: int, costs: list[Cost]) -> tuple[Remedy, str]:
    by_remedy = {cost.remedy: cost for cost in costs if not cost.folded}
    if have == target:
        return "none", "no remedy. The student has the teacher's width: distil it directly (FeatureDistiller)."
    if have > target:
        return (
            "none",
            "no remedy. The student is wider than the teacher: distil by FeatureDistiller, projector: linear.",
        )
    if have >= need:
        return "none", (
            f"no remedy. {have} channels can hold the {need} axes that matter: distil by FeatureDistiller, "
            "projector: linear."
        )
    short = f"{have} channels cannot hold {need} axes"
    wide, narrow = by_remedy.get("WideLast"), by_remedy["none"]
    if len(by_remedy) == 1:
        return "none", (
            f"no remedy that kdvit has. {short}, an encoding mismatch; but Lift and WideLast are made for timm's "
            "VisionTransformer and Eva, and this student is neither. Distil logits (LogitDistiller), or a fixed target "
            "(FeatureDistiller, projector: phi_s); or take one of these."
        )
    if wide is None:
        return "Lift", f"Lift at width {target}. {short}, an encoding mismatch; WideLast does not fit this student."
    if have < rank:
        return "WideLast", (
            f"WideLast at width {target}. {short}, nor the {rank} directions of single images: the lifted map of an "
            "image has no more rank than the student's tokens, so that Lift would not do."
        )
    ratio = max(wide.parameters / narrow.parameters, wide.flops / narrow.flops)
    if ratio <= AFFORDABLE or "Lift" not in by_remedy:
        cheaper = " Lift is the cheaper choice: once trained, it folds into a student that costs what this one costs."
        return "WideLast", (
            f"WideLast at width {target}. {short}, an encoding mismatch, and WideLast, which gained most in the paper, "
            f"costs {ratio:.2f} times the student's parameters or operations.{cheaper if 'Lift' in by_remedy else ''}"
        )
    return "Lift", (
        f"Lift at width {target}. {short}, an encoding mismatch; WideLast, which gained more in the paper, would cost "
        f"{ratio:.2f} times the student's parameters or operations. Once trained, Lift folds into a student that costs "
        "what this one costs (kdvit export --fold)."
    )


def remedy_costs(student: Network, width: int) -> list[Cost]:
    """Returns the costs of a student with each remedy that its architecture allows."""
    costs = []
    for name, remedy in REMEDIES.items():
        heads: list[int | None] = [None] if name == "Lift" else [None, _heads(student, width)]
        for num_heads in heads:
            args = {**remedy_args(student), "width": width, **({} if num_heads is None else {"num_heads": num_heads})}
            try:
                remedied = remedy(**args)
            except (ValueError, TypeError):  # heads that do not divide the width, or another family of timm's
                continue
            costs.append(Cost(name, width, parameter_count(remedied), forward_flops(remedied), num_heads))
            if isinstance(remedied, LiftViT):
                folded = remedied.folded()
                costs.append(Cost(name, width, parameter_count(folded), forward_flops(folded), folded=True))
            break
    return costs


def _heads(student: Network, width: int) -> int:
    """Returns the number of heads that divides a width and comes nearest to the student's head dimension."""
    blocks: Any = getattr(getattr(student, "model", None), "blocks", None)
    heads = getattr(getattr(blocks[-1], "attn", None), "num_heads", 1) if blocks is not None and len(blocks) else 1
    head_dim = student.output_shapes((-1,), logits=False).features[0][0] / heads
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(width / n - head_dim))


def remedy_args(student: Network) -> dict[str, Any]:
    """Returns the arguments of a student's narrow architecture, without those of a remedy that it may have."""
    given: Mapping[str, Any] = getattr(student, "init_args", None) or {}
    return {name: value for name, value in given.items() if name not in OF_A_REMEDY}


def advised_model(advice: Advice, model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `model` part of a config, changed as the advice says.

    Student and map objective change; all the rest stays, and of the objective its weight and loss. A narrow student
    that no remedy fits keeps its other objectives alone, or gets the fixed target where it has none.

    Args:
        advice: The advice.
        model: The `model` part: student, teacher, distillers and the rest.
    """
    given = model.get("distillers") or {}
    maps = {key: each for key, each in given.items() if each["class_path"] in MAP_OBJECTIVES}
    kept = {key: each for key, each in given.items() if key not in maps}
    if advice.unchanged and maps and advice.fits:
        bridge = {"projector": "linear"} if advice.remedy == "none" and advice.have != advice.teacher_width else {}
        bridged = {
            key: {**each, "init_args": {**each.get("init_args", {}), **bridge}} if key in maps else each
            for key, each in given.items()
        }
        return {**model, "distillers": bridged}
    student = model["student"]
    args = {name: value for name, value in student.get("init_args", {}).items() if name not in OF_A_REMEDY}
    name, objective = DISTILLERS[advice.remedy]
    options: dict[str, Any] = {"weight": 0.2}
    for each in maps.values():
        init_args = each.get("init_args", {})
        options |= {option: init_args[option] for option in ("weight", "loss") if option in init_args}
    if advice.remedy == "none":
        kind = "TimmStudent" if advice.present != "none" else student["class_path"]
        bridged_by = "linear" if advice.fits else "phi_s"
        options |= {"projector": None if advice.have == advice.teacher_width else bridged_by}
    else:
        kind = REMEDIES[advice.remedy].__name__
        heads = next(cost.num_heads for cost in advice.costs if cost.remedy == advice.remedy)
        args |= {"width": advice.width, **({} if heads is None else {"num_heads": heads})}
    new = {name: {"class_path": objective.__name__, "init_args": options}}
    distillers = {**kept, **new} if advice.fits or not kept else kept
    return {**model, "student": {"class_path": kind, "init_args": args}, "distillers": distillers}
