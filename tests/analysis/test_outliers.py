"""What outliers do to a teacher's ranks, and not to the advice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdvit.analysis import Options, advise, measure
from kdvit.analysis.outliers import FOUND, outlier_share
from kdvit.models import Network, TimmStudent
from tests.tiny import student

FEW = Options(permutations=1)
Shape = tuple[int, int, int]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _directions(shape: Shape, rank: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(shape[2], rank, generator=generator))[0].T


def rotated(shape: Shape, rank: int) -> Tensor:
    """Each image in a random subspace of its own."""
    generator = _generator()
    images, tokens, _ = shape
    return torch.stack(
        [torch.randn(tokens, rank, generator=generator) @ _directions(shape, rank, generator) for _ in range(images)]
    )


def fixed(shape: Shape, rank: int) -> Tensor:
    """All images in one random subspace."""
    generator = _generator()
    return torch.randn(*shape[:2], rank, generator=generator) @ _directions(shape, rank, generator)


def isotropic(shape: Shape, rank: int) -> Tensor:
    """Gaussian noise."""
    return torch.randn(shape, generator=_generator())


def with_sinks(tokens: Tensor, number: int, own: bool) -> Tensor:
    """The first tokens of each image become 100 times longer, in one direction or in directions of their own."""
    tokens = tokens.clone()
    directions = torch.randn(len(tokens) if own else 1, number, tokens.shape[2], generator=_generator(1))
    length = 100 * tokens.norm(dim=2).mean()
    tokens[:, :number] = length * torch.nn.functional.normalize(directions, dim=2)
    return tokens


def with_giant_channel(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[..., :7], 100 * tokens[..., 7:8], tokens[..., 8:]], dim=2)


OUTLIERS: dict[str, tuple[Callable[[Tensor], Tensor], list[str], str]] = {
    "none": (lambda x: x, [], "tokens as they are"),
    "a giant channel": (with_giant_channel, ["channels"], "standardised channels"),
    "an offset of 10": (lambda x: x + 10 * x.std(), ["offset"], "centred tokens"),
    "an offset of 100": (lambda x: x + 100 * x.std(), ["offset"], "centred tokens"),
    "one sink": (lambda x: with_sinks(x, 1, own=False), ["sinks"], "tokens at length 1"),
    "two sinks in own directions": (lambda x: with_sinks(x, 2, own=True), ["sinks"], "tokens at length 1"),
    "one sink in one channel": (
        lambda x: torch.cat(
            [100 * x.norm(dim=2).mean() * torch.eye(x.shape[2])[:1].expand(len(x), 1, -1), x[:, 1:]], 1
        ),
        ["sinks"],
        "tokens at length 1",
    ),
}
FULL = {
    **OUTLIERS,
    "a giant channel and a sink": (
        lambda x: with_giant_channel(with_sinks(x, 1, own=False)),
        ["channels", "sinks"],
        "tokens at length 1, channels standardised",
    ),
}
TEACHERS = {rotated: "Lift", fixed: "phi_s", isotropic: "WideLast"}


def _check(tokens: Tensor, outliers: str, pair: Network, verdict: str) -> None:
    change, found, variant = FULL[outliers]
    teacher = measure(change(tokens), FEW)
    assert [name for name, share in teacher.outliers._asdict().items() if share >= FOUND] == found
    advice = advise(teacher, pair)
    assert advice.rests_on.variant == variant
    assert (advice.verdict, advice.decided) == (verdict, True), advice.why
    assert len(advice.outliers) == len(found)
    assert ("takes its axes from the tokens as they are" in str(advice)) == (
        "tokens at" in variant or "channels" in variant
    )


@pytest.mark.parametrize("outliers", OUTLIERS)
@pytest.mark.parametrize("kind", TEACHERS, ids=lambda kind: kind.__name__)
def test_outliers_do_not_change_the_advice(kind: Callable[[Shape, int], Tensor], outliers: str) -> None:
    _check(kind((30, 40, 64), 12), outliers, student(), TEACHERS[kind])


def test_what_is_said_of_channels_and_offset_is_of_the_tokens_as_they_are() -> None:
    tokens = torch.randn(40, 64, 48, generator=torch.Generator().manual_seed(0))
    tokens[..., 3] = 60 * torch.where(torch.rand(40, 64, generator=torch.Generator().manual_seed(1)) < 0.3, 1, 0)
    tokens[..., 5] += 40
    flat = tokens.double().flatten(0, 1)
    variance, constant = flat.var(0, correction=0), flat.mean(0).square().sum()
    found = measure(tokens, FEW).outliers
    assert found.channels == pytest.approx(float(variance[3] / variance.sum()), rel=1e-6)
    assert found.offset == pytest.approx(float(constant / (constant + variance.sum())), rel=1e-6)
    assert found.sinks == 0


@pytest.mark.slow
@pytest.mark.parametrize("outliers", ["none", "two sinks in own directions", "a giant channel and a sink"])
def test_outliers_do_not_change_the_advice_on_a_teacher_of_full_size(outliers: str) -> None:
    tokens = rotated((120, 196, 384), 60)
    _check(tokens, outliers, TimmStudent("deit_tiny_patch16_224"), "WideLast")
    fooled = measure(FULL[outliers][0](tokens), FEW, robust=False).ranks.spread()
    if outliers == "two sinks in own directions":
        assert fooled.rank.value == 2
        assert fooled.need.value == pytest.approx(192, abs=12)
    elif outliers != "none":
        assert fooled.rank.value < 10
        assert fooled.need.value < 100


@pytest.mark.parametrize(("outliers", "variant"), [(name, case[2]) for name, case in OUTLIERS.items()])
def test_the_variant_that_decides_recovers_ranks_and_axes(outliers: str, variant: str) -> None:
    tokens = rotated((30, 40, 64), 12)
    plain = measure(tokens, FEW).ranks.spread()
    found = measure(OUTLIERS[outliers][0](tokens), FEW).variants.values()
    ranks = next(each for each in found if each.label == variant).spread()
    assert ranks.rank.value == pytest.approx(plain.rank.value, abs=3)
    assert ranks.need.value == pytest.approx(plain.need.value, abs=3)


@pytest.mark.parametrize(("images", "own"), [(30, True), (10, True), (4, False)])
def test_sinks_in_few_images_do_not_change_the_advice(images: int, own: bool) -> None:
    tokens = fixed((200, 40, 64), 12)
    tokens[:images] = with_sinks(tokens, 1, own)[:images]
    energy = tokens.double().square().sum(2).numpy()
    teacher = measure(tokens, FEW)
    assert teacher.outliers.sinks == pytest.approx(energy[:images, 0].sum() / energy.sum(), rel=1e-6)
    assert (energy[:images, 0] / energy[:images].sum(1)).sum() / 200 < FOUND
    advice = advise(teacher, student())
    assert (advice.verdict, advice.decided) == ("phi_s", True), advice.why
    assert advice.rests_on.variant == "tokens at length 1"


def test_outliers_that_no_variant_withstands_leave_the_advice_undecided() -> None:
    tokens = with_sinks(rotated((30, 40, 64), 12), 1, own=False)
    advice = advise(measure(tokens + 100 * tokens.std(), FEW), student())
    assert not advice.decided
    assert advice.why.startswith("undecided, as outliers fool every variant of the tokens. By the tokens as they are:")


def test_variants_that_differ_leave_the_advice_undecided() -> None:
    teacher = measure(rotated((30, 40, 64), 12), FEW)
    narrow = teacher.ranks._replace(pca_energy=0 * teacher.pca_energy + 0.99)
    advice = advise(teacher._replace(variants={**teacher.variants, "raw": narrow}), student())
    assert not advice.decided
    assert advice.why.startswith(
        "undecided: fixed target phi_s by the tokens as they are (1 [1, 1] axes; 16 hold 99% [99%, 99%]), "
        "Lift by the tokens at length 1"
    )


def test_the_share_of_outliers_counts_few_entries_that_are_25_times_the_median() -> None:
    energy = torch.ones(4, 20, dtype=torch.float64)
    energy[0, :2] = 81.0
    energy[1, :3] = 81.0  # more than a tenth: so the energy spreads
    energy[2, 0] = 24.0
    energy[3, 5:] = 0.0
    energy[3, 0] = 36.0
    assert outlier_share(energy).tolist() == [162 / 180, 0, 0, 36 / 40]
    assert outlier_share(torch.zeros(3)).item() == 0


def test_centred_means_svd_and_pca_of_the_same_tokens() -> None:
    tokens = rotated((6, 9, 12), 3)
    shifted = measure(tokens + 50, Options(permutations=1, centred=True), robust=False)
    mean = tokens.mean((0, 1))
    expected = torch.linalg.svdvals((tokens - mean).double()).square().cumsum(1)
    torch.testing.assert_close(torch.from_numpy(shifted.svd_energy), expected / expected[:, -1:], atol=1e-5, rtol=0)
    assert list(shifted.variants) == ["centred"]
    assert list(measure(torch.ones(3, 4, 5), FEW).variants) == ["raw", "unit"]
