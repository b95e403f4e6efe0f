"""How many directions, shared by all images, hold the energy of each (arXiv:2511.15572, dataset PCA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kdvit.analysis.participation import unchecked_ratio
from kdvit.analysis.tokens import PerImage, over_images
from kdvit.structures import SharedBasis


def moments(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums over tokens ``[B, N, D]`` of ``x x^T``, ``[D, D]``, and of x, ``[D]``, in float64."""
    sums = over_images(lambda part: (part.flatten(0, 1).T @ part.flatten(0, 1), part.sum((0, 1))), tokens)
    second, first = zip(*sums, strict=True)
    return torch.stack(second).sum(0), torch.stack(first).sum(0)


def shared_basis(moment: Tensor, total: Tensor, count: Tensor | int, centred: bool = False) -> SharedBasis:
    """Returns the principal axes of tokens by their sums.

    Args:
        moment: Sum of ``x x^T`` over all tokens, ``[D, D]``.
        total: Sum of all tokens, ``[D]``.
        count: Number of tokens.
        centred: Take the covariance instead of the second moment, which is the paper's.

    Examples:
        >>> tokens = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
        >>> shared_basis(*moments(tokens), 2).spectrum
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    mean = total.double() / count * centred
    values, axes = torch.linalg.eigh(moment / count - torch.outer(mean, mean))
    return SharedBasis(values.flip(-1).clamp(min=0), axes.flip(-1), mean)


def pca_energy(tokens: Tensor, basis: SharedBasis) -> Tensor:
    """Returns ``E_i(d) = ||X_i V_d||_F^2 / ||X_i||_F^2``: the share of each image in the d leading shared axes.

    Args:
        tokens: ``[B, N, D]``.
        basis: Of D channels.

    Returns:
        ``[B, D]``, float64, rising to 1.

    Raises:
        ValueError: If the tokens are empty, not finite, or zero.

    Examples:
        >>> basis = SharedBasis(torch.ones(2), torch.eye(2).double(), torch.zeros(2))
        >>> pca_energy(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), basis)
        tensor([[0.9000, 1.0000]], dtype=torch.float64)
    """
    return in_shared_basis(tokens, basis)[0]


def in_shared_basis(tokens: Tensor, basis: SharedBasis) -> tuple[Tensor, Tensor]:
    """Returns `pca_energy` ``[B, D]`` and the participation ratio of the tokens' coordinates, ``[B]``."""

    def measure(part: Tensor) -> tuple[Tensor, Tensor]:
        coordinates = (part - basis.mean if basis.mean.any() else part) @ basis.axes
        energy = coordinates.square().sum(1).cumsum(-1)
        if not energy[:, -1].all():
            raise ValueError("All tokens of an image are the mean token: centred, they have no energy.")
        return energy / energy[:, -1:], unchecked_ratio(coordinates)

    energies, ratios = zip(*over_images(measure, tokens), strict=True)
    return torch.cat(energies), torch.cat(ratios)


class TokenMoments(Metric):
    """The second moment and the mean of a data set's tokens, from float64 sums over all batches and ranks.

    Args:
        width: Channels D.
    """

    full_state_update = False
    moment: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_state("moment", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, tokens: Tensor) -> None:
        """Adds images by their tokens ``[B, N, D]``."""
        second, first = moments(tokens)
        self.moment += second
        self.total += first
        self.count += tokens.shape[0] * tokens.shape[1]

    def compute(self) -> Any:
        """Returns the mean of ``x x^T`` over all tokens, ``[D, D]``, and the mean token ``[D]``."""
        return self.moment / self.count, self.total / self.count


class DatasetPCA(TokenMoments):
    """The `SharedBasis` of a data set.

    Args:
        width: Channels D.
        centred: Take the covariance instead of the second moment, which is the paper's.
    """

    def __init__(self, width: int, centred: bool = False) -> None:
        super().__init__(width)
        self.centred = centred

    def compute(self) -> SharedBasis:
        """Returns the basis."""
        return shared_basis(self.moment, self.total, self.count, self.centred)


class PCAEnergy(PerImage):
    """`pca_energy` of every image, and its participation ratio in the shared basis, over all batches and ranks.

    Args:
        basis: The basis of the data set, from `DatasetPCA`.
    """

    def __init__(self, basis: SharedBasis) -> None:
        super().__init__()
        self.basis = basis

    def measure(self, tokens: Tensor) -> Tensor:
        """Returns both of images by their tokens ``[B, N, D]``, ``[B, D + 1]``."""
        energy, participation = in_shared_basis(tokens, self.basis)
        return torch.cat([energy, participation[:, None]], 1)

    def compute(self) -> Any:
        """Returns the energy ``[images, D]`` and the participation ratio ``[images]`` of every image, float64."""
        rows = super().compute()
        return rows[:, :-1], rows[:, -1]
