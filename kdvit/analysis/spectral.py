"""How a token's energy spreads over the frequencies along its channels: SEP (arXiv:2511.15572).

Channels have no natural order, and the spectrum of a real vector is symmetric. So any token without structure along the
channel axis has a curve close to the diagonal, whether it is noise or confined to a few directions: read the curve only
beside its controls (`kdvit.analysis.controls`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from kdvit.analysis.svd_rank import energy_rank
from kdvit.analysis.tokens import over_images


def channel_spectrum(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean power spectrum of each image's tokens along their channels, each token's power being 1.

    Args:
        tokens: ``[B, N, D]``. Tokens of zeros have no spectrum and do not count.

    Returns:
        The share of power at each frequency from 0 (the channel mean) to D // 2, conjugate pairs summed,
        ``[B, D // 2 + 1]``, float64; and the number of tokens that count, ``[B]``.

    Raises:
        ValueError: If the tokens are empty, not finite, or zero.
    """
    spectra, counts = zip(*over_images(_channel_spectrum, tokens), strict=True)
    return torch.cat(spectra), torch.cat(counts)


def _channel_spectrum(tokens: Tensor) -> tuple[Tensor, Tensor]:
    energy = tokens.square().sum(2)
    counts = (energy > 0).sum(1)
    shares = torch.einsum("bnk,bn->bk", power_spectrum(tokens), 1 / energy.where(energy > 0, torch.inf))
    width = tokens.shape[2]
    return shares * multiplicity(width, shares) / (width * counts[:, None]), counts


def power_spectrum(tokens: Tensor) -> Tensor:
    """Returns the power of tokens ``[..., D]`` at each frequency from 0 to D // 2, ``[..., D // 2 + 1]``."""
    transform = torch.fft.rfft(tokens)
    power: Tensor = transform.real.square().addcmul_(transform.imag, transform.imag)
    return power


def unit(tokens: Tensor) -> Tensor:
    """Returns tokens ``[..., D]`` at length 1, and tokens of zeros as they are."""
    norm: Tensor = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens / norm.where(norm > 0, torch.inf)


def unit_moments(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sums over an image's tokens at length 1 of ``x x^T``, ``[B, D, D]``, of x, and how many count."""
    at_one = unit(tokens)
    return at_one.mT @ at_one, at_one.sum(1), tokens.any(2).sum(1)


def spectrum_of_moment(moment: Tensor) -> Tensor:
    """Returns the channel spectrum that tokens of a given second moment have.

    It is the Fourier transform of the moment's sums along its circular diagonals (the Wiener-Khinchin theorem).

    Args:
        moment: ``[..., D, D]``.

    Returns:
        Power at each frequency, conjugate pairs summed, ``[..., D // 2 + 1]``; with a moment of trace 1, its share.
    """
    width = moment.shape[-1]
    twice = torch.cat([moment, moment], dim=-1).contiguous()
    *outer, _, _ = twice.stride()
    diagonals = twice.as_strided(moment.shape, (*outer, 2 * width + 1, 1))
    power = torch.fft.rfft(diagonals.sum(-2)).real / width
    share: Tensor = power * multiplicity(width, power)
    return share


def multiplicity(width: int, like: Tensor) -> Tensor:
    """Returns how many of the D frequencies of the full spectrum each of the D // 2 + 1 folded ones stands for."""
    counts = torch.full((width // 2 + 1,), 2, dtype=like.dtype, device=like.device)
    counts[0] = 1
    if width % 2 == 0:
        counts[-1] = 1
    return counts


def sep_curve(spectrum: Tensor, width: int, folded: bool = False) -> Tensor:
    """Returns the Spectral Energy Pattern: the cumulative share of power in the order of frequencies.

    Args:
        spectrum: Shares of power ``[..., D // 2 + 1]``, as of `channel_spectrum`.
        width: Channels D.
        folded: Over the D // 2 + 1 frequencies of a real vector. By default over the D of the complex spectrum, as in
            the paper, where the second half mirrors the first.

    Returns:
        ``[..., D]``, or ``[..., D // 2 + 1]`` if folded, rising to 1.

    Examples:
        >>> sep_curve(torch.tensor([0.25, 0.5, 0.25]), width=4)
        tensor([0.2500, 0.5000, 0.7500, 1.0000])
    """
    if folded:
        return spectrum.cumsum(-1)
    index = torch.arange(width, device=spectrum.device)
    return (spectrum / multiplicity(width, spectrum))[..., torch.minimum(index, width - index)].cumsum(-1)


def bandwidth(curve: Tensor, level: float) -> Tensor:
    """Returns the share of frequencies that holds a share of the energy: (1 + first index at the level) / frequencies.

    Args:
        curve: Of `sep_curve`, ``[..., F]``.
        level: In (0, 1). A tie within 1e-10 counts as reached.

    Returns:
        ``[...]``, float64, in (0, 1].

    Examples:
        >>> bandwidth(torch.tensor([0.2, 0.5, 0.9, 1.0]), 0.5).item()
        0.5
    """
    return energy_rank(curve, level).double() / curve.shape[-1]


def image_bandwidths(spectrum: Tensor, width: int, levels: Sequence[float]) -> Tensor:
    """Returns the bandwidths ``[..., L]`` of channel spectra, ``[..., D // 2 + 1]``, whose sum does not matter."""
    curve = sep_curve(spectrum / spectrum.sum(-1, keepdim=True), width)
    return torch.stack([bandwidth(curve, level) for level in levels], dim=-1)


def _measure(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moments, totals, counts = unit_moments(tokens)
    return spectrum_of_moment(moments) / counts[:, None], counts, moments.sum(0), totals.sum(0)


class SpectralEnergyPattern(Metric):
    """The channel spectrum of every image, and what its controls need, over all batches and ranks.

    Args:
        width: Channels D.
    """

    full_state_update = False
    spectrum: list[Tensor]
    counts: list[Tensor]
    moment: Tensor
    total: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_state("spectrum", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")
        self.add_state("moment", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor) -> None:
        """Adds images by their tokens ``[B, N, D]``."""
        spectra, counts, moments, totals = zip(*over_images(_measure, tokens), strict=True)
        self.spectrum += spectra
        self.counts += counts
        self.moment += torch.stack(moments).sum(0)
        self.total += torch.stack(totals).sum(0)

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns what the curve and its controls are made of.

        Returns:
            The spectrum of every image ``[images, D // 2 + 1]``, the tokens that count in each ``[images]``, and of all
            tokens at length 1 the second moment ``[D, D]``, whose trace is 1, and the mean ``[D]``.
        """
        counts = dim_zero_cat(self.counts)
        return dim_zero_cat(self.spectrum), counts, self.moment / counts.sum(), self.total / counts.sum()
