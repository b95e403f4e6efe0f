"""What is logged of a student's map beside its target's, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdvit.distillers import FeatureDistiller
from kdvit.structures import ViTOutput


def maps(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns a student's and a teacher's map of 6 channels, which have other means and scales."""
    draw = np.random.default_rng(seed)
    scale, mean = 10.0 ** np.arange(-2, 4), np.array([0, 300, -2, 5, 0, 1])
    teacher = draw.standard_normal((4, 6, 5, 5)) * scale[:, None, None] + mean[:, None, None]
    student = teacher + 0.7 * scale[:, None, None] * draw.standard_normal(teacher.shape)
    return student.astype(np.float32), teacher.astype(np.float32)


def measured(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    outputs = (ViTOutput(None, (torch.from_numpy(each),)) for each in (student, teacher))
    return {name: value.item() for name, value in FeatureDistiller().metrics(*outputs).items()}


def by_hand(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    ours, theirs = (x.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in (student, teacher))
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    variances, left = theirs.var(0), (ours - theirs).var(0)
    squared = ((ours - theirs) ** 2).mean(0)
    own = [1 - error / variance for error, variance in zip(squared, variances, strict=True) if variance]
    return {
        "cosine": cosines.mean(),
        "explained_variance": 1 - left[variances > 0].sum() / variances.sum(),
        "r2": np.average(1 - squared[variances > 0] / variances[variances > 0], weights=variances[variances > 0]),
        "r2_median": np.median(own),
    }


def test_every_figure_is_that_of_its_formula() -> None:
    assert measured(*maps()) == pytest.approx(by_hand(*maps()), rel=1e-4)


def test_a_scaled_copy_keeps_the_cosine_and_loses_a_quarter_of_the_variance() -> None:
    teacher = torch.randn(4, 6, 5, 5).numpy()
    teacher -= teacher.mean((0, 2, 3), keepdims=True)
    expected = {"cosine": 1, "explained_variance": 0.75, "r2": 0.75, "r2_median": 0.75}
    assert measured(teacher * 0.5, teacher) == pytest.approx(expected, abs=1e-5)


def test_an_offset_is_forgiven_by_explained_variance_alone() -> None:
    teacher = torch.randn(4, 6, 5, 5).numpy()
    found = measured(teacher + 100, teacher)
    assert found["explained_variance"] == pytest.approx(1, abs=1e-3)
    assert found["r2"] < -5000
    assert found["r2_median"] < -5000
    assert found == pytest.approx(by_hand(teacher + 100, teacher), rel=1e-3)


def test_a_giant_channel_hides_the_rest_from_all_but_the_median() -> None:
    teacher = torch.randn(4, 6, 5, 5).numpy()
    teacher[:, 2] *= 1000
    student = np.zeros_like(teacher)
    student[:, 2] = teacher[:, 2]
    found = measured(student, teacher)
    assert found["r2"] > 0.999
    assert found["explained_variance"] > 0.999
    assert found["r2_median"] == pytest.approx(0, abs=0.1)
    assert found == pytest.approx(by_hand(student, teacher), rel=1e-4, abs=1e-6)


def test_constant_channels_of_the_target_are_left_out() -> None:
    student, teacher = maps()
    teacher[:, 1], teacher[:, 4] = 0.1, 0
    kept = [0, 2, 3, 5]
    found, without = measured(student, teacher), by_hand(student[:, kept], teacher[:, kept])
    names = ("explained_variance", "r2", "r2_median")
    assert [found[name] for name in names] == pytest.approx([without[name] for name in names], rel=1e-4)


def test_there_is_nothing_to_explain_in_a_single_token() -> None:
    found = measured(np.ones((1, 6, 1, 1), np.float32), np.full((1, 6, 1, 1), 0.1, np.float32))
    assert (found["explained_variance"], found["r2"], found["r2_median"]) == (0, 0, 0)


def test_a_student_that_is_not_finite_has_no_score() -> None:
    student, teacher = maps()
    student[0, 0, 0, 0] = np.nan
    assert np.isnan(measured(student, teacher)["r2"])
