"""Images that come one after another and have no numbers: nothing of them can be chosen, resumed or stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kdvit.data.items import read_item
from kdvit.data.reading import DamagedImage, reading
from kdvit.data.transforms import Transform
from kdvit.seeding import mixed_seed, seeded

STREAM = "a stream: a run that goes on amid an epoch reads it from its beginning, and there can be no cache"


class StreamImages(IterableDataset[Any]):
    """Images of a stream, with draws that follow from seed, epoch, process, worker and place.

    The stream divides itself among processes and workers, as torch asks of every IterableDataset.

    Args:
        stream: Yields ``(image, label)``, see `Items`. Its `set_epoch`, if it has one, is called for each epoch.
        transform: Makes a tensor ``[C, H, W]`` of an image.
        seed: Seed of the draws; None for a transform without any.
        classes: Number of classes K; 0 for images without labels.
        grey: Whether images have one channel.
        name: What messages call it.
        skip: Whether a damaged image is left out; else it raises.
    """

    def __init__(
        self, stream: Any, transform: Transform, seed: int | None, classes: int, grey: bool, name: str, skip: bool
    ) -> None:
        self.stream, self.transform, self.seed = stream, transform, seed
        self.classes, self.grey, self.name = classes, grey, name
        self.skip, self.epoch = skip, 0

    def __len__(self) -> int:
        size = len(self.stream) if self.seed is not None and hasattr(self.stream, "__len__") else 0
        if not size:
            raise TypeError("nobody knows how long the stream is")  # what torch asks for
        return size

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(self.epoch)
        for place, item in enumerate(self.stream):
            number = (place * workers + worker) * ranks + rank
            with suppress(DamagedImage) if self.skip else nullcontext():
                yield self._sample(item, number)

    def _sample(self, item: Any, number: int) -> tuple[Tensor, int, int]:
        where = f"item {number} of {self.name}"
        with reading(where):
            image, target = read_item(item, self.classes, self.grey, where)
        with seeded(mixed_seed(self.seed or 0, self.epoch, number)):
            return self.transform(image), target, number


class StreamLoader(DataLoader[Any]):
    """A loader of a stream, which tells it the epoch when the first batch is asked for."""

    epoch: Callable[[], int] = staticmethod(lambda: 0)

    def __iter__(self) -> Any:
        dataset: Any = self.dataset
        dataset.epoch = self.epoch()
        yield from super().__iter__()
