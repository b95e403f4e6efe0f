"""How near a student's map is to its target: measured for the logs, and no loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import explained_variance


def agreement(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Measures the cosine similarity of tokens, and what share of the target's variance is explained.

    `explained_variance` forgives a constant offset of each channel; `r2` counts it (one minus the squared error over
    the target's variance, both summed over the channels). In both, a channel counts by its variance, so that a giant
    one hides the rest; `r2_median` is the median of the channels' own R^2, and hides as little as half of them can.

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C, H, W]``, the target.
    """
    cosine = F.cosine_similarity(student, teacher, dim=1).mean()
    ours, theirs = (x.movedim(1, -1).flatten(0, -2) for x in (student, teacher))
    explained = torch.as_tensor(explained_variance(ours, theirs, multioutput="variance_weighted"))
    whole, median = r2_scores(ours, theirs)
    return {"cosine": cosine, "explained_variance": explained, "r2": whole, "r2_median": median}


def r2_scores(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Returns R^2 with the channels weighted by their variance, and the median of the channels' own R^2.

    Channels in which the target is constant have no R^2 and are left out. If all are, both are 0. (torchmetrics'
    `r2_score` sums squares about zero, which loses the variance of a channel that is far from it, in float32.)

    Args:
        student: ``[N, C]``.
        teacher: ``[N, C]``, the target.
    """
    varies = (teacher != teacher[:1]).any(dim=0)
    error = varies * (student - teacher).square().sum(dim=0)
    variance = varies * (teacher - teacher.mean(dim=0)).square().sum(dim=0)
    whole = 1 - error.sum() / variance.sum()
    median = (1 - error / variance).nanquantile(0.5)
    return torch.where(varies.any(), whole, 0), torch.where(varies.any(), median, 0)
