"""What a teacher/student pair suffers from, and what to do about it.

The measurements are the paper's (arXiv:2511.15572, sections on per-image SVD and dataset PCA); the rule is kdvit's:

- *need* is the number of shared axes that hold 95 % of the energy of 99 % of the teacher's images (dataset PCA), *rank*
  the number of directions that hold as much of one image alone (per-image SVD), *have* the width of the student's
  blocks, whether or not it has a remedy already. (Need and rank are some image's own and not interpolated, so that
  *have* axes hold 95 % of 99 % of the images exactly where have >= need.)
- have >= need: no remedy. The fixed target phi_s of *have* channels holds what matters of the teacher's map.
- have < need and have < rank: WideLast at the teacher's width. The lifted map of one image has at most the rank of the
  student's tokens, so that Lift could not hold even a single image.
- have < need otherwise: the encoding mismatch of the paper. WideLast at the teacher's width, which gained most there
  (78.23 against Lift's 77.53 % for DeiT-Tiny from CaiT-S24) and in nearly all pairs of the replication, if it costs at
  most a third more parameters and operations, as it does there. Else what costs nothing at inference: phi_s again, if
  the *have* leading shared axes hold two thirds of the energy of 99 % of the images; Lift at the teacher's width, which
  folds once it is trained (`kdvit.models.fold`), if they hold less. (This last choice was refitted to the 24 pairs of
  the replication: with two thirds or more phi_s gained more than Lift in 17 of 19, with less in none of 5.)

The rule is asked of the tokens as they are, at length 1, and centred, as far as no outlier fools these (see
`kdvit.analysis.variants`); if all are fooled, of standardised channels. Where they differ, or the ends of a figure's
95 % interval over the images do, the advice is undecided.

Its limits: it rests on one pair of one paper, on small pairs and on linear subspaces; 95 % and the thirds are
conventions; it says nothing of logit distillation, which works beside any of them, nor of how much is gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kdvit.analysis.costs import Cost, Remedy, remedy_costs, without_remedy
from kdvit.analysis.layer_report import LayerReport
from kdvit.analysis.variants import VARIANTS, Ranks, Spread, decisive, shown, spread_json
from kdvit.models import Network
from kdvit.models.cost import forward_flops, parameter_count
from kdvit.tables import text_table

AFFORDABLE = 4 / 3
"""Times the student's parameters or operations that WideLast may cost."""
HOLDS = 2 / 3
"""Share of the energy from which on a fixed target is worth as much as a lift."""


class Opinion(NamedTuple):
    """What one variant of the teacher's tokens says.

    Attributes:
        variant: The variant in words.
        unit: Whether tokens are at length 1.
        standardised: Whether channels are.
        decides: Whether the advice listens to it.
        spread: Its figures with their intervals: of them all, the rule asks for need and rank.
        sure: Whether at both ends of the intervals the remedy is one.
        held: Share of the energy that the leading shared axes, as many as the student's channels, hold of 99 % of the
            images.
        remedy: What the rule makes of them.
        why: In words.
    """

    variant: str
    unit: bool
    standardised: bool
    decides: bool
    spread: Spread
    sure: bool
    held: float
    remedy: Remedy
    why: str

    @property
    def as_they_are(self) -> bool:
        """Whether lengths of tokens and scales of channels are as the network gives them."""
        return not (self.unit or self.standardised)

    @property
    def need(self) -> int:
        """Shared axes that hold 95 % of the energy of 99 % of the teacher's images."""
        return int(self.spread.need.value)

    @property
    def rank(self) -> int:
        """Directions that hold as much of one image alone."""
        return int(self.spread.rank.value)

    def to_json(self) -> dict[str, Any]:
        """Returns plain types."""
        return {**self._asdict(), "as_they_are": self.as_they_are, "spread": spread_json(self.spread)}


