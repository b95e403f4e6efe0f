"""The same ranks and axes of tokens that outliers cannot fool.

One change of the tokens withstands one kind of outliers (see `kdvit.analysis.outliers`): length 1 the sink tokens,
centring an offset, standardised channels a massive channel and an offset. SVD and PCA are always of the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdvit.analysis.controls import Interval, interval, resampled
from kdvit.analysis.outliers import Outliers, SinkShare, moment_outliers
from kdvit.analysis.pca import PCAEnergy, pca_energy, shared_basis
from kdvit.analysis.spectral import unit
from kdvit.analysis.svd_rank import SVDRank, energy_rank, svd_energy

Array = NDArray[np.float64]
LEVEL = 0.95  # of the summary: ranks in figures, rotation, advice
TURNED = 1.05
ROUNDING = 1e-12  # of a difference of float64 sums, with room


class Variant(NamedTuple):
    """What is done to tokens before they are measured.

    Attributes:
        label: What it is called.
        unit: Each token is divided by its length.
        centred: Then the mean token of all images is subtracted.
        standardised: Then each channel is divided by its standard deviation over all tokens.
    """

    label: str
    unit: bool = False
    centred: bool = False
    standardised: bool = False


VARIANTS = {
    "raw": Variant("tokens as they are"),
    "unit": Variant("tokens at length 1", unit=True),
    "centred": Variant("centred tokens", centred=True),
    "standardised": Variant("standardised channels", centred=True, standardised=True),
    "unit_standardised": Variant("tokens at length 1, channels standardised", True, True, True),
}


class Ranks(NamedTuple):
    """Per-image SVD and dataset PCA of one variant.

    Attributes:
        variant: Its name in `VARIANTS`.
        svd_energy: Share of each image's energy in its leading singular directions, ``[images, min(N, D)]``.
        pca_energy: Share of each image's energy in the leading axes of all images, ``[images, D]``.
        pca_spectrum: Eigenvalues of all tokens' second moment, descending, ``[D]``.
        outliers: What outliers the variant leaves.
        shuffled: `svd_energy` and `pca_energy` of tokens shuffled among images, if they were measured.
    """

    variant: str
    svd_energy: Array
    pca_energy: Array
    pca_spectrum: Array
    outliers: Outliers
    shuffled: tuple[Array, Array] | None = None

    @property
    def label(self) -> str:
        """The variant in words."""
        return VARIANTS[self.variant].label

    def svd_rank(self, level: float = LEVEL) -> Array:
        """Returns the per-image SVD rank at a level, ``[images]``."""
        return _rank(self.svd_energy, level)

    def pca_dimension(self, level: float = LEVEL) -> Array:
        """Returns the least number of shared axes that hold a level of each image's energy, ``[images]``."""
        return _rank(self.pca_energy, level)

    def rotation(self, level: float = LEVEL) -> float:
        """Returns PCA dimension over SVD rank, 99th percentiles."""
        return p99(self.pca_dimension(level)) / p99(self.svd_rank(level))

    def held(self, axes: int) -> Interval:
        """Returns the share of energy that so many shared axes hold of 99 % of the images: 95 % from the need on."""
        (shares,) = resampled(np.random.default_rng(0), self.pca_energy[:, axes - 1])
        return interval(-_of_99(-shares))

    def spread(self) -> Spread:
        """Returns the figures at 95 % with their 95 % bootstrap intervals over images, the shared axes held fixed."""
        generator = np.random.default_rng(0)
        needs, ranks = resampled(generator, self.pca_dimension(), self.svd_rank())
        rotation, shuffled, turn = _p99s(needs) / _p99s(ranks), None, None
        if self.shuffled is not None:
            svd, pca = (_rank(energy, LEVEL) for energy in self.shuffled)
            without = np.divide(*(_p99s(values) for values in resampled(generator, pca, svd)))
            shuffled, turn = interval(without), interval(rotation / without)
        need, rank = (interval(_of_99(values)) for values in (needs, ranks))
        return Spread(need, rank, interval(rotation), shuffled, turn)


class Spread(NamedTuple):
    """Figures at 95 % of the energy, with intervals.

    Attributes:
        need: Shared axes that hold 95 % of the energy of 99 % of the images.
        rank: Directions that hold 95 % of the energy of one image alone, of 99 % of the images.
        rotation: PCA dimension over SVD rank, 99th percentiles.
        shuffled: The same of tokens shuffled among images. It grows with D over N: one distribution for all images, and
            no rotation at all, has 13.7 at N = 49, D = 768, and 1.15 at N = 1024, D = 384.
        turn: Rotation over that: 1 where the images have no subspaces of their own.
    """

    need: Interval
    rank: Interval
    rotation: Interval
    shuffled: Interval | None
    turn: Interval | None

    @property
    def turned(self) -> bool:
        """Whether the images' subspaces turn from each other: by 5 % or more, with its interval."""
        return self.turn is not None and self.turn.low >= TURNED


