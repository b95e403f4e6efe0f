"""Rotation beside its null, and figures with their intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdvit.analysis import Advice, Options, Outliers, Ranks, advise, measure, p99
from kdvit.analysis.page import page
from kdvit.analysis.report import NetworkReport, Report
from kdvit.analysis.shuffled import IMAGES, ShuffledTokens
from kdvit.models import Network, TimmNetwork
from kdvit.models.timm_model import create_timm_model
from kdvit.seeding import mixed_seed
from tests.analysis.test_outliers import fixed, isotropic, rotated
from tests.tiny import student

FEW = Options(permutations=1)
SMALL = [(100, 4, 8), (100, 16, 48), (100, 40, 16), (20, 30, 10)]
FULL = [(120, 49, 768), (40, 1024, 384)]


@pytest.mark.parametrize("shape", [*SMALL, *(pytest.param(shape, marks=pytest.mark.slow) for shape in FULL)])
@pytest.mark.parametrize("kind", [isotropic, fixed], ids=["all directions", "one subspace"])
def test_one_distribution_for_all_images_does_not_turn(kind, shape: tuple[int, int, int]) -> None:
    teacher = measure(kind(shape, shape[2] // 2), FEW)
    for ranks in teacher.variants.values():
        spread = ranks.spread()
        assert spread.turn.low <= 1 <= spread.turn.high, (ranks.variant, spread)
        assert not spread.turned
    if shape[1:] == (49, 768):
        assert teacher.rotation() > 6
    said = str(advise(teacher, student()))
    assert "turn from each other" not in said
    assert "not to be told from what any tokens take of so many channels: a factor of" in said


def test_images_in_subspaces_of_their_own_turn() -> None:
    teacher = measure(rotated((60, 40, 64), 12), FEW)
    spread = teacher.ranks.spread()
    assert spread.rotation.value == teacher.rotation()
    assert spread.turn.low > 2
    assert "turn from each other, by a factor of 2." in str(advise(teacher, student()))


@pytest.mark.parametrize(("kind", "turns"), [(isotropic, False), (rotated, True)])
def test_a_page_speaks_of_subspaces_that_turn_only_where_they_do(kind, turns: bool) -> None:
    layer = measure(kind((60, 40, 64), 12), FEW)
    network = NetworkReport("teacher", "", 0, 0, "", None, 1, [layer], "noise", 1)
    report = Report([network], FEW, advise(layer, student()))
    assert ("turn from each other" in page(report, {})) == turns
    assert "turn from each other" not in page(report._replace(advice=None), {})


def test_shuffled_images_hold_at_each_place_the_tokens_of_images_drawn_by_seed() -> None:
    images, places = IMAGES + 30, 5
    tokens = torch.randn(images, places, 3)
    numbers = torch.arange(images)
    keys = np.stack(
        [
            torch.rand(places, generator=torch.Generator().manual_seed(mixed_seed(4, i)), dtype=torch.float64).numpy()
            for i in range(images)
        ]
    )
    chosen = keys.argsort(0)[:IMAGES]
    expected = np.stack([tokens.numpy()[chosen[:, place], place] for place in range(places)], 1)
    for order in (numbers, numbers.flip(0)):
        metric = ShuffledTokens(seed=4)
        for part in order.split(7):
            metric.update(tokens[part], part)
        assert sum(len(state) for state in metric.tokens) == IMAGES
        np.testing.assert_array_equal(metric.compute(), expected)
    assert np.median([len(np.unique(row)) for row in chosen]) == places  # of as many images


def test_the_shuffled_images_of_several_processes_are_those_of_one() -> None:
    tokens, numbers = torch.randn(IMAGES + 9, 4, 3), torch.arange(IMAGES + 9)
    one, first, second = ShuffledTokens(), ShuffledTokens(), ShuffledTokens()
    one.update(tokens, numbers)
    first.update(tokens[::2], numbers[::2])
    second.update(tokens[1::2], numbers[1::2])
    for name in ("keys", "tokens"):  # as torchmetrics gathers them
        setattr(first, name, [*getattr(first, name), *getattr(second, name)])
    torch.testing.assert_close(first.compute(), one.compute())


def _ranks(dimensions: list[int], ranks: list[int], width: int) -> Ranks:
    steps = np.arange(1, width + 1)
    pca, svd = (np.where(steps >= np.array(least)[:, None], 0.96, 0.9) for least in (dimensions, ranks))
    return Ranks("raw", svd, pca, np.ones(width), Outliers(0, 0, 0), (svd[:3], pca[:3]))


def test_intervals_equal_a_plain_resampling_of_the_images() -> None:
    numbers = np.random.default_rng(1)
    dimensions, svd = numbers.integers(10, 30, 40), numbers.integers(3, 9, 40)
    spread = _ranks(dimensions.tolist(), svd.tolist(), 30).spread()
    generator = np.random.default_rng(0)
    drawn = [*generator.integers(40, size=(1000, 40))]
    nulls = [*generator.integers(3, size=(1000, 3))]
    needs = [sorted(dimensions[each])[39] for each in drawn]  # 99 % of 40 are all
    rotations = [np.percentile(dimensions[each], 99) / np.percentile(svd[each], 99) for each in drawn]
    without = [np.percentile(dimensions[each], 99) / np.percentile(svd[each], 99) for each in nulls]
    assert spread.need == pytest.approx((dimensions.max(), *np.percentile(needs, (2.5, 97.5))))
    assert spread.rotation == pytest.approx((p99(dimensions) / p99(svd), *np.percentile(rotations, (2.5, 97.5))))
    turns = np.percentile(np.array(rotations) / np.array(without), (2.5, 97.5))
    assert spread.turn[1:] == pytest.approx(tuple(turns))


def test_an_interval_that_spans_the_students_width_leaves_the_advice_undecided() -> None:
    dimensions = [12] * 97 + [20] * 3
    ranks = _ranks(dimensions, [18] * 100, 24)
    assert ranks.spread().need == (20, 12, 20)
    layer = measure(torch.randn(3, 4, 24), FEW, robust=False)._replace(variants={"raw": ranks})
    advice = advise(layer, student())
    assert not advice.decided
    assert advice.why.startswith(
        "undecided: WideLast by the tokens as they are (20 [12, 20] axes; 16 hold 90% [90%, 96%]), and the student has "
        "16 channels. By the first: WideLast at width 24. 16 channels cannot hold 20 axes"
    )
    assert "not within its intervals" in str(advice)


def _advice(ranks: Ranks, width: int, pair: Network) -> Advice:
    layer = measure(torch.randn(3, 4, width), FEW, robust=False)
    return advise(layer._replace(variants={"raw": ranks}), pair)


def test_a_factor_that_is_neither_one_nor_a_turn_is_a_number_alone() -> None:
    ranks = _ranks([104] * 10, [100] * 10, 120)
    svd, _ = ranks.shuffled
    even = ranks._replace(shuffled=(svd, svd))
    assert even.spread().turn == pytest.approx((1.04, 1.04, 1.04))
    said = str(_advice(even, 120, student()))
    assert "(tokens shuffled among images: 1.0 times), a factor of 1.04 [1.04, 1.04]." in said


def test_an_interval_that_spans_the_students_width_leaves_one_advice_where_phi_s_is_that_of_both_ends() -> None:
    resnet = TimmNetwork(create_timm_model("resnet18"))
    advice = _advice(_ranks([500] * 97 + [600] * 3, [5] * 100, 700), 700, resnet)
    assert (advice.have, advice.decided) == (512, True)
    assert advice.why.startswith("a fixed target: FeatureDistiller, projector: phi_s. 512")


def test_a_rank_that_leaves_the_advice_undecided_is_said() -> None:
    advice = _advice(_ranks([40] * 100, [12] * 97 + [20] * 3, 64), 64, student())
    assert advice.why.startswith(
        "undecided: WideLast by the tokens as they are (40 [40, 40] axes, 20 [12, 20] directions of one image; 16 "
        "hold 90% [90%, 90%]), and the student has 16 channels."
    )


def test_need_and_holding_are_of_the_same_images() -> None:
    ranks = _ranks([16] * 990 + [17] * 10, [5] * 1000, 24)
    assert p99(ranks.pca_dimension()) == pytest.approx(16.01)
    assert (ranks.spread().need.value, ranks.held(16).value, ranks.held(15).value) == (16, 0.96, 0.9)
    one_more = _ranks([16] * 989 + [17] * 11, [5] * 1000, 24)
    assert (one_more.spread().need.value, one_more.held(16).value) == (17, 0.9)
    advice = advise(measure(torch.randn(3, 4, 24), FEW, robust=False)._replace(variants={"raw": ranks}), student())
    assert advice.rests_on.verdict == "phi_s"
    assert "16 channels can hold the 16 axes" in advice.why
    energy = measure(isotropic((7, 30, 12), 0), FEW).ranks
    for axes in range(1, 13):
        assert (axes >= energy.spread().need.value) == (energy.held(axes).value >= 0.95)
