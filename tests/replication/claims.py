"""The questions, each with its comparisons and the rule of the verdicts. (What came when: the page's "History".)

A comparison is the mean over seeds of the difference, in points of test accuracy, between two runs of one seed. Its
interval is Student's, 95 %. Its p-value is that of the two-sided paired t-test, corrected within its question by Holm's
method. It is **more** or **less** if the corrected p-value is below 0.05, **alike** if the whole interval is within
LITTLE of zero, and else **undecided**.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as students_t

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
MORE, LESS, ALIKE = "more", "less", "alike"
LEVEL = 0.05
LITTLE = 0.5  # points of accuracy: what counts as little
DIAGONAL = 0.03  # the most that the paper's models are off the diagonal
Result = dict[str, Any]
Results = dict[str, dict[int, Result]]  # by arm and seed


class Estimate(NamedTuple):
    """A mean over seeds with Student's 95 % interval.

    Attributes:
        mean: Of all seeds.
        low: Lower end of the interval.
        high: Upper end.
        p: Of the two-sided t-test against zero, uncorrected.
        values: One each seed.
    """

    mean: float
    low: float
    high: float
    p: float
    values: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of two values or more, with its interval."""
    mean, freedom = float(np.mean(values)), len(values) - 1
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(students_t.ppf(0.975, freedom)) * error
    p = 2 * float(students_t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Estimate(mean, mean - half, mean + half, p, tuple(map(float, values)))


def holm(p: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number (Holm, 1979, Scand. J. Statist. 6:65)."""
    corrected, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def above(low: float, high: float, bound: float = 0.0) -> str:
    """Returns whether something is more than a bound: by its whole interval, or undecided."""
    return HOLDS if low > bound else FAILS if high <= bound else UNDECIDED


def at_most(low: float, high: float, bound: float) -> str:
    """Returns whether something is at most a bound: by its whole interval, or undecided."""
    return HOLDS if high <= bound else FAILS if low > bound else UNDECIDED


def within(low: float, high: float, bound: float) -> str:
    """Returns whether something is off zero by at most a bound: by its whole interval, or undecided."""
    return HOLDS if -bound <= low and high <= bound else FAILS if low > bound or high < -bound else UNDECIDED


def together(verdicts: Sequence[str]) -> str:
    """Returns the verdict of a claim of several parts: all must hold."""
    return FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS


def accuracy(result: Result) -> float:
    """Returns the test accuracy in per cent."""
    return 100 * float(result["scores"]["test/acc1"])


class Question(NamedTuple):
    """What is asked, and the comparisons that answer it.

    Attributes:
        text: The question.
        comparisons: What each one tells, the arm, and what it is compared with.
    """

    text: str
    comparisons: tuple[tuple[str, str, str], ...]


QUESTIONS = {
    "a": Question(
        "Does Lift help through its pooling, its norm, its parametrisation or its loss?",
        (
            ("mean pooling for the class token", "plain_mean", "plain"),
            ("... then the folded norm and head, from the start", "folded_none", "plain_mean"),
            ("... then the lift as parameters of its own", "lift_none", "folded_none"),
            ("... then the feature loss", "lift_mse", "lift_none"),
            ("all together", "lift_mse", "plain"),
        ),
    ),
    "b": Question(
        "Does a fixed basis repair feature distillation at no cost at inference?",
        (
            ("pooled channels", "pool", "plain"),
            ("a random orthogonal basis", "random", "plain"),
            ("the leading axes, pca", "pca", "plain"),
            ("the leading axes in balance, phi_s", "phi_s", "plain"),
            ("a trained orthogonal projector", "orthogonal", "plain"),
            ("a trained linear projector", "linear", "plain"),
            ("Lift + MSE", "lift_mse", "plain"),
            ("WideLast + MSE", "wide_last_mse", "plain"),
            ("phi_s against pooled channels", "phi_s", "pool"),
            ("phi_s against a random basis", "phi_s", "random"),
            ("phi_s against Lift + MSE", "phi_s", "lift_mse"),
            ("WideLast + MSE against phi_s", "wide_last_mse", "phi_s"),
        ),
    ),
    "c": Question(
        "What does a feature term add to soft KD?",
        (
            ("soft KD itself", "soft_kd", "plain"),
            ("pooled channels, to soft KD", "pool_soft", "soft_kd"),
            ("phi_s, to soft KD", "phi_s_soft", "soft_kd"),
            ("Lift, to soft KD", "lift_soft", "soft_kd"),
            ("MSE, to Lift + soft KD", "lift_soft_mse", "lift_soft"),
            ("the lift, to its folded form + soft KD", "lift_soft", "folded_soft"),
            ("WideLast, to soft KD", "wide_last_soft", "soft_kd"),
            ("MSE, to WideLast + soft KD", "wide_last_soft_mse", "wide_last_soft"),
        ),
    ),
    "d": Question(
        "Is WideLast better than a uniformly wide student of its size with as much distillation?",
        (
            ("without a teacher", "wide_last_none", "uniform_none"),
            ("with soft KD", "wide_last_soft", "uniform_soft"),
            ("with soft KD and a feature term (MSE or phi_s)", "wide_last_soft_mse", "uniform_soft_phi_s"),
            ("the same, at one rate for both", "wide_last_soft_mse_fast", "uniform_soft_phi_s"),
        ),
    ),
    "e": Question(
        "What lasts when training is four times as long?",
        (
            ("longer training of the plain student", "plain_long", "plain"),
            ("soft KD", "soft_kd_long", "plain_long"),
            ("soft KD + phi_s, to soft KD", "phi_s_soft_long", "soft_kd_long"),
            ("Lift + soft KD + MSE, to soft KD", "lift_soft_mse_long", "soft_kd_long"),
            ("WideLast + soft KD + MSE, to soft KD", "wide_last_soft_mse_long", "soft_kd_long"),
            ("WideLast + soft KD + MSE, to its size with soft KD", "wide_last_soft_mse_long", "uniform_soft_long"),
        ),
    ),
}
NEARER = (  # distances to the teacher's geometry, without a verdict
    ("How much nearer to the teacher Lift is by itself", "plain", "lift_none"),
    ("... and by distillation", "lift_none", "lift_mse"),
    ("How much nearer WideLast is by itself", "plain", "wide_last_none"),
    ("... and by distillation", "wide_last_none", "wide_last_mse"),
)


def paired(results: Results, arm: str, other: str, measure: Callable[[Result], float] = accuracy) -> Estimate | None:
    """Returns the difference of two arms over the seeds that both have; None without two of them."""
    ours, theirs = results.get(arm, {}), results.get(other, {})
    seeds = sorted(set(ours) & set(theirs))
    if len(seeds) < 2:
        return None
    return estimate([measure(ours[seed]) - measure(theirs[seed]) for seed in seeds])


class Finding(NamedTuple):
    """Something asked or claimed, with what was found.

    Attributes:
        claim: The claim.
        rule: The rule of the verdict.
        found: The numbers, as text.
        verdict: In a word or two.
    """

    claim: str
    rule: str
    found: str
    verdict: str


class Answer(NamedTuple):
    """A comparison with what was found.

    Attributes:
        text: What it tells.
        arms: The two arms.
        found: The difference in points.
        p: Corrected within the question.
        verdict: more, less, alike or undecided.
    """

    text: str
    arms: tuple[str, str]
    found: Estimate
    p: float
    verdict: str


def answers(results: Results, question: Question) -> list[Answer]:
    """Returns what was found on a question's comparisons, of those that have two seeds."""
    pairs = [(text, arm, other, paired(results, arm, other)) for text, arm, other in question.comparisons]
    tried = [(text, (arm, other), found) for text, arm, other, found in pairs if found is not None]
    corrected = holm([found.p for *_, found in tried])
    return [Answer(*each, p, verdict(each[2], p)) for each, p in zip(tried, corrected, strict=True)]


def verdict(found: Estimate, p: float) -> str:
    """Returns the verdict by the rule that stands above."""
    if p < LEVEL:
        return MORE if found.mean > 0 else LESS
    return ALIKE if found.low >= -LITTLE and found.high <= LITTLE else UNDECIDED


def beside(results: Results, teacher: Result) -> list[tuple[str, str, str]]:
    """Returns distances to the teacher's geometry: what is compared, the arms, the difference."""
    found = [
        (text, f"`{arm}` - `{other}`", paired(results, arm, other, distance(teacher))) for text, arm, other in NEARER
    ]
    return [(text, arms, f"{shown(each)} of distance") for text, arms, each in found if each is not None]


def shown(found: Estimate) -> str:
    """Returns a difference and its interval as text."""
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


# The geometry: the teacher's by intervals over images, the students' by distances over seeds

MOVED = {"Lift": "lift_mse", "WideLast": "wide_last_mse"}


def own_layer(result: Result) -> dict[str, Any]:
    """Returns the numbers of a network's own last block (of a Lift student, the one before the lift)."""
    layer: dict[str, Any] = result["geometry"][0]
    return layer


def distance(teacher: Result) -> Callable[[Result], float]:
    """Returns how far a student's geometry is from the teacher's.

    It is the mean of |ln(student / teacher)| of the two figures: SVD rank and PCA dimension at 95 % of the energy,
    99th percentile of the images, each at the last block. 0 is the teacher's geometry, 0.69 a factor of two.
    """
    goal = own_layer(teacher)

    def measure(result: Result) -> float:
        ours = own_layer(result)
        logs = [abs(math.log(ours[name]["p99"] / goal[name]["p99"])) for name in ("svd_rank", "pca_dimension")]
        return sum(logs) / len(logs)

    return measure


def geometry_findings(results: Results, teacher: Result, student_width: int) -> list[Finding]:
    """Returns what was found on the claims of geometry."""
    layer = own_layer(teacher)
    rank, shared = layer["svd_rank"], layer["pca_dimension"]
    findings = [
        Finding(
            "Teacher features are per-image low-rank",
            f"SVD rank (95 %, p99) at most the student's {student_width} channels",
            f"{rank['p99']:.0f} [{rank['low']:.0f}, {rank['high']:.0f}] of {layer['width']}",
            at_most(rank["low"], rank["high"], student_width),
        ),
        Finding(
            "... while the shared subspace is wide",
            f"PCA dimension (95 %, p99) above the student's {student_width} channels",
            f"{shared['p99']:.0f} [{shared['low']:.0f}, {shared['high']:.0f}] of {layer['width']}",
            above(shared["low"], shared["high"], student_width),
        ),
        _diagonal("SEP lies on the diagonal", layer, layer["sep_intervals"]),
        _diagonal(
            "... and so do its controls: permuted channels", layer, _controls(layer, "permuted_min", "permuted_max")
        ),
        _diagonal("... and Gaussian noise", layer, _controls(layer, "gaussian", "gaussian")),
    ]
    for title, arm in MOVED.items():
        moved = paired(results, "plain", arm, distance(teacher))
        claim, rule = f"{title} moves the student's geometry to the teacher's", f"`plain` - `{arm}`: distance above 0"
        if moved is not None:
            findings.append(Finding(claim, rule, shown(moved), above(moved.low, moved.high)))
    return findings


def _controls(layer: dict[str, Any], low: str, high: str) -> dict[str, list[float]]:
    return {level: [found[low], found[high]] for level, found in layer["sep"].items()}


def _diagonal(claim: str, layer: dict[str, Any], intervals: dict[str, list[float]]) -> Finding:
    offsets = {level: [value - float(level) for value in pair] for level, pair in intervals.items()}
    verdicts = [within(low, high, DIAGONAL) for low, high in offsets.values()]
    largest = max((value for pair in offsets.values() for value in pair), key=abs)
    rule = f"bandwidths at 50 to 90 % within {DIAGONAL:g} of the diagonal"
    return Finding(claim, rule, f"at most {largest:+.3f} off, of {layer['width']} channels", together(verdicts))
