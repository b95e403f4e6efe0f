"""Patch tokens: what the analyses take, and how they go over images on all cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

T = TypeVar("T")
IMAGES_AT_ONCE = 4  # of a size that stays in a core's cache


def as_tokens(feature: Tensor) -> Tensor:
    """Returns a feature map ``[B, C, H, W]`` as patch tokens ``[B, H * W, C]``."""
    return feature.flatten(2).transpose(1, 2)


def check_tokens(tokens: Tensor, first: int = 0) -> Tensor:
    """Returns tokens in float64.

    Args:
        tokens: ``[B, N, D]``: N patch tokens of D channels for each of B images, of any floating type.
        first: Number of the first image, for messages.

    Raises:
        TypeError: If they are no floating-point numbers.
        ValueError: If the shape is another one or empty, a number is not finite, or all tokens of an image are zero, so
            that it has no energy to speak of.
    """
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(
            f"Expected tokens [images, N, D], each at least 1, got shape {list(tokens.shape)}. (A feature map "
            "[B, C, H, W] becomes tokens by kdvit.analysis.as_tokens.)"
        )
    if not tokens.is_floating_point():
        raise TypeError(f"Expected floating-point tokens, got {tokens.dtype}.")
    tokens = tokens.double()
    largest: Tensor = torch.linalg.vector_norm(tokens, torch.inf, dim=(1, 2))
    for wrong, said in (
        (~largest.isfinite(), "The tokens of image {} of the batch are not finite."),
        (largest == 0, "All tokens of image {} of the batch are zero: they have no energy, and no rank."),
    ):
        if wrong.any():
            raise ValueError(said.format(first + int(wrong.nonzero()[0])))
    return tokens


def over_images(function: Callable[[Tensor], T], tokens: Tensor) -> list[T]:
    """Applies a function to a few images at a time, on the CPU one thread a core, each in its own cache.

    (torch's own threads share the work within one small matrix; eigenvalues of 196 x 196 gain nothing by that.)

    Args:
        function: Of tokens ``[b, N, D]`` in float64.
        tokens: ``[B, N, D]``.

    Returns:
        What the function returned, in the order of the images.

    Raises:
        ValueError: See `check_tokens`.
    """
    parts = torch.split(tokens, IMAGES_AT_ONCE) if tokens.device.type == "cpu" and tokens.ndim == 3 else [tokens]

    def checked(i: int) -> T:
        return function(check_tokens(parts[i], i * IMAGES_AT_ONCE))

    threads = torch.get_num_threads()
    if threads == 1 or len(parts) == 1:
        return [checked(i) for i in range(len(parts))]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(checked, range(len(parts))))
    finally:
        torch.set_num_threads(threads)


class PerImage(Metric):
    """Rows of numbers of every image, float64, over all batches and ranks; those of one rank stand together."""

    full_state_update = False
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def measure(self, tokens: Tensor) -> Tensor:
        """Returns the rows of images, ``[B, ...]``: by default what is given."""
        return tokens

    def update(self, tokens: Tensor) -> None:
        """Adds images by their tokens ``[B, N, D]``."""
        self.rows.append(self.measure(tokens))

    def compute(self) -> Tensor:
        """Returns the rows, ``[images, ...]``."""
        return dim_zero_cat(self.rows)
