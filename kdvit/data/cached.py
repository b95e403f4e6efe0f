"""Training images with the teacher's stored outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from kdvit.cache import CacheReader
from kdvit.structures import Batch, Pixels, View


class ViewBatches(Dataset[Any]):
    """Maps a list of views to a Batch.

    Args:
        images: The data set of the images.
        reader: Reads the teacher's outputs for them; None for images alone.
    """

    def __init__(self, images: Any, reader: CacheReader | None = None) -> None:
        self.images, self.reader = images, reader

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """Digest of the names of the images, where they are files."""
        return getattr(self.images, "digest", "")

    def __getitem__(self, indices: Sequence[View | int]) -> Batch:
        views = [View.of(index) for index in indices]
        together = hasattr(self.images, "__getitems__")
        batch = collate(self.images.__getitems__(views) if together else [self.images[view] for view in views])
        return batch if self.reader is None else batch._replace(teacher=self.reader.read(views, batch.index))

    __getitems__ = __getitem__


def collate(samples: Batch | list[tuple[Any, int, int]]) -> Batch:
    """Stacks samples into a Batch, of images or of pixels with `Pixels`; a Batch passes through."""
    if isinstance(samples, Batch):
        return samples
    images, targets, indices = zip(*samples, strict=True)
    pixels = None
    if isinstance(images[0], tuple):
        images, each = zip(*images, strict=True)
        pixels = Pixels.of_batch(each)
    return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(indices), pixels=pixels)
