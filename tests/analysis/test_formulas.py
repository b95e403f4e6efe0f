"""Each analysis against an independent reference, and its properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdvit.analysis import (
    DatasetPCA,
    Options,
    ParticipationRatio,
    PCAEnergy,
    SpectralEnergyPattern,
    SVDRank,
    bandwidth,
    channel_spectrum,
    energy_rank,
    measure,
    moments,
    p99,
    participation_ratio,
    pca_energy,
    sep_curve,
    shared_basis,
    svd_energy,
)
from kdvit.analysis.controls import (
    channel_orders,
    gaussian_spectrum,
    permuted_spectra,
)

REFERENCE = Path(__file__).parent.parent / "reference"
LEVELS = (0.8, 0.9, 0.95, 0.99)


def _tokens(images: int = 6, tokens: int = 20, width: int = 12, seed: int = 0) -> torch.Tensor:
    """Tokens of unequal directions, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images, tokens, width, generator=generator, dtype=torch.float64)
    return noise * torch.linspace(3, 0.2, width) + 0.3


def _orthogonal(width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


def _plain_svd(x: np.ndarray) -> np.ndarray:
    energy = np.linalg.svd(x, compute_uv=False) ** 2
    return energy.cumsum() / energy.sum()


def _plain_pca(x: np.ndarray, centred: bool) -> np.ndarray:
    flat = x.reshape(-1, x.shape[2])
    mean = flat.mean(0) * centred
    values, axes = np.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    energy = (((x - mean) @ axes[:, np.argsort(values)[::-1]]) ** 2).sum(1)
    return energy.cumsum(1) / energy.sum(1, keepdims=True)


def _plain_sep(x: np.ndarray) -> np.ndarray:
    power = np.abs(np.fft.fft(x.reshape(-1, x.shape[2]))) ** 2
    return (power.cumsum(1) / power.sum(1, keepdims=True)).mean(0)


def test_the_stored_values_of_the_reference_come_out_exactly() -> None:
    expected = json.loads((REFERENCE / "reference.json").read_text())["geometry"]
    tokens = torch.from_numpy(np.load(REFERENCE / "reference.npz")["tokens"])
    report = measure(tokens.split(5))
    for i, level in enumerate(expected["energies"]):
        assert report.svd_rank(level).tolist() == [ranks[i] for ranks in expected["svd_rank_per_image"]]
        assert report.pca_dimension(level).tolist() == [dims[i] for dims in expected["pca_dims_per_image"]]
        assert p99(report.svd_rank(level)) == pytest.approx(expected["svd_rank_p99"][i], abs=1e-12)
        assert p99(report.pca_dimension(level)) == pytest.approx(expected["pca_dims_p99"][i], abs=1e-12)
        assert report.svd_rank(level).mean() == pytest.approx(expected["svd_rank_mean"][i], abs=1e-12)
    np.testing.assert_allclose(report.sep(), expected["sep_curve"], rtol=0, atol=1e-9)
    for level, index in expected["sep_bandwidth"].items():
        assert bandwidth(torch.from_numpy(report.sep()), float(level)).item() * 24 == pytest.approx(index)


@pytest.mark.parametrize("shape", [(4, 20, 12), (4, 12, 20), (3, 1, 8), (1, 9, 5), (2, 7, 1)])
def test_every_analysis_equals_a_plain_transcription_of_its_definition(shape: tuple[int, int, int]) -> None:
    tokens = _tokens(*shape)
    x = tokens.numpy()
    torch.testing.assert_close(
        svd_energy(tokens).numpy(), np.stack([_plain_svd(each) for each in x]), atol=1e-12, rtol=0
    )
    for centred in (False, True):
        if shape[1] == 1 and centred and shape[0] == 1:
            continue
        basis = shared_basis(*moments(tokens), shape[0] * shape[1], centred)
        torch.testing.assert_close(pca_energy(tokens, basis).numpy(), _plain_pca(x, centred), atol=1e-9, rtol=0)
    spectrum, counts = channel_spectrum(tokens)
    assert counts.tolist() == [shape[1]] * shape[0]
    np.testing.assert_allclose(sep_curve(spectrum.mean(0), shape[2]), _plain_sep(x), atol=1e-12)
    folded = np.abs(np.fft.rfft(x)) ** 2
    folded[..., 1 : (shape[2] + 1) // 2] *= 2
    share = (folded / folded.sum(2, keepdims=True)).mean((0, 1))
    np.testing.assert_allclose(sep_curve(spectrum.mean(0), shape[2], folded=True), share.cumsum(), atol=1e-12)
    ratio = (x**2).sum(2) ** 2 / (shape[2] * (x**4).sum(2))
    np.testing.assert_allclose(participation_ratio(tokens), ratio.mean(1), atol=1e-12)


def test_a_union_of_turned_subspaces_has_low_ranks_and_many_shared_axes() -> None:
    rank, width, images = 5, 40, 8
    blocks = [torch.linalg.qr(torch.randn(30, rank, dtype=torch.float64))[0] for _ in range(images)]
    axes = _orthogonal(width)
    tokens = torch.stack([block @ axes[:, rank * i : rank * (i + 1)].T for i, block in enumerate(blocks)])
    report = measure(tokens)
    assert report.svd_rank(0.99).tolist() == [rank] * images
    assert report.pca_spectrum == pytest.approx([1 / 30 / images] * width)  # images * rank = width axes of one strength
    turned = measure(tokens @ axes)
    assert turned.svd_rank(0.99).tolist() == [rank] * images
    one = measure(tokens[:1].expand(images, -1, -1))
    assert one.pca_dimension(0.99).tolist() == one.svd_rank(0.99).tolist() == [rank] * images
    assert one.rotation() == 1


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_shared_dimensions_do_not_change_under_a_rotation_of_the_channels_and_sep_does(seed: int) -> None:
    tokens = _tokens(seed=seed)
    tokens = tokens * torch.linspace(0.2, 2, tokens.shape[2])
    report, turned = measure(tokens), measure(tokens @ _orthogonal(12, seed))
    np.testing.assert_allclose(turned.svd_energy, report.svd_energy, atol=1e-12)
    np.testing.assert_allclose(turned.pca_energy, report.pca_energy, atol=1e-9)
    np.testing.assert_allclose(turned.participation_shared, report.participation_shared, atol=1e-9)
    assert np.abs(turned.sep() - report.sep()).max() > 0.01
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(measure(tokens[..., order]).participation, report.participation, atol=1e-12)


@pytest.mark.parametrize("factor", [1e4, 1e-20, 1e30])
def test_the_scale_of_the_features_does_not_matter(factor: float) -> None:
    report, scaled = measure(_tokens()), measure(_tokens() * factor)
    np.testing.assert_allclose(scaled.svd_energy, report.svd_energy, atol=1e-12)
    np.testing.assert_allclose(scaled.pca_energy, report.pca_energy, atol=1e-9)
    np.testing.assert_allclose(scaled.sep(), report.sep(), atol=1e-12)
    np.testing.assert_allclose(scaled.participation, report.participation, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_measured_in_double_precision(dtype: torch.dtype) -> None:
    tokens = (1e3 * _tokens()).to(dtype)
    np.testing.assert_array_equal(svd_energy(tokens), svd_energy(tokens.double()))
    np.testing.assert_array_equal(measure(tokens).pca_energy, measure(tokens.double()).pca_energy)


def test_constant_channels_have_rank_one_and_all_their_power_at_frequency_zero() -> None:
    report = measure(torch.ones(3, 10, 6))
    assert report.svd_rank(0.99).tolist() == report.pca_dimension(0.99).tolist() == [1, 1, 1]
    assert report.dc_share == pytest.approx(1)
    assert report.participation == pytest.approx([1, 1, 1])


def test_tokens_of_zeros_do_not_count_beside_others() -> None:
    tokens = _tokens()
    padded = torch.cat([tokens, torch.zeros(6, 4, 12)], dim=1)
    more, report = measure(padded), measure(tokens)
    np.testing.assert_allclose(more.participation, report.participation, atol=1e-12)
    np.testing.assert_allclose(more.svd_energy, report.svd_energy, atol=1e-12)
    np.testing.assert_allclose(more.sep(), report.sep(), atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, 4, 8), "each at least 1, got shape \\[0, 4, 8\\]"),
        (torch.zeros(2, 0, 8), "each at least 1, got shape \\[2, 0, 8\\]"),
        (torch.zeros(2, 8), "Expected tokens \\[images, N, D\\].*got shape \\[2, 8\\]"),
        (torch.cat([torch.ones(6, 4, 8), torch.zeros(1, 4, 8)]), "tokens of image 6 of the batch are zero"),
        (torch.full((1, 4, 8), float("nan")), "tokens of image 0 of the batch are not finite"),
    ],
)
def test_tokens_that_cannot_be_measured_are_refused(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure([tokens])
    with pytest.raises(ValueError, match=message):
        svd_energy(tokens)


@pytest.mark.parametrize("shape", [(1, 9, 5), (1, 1, 5), (6, 4, 1), (1, 1, 1), (3, 1, 8)])
def test_one_image_one_token_and_one_channel_are_measured(shape: tuple[int, int, int]) -> None:
    report = measure(_tokens(*shape), Options(permutations=2))
    assert report.images == shape[0]
    assert report.svd_energy.shape == (shape[0], min(shape[1:]))
    assert report.pca_energy.shape == (shape[0], shape[2])
    assert report.sep().shape == (shape[2],)
    assert report.participation.shape == report.participation_shared.shape == (shape[0],)


def test_images_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValueError, match="All images must have one number of tokens; got 9 and 8"):
        measure([torch.randn(2, 9, 4), torch.randn(2, 8, 4)])


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"floating-point tokens, got torch\.int64"):
        svd_energy(torch.ones(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="There are no tokens to measure"):
        measure([])
    with pytest.raises(ValueError, match=r"above 0 and below 1, got 1\.0"):
        energy_rank(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="energies must be shares"):
        measure(_tokens(), Options(energies=(0.5, 1.5)))
    with pytest.raises(ValueError, match="permutations must be 1 or more"):
        measure(_tokens(), Options(permutations=0))
    with pytest.raises(ValueError, match="All tokens are the mean token: centred, they have no energy"):
        measure(torch.ones(2, 3, 4), Options(centred=True))


def test_a_tie_at_the_level_counts_as_reached() -> None:
    five_equal = torch.linalg.qr(torch.randn(9, 5, dtype=torch.float64))[0][None]
    assert energy_rank(svd_energy(five_equal), 0.8).tolist() == [4]


def test_the_spectrum_under_a_permutation_is_that_of_the_permuted_tokens() -> None:
    tokens = _tokens()
    metric = SpectralEnergyPattern(12)
    metric.update(tokens)
    _, _, moment, mean = metric.compute()
    np.testing.assert_allclose(mean, (tokens / tokens.norm(dim=2, keepdim=True)).mean((0, 1)), atol=1e-12)
    assert moment.trace().item() == pytest.approx(1)
    orders = channel_orders(12, 3, seed=5)
    for order, spectrum in zip(orders, permuted_spectra(moment, orders), strict=True):
        torch.testing.assert_close(spectrum, channel_spectrum(tokens[..., order])[0].mean(0))


def test_noise_of_full_and_of_low_rank_both_lie_on_the_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    diagonal = np.arange(1, 65) / 64
    noise = sep_curve(gaussian_spectrum(40, 50, 64, seed=0), 64)
    low = measure(torch.randn(40, 50, 10, generator=generator) @ torch.randn(40, 10, 64, generator=generator))
    assert low.svd_rank(0.99).max() <= 10
    np.testing.assert_allclose(noise, diagonal, atol=0.01)
    np.testing.assert_allclose(low.sep(), diagonal, atol=0.03)


def _plain_image_bandwidths(x: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    curves = np.stack([_plain_sep(each[None]) for each in x])
    return (1 + (curves[:, None] >= np.array(levels)[:, None] - 1e-10).argmax(2)) / x.shape[2]


def test_bandwidths_of_images_are_bootstrapped_as_the_authors_do() -> None:
    tokens = (_tokens(images=9) * torch.linspace(0.1, 2, 12) + torch.linspace(-1, 1, 12)).float()
    x, levels = tokens.double().numpy(), (0.5, 0.6, 0.7, 0.8, 0.9)
    orders = channel_orders(12, 4, seed=3)
    own = _plain_image_bandwidths(x, levels)
    expected = np.stack([_plain_image_bandwidths(x[..., order.numpy()], levels) for order in orders]).mean(0)
    chosen = np.random.default_rng(3).integers(9, size=(1000, 9))
    added = (expected - own)[chosen].mean(1)  # permuted minus own
    for report in (
        measure(tokens, Options(permutations=4, seed=3)),
        measure(tokens.split(2), Options((0.9,), False, 4, 3)),
    ):
        assert len(report.bandwidths) == len(levels)
        for i, (ours, difference) in enumerate(report.bandwidths):
            assert ours == pytest.approx((own[:, i].mean(), *np.percentile(own[chosen, i].mean(1), (2.5, 97.5))))
            low_and_high = np.percentile(added[:, i], (2.5, 97.5))
            assert difference == pytest.approx(((expected - own)[:, i].mean(), *low_and_high), abs=1e-12)
    assert any(ours.value * 12 % 1 > 0.01 for ours, _ in report.bandwidths)  # in no steps of 1 / D
    assert report.bandwidths[-1][1].value < -0.01  # low frequencies lie at both ends of the full spectrum
    assert measure(tokens, Options(permutations=4), robust=False).bandwidths == []


def test_the_metrics_do_not_depend_on_how_images_are_batched() -> None:
    tokens = _tokens(images=11)
    whole: list[Any] = []
    parts: list[Any] = []
    for batches, results in (([tokens], whole), (tokens.split(3), parts)):
        for metric in (SVDRank(), SpectralEnergyPattern(12), ParticipationRatio()):
            for batch in batches:
                metric.update(batch)
            results.append(metric.compute())
        pca = DatasetPCA(12)
        for batch in batches:
            pca.update(batch)
        energy = PCAEnergy(pca.compute())
        for batch in batches:
            energy.update(batch)
        results.append(energy.compute())
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_threads_change_no_number() -> None:
    tokens = _tokens(images=13)
    one = measure(tokens)
    torch.set_num_threads(2)
    try:
        two = measure(tokens)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(one.svd_energy, two.svd_energy)
    np.testing.assert_array_equal(one.sep(), two.sep())
