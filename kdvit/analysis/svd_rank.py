"""How many directions hold the energy of one image (arXiv:2511.15572, per-image SVD)."""

from __future__ import annotations

import torch
from torch import Tensor

from kdvit.analysis.tokens import PerImage, over_images

TIE = 1e-10


def svd_energy(tokens: Tensor) -> Tensor:
    """Returns the share of each image's energy in its r leading singular directions, for every r.

    With the singular values s of the tokens, not centred: ``sum_{k<=r} s_k^2 / sum_k s_k^2``. (The squares are the
    eigenvalues of the smaller Gram matrix, in float64.)

    Args:
        tokens: ``[B, N, D]``.

    Returns:
        ``[B, min(N, D)]``, float64, rising to 1.

    Raises:
        ValueError: If the tokens are empty, not finite, or zero.

    Examples:
        >>> svd_energy(torch.diag(torch.tensor([3.0, 1.0]))[None])
        tensor([[0.9000, 1.0000]], dtype=torch.float64)
    """
    return torch.cat(over_images(_svd_energy, tokens))


def _svd_energy(tokens: Tensor) -> Tensor:
    gram = tokens @ tokens.mT if tokens.shape[1] <= tokens.shape[2] else tokens.mT @ tokens
    energy: Tensor = torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0).cumsum(-1)
    share: Tensor = energy / energy[:, -1:]
    return share


def energy_rank(energy: Tensor, level: float) -> Tensor:
    """Returns the least r whose cumulative share of the energy reaches a level.

    Args:
        energy: Cumulative shares ``[..., R]``, rising to 1. A tie within 1e-10 counts as reached.
        level: In (0, 1).

    Returns:
        ``[...]``, int64, 1..R.

    Raises:
        ValueError: If the level is out of range.

    Examples:
        >>> energy_rank(torch.tensor([[0.6, 0.9, 1.0], [0.95, 0.99, 1.0]]), 0.95).tolist()
        [3, 1]
    """
    if not 0 < level < 1:
        raise ValueError(f"An energy level must be above 0 and below 1, got {level}.")
    return (energy < level - TIE).sum(-1) + 1


class SVDRank(PerImage):
    """`svd_energy` of every image of a data set, over all batches and ranks.

    Examples:
        >>> metric = SVDRank()
        >>> metric.update(torch.eye(4)[None])
        >>> energy_rank(metric.compute(), 0.7).tolist()
        [3]
    """

    measure = staticmethod(svd_energy)
