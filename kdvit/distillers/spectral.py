"""SpectralKD: distillation of the spatial spectrum of feature maps (arXiv:2412.19055)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.structures import at_least_float32


def spectral_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between the 2-D spectra of two maps.

    Both maps go through a real FFT over height and width (norm "ortho"); real and imaginary parts are compared.
    By Parseval's theorem this is, for maps of equal width, a re-weighted `feature_mse`: the mean runs over about as
    many numbers, but of each conjugate pair only one is counted. On white noise it is about half of it.

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C, H, W]``.

    Returns:
        A scalar, float32 or better.

    Examples:
        >>> spectral_mse(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
        tensor(0.6667)
    """
    maps = at_least_float32(student), at_least_float32(teacher)
    ours, theirs = (torch.view_as_real(torch.fft.rfft2(feature, norm="ortho")) for feature in maps)
    return F.mse_loss(ours, theirs)