class Advice(NamedTuple):
    """What to do about a pair.

    Attributes:
        remedy: "none", "Lift" or "WideLast".
        width: Width of the map that is distilled.
        have: Width of the student's blocks.
        present: The remedy that the student has already, or "none".
        teacher_width: Channels of the teacher's map.
        why: The verdict in words.
        unchanged: Whether the student is as advised already.
        costs: Of the student without a remedy and with each that it can have.
        opinions: The remedy by each variant of the tokens. The first that decides is the one the advice rests on.
        outliers: What outliers the teacher's tokens have, in words.
    """

    remedy: Remedy
    width: int
    have: int
    present: Remedy
    teacher_width: int
    why: str
    unchanged: bool
    costs: list[Cost]
    opinions: list[Opinion]
    outliers: list[str]

    @property
    def rests_on(self) -> Opinion:
        """The variant that the figures of the advice are of: the first that decides, or the first."""
        return next((each for each in self.opinions if each.decides), self.opinions[0])

    @property
    def need(self) -> int:
        """Shared axes that hold 95 % of the energy of 99 % of the teacher's images."""
        return self.rests_on.need

    @property
    def rank(self) -> int:
        """Directions that hold as much of one image alone."""
        return self.rests_on.rank

    @property
    def held(self) -> float:
        """Share of the energy that the `have` leading shared axes hold of 99 % of the images."""
        return self.rests_on.held

    @property
    def decided(self) -> bool:
        """Whether there are variants that decide, and they give one remedy, each within its intervals."""
        deciding = [each for each in self.opinions if each.decides]
        agree = len({each.remedy for each in deciding}) == 1
        return agree and all(each.sure for each in deciding)

    @property
    def fits(self) -> bool:
        """Whether the student, as advised, can hold what is distilled of the teacher's map."""
        return self.remedy != "none" or self.have >= self.teacher_width or self.held >= HOLDS

    @property
    def rotation(self) -> float:
        """Shared axes over directions of one image."""
        return self.need / self.rank

    def to_json(self) -> dict[str, Any]:
        """Returns plain types."""
        return {
            **self._asdict(),
            **{name: getattr(self, name) for name in ("decided", "need", "rank", "held", "rotation")},
            "variant": self.rests_on.variant,
            "costs": [{"student": cost.student, **cost._asdict()} for cost in self.costs],
            "opinions": [each.to_json() for each in self.opinions],
        }

    def facts(self) -> list[str]:
        """Returns what the verdict rests on, a sentence each."""
        spread = self.rests_on.spread
        taken = f"all together take {self.rotation:.1f} times as many{_turn(spread)}"
        target = (
            "a fixed target of that many (FeatureDistiller, projector: phi_s) keeps as much, and costs nothing at "
            "inference."
            if self.rests_on.as_they_are
            else "but a fixed target (projector: phi_s) takes its axes from tokens as they are, and keeps the outliers."
        )
        return [
            *(f"Outliers: {each}." for each in self.outliers),
            f"These figures are of the {self.rests_on.variant}.",
            f"The teacher's map has {self.teacher_width} channels. 99 % of the images keep 95 % of their energy in "
            f"{shown(spread.need)} axes that all share (dataset PCA; in brackets 95 % intervals over the images).",
            f"One image alone needs {shown(spread.rank)} directions for that (per-image SVD); {taken}.",
            f"The student's blocks have {self.have} channels. The {min(self.have, self.teacher_width)} leading shared "
            f"axes hold {100 * self.held:.1f} % of the energy, or more, of 99 % of the images: {target}",
        ]

    def cost_table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Returns head and rows of the table of costs."""
        rows = [(c.student, str(c.width), f"{c.parameters:,}", f"{c.flops / 1e9:.3g}") for c in self.costs]
        return ("student", "distilled width", "parameters", "GFLOP"), rows

    def opinion_table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Returns head and rows of the table of what each variant of the tokens says."""
        rows = [
            (each.variant, shown(each.spread.need), shown(each.spread.rank), each.remedy, _decides(each))
            for each in self.opinions
        ]
        return ("teacher's tokens", "shared axes", "of one image", "remedy", "decides"), rows

    def __str__(self) -> str:
        tables = [text_table(*self.opinion_table()), "", text_table(*self.cost_table())]
        return "\n".join([*self.facts(), f"Advice: {self.why}", "", *tables])


def _turn(spread: Spread) -> str:
    """Returns what the tokens shuffled among images say of the rotation, if they were measured."""
    if spread.shuffled is None or spread.turn is None:
        return ""
    if spread.turned:
        told = "as the images' subspaces turn from each other, by "
    elif spread.turn.low <= 1 <= spread.turn.high:
        told = "not to be told from what any tokens take of so many channels: "
    else:
        told = ""
    factor = f"{told}a factor of {shown(spread.turn, '.2f')}"
    return f" (tokens shuffled among images: {spread.shuffled.value:.1f} times), {factor}"


def _decides(opinion: Opinion) -> str:
    return "no" if not opinion.decides else "yes" if opinion.sure else "not within its intervals"


def advise(teacher: LayerReport, student: Network) -> Advice:
    """Returns the advice on a pair; see the rule on top of this file.

    Args:
        teacher: What was measured at the teacher's layer that is distilled.
        student: The student, with or without a remedy.
    """
    present, bare = without_remedy(student)
    have = bare.output_shapes((-1,), logits=False).features[0][0]
    costs = [Cost("none", have, parameter_count(bare), forward_flops(bare)), *remedy_costs(bare, teacher.width)]
    deciding = [each.variant for each in decisive(teacher.variants)]
    opinions = [
        _opinion(ranks, have, teacher.width, costs, ranks.variant in deciding) for ranks in teacher.variants.values()
    ]
    outliers = list(teacher.outliers.found().values())
    advice = Advice("none", have, have, present, teacher.width, "", False, costs, opinions, outliers)
    remedy, why = advice.rests_on.remedy, advice.rests_on.why
    width = have if remedy == "none" else teacher.width
    facing = student.output_shapes(tuple(student.named_layers()) or (-1,), logits=False).features[-1][0]
    unchanged = (present, facing) == (remedy, width)
    if unchanged and remedy != "none":
        why = f"nothing to change: the student has {why}"
    elif present != "none":
        why = f"{why} (Now it has {present} at width {facing}.)"
    if not advice.decided:
        why = f"{_undecided(advice)} {why}"
    if not advice.rests_on.as_they_are:
        why = f"{why} {_left_in_the_loss(advice.rests_on)}"
    return advice._replace(remedy=remedy, width=width, why=why, unchanged=unchanged)


