"""Intervals and verdicts on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.replication import claims
from tests.replication.arms import ARMS
from tests.replication.claims import (
    ALIKE,
    FAILS,
    HOLDS,
    LESS,
    MORE,
    UNDECIDED,
    Question,
    above,
    answers,
    at_most,
    estimate,
    holm,
    paired,
    together,
    within,
)


def scored(*accuracies: float) -> dict[int, dict]:
    return {seed: {"scores": {"test/acc1": value}} for seed, value in enumerate(accuracies)}


def test_an_interval_is_students_by_a_table() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * np.sqrt(2.5 / 5)  # the 97.5 % quantile of four degrees of freedom
    assert found[:3] == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-3)
    assert found.p == pytest.approx(0.0133, abs=1e-4)  # t = 4.243
    assert estimate([1.5] * 5) == (1.5, 1.5, 1.5, 0.0, (1.5,) * 5)


def test_holms_correction_is_that_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


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
def test_a_verdict_on_the_geometry_needs_the_whole_interval(verdict: str, expected: str) -> None:
    assert verdict == expected


def test_differences_are_between_runs_of_one_seed() -> None:
    results = {"a": scored(0.80, 0.90, 0.70), "b": {2: scored(0, 0, 0.69)[2], 0: scored(0.79)[0]}}
    found = paired(results, "a", "b")
    assert found is not None
    assert found.values == pytest.approx((1.0, 1.0))
    assert paired({"a": scored(0.8), "b": scored(0.7)}, "a", "b") is None


def test_a_question_is_answered_by_its_rule_and_a_missing_arm_is_left_out() -> None:
    noise = np.random.default_rng(0).normal(0, 0.001, (5, 8))
    means = {"plain": 0.80, "more": 0.83, "less": 0.77, "alike": 0.80, "wild": 0.80}
    results = {name: scored(*(mean + noise[i])) for i, (name, mean) in enumerate(means.items())}
    results["wild"] = scored(*(0.80 + 20 * noise[4]))
    asked = Question("?", tuple((name, name, "plain") for name in ("more", "less", "alike", "wild", "missing")))
    found = {answer.text: answer for answer in answers(results, asked)}
    assert {name: answer.verdict for name, answer in found.items()} == {
        "more": MORE,
        "less": LESS,
        "alike": ALIKE,
        "wild": UNDECIDED,
    }
    assert found["more"].p > found["more"].found.p
    assert found["more"].found.mean == pytest.approx(3.0, abs=0.2)


def test_every_question_and_distance_is_about_arms_that_are_trained() -> None:
    asked = [each for question in claims.QUESTIONS.values() for each in question.comparisons]
    assert {name for _, *arms in (*asked, *claims.NEARER) for name in arms} == set(ARMS)
    assert all(ARMS[name].geometry for _, *arms in claims.NEARER for name in arms)
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
    assert verdicts == [HOLDS] * 6
    assert claims.distance(teacher)(plain[0]) == pytest.approx(1.5 * np.log(2))
    narrow = claims.geometry_findings({}, {"geometry": [layer(30, 20, off=0.1)]}, 24)
    assert [finding.verdict for finding in narrow[:3]] == [FAILS, FAILS, FAILS]
    assert claims.beside(results | {"lift_none": results["plain"]}, teacher)[1][2] == "+0.69 [+0.69, +0.69] of distance"
