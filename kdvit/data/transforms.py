"""timm's transforms with the arguments of DeiT's recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torchvision.transforms import Normalize

from kdvit.structures import ImageFormat, Pixels, Rectangle

Transform = Callable[[Image.Image], Any]
ErasingMode = Literal["pixel", "rand", "const"]


def train_transform(
    images: ImageFormat,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.4,
    random_erasing: float = 0.25,
    erasing_mode: ErasingMode = "pixel",
    erasing_count: int = 1,
) -> Transform:
    """Returns random resized crop, flip, auto-augment or colour jitter, normalisation and random erasing.

    Args:
        images: What it makes.
        auto_augment: timm's policy string, or None.
        color_jitter: Strength of the colour jitter; timm leaves it out beside a policy.
        random_erasing: Probability of erasing rectangles.
        erasing_mode: With noise of its own for each pixel, one random colour ("rand"), or zeros ("const").
        erasing_count: The largest number of rectangles, which share the area.
    """
    transform = create_transform(
        images.size,
        is_training=True,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        interpolation=images.interpolation,
        re_prob=random_erasing,
        re_mode=erasing_mode,
        re_count=erasing_count,
        mean=images.mean,
        std=images.std,
    )
    _replace_posterize(transform)
    return transform  # type: ignore[no-any-return]


def leaves_arithmetic(transform: Any) -> bool:
    """Tells whether a transform ends as timm's, whose last steps `Pixels` can take; one of a user's own need not."""
    kinds = [type(step) for step in getattr(transform, "transforms", ()) if not isinstance(step, RandomErasing)]
    return kinds[-2:] == [MaybeToTensor, Normalize]


class PixelTransform:
    """A training transform up to its uint8 pixels, with all draws: the arithmetic that is left is `Pixels`.

    Args:
        transform: One that `leaves_arithmetic`.
    """

    def __init__(self, transform: Any) -> None:
        steps = transform.transforms
        tensor = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        self.transform, self._before, self._erasing = transform, steps[:tensor], steps[tensor + 2 :]
        self._mean, self._std = torch.as_tensor(steps[tensor + 1].mean), torch.as_tensor(steps[tensor + 1].std)

    def __repr__(self) -> str:
        return repr(self.transform)

    def __call__(self, image: Image.Image) -> tuple[Tensor, Pixels]:
        """Returns pixels ``[H, W, C]``, and how they become an image."""
        for step in self._before:
            image = step(image)
        pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
        erased = _Erased(pixels.shape)
        for step in self._erasing:
            step(erased)
        return pixels, Pixels(self._mean, self._std, tuple(erased.places), torch.cat(erased.values))


class _Erased:
    """Stands for a float image ``[C, H, W]`` that timm's random erasing writes into, and notes what it writes."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self._shape = torch.Size((shape[2], *shape[:2]))
        self.places: list[Rectangle] = []
        self.values = [torch.empty(0)]

    def size(self) -> torch.Size:
        return self._shape

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = place
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.places.append(Rectangle(0, rows.start, columns.start, height, width, values.numel()))
        self.values.append(values.flatten())


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keeps the highest bits of each channel; 0 bits give black, as in every Pillow before 13, which raises instead."""
    if bits_to_keep >= 8:
        return image
    if bits_to_keep < 1:
        return image.point(lambda _: 0)
    return ImageOps.posterize(image, bits_to_keep)


def _replace_posterize(transform: Any) -> None:
    """Replaces `posterize` in timm's policies; theirs asks for 0 bits about once in 360 images."""
    for step in transform.transforms:
        policies = getattr(step, "policy", [getattr(step, "ops", [])])
        for op in (op for policy in policies for op in policy):
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize
