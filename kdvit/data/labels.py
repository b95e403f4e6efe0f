"""Labels: each the index of one class, or a reason to stop before the first step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdvit.errors import WorkerError
from kdvit.structures import ONE_CLASS


class LabelError(WorkerError, ValueError):
    """A label that is not the index of one class."""


def class_indices(labels: Any, images: int, classes: int, where: str) -> NDArray[np.int64]:
    """Returns labels as class indices ``[n]``.

    Args:
        labels: Whole numbers ``[n]`` or ``[n, 1]``, as array, tensor or list; a number for one image.
        images: Number of images n.
        classes: Number of classes K.
        where: What has the labels, for messages.

    Raises:
        LabelError: If they are no class indices.

    Examples:
        >>> class_indices([[2], [0]], images=2, classes=3, where="train").tolist()
        [2, 0]
    """
    try:
        values = np.asarray(labels)
    except ValueError:  # lists of unequal lengths
        values = np.empty(0, object)
    if values.dtype.kind not in "iub" or values.size != images:
        found = f"{values.dtype} {list(values.shape)}" if images > 1 or values.size > 9 else repr(labels)
        raise LabelError(f"{where}: expected {images} class index(es), got {found}. {ONE_CLASS}")
    values = values.reshape(images).astype(np.int64)
    if images and not 0 <= values.min() <= values.max() < classes:
        wrong = int(values.min() if values.min() < 0 else values.max())
        raise LabelError(f"{where}: expected labels of 0 to {classes - 1}, for {classes} classes, got {wrong}.")
    return values


def first_of_each_class(labels: NDArray[Any], order: NDArray[np.intp], share: float) -> NDArray[np.bool_]:
    """Returns which images are the first of their class in an order: a share of it, rounded, at least one, never all.

    Args:
        labels: Class indices ``[n]``.
        order: Numbers of all images ``[n]``.
        share: Of each class.
    """
    first = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        ours = order[labels[order] == label]
        first[ours[: min(max(int(share * len(ours) + 0.5), 1), len(ours) - 1)]] = True
    return first


def held_out(labels: Any, share: float, seed: int) -> NDArray[np.bool_]:
    """Draws what is set apart to validate on, as `first_of_each_class` of a random order.

    Args:
        labels: Class indices ``[n]``; all alike where nobody knows them.
        share: Of each class.
        seed: Of the draw.

    Raises:
        ValueError: If no class has two images.
    """
    held = first_of_each_class(np.asarray(labels), np.random.default_rng(seed).permutation(len(labels)), share)
    if not held.any():
        raise ValueError("No class has two images, one to train and one to validate on: give val.")
    return held