def _opinion(ranks: Ranks, have: int, target: int, costs: list[Cost], decides: bool) -> Opinion:
    of, spread = VARIANTS[ranks.variant], ranks.spread()
    at_value_and_ends = [(int(need), int(rank)) for need, rank in zip(spread.need, spread.rank, strict=True)]
    held = ranks.held(min(have, target))
    verdicts = [_verdict(have, need, rank, held, target, costs) for need, rank in at_value_and_ends]
    said = {remedy for remedy, _ in verdicts}
    return Opinion(of.label, of.unit, of.standardised, decides, spread, len(said) == 1, held, *verdicts[0])


def _left_in_the_loss(opinion: Opinion) -> str:
    """Returns what becomes of outliers that the figures leave out."""
    said = "A loss on the map still compares the outliers that these figures leave out"
    if opinion.unit:
        said += "; with normalize: layer_norm every token counts alike in it"
    if opinion.standardised:
        said += "; no option takes massive channels out"
    return f"{said}."


def _undecided(advice: Advice) -> str:
    """Returns why there is no one answer, and what is assumed."""
    deciding = [each for each in advice.opinions if each.decides]
    if not deciding:
        return f"undecided, as outliers fool every variant of the tokens. By the {advice.rests_on.variant}:"
    ranks = [each.spread.rank for each in deciding]
    by_rank = min(rank.low for rank in ranks) <= advice.have < max(rank.high for rank in ranks)
    said = [
        f"{'no remedy' if each.remedy == 'none' else each.remedy} by the {each.variant} "
        f"({shown(each.spread.need)} axes"
        f"{f', {shown(each.spread.rank)} directions of one image' if by_rank else ''})"
        for each in deciding
    ]
    return f"undecided: {', '.join(said)}, and the student has {advice.have} channels. By the first:"


def _verdict(have: int, need: int, rank: int, held: float, target: int, costs: list[Cost]) -> tuple[Remedy, str]:
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
            f"no remedy. {have} channels can hold the {need} axes that matter: distil by FeatureDistiller, projector: "
            "phi_s."
        )
    short = f"{have} channels cannot hold {need} axes"
    wide, narrow = by_remedy.get("WideLast"), by_remedy["none"]
    if len(by_remedy) == 1 and held < HOLDS:
        return "none", (
            f"no remedy that kdvit has. {short}, an encoding mismatch; but Lift and WideLast are made anew from a "
            "TimmStudent of timm's VisionTransformer or Eva, and this student is none: if it is one of these, build it "
            "as TimmStudent. Else distil logits (LogitDistiller), or a fixed target (FeatureDistiller, projector: "
            "phi_s); or take such a student."
        )
    if wide is None:
        beside = f"{'WideLast does' if 'Lift' in by_remedy else 'Lift and WideLast do'} not fit this student"
    else:
        if have < rank:
            return "WideLast", (
                f"WideLast at width {target}. {short}, nor the {rank} directions of single images: the lifted map of "
                "an image has no more rank than the student's tokens, so that Lift would not do."
            )
        ratio = max(wide.parameters / narrow.parameters, wide.flops / narrow.flops)
        price = f"{ratio:.2f} times the student's parameters or operations"
        if ratio <= AFFORDABLE or "Lift" not in by_remedy:
            cheaper = (
                " Lift is the cheaper choice: once trained, it folds into a student that costs what this one costs."
            )
            return "WideLast", (
                f"WideLast at width {target}. {short}, an encoding mismatch, and WideLast, which gained most in the "
                f"paper, costs {price}.{cheaper if 'Lift' in by_remedy else ''}"
            )
        beside = f"WideLast, which gained most in the paper, would cost {price}"
    if held >= HOLDS:
        return "none", (
            f"no remedy, but a fixed target: distil by FeatureDistiller, projector: phi_s. {short}, an encoding "
            f"mismatch; {beside}. But {have} axes hold {held:.0%} of the energy of 99 % of the images, and where they "
            "held two thirds or more, phi_s mostly gained more than Lift in the replication, at the same cost."
        )
    return "Lift", (
        f"Lift at width {target}. {short}, an encoding mismatch; {beside}. Once trained, Lift folds into a student "
        "that costs what this one costs (kdvit export --fold)."
    )
