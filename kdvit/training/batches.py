"""Batches of any data module, and labels that are none, before they come to a loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdvit.errors import UserError, shown
from kdvit.structures import ONE_CLASS, Batch, BatchError, as_batch


class TargetError(UserError, ValueError):
    """Targets that no loss of kdvit is for."""


def read_batch(batch: Any, number: int, classes: int) -> Batch:
    """Returns a batch of any data module as a Batch.

    Args:
        batch: What the data module yields.
        number: Number of the batch in its epoch. The values of the first are looked at, those of others only where
            that is free, on CPUs.
        classes: Number of classes K; 0 where labels are not used, and may be missing.

    Raises:
        UserError: If it is no batch.
        TargetError: If its targets are neither class indices ``[B]`` nor, once mixed, probabilities ``[B, K]``.
    """
    with shown((BatchError,)):
        read = as_batch(batch)
    if classes:
        require_classes(read.target, len(read.image), classes, number == 0 or read.target.device.type == "cpu")
    return read


def require_classes(target: Tensor, images: int, classes: int, look: bool) -> None:
    """Raises TargetError unless targets are class indices ``[B]`` or probabilities ``[B, K]``.

    Args:
        target: The targets.
        images: Number of images B.
        classes: Number of classes K.
        look: Whether to look at their values, for which a GPU has to wait.
    """
    found = f"{target.dtype} {list(target.shape)}"
    if target.is_floating_point() and target.shape == (images, classes):
        if look and not bool(((target.sum(dim=1) - 1).abs() < 1e-2).all() and target.min() >= 0):
            raise TargetError(f"Expected class indices, or probabilities of sum 1; got {found} of others. {ONE_CLASS}")
    elif target.is_floating_point() or target.shape != (images,):
        raise TargetError(f"Expected class indices [{images}], got {found}. {ONE_CLASS}")
    elif look and not bool(target.min() >= 0 and target.max() < classes):
        low, high = int(target.min()), int(target.max())
        raise TargetError(f"Expected labels of 0 to {classes - 1}, for {classes} classes; got {low} to {high}.")
