"""What SEP shows where there is nothing to see: the same tokens with their channels permuted, and Gaussian noise.

Two facts make the permutations cheap. The mean spectrum of tokens under any permutation P follows from one matrix, the
second moment M of the tokens at length 1, as that of ``P M P^T``. And its mean over all permutations is known: a
permutation leaves the share of frequency 0 (the squared channel mean) as it is, and all others are alike, so each of
them has ``(1 - share) / (D - 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kdvit.analysis.spectral import bandwidth, channel_spectrum, multiplicity, sep_curve, spectrum_of_moment

RESAMPLES = 1000


def permuted_spectra(moment: Tensor, permutations: int, generator: torch.Generator) -> Tensor:
    """Returns the mean channel spectrum of a data set under random permutations of its channels, exactly.

    Args:
        moment: Second moment of the tokens at length 1, ``[D, D]``, as of `SpectralEnergyPattern`.
        permutations: How many, P.
        generator: On the CPU.

    Returns:
        ``[P, D // 2 + 1]``, float64.
    """
    moment = moment.cpu()
    orders = [torch.randperm(len(moment), generator=generator) for _ in range(permutations)]
    return torch.stack([spectrum_of_moment(moment[order][:, order]) for order in orders])


def mean_permuted_spectrum(spectrum: Tensor, width: int) -> Tensor:
    """Returns the mean of a spectrum over all permutations of the channels, in closed form.

    Args:
        spectrum: ``[..., D // 2 + 1]``, as of `channel_spectrum`.
        width: Channels D.

    Returns:
        ``[..., D // 2 + 1]``.

    Example:
        >>> mean_permuted_spectrum(torch.tensor([0.1, 0.9, 0.0]), width=4)
        tensor([0.1000, 0.6000, 0.3000])
    """
    counts = multiplicity(width, spectrum)
    flat = (1 - spectrum[..., :1]) / max(width - 1, 1) * counts
    flat[..., :1] = spectrum[..., :1]
    return flat


@lru_cache(maxsize=8)  # the layers of a network have few shapes
def gaussian_spectrum(images: int, tokens: int, width: int, seed: int) -> Tensor:
    """Returns the mean channel spectrum ``[D // 2 + 1]`` of Gaussian noise of the shape ``[images, N, D]``."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(width // 2 + 1, dtype=torch.float64)
    for first in range(0, images, 32):
        noise = torch.randn(min(32, images - first), tokens, width, generator=generator)
        total += channel_spectrum(noise)[0].sum(0)
    return total / images


class Interval(NamedTuple):
    """A value with its bootstrap interval.

    Attributes:
        value: Of all images.
        low: 2.5th percentile over resamples of the images.
        high: 97.5th percentile.
    """

    value: float
    low: float
    high: float


def bandwidth_intervals(
    spectrum: Tensor, counts: Tensor, width: int, levels: Sequence[float], generator: torch.Generator
) -> list[tuple[Interval, Interval]]:
    """Returns bandwidths, and their differences from those of the permuted channels, with 95 % intervals over images.

    The bootstrap is paired: each resample of the images is used for both. The permuted curve is the mean over all
    permutations.

    Args:
        spectrum: Of each image, ``[images, D // 2 + 1]``, on the CPU.
        counts: Tokens behind each, ``[images]``.
        width: Channels D.
        levels: Shares of the energy.
        generator: On the CPU.

    Returns:
        For each level the bandwidth, and bandwidth minus permuted bandwidth.
    """
    images = len(spectrum)
    weights = torch.cat([torch.ones(1, images), *(_resample(images, generator) for _ in range(RESAMPLES))])
    means = torch.cat([(part * counts).double() @ spectrum for part in torch.split(weights, 50)])
    means /= means.sum(1, keepdim=True)
    curves = sep_curve(means, width), sep_curve(mean_permuted_spectrum(means, width), width)
    pairs = [tuple(bandwidth(curve, level) for curve in curves) for level in levels]
    return [(_interval(ours), _interval(ours - permuted)) for ours, permuted in pairs]


def _resample(images: int, generator: torch.Generator) -> Tensor:
    """Returns how often each image comes in a resample, ``[1, images]``."""
    return torch.randint(images, (images,), generator=generator).bincount(minlength=images).float()[None]


def _interval(values: Tensor) -> Interval:
    low, high = torch.quantile(values[1:], torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Interval(float(values[0]), low, high)
