"""Small images held in memory and augmented a whole batch at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from kdvit.data.base import ImageDataModule, Split
from kdvit.seeding import mixed_words
from kdvit.structures import Batch, ImageFormat, View


class InMemoryData(ImageDataModule):
    """Small images in memory. Subclass it and give what stands here.

    Attributes:
        parts: Images ``[n, H, W]`` or ``[n, H, W, 3]`` and class indices ``[n]`` that a split is taken from.
        numbers: Which of them are the split's, in its order.
        padding: Zero pixels around an image, of which a random crop is taken in training.
        hflip: Probability of a horizontal flip in training.
    """

    parts: dict[str, tuple[Tensor, Tensor]]
    numbers: dict[str, Tensor]
    padding: int
    hflip: float = 0.0

    def source(self, split: Split) -> Split:
        """Returns val for test, or test for val, where there is no other."""
        return split if split in self.parts else "val" if split == "test" else "test"

    def labels(self, split: Split) -> Tensor:
        """Returns the classes of a split."""
        return self.parts[split][1][self.numbers[split]]

    def dataset(self, split: Split) -> Dataset[Any]:
        """Returns the images of a split."""
        source = self.source(split)
        images, index = self.parts[source][0], self.numbers[source]
        own: dict[str, Any] = {"seed": self.seed, "padding": self.padding, "hflip": self.hflip}
        return InMemoryImages(
            images[index], self.labels(source), self.image_format, **(own if split == "train" else {})
        )

    def path(self, index: int, split: Split = "test") -> str:
        """Returns ``SPLIT/N``, N the number in the array of val or test; of images set apart, in that of train."""
        source = self.source(split)
        own = "train" if self.parts[source] is self.parts["train"] else source
        return f"{own}/{int(self.numbers[source][index])}"


class InMemoryImages(Dataset[Any]):
    """Colour images, or grey ones, of one channel or repeated as three equal ones, as the format says.

    Args:
        images: ``[n, H, W]`` or ``[n, H, W, 3]``, uint8.
        targets: ``[n]``, int64.
        image_format: Size and normalisation to give; other sizes are reached by bilinear resizing, once.
        seed: Seed of the augmentation, together with the view; None for none.
        padding: Zero pixels around an image, of which a random crop is taken.
        hflip: Probability of a horizontal flip.

    Raises:
        ValueError: If images have more channels than the format.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        image_format: ImageFormat,
        seed: int | None = None,
        padding: int = 0,
        hflip: float = 0.0,
    ) -> None:
        pixels = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        if pixels.shape[1] > len(image_format.mean):
            raise ValueError(
                f"The images have {pixels.shape[1]} channels, and mean and std {len(image_format.mean)} number(s)."
            )
        if pixels.shape[2:] != image_format.size:
            pixels = F.interpolate(pixels, size=list(image_format.size), mode="bilinear", antialias=True)
        self.pixels, self.targets = pixels, targets
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in (image_format.mean, image_format.std))
        self.seed, self.padding, self.hflip = seed, padding, hflip

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: View | int) -> tuple[Tensor, int, int]:
        batch = self.__getitems__([index])
        return batch.image[0], int(batch.target[0]), int(batch.index[0])

    def fingerprint(self) -> dict[str, Any]:
        """Describes in plain types what the pixels of a view depend on: the images and the augmentation."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes() + self.targets.numpy().tobytes()).hexdigest()
        return {"content": digest, "padding": self.padding, "hflip": self.hflip}

    def __getitems__(self, indices: Sequence[View | int]) -> Batch:
        views = [View.of(index) for index in indices]
        index = torch.tensor([view.image for view in views])
        pixels = self.pixels[index].float() / 255
        if self.seed is not None:
            pixels = self._augmented(pixels, views, self.seed)
        return Batch((pixels - self.mean) / self.std, self.targets[index], index)

    def _augmented(self, pixels: Tensor, views: list[View], seed: int) -> Tensor:
        draws = np.stack([mixed_words(seed, *view, count=3) for view in views])
        shifts = torch.from_numpy(draws[:, :2] % (2 * self.padding + 1)).long()
        flips = torch.from_numpy(draws[:, 2] < self.hflip * 2**32)
        height, width = pixels.shape[2:]
        rows = shifts[:, 0, None] + torch.arange(height)
        columns = shifts[:, 1, None] + torch.where(flips[:, None], torch.arange(width).flip(0), torch.arange(width))
        padded = F.pad(pixels, [self.padding] * 4).movedim(1, 3)
        picked = padded[torch.arange(len(views))[:, None, None], rows[:, :, None], columns[:, None, :]]
        return picked.movedim(3, 1)
