"""What SEP shows where there is nothing to see: the same tokens with their channels permuted, and Gaussian noise.

The curve of a data set under any permutation P is cheap, as it follows from one matrix, the second moment M of the
tokens at length 1, as that of ``P M P^T``. Bandwidths of each image under it take a transform of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdvit.analysis.spectral import (
    channel_spectrum,
    image_bandwidths,
    multiplicity,
    power_spectrum,
    spectrum_of_moment,
    unit,
)
from kdvit.analysis.tokens import PerImage, over_images

RESAMPLES = 1000


def channel_orders(width: int, permutations: int, seed: int) -> list[Tensor]:
    """Returns random permutations of D channels, ``[D]`` each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(width, generator=generator) for _ in range(permutations)]


def permuted_spectra(moment: Tensor, orders: Sequence[Tensor]) -> Tensor:
    """Returns the mean channel spectrum of a data set under permutations of its channels, exactly.

    Args:
        moment: Second moment of the tokens at length 1, ``[D, D]``, as of `SpectralEnergyPattern`.
        orders: P permutations.

    Returns:
        ``[P, D // 2 + 1]``, float64.
    """
    moment = moment.cpu()
    return torch.stack([spectrum_of_moment(moment[order][:, order]) for order in orders])


class PermutedBandwidths(PerImage):
    """The bandwidths of each image's mean curve under permutations of the channels, their mean over these.

    Args:
        orders: P permutations of the channels, the same for all images.
        levels: Shares of the energy, L.
    """

    def __init__(self, orders: Sequence[Tensor], levels: Sequence[float]) -> None:
        super().__init__()
        self.orders, self.levels = list(orders), levels

    def measure(self, tokens: Tensor) -> Tensor:
        """Returns the means of images by their tokens ``[B, N, D]``, ``[B, L]``."""
        return torch.cat(over_images(self._measure, tokens))

    def _measure(self, tokens: Tensor) -> Tensor:
        tokens, width = unit(tokens), tokens.shape[2]
        power = torch.stack([power_spectrum(tokens[..., order.to(tokens.device)]).sum(1) for order in self.orders])
        return image_bandwidths(power * multiplicity(width, power), width, self.levels).mean(0)


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


def bandwidth_intervals(own: Tensor, permuted: Tensor, seed: int) -> list[tuple[Interval, Interval]]:
    """Returns bandwidths, and what a permutation of the channels adds to them, with 95 % intervals over images.

    These are means over the images, of which each has its own bandwidth, and the bootstrap is paired: each resample of
    the images is used for both (as in the authors' script, sign and all: permuted minus own).

    Args:
        own: Bandwidths of the images, ``[images, L]``.
        permuted: Likewise, of `PermutedBandwidths`.
        seed: Of the resamples.

    Returns:
        For each level the bandwidth, and permuted minus own bandwidth.
    """
    columns = (*own.T.numpy(), *(permuted - own).T.numpy())
    found = [interval(each.mean(1)) for each in resampled(np.random.default_rng(seed), *columns)]
    return list(zip(found[: own.shape[1]], found[own.shape[1] :], strict=True))


def resampled(generator: np.random.Generator, *values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yields values ``[images, ...]`` as they are and in the same resamples each, ``[1 + RESAMPLES, images, ...]``."""
    images = len(values[0])
    chosen = np.concatenate([np.arange(images)[None], generator.integers(images, size=(RESAMPLES, images))])
    return (each[chosen] for each in values)


def interval(values: NDArray[Any]) -> Interval:
    """Returns the first value, with the 95 % interval of the others, which are those of resamples."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return Interval(float(values[0]), float(low), float(high))
