"""Bootstrap and verdicts on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.replication import claims
from tests.replication.arms import ARMS
from tests.replication.claims import FAILS, HOLDS, UNDECIDED, above, at_most, bootstrap, paired, together, within


def scored(*accuracies: float) -> dict[int, dict]:
    return {seed: {"scores": {"test/acc1": value}} for seed, value in enumerate(accuracies)}


def test_the_interval_of_equal_values_is_a_point() -> None:
    assert bootstrap([1.5] * 5) == (1.5, 1.5, 1.5, (1.5,) * 5)


def test_the_interval_is_that_of_the_resampled_means_and_always_the_same() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 200)
    found = bootstrap(values)
    error = 1.96 * values.std() / np.sqrt(200)  # of the normal approximation, close for 200 values
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.02)
    assert found == bootstrap(values)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (above(0.1, 0.5), HOLDS),
        (above(-0.1, 0.5), UNDECIDED),
        (above(-0.5, 0.0), FAILS),
        (at_most(-1.0, 0.5, 0.5), HOLDS),
        (at_most(0.4, 0.6, 0.5), UNDECIDED),
        (at_most(0.6, 0.9, 0.5), FAILS),
        (within(-0.03, 0.02, 0.03), HOLDS),
        (within(0.02, 0.04, 0.03), UNDECIDED),
        (within(-0.5, -0.04, 0.03), FAILS),
        (together([HOLDS, UNDECIDED]), UNDECIDED),
        (together([HOLDS, FAILS, UNDECIDED]), FAILS),
        (together([HOLDS, HOLDS]), HOLDS),
    ],
)
def test_a_verdict_needs_the_whole_interval(verdict: str, expected: str) -> None:
    assert verdict == expected


def test_differences_are_between_runs_of_one_seed() -> None:
    results = {"a": scored(0.80, 0.90, 0.70), "b": {2: scored(0, 0, 0.69)[2], 0: scored(0.79)[0]}}
    found = paired(results, "a", "b")
    assert found is not None
    assert found.values == pytest.approx((1.0, 1.0))
    assert paired({"a": scored(0.8), "b": scored(0.7)}, "a", "b") is None


def test_a_claim_that_does_not_reappear_is_said_not_to_hold() -> None:
    plain, naive = (0.80, 0.81, 0.82, 0.81, 0.80), (0.83, 0.84, 0.85, 0.84, 0.83)
    results = {"plain": scored(*plain), "naive": scored(*naive), "lift_mse": scored(*[0.7] * 5)}
    verdicts = {finding.claim: finding.verdict for finding in claims.accuracy_findings(results)}
    assert verdicts["Naive feature KD gains little"] == FAILS
    assert verdicts["Lift + MSE gains more than naive feature KD"] == FAILS
    assert verdicts["WideLast gains without a teacher"] == UNDECIDED
    few = {"plain": scored(*plain[:4]), "naive": scored(*naive[:4])}
    assert claims.accuracy_findings(few)[0].verdict == UNDECIDED


def test_students_interval_is_that_of_a_table() -> None:
    low, high = claims.students_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * np.sqrt(2.5 / 5)  # the 97.5 % quantile of four degrees of freedom
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=1e-3)


def test_what_is_read_beside_the_claims_has_no_verdict() -> None:
    results = {"projector": scored(*[0.8] * 5), "naive": scored(*[0.79] * 5)}
    rows = claims.beside(results, {"geometry": [layer(16, 48)]})
    assert rows == [("The train-only projector against naive", "`projector` - `naive`", "+1.00 [+1.00, +1.00] points")]


def test_every_claim_is_about_arms_that_are_trained() -> None:
    assert {name for claim in claims.CLAIMS for name in (claim.arm, claim.other)} <= set(ARMS)
    assert {name for _, *arms in (*claims.BESIDE, *claims.NEARER) for name in arms} <= set(ARMS)
    assert all(ARMS[name].geometry for name in ("plain", *claims.MOVED.values()))


def layer(svd: float, pca: float, off: float = 0.0) -> dict:
    levels = ("0.5", "0.6", "0.7", "0.8", "0.9")
    sep = {a: {"permuted_min": float(a), "permuted_max": float(a) + 0.01, "gaussian": float(a)} for a in levels}
    return {
        "width": 96,
        "svd_rank": {"p99": svd, "low": svd - 1, "high": svd + 1},
        "pca_dimension": {"p99": pca, "low": pca - 1, "high": pca + 1},
        "sep": sep,
        "sep_intervals": {a: [float(a) + off, float(a) + off + 0.01] for a in levels},
    }


def test_geometry_is_judged_by_the_students_width_the_diagonal_and_the_way_to_the_teacher() -> None:
    teacher = {"geometry": [layer(16, 48)]}
    plain = {seed: {"geometry": [layer(8, 12)]} for seed in range(5)}
    results = {"plain": plain, "lift_mse": {seed: {"geometry": [layer(16, 24)]} for seed in range(5)}}
    verdicts = [finding.verdict for finding in claims.geometry_findings(results, teacher, 24)]
    assert verdicts == [HOLDS, HOLDS, HOLDS, HOLDS, HOLDS, HOLDS, UNDECIDED]
    assert claims.distance(teacher)(plain[0]) == pytest.approx(1.5 * np.log(2))
    narrow = claims.geometry_findings({}, {"geometry": [layer(30, 20, off=0.1)]}, 24)
    assert [finding.verdict for finding in narrow[:3]] == [FAILS, FAILS, FAILS]
