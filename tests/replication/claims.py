"""The paper's claims, each with the rule of its verdict. Written down before any result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as students_t

from tests.replication.arms import SEEDS

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
LITTLE = 0.5  # points of accuracy: what counts as little
DIAGONAL = 0.03  # the most that the paper's models are off the diagonal
RESAMPLES = 10_000
Result = dict[str, Any]
Results = dict[str, dict[int, Result]]  # by arm and seed


class Estimate(NamedTuple):
    """A mean over seeds with its bootstrap 95 % interval.

    Attributes:
        mean: Of all seeds.
        low: 2.5th percentile of the means of resampled seeds.
        high: 97.5th percentile.
        values: One each seed.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def bootstrap(values: Sequence[float]) -> Estimate:
    """Returns the mean with its percentile interval, seeds drawn with replacement; always the same draws."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(axis=1), (2.5, 97.5))
    return Estimate(float(array.mean()), float(low), float(high), tuple(map(float, array)))


def students_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the mean by Student's t, which for few seeds is wider than the bootstrap's."""
    half = students_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


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


class Paired(NamedTuple):
    """A claim on two arms, by the differences between runs of one seed.

    Attributes:
        text: The claim.
        arm: The one that is said to gain, or not to.
        other: What it is compared with.
        little: Whether it is said to gain at most a little, instead of something.
    """

    text: str
    arm: str
    other: str
    little: bool = False

    @property
    def rule(self) -> str:
        """The rule of the verdict."""
        return f"difference of at most {LITTLE:g} points" if self.little else "difference above 0"

    def verdict(self, estimate: Estimate) -> str:
        """Returns the verdict on a difference in points."""
        return at_most(estimate.low, estimate.high, LITTLE) if self.little else above(estimate.low, estimate.high)


CLAIMS = (  # written down before any result
    Paired("Naive feature KD gains little", "naive", "plain", little=True),
    Paired("A train-only projector does not repair it", "projector", "plain", little=True),
    Paired("Lift + MSE gains more than naive feature KD", "lift_mse", "naive"),
    Paired("WideLast + MSE gains more than naive feature KD", "wide_last_mse", "naive"),
    Paired("WideLast + MSE gains more than Lift + MSE", "wide_last_mse", "lift_mse"),
    Paired("WideLast + soft KD gains more than Lift + soft KD", "wide_last_soft_mse", "lift_soft_spectral"),
    Paired("Lift gains without a teacher", "lift_none", "plain"),
    Paired("WideLast gains without a teacher", "wide_last_none", "plain"),
    Paired("Lift's gain is not only parameters", "lift_none", "uniform_lift"),
    Paired("WideLast's gain is not only parameters", "wide_last_none", "uniform_wide_last"),
    Paired("Wider than the teacher does not help", "lift_wider", "lift_none", little=True),
)
BESIDE = (  # added when the results were known, so without a verdict
    ("The train-only projector against naive", "projector", "naive"),
    ("Lift + SpectralKD against naive", "lift_spectral", "naive"),
    ("What distillation adds to Lift", "lift_mse", "lift_none"),
    ("What distillation adds to WideLast", "wide_last_mse", "wide_last_none"),
    ("WideLast + MSE against its size without a teacher", "wide_last_mse", "uniform_wide_last"),
    ("Naive against WideLast's size without a teacher", "naive", "uniform_wide_last"),
)
NEARER = (  # likewise, of distances to the teacher's geometry
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
    return bootstrap([measure(ours[seed]) - measure(theirs[seed]) for seed in seeds])


class Finding(NamedTuple):
    """A claim with what was found.

    Attributes:
        claim: The claim.
        rule: The rule of the verdict.
        found: The numbers, as text.
        verdict: holds, does not hold, or undecided.
    """

    claim: str
    rule: str
    found: str
    verdict: str


def accuracy_findings(results: Results) -> list[Finding]:
    """Returns what was found on the claims of accuracy; those that have no two seeds yet are undecided."""
    findings = []
    for claim in CLAIMS:
        estimate = paired(results, claim.arm, claim.other)
        rule = f"`{claim.arm}` - `{claim.other}`: {claim.rule}"
        findings.append(_judged(claim.text, rule, estimate, claim.verdict, _told))
    return findings


def beside(results: Results, teacher: Result) -> list[tuple[str, str, str]]:
    """Returns what to read beside the claims: what is compared, the arms, the difference."""
    measures = [(BESIDE, accuracy, "points"), (NEARER, distance(teacher), "of distance")]
    found = [
        (text, f"`{arm}` - `{other}`", unit, paired(results, arm, other, measure))
        for rows, measure, unit in measures
        for text, arm, other in rows
    ]
    return [(text, arms, f"{shown(each)} {unit}") for text, arms, unit, each in found if each is not None]


def _judged(
    claim: str,
    rule: str,
    estimate: Estimate | None,
    verdict: Callable[[Estimate], str],
    told: Callable[[Estimate], str],
) -> Finding:
    """Returns what was found on a difference; it is undecided as long as seeds are missing."""
    if estimate is None:
        return Finding(claim, rule, "not enough seeds", UNDECIDED)
    complete = len(estimate.values) >= len(SEEDS)
    return Finding(claim, rule, told(estimate), verdict(estimate) if complete else UNDECIDED)


def _told(estimate: Estimate) -> str:
    more = sum(value > 0 for value in estimate.values)
    low, high = students_interval(estimate.values)
    interval = f"by Student's t [{low:+.2f}, {high:+.2f}]"
    return f"{shown(estimate)} points, {interval}; above 0 in {more} of {len(estimate.values)} seeds"


def shown(estimate: Estimate) -> str:
    """Returns a difference and its interval as text."""
    return f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


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
        estimate = paired(results, "plain", arm, distance(teacher))
        claim, rule = f"{title} moves the student's geometry to the teacher's", f"`plain` - `{arm}`: distance above 0"
        findings.append(_judged(claim, rule, estimate, lambda found: above(found.low, found.high), shown))
    return findings


def _controls(layer: dict[str, Any], low: str, high: str) -> dict[str, list[float]]:
    return {level: [found[low], found[high]] for level, found in layer["sep"].items()}


def _diagonal(claim: str, layer: dict[str, Any], intervals: dict[str, list[float]]) -> Finding:
    offsets = {level: [value - float(level) for value in pair] for level, pair in intervals.items()}
    verdicts = [within(low, high, DIAGONAL) for low, high in offsets.values()]
    largest = max((value for pair in offsets.values() for value in pair), key=abs)
    rule = f"bandwidths at 50 to 90 % within {DIAGONAL:g} of the diagonal"
    return Finding(claim, rule, f"at most {largest:+.3f} off, of {layer['width']} channels", together(verdicts))