def shown(interval: Interval, digits: str = ".0f") -> str:
    """Returns an interval as text: the value, and in brackets its bounds."""
    return "{:{digits}} [{:{digits}}, {:{digits}}]".format(*interval, digits=digits)


def spread_json(spread: Spread) -> dict[str, Any]:
    """Returns plain types."""
    found: dict[str, Interval | None] = spread._asdict()
    named = {name: None if each is None else each._asdict() for name, each in found.items()}
    return {**named, "turned": spread.turned}


def _p99s(values: Array) -> Array:
    percentiles: Array = np.percentile(values, 99, axis=1)
    return percentiles


def _of_99(values: Array) -> Any:
    """Returns the least of the values ``[..., images]`` that 99 % of the images do not exceed; none between them."""
    place = -(-99 * values.shape[-1] // 100) - 1
    return np.partition(values, place)[..., place]


def _rank(energy: Array, level: float) -> Array:
    rank: Array = energy_rank(torch.from_numpy(energy), level).numpy()
    return rank


def p99(values: Array) -> float:
    """Returns the 99th percentile over images (numpy's linear one), the paper's figure for a data set."""
    return float(np.percentile(values, 99))


def decisive(variants: Mapping[str, Ranks]) -> list[Ranks]:
    """Returns the variants that decide: those without outliers of their own.

    Standardised channels change what a feature-map objective compares: they are asked only where no other variant is
    left, and at length 1 besides only where these are fooled, too.

    Returns:
        Nothing where each variant has outliers.
    """
    groups = (("raw", "unit", "centred"), ("standardised",), ("unit_standardised",))
    clean = [[variants[v] for v in group if v in variants and not variants[v].outliers.found()] for group in groups]
    return next((group for group in clean if group), [])


class VariantRanks(nn.Module):
    """Measures one variant, once the moments of all tokens are known, over all batches and ranks.

    Args:
        name: Of the variant.
        moment: Mean of ``x x^T`` over all tokens ``[D, D]``, of tokens at length 1 if the variant has such.
        mean: Mean token ``[D]``, likewise.

    Attributes:
        has_energy: Whether anything is left of the tokens: not of one token for all, centred.
    """

    def __init__(self, name: str, moment: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.name, self.variant = name, VARIANTS[name]
        self.mean = mean * self.variant.centred
        variance = (moment.diagonal() - mean.square()).clamp(min=0)
        varies = variance > ROUNDING * moment.diagonal()
        self.has_energy = not self.variant.centred or bool(varies.any())
        self.scale = varies / variance.sqrt().where(varies, 1) if self.variant.standardised else torch.ones_like(mean)
        moment = (moment - torch.outer(self.mean, self.mean)) * torch.outer(self.scale, self.scale)
        self.basis = shared_basis(moment, mean, 1)
        self.left = variance * self.scale.square(), (mean - self.mean) * self.scale
        self.svd, self.pca, self.sinks = SVDRank(), PCAEnergy(self.basis), SinkShare()

    def prepare(self, tokens: Tensor) -> Tensor:
        """Returns tokens ``[B, N, D]`` as the variant wants them."""
        if self.variant.unit:
            tokens = unit(tokens.double())
        return (tokens - self.mean) * self.scale if self.variant.centred else tokens

    def update(self, tokens: Tensor) -> None:
        """Adds images by their tokens ``[B, N, D]``."""
        tokens = self.prepare(tokens)
        for metric in (self.svd, self.pca, self.sinks):
            metric.update(tokens)

    def report(self, order: Tensor, shuffled: Tensor | None = None) -> tuple[Ranks, Tensor]:
        """Returns the ranks, and the participation ratio in the shared axes ``[images]``, together with all ranks.

        Args:
            order: Order in which to put the images.
            shuffled: Tokens shuffled among images, ``[images, N, D]``.
        """

        def rows(value: Tensor) -> Tensor:  # torchmetrics drops the shape of a single number
            return value.cpu().reshape(len(order), -1)[order]

        energy, participation = (rows(value) for value in self.pca.compute())
        svd, sinks = rows(self.svd.compute()).numpy(), rows(self.sinks.compute())
        variance, mean = self.left
        outliers = moment_outliers(variance.cpu(), mean.cpu(), sinks)
        null = None
        if shuffled is not None:
            shuffled = self.prepare(shuffled)
            null = svd_energy(shuffled).cpu().numpy(), pca_energy(shuffled, self.basis).cpu().numpy()
        spectrum = self.basis.spectrum.cpu().numpy()
        return Ranks(self.name, svd, energy.numpy(), spectrum, outliers, null), participation[:, 0]
