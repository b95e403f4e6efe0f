"""Outliers: few channels, few tokens, or a constant, with so much of the energy that ranks and axes count nothing else.

Vision transformers have them: massive channels and sink tokens (arXiv:2402.17762; arXiv:2309.16588 calls the tokens
registers). The detection is kdvit's:

- Massive are channels with more than 25 times the median channel's variance, and sink tokens those with more than 25
  times the energy of their image's median token: 5 times in length, where ordinary tokens differ by 2 or 3 times.
- Outliers are few. Where more than a tenth of the channels (or of an image's tokens) is massive, that is how the energy
  spreads, and is none.
- They are *found* where they hold a fifth of the energy: sink tokens that of an image on average, or of all images
  together. (Ranks are each image's own, but the axes that all share are weighted by energy, so that the sinks of few
  images can fool them.) 95 % of all is then 93.75 % of the rest; less than a fifth moves the figures by less than a
  step of the paper's levels (95 to 90 %), which is 55 of CaiT-S24's 302 axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdvit.analysis.tokens import PerImage, over_images

MASSIVE = 25.0
FEW = 0.1
FOUND = 0.2
NOTHING = 1e-20  # of the largest: the square of float64's rounding, with room


def outlier_share(energy: Tensor) -> Tensor:
    """Returns the share of the energy that few entries hold which have more than 25 times the median.

    Args:
        energy: ``[..., n]``, not negative. Entries of (nearly) nothing do not count in the median.

    Returns:
        ``[...]``, in 0..1; 0 where more than a tenth of the entries (and more than one) are so large.

    Examples:
        >>> outlier_share(torch.tensor([1.0, 1.0, 2.0, 96.0, 0.0]))
        tensor(0.9600)
    """
    live = energy > NOTHING * energy.amax(-1, keepdim=True)
    median = energy.where(live, torch.nan).nanmedian(-1, keepdim=True).values
    massive = energy > MASSIVE * median
    few = massive.sum(-1) <= max(1, int(FEW * energy.shape[-1]))
    share: Tensor = (energy * massive).sum(-1) / energy.sum(-1) * few
    return share.nan_to_num(0)


class Outliers(NamedTuple):
    """Shares of the energy that outliers hold.

    Attributes:
        channels: Of the variance, in massive channels.
        sinks: In sink tokens: of an image's energy, the mean over images, or of all images' energy, whichever is more.
        offset: In the mean token: a constant offset.
    """

    channels: float
    sinks: float
    offset: float

    def found(self) -> dict[str, str]:
        """Returns what is found of them, by name, in words."""
        said = {
            "channels": f"massive channels hold {self.channels:.1%} of the variance",
            "sinks": f"sink tokens hold {self.sinks:.1%} of the energy",
            "offset": f"a constant offset holds {self.offset:.1%} of the energy",
        }
        return {name: said[name] for name, share in self._asdict().items() if share >= FOUND}


def moment_outliers(variance: Tensor, mean: Tensor, sinks: Tensor) -> Outliers:
    """Returns the outliers of tokens.

    Args:
        variance: Of each channel, ``[D]``.
        mean: Mean token ``[D]``.
        sinks: Each image's share of energy in sinks, and its energy, ``[images, 2]``.
    """
    constant = mean.square().sum()
    offset = (constant / (constant + variance.sum())).nan_to_num(0)
    share, energy = sinks.unbind(1)
    in_sinks = max(float(share.mean()), float((share * energy).sum() / energy.sum()))
    return Outliers(float(outlier_share(variance)), in_sinks, float(offset))


class SinkShare(PerImage):
    """`outlier_share` of the energies of each image's tokens, and their sum, ``[images, 2]``."""

    def measure(self, tokens: Tensor) -> Tensor:
        """Returns share and energy of images by their tokens ``[B, N, D]``."""
        energies = torch.cat(over_images(lambda part: part.square().sum(2), tokens))
        return torch.stack([outlier_share(energies), energies.sum(1)], 1)
