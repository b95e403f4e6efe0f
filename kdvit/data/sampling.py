"""Which views of which images a rank sees, in which order, and where a resumed run continues."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler

from kdvit.errors import UserError
from kdvit.seeding import mixed_seed
from kdvit.structures import View


class ShareError(UserError, ValueError):
    """The images cannot be shared by the processes as they are."""


class ViewSampler(DistributedSampler[Any]):
    """Distributes an epoch's views over the ranks.

    In training, the images are shuffled by (seed, epoch). With `repeats`, each image comes that many times, as distinct
    views on successive ranks, and the epoch is cut to as many views as there are images (repeated augmentation of
    DeiT, arXiv:2012.12877, which also rounds the epoch down to a multiple of 256 images; below 256 it is not cut to
    nothing). All ranks get equally many: as many as whole steps take, so that a step shows the same views to any number
    of ranks; where there is no whole step, all views, filled up. In evaluation, each image comes once, on one rank, and
    nothing is padded.

    (A DistributedSampler, for Lightning replaces any other under DDP.)

    Args:
        size: Number of images.
        training: Shuffle, repeat and pad.
        repeats: Views of an image in an epoch.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seed of the order.
        views: Epochs after which the views of an image come again (the order does not); None for never.
        step: Views of a training step on each rank; 0 where an epoch need not be whole steps.

    Attributes:
        start: Views that the next iteration skips; the one after starts at 0 again.
    """

    def __init__(
        self,
        size: int,
        *,
        training: bool,
        repeats: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        views: int | None = None,
        step: int = 0,
    ) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=training, seed=seed)  # type: ignore[arg-type]
        self.size, self.training, self.repeats = size, training, repeats if training else 1
        self.views, self.step = views, step
        self.start = 0

    def __len__(self) -> int:
        if not self.training:
            return len(range(self.rank, self.size, self.num_replicas))
        return self.share(self.num_replicas, self.step)

    def share(self, replicas: int, step: int) -> int:
        """Returns the images of a training epoch that each of so many processes has, with so many of its own a step."""
        cut = self.repeats > 1 and self.size >= 256
        views = self.size // 256 * 256 if cut else self.size
        if step and views >= step * replicas:
            return views // (step * replicas) * step
        return views // replicas if cut else math.ceil(views / replicas)

    def __iter__(self) -> Iterator[View]:
        start, self.start = self.start, 0
        order = list(range(self.size))
        if self.training:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        epoch = self.epoch if self.views is None else self.epoch % self.views
        for i in range(start, len(self)):
            image, repeat = divmod((self.rank + i * self.num_replicas) % (self.size * self.repeats), self.repeats)
            yield View(order[image], epoch, repeat)


class ResumableLoader(DataLoader[Any]):
    """A loader whose state is the number of batches yielded in an epoch, their size over all ranks, and the images.

    Lightning saves and restores the state of a loader that has one; without it, a run resumed in the middle of an epoch
    sees the epoch's first batches again. The count is all there is to save, as every sample follows from its View
    (torchdata's StatefulDataLoader would restore the order, and no random draw).

    Raises:
        ShareError: If an epoch is resumed in batches of another size over all ranks than it began with: images would
            come twice, or never.

    Its iterator reads the epoch when the first batch is asked for: Lightning makes it before it sets the epoch.
    """

    _yielded = 0
    _resume = (-1, 0)
    _begun_in = 0

    def __iter__(self) -> Any:
        epoch, batches = self._resume
        if batches and epoch == self._epoch and self._begun_in != self._images:
            raise ShareError(
                f"The checkpoint was saved amid epoch {epoch}, which began in batches of {self._begun_in} images over "
                f"all processes, and in batches of {self._images} images would come twice, or never. Go on with "
                f"{self._begun_in} (batch_size x trainer.devices x trainer.num_nodes), or from a checkpoint that was "
                "saved at the end of an epoch."
            )
        self._resume = (-1, 0)
        self._yielded = batches if epoch == self._epoch and batches < len(self) else 0
        if isinstance(self.sampler, ViewSampler):
            self.sampler.start = self._yielded * (self.batch_size or 1)
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch, the number of batches yielded in it, the images of one over all ranks, and of the epoch.

        Batches that a resume has yet to skip count as yielded.
        """
        epoch, batches = self._resume
        yielded = batches if epoch == self._epoch else self._yielded
        size, digest = self._listing
        return {"epoch": self._epoch, "batches": yielded, "images": self._images, "size": size, "digest": digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Starts the next iteration, if it is of the same epoch, after the batches already yielded.

        Says so if the images are others than they were. (Older states do not tell.)
        """
        self._resume, self._begun_in = (state_dict["epoch"], state_dict["batches"]), state_dict["images"]
        size, digest = self._listing
        before = state_dict.get("size", size), state_dict.get("digest", digest)
        if before != (size, digest):
            rank_zero_info(
                f"The training images are no longer those of the checkpoint: {before[0]:,} then, {size:,} now, or of "
                "other names. An epoch that it was saved amid shows some images twice, or never."
            )

    @property
    def _listing(self) -> tuple[int, str]:
        """The number of images, and a digest of their names where they are files."""
        dataset: Any = self.dataset
        return len(dataset), getattr(dataset, "digest", "")

    @property
    def _epoch(self) -> int:
        return self.sampler.epoch if isinstance(self.sampler, ViewSampler) else 0

    @property
    def _images(self) -> int:
        ranks = self.sampler.num_replicas if isinstance(self.sampler, ViewSampler) else 1
        return ranks * (self.batch_size or 1)
