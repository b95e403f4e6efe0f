"""Batches of any data module, and labels or images that are not what a module takes, before they come to a loss."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kdvit.errors import UserError, shown
from kdvit.structures import ONE_CLASS, Batch, BatchError, ImageFormat, as_batch


class TargetError(UserError, ValueError):
    """Targets that no loss of kdvit is for."""


def read_batch(batch: Any, number: int, classes: int, mixed: bool = False) -> Batch:
    """Returns a batch of any data module as a Batch.

    Args:
        batch: What the data module yields.
        number: Number of the batch in its epoch. The values of labels are looked at in the first, for a GPU has to wait
            for that; on CPUs in all that are no `Batch` yet. (kdvit's own data modules have looked, so a `Batch` of
            training is taken as it is.)
        classes: Number of classes K; 0 where labels are not used, and may be missing.
        mixed: Whether the targets may be probabilities, as Mixup makes them in training.

    Raises:
        UserError: If it is no batch.
        TargetError: If its targets are neither class indices ``[B]`` nor, where mixed, probabilities ``[B, K]``.
    """
    with shown((BatchError,)):
        read = as_batch(batch)
    if classes:
        foreign = not isinstance(batch, Batch)
        look = (foreign and read.target.device.type == "cpu") or (number == 0 and (foreign or not mixed))
        require_classes(read.target, len(read.image), classes, mixed, look)
    return read


def require_classes(target: Tensor, images: int, classes: int, mixed: bool, look: bool) -> None:
    """Raises TargetError unless targets are class indices ``[B]`` or, where mixed, probabilities ``[B, K]``.

    Args:
        target: The targets.
        images: Number of images B.
        classes: Number of classes K.
        mixed: Whether they may be probabilities.
        look: Whether to look at their values, for which a GPU has to wait.
    """
    found = f"{target.dtype} {list(target.shape)}"
    if mixed and target.is_floating_point() and target.shape == (images, classes):
        if look and not bool(((target.sum(dim=1) - 1).abs() < 1e-2).all() and target.min() >= 0):
            raise TargetError(f"Expected class indices, or probabilities of sum 1; got {found} of others. {ONE_CLASS}")
    elif target.is_floating_point() or target.shape != (images,):
        raise TargetError(f"Expected class indices [{images}], got {found}. {ONE_CLASS}")
    elif look and not bool(target.min() >= 0 and target.max() < classes):
        low, high = int(target.min()), int(target.max())
        raise TargetError(f"Expected labels of 0 to {classes - 1}, for {classes} classes; got {low} to {high}.")


def require_same_images(taken: ImageFormat, datamodule: Any) -> None:
    """Raises ValueError if a data module's images are not those that a module takes; says so if it tells nothing."""
    given = getattr(datamodule, "image_format", None)
    if not isinstance(given, ImageFormat):
        rank_zero_info(
            f"The data has no image_format: its images are taken for those of {taken[:3]}, size, mean and std."
        )
    elif given[:3] != taken[:3]:
        raise ValueError(
            f"The data gives images of size, mean and std {given[:3]}, and the module takes {taken[:3]}, by which "
            "a teacher converts them: give DistillationModule image_format=data.image_format."
        )
