"""How evenly a token uses its channels: a measure of kdvit's own, which does not depend on the channels' order."""

from __future__ import annotations

import torch
from torch import Tensor

from kdvit.analysis.tokens import PerImage, over_images


def participation_ratio(tokens: Tensor) -> Tensor:
    """Returns ``(sum x^2)^2 / (D * sum x^4)`` of a token's channels, as the mean over each image's tokens.

    1 where all channels of a token have one magnitude, 1 / D where a single channel has all of it, 1/3 for Gaussian
    noise (the limit for large D). It is kdvit's, not the paper's; unlike the spectrum along the channels, a permutation
    of them leaves it as it is. Tokens of zeros do not count.

    Args:
        tokens: ``[B, N, D]``.

    Returns:
        ``[B]``, float64.

    Raises:
        ValueError: If the tokens are empty, not finite, or zero.

    Examples:
        >>> participation_ratio(torch.tensor([[[1.0, -1.0, 1.0, -1.0]], [[0.0, 0.0, 5.0, 0.0]]]))
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    return torch.cat(over_images(unchecked_ratio, tokens))


def unchecked_ratio(tokens: Tensor) -> Tensor:
    """Returns `participation_ratio` of float64 tokens that have been checked."""
    square = tokens.square()
    quartic = tokens.shape[2] * square.square().sum(2)
    counts = quartic > 0
    ratio = square.sum(2).square() / quartic.where(counts, 1)
    return ratio.sum(1) / counts.sum(1)


class ParticipationRatio(PerImage):
    """`participation_ratio` of every image of a data set, over all batches and ranks."""

    measure = staticmethod(participation_ratio)
