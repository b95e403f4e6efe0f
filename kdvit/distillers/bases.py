"""Fixed targets for a narrow student: the teacher's tokens in few axes, without trained parts or cost at inference.

The naive baseline averages neighbouring channels, whose order is arbitrary, and keeps no more of the teacher's energy
than a random projection. The leading principal axes of the teacher's tokens keep the most that so few channels can.
They are measured once, on training images, before the first step. (kdvit's own baselines; their ideas are PCA, and
PHI-S of RADIO, arXiv:2410.01680.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.structures import SharedBasis


def pca_projection(basis: SharedBasis, width: int) -> Tensor:
    """Returns the projection to the leading axes, scaled so that the mean variance of the outputs is 1.

    ``V_d / sqrt(mean of the d eigenvalues)``. Unscaled, a target has the scale of the teacher's features, and its loss
    drowns the others.

    Args:
        basis: Principal axes of the teacher's tokens, centred, of C channels.
        width: Axes d to keep, at most C.

    Returns:
        ``[C, d]``, of the basis' type.
    """
    return basis.axes[:, :width] / basis.spectrum[:width].mean().sqrt()


def phi_s_projection(basis: SharedBasis, width: int) -> Tensor:
    """Returns the projection to the leading axes, rotated so that every output has the same variance, 1.

    ``V_d H / sqrt(mean of the d eigenvalues)``, H an orthonormal Hadamard matrix (PHI-S, arXiv:2410.01680).

    Args:
        basis: Principal axes of the teacher's tokens, centred, of C channels.
        width: Axes d to keep, at most C.

    Returns:
        ``[C, d]``, of the basis' type.
    """
    return pca_projection(basis, width) @ hadamard(width).to(basis.axes)


def hadamard(size: int) -> Tensor:
    """Returns an orthonormal matrix whose entries have one magnitude; where none is known, a random orthonormal one.

    Sylvester's doubling of 1 or of one of Paley's, of order q + 1 for a prime q = 3 mod 4.

    Args:
        size: Rows n.

    Returns:
        ``[n, n]``, float64.

    Examples:
        >>> [bool((hadamard(n).abs() * n**0.5 - 1).abs().max() < 1e-9) for n in (1, 2, 16, 192, 384, 10)]
        [True, True, True, True, True, False]
    """
    matrix, core = torch.ones(1, 1, dtype=torch.float64), size
    doublings = 0
    while core % 2 == 0 and not _is_paley(core):
        core, doublings = core // 2, doublings + 1
    if _is_paley(core):
        matrix = _paley(core)
    elif core > 1:
        generator = torch.Generator().manual_seed(size)
        rotation: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        return rotation
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scaled: Tensor = matrix / size**0.5
    return scaled


def _is_paley(order: int) -> bool:
    prime = order - 1
    return order > 2 and prime % 4 == 3 and all(prime % divisor for divisor in range(2, int(prime**0.5) + 1))


def _paley(order: int) -> Tensor:
    """Returns Paley's Hadamard matrix of the first kind, ``[q + 1, q + 1]``."""
    prime = order - 1
    squares = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0] + [1 if number in squares else -1 for number in range(1, prime)], dtype=torch.float64)
    number = torch.arange(prime)
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(number[:, None] - number) % prime]
    skew.diagonal().add_(1)
    return skew


def energy_kept(basis: SharedBasis, projection: Tensor) -> float:
    """Returns the share of the tokens' energy in the span of a projection's columns.

    ``tr(Q^T C Q) / tr C``, C the tokens' second moment (about their mean, where the basis is centred), Q an orthonormal
    basis of the span. (Whoever knows C guesses more of the tokens from their projection, as channels are correlated.)

    Args:
        basis: Principal axes of the tokens, of C channels.
        projection: ``[C, d]``, of full rank.
    """
    span: Tensor = torch.linalg.qr(projection.to(basis.axes)).Q
    shares = (basis.axes.T @ span).square().sum(1)  # of each axis
    return float(shares @ basis.spectrum / basis.spectrum.sum())


def energies_kept(basis: SharedBasis, width: int) -> dict[str, float]:
    """Returns the share of the tokens' energy that each way to few channels keeps.

    Args:
        basis: Principal axes of the tokens, of C channels.
        width: Channels d that are kept, at most C.

    Returns:
        The shares by the words for the way. The leading axes keep the most; random ones keep d / C on average.
    """
    channels = len(basis.mean)
    drawn = torch.randn(channels, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ways = {
        "the leading axes (pca, phi_s)": basis.axes[:, :width],
        "random orthogonal axes": drawn,
        "pooled channels (pool)": pooling(channels, width),
    }
    return {way: energy_kept(basis, projection) for way, projection in ways.items()}


def pooling(channels: int, width: int) -> Tensor:
    """Returns adaptive average pooling of channels as a matrix ``[channels, width]``, float64."""
    eye = torch.eye(channels, dtype=torch.float64)
    return torch.nn.functional.adaptive_avg_pool1d(eye[None], width)[0]


class FixedProjection(nn.Module):
    """``(T - mean) P`` of a teacher's map, with buffers that are fixed once, by `fix`.

    A map that is as wide as the target and no wider is one already: a cache stores targets.

    Args:
        channels: Channels C of the teacher.
        width: Channels d of the target.
    """

    mean: Tensor
    weight: Tensor
    is_fixed: Tensor

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("weight", torch.zeros(width, channels))
        self.register_buffer("is_fixed", torch.tensor(False))
        self._checked = False

    def fix(self, mean: Tensor, projection: Tensor) -> None:
        """Takes the mean ``[C]`` and the projection ``[C, d]``."""
        self.mean.copy_(mean)
        self.weight.copy_(projection.T)
        self.is_fixed.fill_(True)

    def forward(self, feature: Tensor) -> Tensor:
        """Returns the map ``[B, C, H, W]`` as ``[B, d, H, W]``; a target as it is.

        Raises:
            RuntimeError: If it has not been fixed.
        """
        if feature.shape[1] == self.width < len(self.mean):
            return feature
        if not self._checked:  # once, as it waits for the device
            if not bool(self.is_fixed):
                raise RuntimeError(
                    "The teacher's axes are not measured yet: call the distiller's calibrate(bases) first."
                )
            self._checked = True
        bias = -(self.weight @ self.mean)
        return F.conv2d(feature.to(bias.dtype), self.weight[:, :, None, None], bias)
