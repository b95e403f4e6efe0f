"""All analyses of one layer, in one pass over its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.analysis.controls import (
    PermutedBandwidths,
    bandwidth_intervals,
    channel_orders,
    gaussian_spectrum,
    permuted_spectra,
)
from kdvit.analysis.layer_report import BANDWIDTH_LEVELS, LayerReport, Options
from kdvit.analysis.outliers import Outliers, SinkShare, moment_outliers
from kdvit.analysis.participation import ParticipationRatio
from kdvit.analysis.pca import TokenMoments
from kdvit.analysis.shuffled import ShuffledTokens
from kdvit.analysis.spectral import SpectralEnergyPattern, image_bandwidths
from kdvit.analysis.subspaces import Part, Routed, routed_dimensions
from kdvit.analysis.variants import VARIANTS, Ranks, VariantRanks, decisive


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
        self._kept: list[Part] = []

    def curve_bytes(self, tokens: int) -> int:
        """Returns the bytes that are kept of an image with so many tokens, without the tokens."""
        width, variants = self.shape[1], len(self.names)
        numbers = variants * (min(tokens, width) + width + 3) + width // 2 + 1 + 4
        return 8 * (numbers + (0 if self.permuted is None else len(BANDWIDTH_LEVELS)))

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
        numbers = self.seen + torch.arange(len(tokens)) if numbers is None else numbers
        if self.shuffled is not None:
            self.shuffled.update(tokens, numbers)
        self.seen += len(tokens)
        if keep:
            self._kept.append((tokens.detach().cpu(), numbers))

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
        for tokens, _ in self._kept:
            for variant in self.variants:
                variant.update(tokens.to(device))
        if not self.options.subspaces:
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
        variants = {ranks.variant: ranks for ranks, _ in measured}
        spectra, counts, *at_one = self.sep.compute()
        spectra, counts, moment = rows(spectra), rows(counts)[:, 0], at_one[0].cpu().reshape(width, width)
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
            outliers=self._outliers(at_one, rows(self.sinks.compute())),
            variants=variants,
            participation=rows(self.participation.compute())[:, 0].numpy(),
            participation_shared=measured[0][1].numpy(),
            spectrum=spectrum.numpy(),
            permuted=permuted.numpy(),
            gaussian=gaussian.numpy(),
            bandwidths=intervals,
            subspaces=self._routed(variants) if self.options.subspaces and self.shuffled is not None else None,
        )

    def _outliers(self, at_one: Sequence[Tensor], sinks: Tensor) -> Outliers:
        """Returns the outliers of the tokens: where there are sinks, which hide the others, of those at length 1."""
        found = []
        for second, mean in (self.moments.compute(), at_one):
            mean = mean.cpu().flatten()
            variance = second.cpu().reshape(len(mean), -1).diagonal() - mean.square()
            found.append(moment_outliers(variance.clamp(min=0), mean, sinks))
        return found["sinks" in found[0].found()]

    def _routed(self, variants: dict[str, Ranks]) -> tuple[str, list[Routed]]:
        """Returns what the kept images need that are routed to several bases."""
        name = (decisive(variants) or list(variants.values()))[0].variant
        variant = next(each for each in self.variants if each.name == name)
        device = variant.basis.axes.device
        parts = [(variant.prepare(tokens.to(device)), numbers.to(device)) for tokens, numbers in self._kept]
        self._kept.clear()
        return name, routed_dimensions(parts, self.options.subspaces, self.options.seed)


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

    Examples:
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
