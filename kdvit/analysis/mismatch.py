"""What a teacher/student pair suffers from, and what to do about it.

The rule (`kdvit.analysis.rule`) is asked of the tokens as they are, at length 1, and centred, as far as no outlier
fools these (see `kdvit.analysis.variants`); if all are fooled, of standardised channels. Where they differ, or the ends
of a figure's 95 % interval over the images do, the advice is undecided.

Its limits: it rests on one pair of one paper, on small pairs and on linear subspaces; 95 % and the thirds are
conventions; it says nothing of logit distillation, which works beside any of them, nor of how much is gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kdvit.analysis.controls import Interval
from kdvit.analysis.costs import Cost, Remedy, remedy_costs, without_remedy
from kdvit.analysis.layer_report import LayerReport
from kdvit.analysis.rule import LABELS, REMEDY, Verdict, judge
from kdvit.analysis.variants import VARIANTS, Ranks, Spread, decisive, shown, spread_json
from kdvit.models import Network
from kdvit.models.cost import forward_cost, parameter_count
from kdvit.tables import text_table


class Opinion(NamedTuple):
    """What one variant of the teacher's tokens says.

    Attributes:
        variant: The variant in words.
        unit: Whether tokens are at length 1.
        standardised: Whether channels are.
        decides: Whether the advice listens to it.
        spread: Its figures with their intervals: of them all, the rule asks for need and rank.
        sure: Whether at both ends of the intervals the verdict is one.
        held: Share of the energy that the leading shared axes, as many as the student's channels, hold of 99 % of the
            images, with its interval.
        verdict: What the rule makes of them.
        why: In words.
    """

    variant: str
    unit: bool
    standardised: bool
    decides: bool
    spread: Spread
    sure: bool
    held: Interval
    verdict: Verdict
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
        plain = {"as_they_are": self.as_they_are, "spread": spread_json(self.spread), "held": self.held._asdict()}
        return {**self._asdict(), **plain}


class Advice(NamedTuple):
    """What to do about a pair.

    Attributes:
        verdict: What to distil.
        width: Width of the map that is distilled.
        have: Width of the student's blocks.
        present: The remedy that the student has already, or "none".
        teacher_width: Channels of the teacher's map.
        why: The verdict in words.
        unchanged: Whether the student is as advised already.
        costs: Of the student without a remedy and with each that it can have.
        opinions: The verdict by each variant of the tokens. The first that decides is the one the advice rests on.
        outliers: What outliers the teacher's tokens have, in words.
    """

    verdict: Verdict
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
    def remedy(self) -> Remedy:
        """The remedy that the student gets: "none", "Lift" or "WideLast"."""
        return REMEDY.get(self.verdict, "none")

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
        return self.rests_on.held.value

    @property
    def decided(self) -> bool:
        """Whether there are variants that decide, and they give one verdict, each within its intervals."""
        deciding = [each for each in self.opinions if each.decides]
        agree = len({each.verdict for each in deciding}) == 1
        return agree and all(each.sure for each in deciding)

    @property
    def rotation(self) -> float:
        """Shared axes over directions of one image."""
        return self.need / self.rank

    def to_json(self) -> dict[str, Any]:
        """Returns plain types."""
        return {
            **self._asdict(),
            **{name: getattr(self, name) for name in ("remedy", "decided", "need", "rank", "held", "rotation")},
            "variant": self.rests_on.variant,
            "costs": [{"student": cost.student, **cost._asdict()} for cost in self.costs],
            "opinions": [each.to_json() for each in self.opinions],
        }

    def facts(self) -> list[str]:
        """Returns what the verdict rests on, a sentence each."""
        spread = self.rests_on.spread
        taken = f"all together take {self.rotation:.1f} times as many{_turn(spread)}"
        leading, held = min(self.have, self.teacher_width), self.rests_on.held
        if self.have >= self.teacher_width:
            fixed = ""
        elif self.rests_on.as_they_are:
            fixed = "; a fixed target of that many (phi_s) holds as much"
        else:
            fixed = "; a fixed target (phi_s) takes its axes from the tokens as they are, and holds at most as much"
        return [
            *(f"Outliers: {each}." for each in self.outliers),
            f"These figures are of the {self.rests_on.variant}.",
            f"The teacher's map has {self.teacher_width} channels. 99 % of the images keep 95 % of their energy in "
            f"{shown(spread.need)} axes that all share (dataset PCA; in brackets 95 % intervals over the images).",
            f"One image alone needs {shown(spread.rank)} directions for that (per-image SVD); {taken}.",
            f"The student's blocks have {self.have} channels. The {leading} leading shared axes hold "
            f"{shown(held, '.1%')} of the energy, or more, of 99 % of the images{fixed}.",
        ]

    def cost_table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Returns head and rows of the table of costs."""
        rows = [(c.student, str(c.width), f"{c.parameters:,}", f"{c.flops / 1e9:.3g}") for c in self.costs]
        return ("student", "distilled width", "parameters", "GFLOP"), rows

    def opinion_table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Returns head and rows of the table of what each variant of the tokens says."""
        rows = [
            (
                each.variant,
                *(shown(figure) for figure in (each.spread.need, each.spread.rank)),
                shown(each.held, ".0%"),
                LABELS[each.verdict],
                _decides(each),
            )
            for each in self.opinions
        ]
        head = ("teacher's tokens", "shared axes", "of one image", f"{self.have} axes hold", "verdict", "decides")
        return head, rows

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
    costs = [Cost("none", have, parameter_count(bare), forward_cost(bare).flops), *remedy_costs(bare, teacher.width)]
    deciding = [each.variant for each in decisive(teacher.variants)]
    opinions = [
        _opinion(ranks, have, teacher.width, costs, ranks.variant in deciding) for ranks in teacher.variants.values()
    ]
    outliers = list(teacher.outliers.found().values())
    advice = Advice("logits", have, have, present, teacher.width, "", False, costs, opinions, outliers)
    verdict, why = advice.rests_on.verdict, advice.rests_on.why
    width = teacher.width if verdict in REMEDY else have
    facing = student.output_shapes(tuple(student.named_layers()) or (-1,), logits=False).features[-1][0]
    unchanged = (present, facing) == (REMEDY.get(verdict, "none"), width)
    if unchanged and verdict in REMEDY:
        why = f"nothing to change: the student has {why}"
    elif present != "none":
        why = f"{why} (Now it has {present} at width {facing}.)"
    if not advice.decided:
        why = f"{_undecided(advice)} {why}"
    if not advice.rests_on.as_they_are:
        why = f"{why} {_left_in_the_loss(advice.rests_on)}"
    return advice._replace(verdict=verdict, width=width, why=why, unchanged=unchanged)


def _opinion(ranks: Ranks, have: int, target: int, costs: list[Cost], decides: bool) -> Opinion:
    of, spread, held = VARIANTS[ranks.variant], ranks.spread(), ranks.held(min(have, target))
    at_value_and_ends = zip(spread.need, spread.rank, (held.value, held.high, held.low), strict=True)
    judged = [judge(have, int(need), int(rank), share, target, costs) for need, rank, share in at_value_and_ends]
    sure = len({verdict for verdict, _ in judged}) == 1
    return Opinion(of.label, of.unit, of.standardised, decides, spread, sure, held, *judged[0])


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
        f"{LABELS[each.verdict]} by the {each.variant} ({shown(each.spread.need)} axes"
        f"{f', {shown(each.spread.rank)} directions of one image' if by_rank else ''}; {advice.have} hold "
        f"{shown(each.held, '.0%')})"
        for each in deciding
    ]
    return f"undecided: {', '.join(said)}, and the student has {advice.have} channels. By the first:"
