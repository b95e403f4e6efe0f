"""All analyses of one layer, in one pass over its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdvit.analysis.controls import (
    Interval,
    PermutedBandwidths,
    bandwidth_intervals,
    channel_orders,
    gaussian_spectrum,
    permuted_spectra,
)
from kdvit.analysis.outliers import Outliers, SinkShare, moment_outliers
from kdvit.analysis.participation import ParticipationRatio
from kdvit.analysis.pca import TokenMoments
from kdvit.analysis.shuffled import ShuffledTokens
from kdvit.analysis.spectral import SpectralEnergyPattern, bandwidth, image_bandwidths, sep_curve
from kdvit.analysis.variants import LEVEL, VARIANTS, Ranks, VariantRanks

Array = NDArray[np.float64]
BANDWIDTH_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)


class Options(NamedTuple):
    """What to measure.

    Attributes:
        energies: Shares of the energy at which ranks and dimensions are given.
        centred: Subtract the mean token of all images before SVD and PCA; the paper does not.
        permutations: Random permutations of the channels beside SEP.
        seed: Of the controls and of the choice of images.
    """

    energies: tuple[float, ...] = (0.8, 0.9, 0.95, 0.99)
    centred: bool = False
    permutations: int = 100
    seed: int = 0

    @property
    def variant(self) -> str:
        """The variant of the tokens that is measured at every layer."""
        return "centred" if self.centred else "raw"

    def check(self) -> None:
        """Raises ValueError if a value is out of range."""
        if not self.energies or not all(0 < level < 1 for level in self.energies):
            raise ValueError(f"energies must be shares above 0 and below 1, got {list(self.energies)}.")
        if self.permutations < 1:
            raise ValueError(f"permutations must be 1 or more, for SEP means nothing without; got {self.permutations}.")


class LayerReport(NamedTuple):
    """What was measured at one layer.

    Attributes:
        layer: The layer as it was asked for.
        index: Its index.
        tokens: Patch tokens N of an image.
        width: Channels D.
        outliers: What outliers the tokens have.
        variants: Ranks and shared axes by the name of the variant: first of the tokens as the options want them, then,
            where it was asked for, of those that outliers cannot fool.
        participation: Participation ratio of each image's tokens, ``[images]``.
        participation_shared: The same in the basis of the dataset PCA, ``[images]``.
        spectrum: Mean channel spectrum, ``[D // 2 + 1]``.
        permuted: The same under random permutations of the channels, ``[P, D // 2 + 1]``.
        gaussian: The same of Gaussian noise of the same shape, ``[D // 2 + 1]``.
        bandwidths: At 50, 60, 70, 80 and 90 %, where it was asked for, means over the images with their intervals: the
            bandwidth of an image, and what a permutation of the channels adds to it.
    """

    layer: str
    index: int  # type: ignore[assignment]  # tuple.index is of no use here
    tokens: int
    width: int
    outliers: Outliers
    variants: dict[str, Ranks]
    participation: Array
    participation_shared: Array
    spectrum: Array
    permuted: Array
    gaussian: Array
    bandwidths: list[tuple[Interval, Interval]]

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.participation)

    @property
    def ranks(self) -> Ranks:
        """The ranks of the tokens as the options want them: by default as they are."""
        return next(iter(self.variants.values()))

    @property
    def svd_energy(self) -> Array:
        """Share of each image's energy in its leading singular directions, ``[images, min(N, D)]``."""
        return self.ranks.svd_energy

    @property
    def pca_energy(self) -> Array:
        """Share of each image's energy in the leading axes of all images, ``[images, D]``."""
        return self.ranks.pca_energy

    @property
    def pca_spectrum(self) -> Array:
        """Eigenvalues of all tokens' second moment, descending, ``[D]``."""
        return self.ranks.pca_spectrum

    def svd_rank(self, level: float) -> Array:
        """Returns the per-image SVD rank at a level, ``[images]``."""
        return self.ranks.svd_rank(level)

    def pca_dimension(self, level: float) -> Array:
        """Returns the least number of shared axes that hold a level of each image's energy, ``[images]``."""
        return self.ranks.pca_dimension(level)

    def sep(self, spectrum: Array | None = None, folded: bool = False) -> Array:
        """Returns the SEP curve of `spectrum`, or of a control's spectra, ``[..., D]``."""
        chosen = torch.from_numpy(self.spectrum if spectrum is None else spectrum)
        curve: Array = sep_curve(chosen, self.width, folded).numpy()
        return curve

    @property
    def dc_share(self) -> float:
        """The share of the tokens' energy in their channel mean (frequency 0)."""
        return float(self.spectrum[0])

    def rotation(self, level: float = LEVEL) -> float:
        """Returns PCA dimension over SVD rank, 99th percentiles."""
        return self.ranks.rotation(level)


def bandwidths(layer: LayerReport, folded: bool = False) -> dict[str, dict[str, float]]:
    """Returns the bandwidths of a layer's tokens and of their controls, by level."""
    ours, permuted, gaussian = (
        torch.from_numpy(layer.sep(of, folded)) for of in (layer.spectrum, layer.permuted, layer.gaussian)
    )
    found = {}
    for level in BANDWIDTH_LEVELS:
        controls = bandwidth(permuted, level)
        found[f"{level:g}"] = {
            "tokens": float(bandwidth(ours, level)),
            "permuted_mean": float(controls.mean()),
            "permuted_min": float(controls.min()),
            "permuted_max": float(controls.max()),
            "gaussian": float(bandwidth(gaussian, level)),
        }
    return found


class LayerGeometry(nn.Module):
    """Measures one layer: ranks, shared axes, spectra and participation, over all batches and ranks.

    Ranks and the energy in the shared axes need every image again once the moments of all are known. Either the tokens
    are kept until then, or all images are passed in a second time.

    Args:
        width: Channels D.
        options: What to measure.
        robust: Measure ranks and axes of all `VARIANTS`, not only of one, and beside them those of shuffled tokens;
            and the SEP bandwidths of each image.
    """

    def __init__(self, width: int, options: Options, robust: bool = False) -> None:
        super().__init__()
        self.options = options
        self.names = list(dict.fromkeys([options.variant, *(VARIANTS if robust else ())]))
        self.moments = TokenMoments(width)
        self.sep = SpectralEnergyPattern(width)
        self.participation = ParticipationRatio()
        self.sinks = SinkShare()
        self.orders = channel_orders(width, options.permutations, options.seed)
        self.permuted = PermutedBandwidths(self.orders, BANDWIDTH_LEVELS) if robust else None
        self.shuffled = ShuffledTokens(options.seed) if robust else None
        self.seen = 0
        self.variants: Any = nn.ModuleList()
        self.shape = (0, width)
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def update(self, tokens: Tensor, keep: bool = False, numbers: Tensor | None = None) -> None:
        """Adds images by their tokens ``[B, N, D]``; in a second pass, for what needs all images again.

        Args:
            tokens: The tokens.
            keep: Keep them, so that there need be no second pass.
            numbers: The images' numbers in the data set, ``[B]``; by default counted.
        """
        if self.variants:
            for variant in self.variants:
                variant.update(tokens)
            return
        for metric in (self.moments, self.sep, self.participation, self.sinks, self.permuted):
            if metric is not None:
                metric.update(tokens)
        shape = (tokens.shape[1], tokens.shape[2])
        if self.shape not in ((0, shape[1]), shape):
            raise ValueError(f"All images must have one number of tokens; got {self.shape[0]} and {shape[0]}.")
        self.shape = shape
        if self.shuffled is not None:
            self.shuffled.update(tokens, self.seen + torch.arange(len(tokens)) if numbers is None else numbers)
        self.seen += len(tokens)
        if keep:
            self._kept.append(tokens.detach().cpu())

    @torch.no_grad()
    def find_axes(self) -> None:
        """Finds the shared axes (together with all ranks), and measures the kept tokens in them.

        Raises:
            ValueError: If all tokens are one, and the options want them centred.
        """
        device, width = self.moments.moment.device, self.shape[1]
        found = [part.reshape(width, -1) for part in (*self.moments.compute(), *self.sep.compute()[2:])]
        as_they_are, at_one = ((moment, mean[:, 0]) for moment, mean in (found[:2], found[2:]))
        made = [VariantRanks(name, *(at_one if VARIANTS[name].unit else as_they_are)) for name in self.names]
        if not made[0].has_energy:
            raise ValueError("All tokens are the mean token: centred, they have no energy.")
        self.variants.extend(each.to(device) for each in made if each.has_energy)
        for tokens in self._kept:
            for variant in self.variants:
                variant.update(tokens.to(device))
        self._kept.clear()

    def report(self, layer: str, index: int, order: Tensor, second: Tensor | None = None) -> LayerReport:
        """Returns what was measured, together with all ranks.

        Args:
            layer: The layer as it was asked for.
            index: Its index.
            order: Order in which to put the images, ``[images]``, so that it does not depend on the number of ranks.
            second: The same for the second pass, if there was one.
        """
        images, (tokens, width) = len(order), self.shape

        def rows(value: Tensor) -> Tensor:  # torchmetrics drops the shape of a single number
            return value.cpu().reshape(images, -1)[order]

        shuffled = None if self.shuffled is None else self.shuffled.compute().reshape(-1, tokens, width)
        measured = [variant.report(order if second is None else second, shuffled) for variant in self.variants]
        spectra, counts, moment, mean = self.sep.compute()
        spectra, counts, moment = rows(spectra), rows(counts)[:, 0], moment.cpu().reshape(width, width)
        mean = mean.cpu().reshape(width)
        variance = (moment.diagonal() - mean.square()).clamp(min=0)
        spectrum = (counts[:, None] * spectra).sum(0) / counts.sum()
        permuted = permuted_spectra(moment, self.orders)
        gaussian = gaussian_spectrum(images, tokens, width, self.options.seed)
        intervals = []
        if self.permuted is not None:
            own = image_bandwidths(spectra, width, BANDWIDTH_LEVELS)
            intervals = bandwidth_intervals(own, rows(self.permuted.compute()), self.options.seed)
        return LayerReport(
            layer=layer,
            index=index,
            tokens=tokens,
            width=width,
            outliers=moment_outliers(variance, mean, rows(self.sinks.compute())),
            variants={ranks.variant: ranks for ranks, _ in measured},
            participation=rows(self.participation.compute())[:, 0].numpy(),
            participation_shared=measured[0][1].numpy(),
            spectrum=spectrum.numpy(),
            permuted=permuted.numpy(),
            gaussian=gaussian.numpy(),
            bandwidths=intervals,
        )


def measure(
    batches: Sequence[Tensor] | Tensor,
    options: Options | None = None,
    layer: str = "tokens",
    index: int = 0,
    robust: bool = True,
) -> LayerReport:
    """Returns all analyses of tokens that are at hand.

    Args:
        batches: Tokens ``[images, N, D]``, or batches of them.
        options: What to measure.
        layer: What to call them.
        index: Their place in the depth.
        robust: Measure all variants that outliers cannot fool beside them.

    Raises:
        ValueError: If there are no tokens, or they are not finite or zero.

    Example:
        >>> report = measure(torch.randn(8, 16, 12, generator=torch.Generator().manual_seed(0)))
        >>> report.images, report.svd_energy.shape
        (8, (8, 12))
    """
    options = options or Options()
    options.check()
    parts = list(torch.split(batches, 32) if isinstance(batches, Tensor) else batches)
    if not parts:
        raise ValueError("There are no tokens to measure.")
    geometry = LayerGeometry(parts[0].shape[-1], options, robust)
    for tokens in parts:
        geometry.update(tokens, keep=True)
    geometry.find_axes()
    return geometry.report(layer, index, torch.arange(sum(len(part) for part in parts)))
