"""The rule, the costs, and the config to paste."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from kdvit.analysis import Options, advise, measure
from kdvit.analysis.geometry import LayerReport
from kdvit.models import LiftViT, TimmNetwork, TimmStudent
from kdvit.models.timm_model import create_timm_model
from tests.tiny import student


def _layer(need: int, rank: int, width: int) -> LayerReport:
    """A teacher's layer with given ranks at 95 %."""
    report = measure(torch.randn(3, 4, 5), Options(permutations=1))

    return report._replace(width=width, svd_energy=_energy(rank, width), pca_energy=_energy(need, width))


def _energy(rank: int, width: int) -> np.ndarray:
    curve = np.concatenate([np.linspace(0.1, 0.9, rank - 1), np.linspace(0.96, 1, width - rank + 1)])
    return np.stack([curve] * 3)


def test_the_published_pair_is_advised_as_the_paper_did_and_costs_what_it_says() -> None:
    advice = advise(_layer(302, 61, 384), TimmStudent("deit_tiny_patch16_224"), 192)
    assert (advice.remedy, advice.width) == ("WideLast", 384)
    costs = {cost.student: cost.parameters for cost in advice.costs}
    assert costs == {"as it is": 5_717_416, "Lift": 5_983_528, "WideLast": 7_313_896}
    assert advice.rotation == pytest.approx(302 / 61)
    assert advice.held == pytest.approx(_energy(302, 384)[0, 191])
    assert "192 channels cannot hold 302 axes, an encoding mismatch" in advice.why
    assert "1.28 times" in advice.why
    assert "all together take 5.0 times as many" in str(advice)


@pytest.mark.parametrize(
    ("need", "rank", "have", "remedy", "why"),
    [
        (10, 5, 16, "none", "16 channels can hold the 10 axes"),
        (20, 5, 24, "none", "as wide as the teacher's"),
        (20, 5, 16, "Lift", "would cost .* times the student's"),
        (20, 18, 16, "WideLast", "nor the 18 directions of single images"),
    ],
)
def test_the_rule(need: int, rank: int, have: int, remedy: str, why: str) -> None:
    advice = advise(_layer(need, rank, 24), student(), have)
    assert advice.remedy == remedy
    assert advice.width == (have if remedy == "none" else 24)
    assert re.search(why, advice.why)


def test_a_student_that_no_remedy_fits_is_told_so() -> None:
    advice = advise(_layer(20, 5, 24), TimmNetwork(create_timm_model("resnet18")), 16)
    assert advice.remedy == "none"
    assert "this student is none" in advice.why
    assert [cost.student for cost in advice.costs] == ["as it is"]


def test_a_lift_of_the_wrong_width_is_widened() -> None:
    lifted = LiftViT(**{**student("lift").init_args, "width": 18})
    advice = advise(_layer(20, 5, 24), lifted, 18)
    assert (advice.remedy, advice.width) == ("Lift", 24)
