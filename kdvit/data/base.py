"""What all data modules share: loaders, seeds, Mixup, and the format of the images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from timm.data import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data import IMAGENET_DEFAULT_STD as IMAGENET_STD
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdvit.cache import CacheReader, load_bases, open_cache
from kdvit.data.cached import ViewBatches, collate
from kdvit.data.sampling import ResumableLoader, ShareError, ViewSampler
from kdvit.data.workers import FORK, start_worker
from kdvit.seeding import mixed_seed, seeded
from kdvit.structures import Batch, ImageFormat, SharedBasis, View, as_batch

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class ImageDataModule(pl.LightningDataModule):
    """Batches of images. Subclass it and give `dataset`, `class_names` and `path`.

    Images without labels have the `class_names` ``()`` and the target -1.

    Args:
        batch_size: Images a step and process.
        num_workers: Processes that load images, for each training process.
        img_size: Height and width in pixels, or one number for both.
        mean: Mean of each channel that is subtracted; one number makes grey images of one channel, three colour.
        std: Standard deviation of each channel that is divided by.
        repeats: Views of an image in an epoch (repeated augmentation); 1 for none, 3 in DeiT's recipe.
        mixup: Alpha of Mixup; 0 for none, as in the paper's runs.
        cutmix: Alpha of CutMix; 0 for none, as in the paper's runs.
        seed: Seed of order and augmentation; by default the run's.
        cache: Folder of stored teacher outputs, made by `kdvit cache`. With it, the teacher does not run in training,
            and epoch e shows view ``e % views`` of an image, views being those that the cache holds.

    Raises:
        ValueError: If Mixup or CutMix is asked for beside a cache, or for pairs in batches of an odd size, or mean and
            std are neither one number each nor three.
    """

    def __init__(
        self,
        batch_size: PositiveInt = 128,
        num_workers: NonNegativeInt = 0,
        img_size: int | tuple[int, int] = 224,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        repeats: PositiveInt = 1,
        mixup: NonNegativeFloat = 0.0,
        cutmix: NonNegativeFloat = 0.0,
        seed: NonNegativeInt | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        if (mixup or cutmix) and batch_size % 2:
            raise ValueError(f"{type(self).__name__}: Mixup and CutMix need an even batch_size, got {batch_size}.")
        if (mixup or cutmix) and cache is not None:
            raise ValueError(
                f"{type(self).__name__}: Mixup and CutMix make new images of pairs, and a teacher's output for a mixed "
                "image is no mixture of its outputs, so no cache has it. Set mixup and cutmix to 0, or leave cache out."
            )
        if not len(mean) == len(std) in (1, 3):
            raise ValueError(
                f"{type(self).__name__}: mean and std have three numbers each, or one for grey images; got {len(mean)} "
                f"and {len(std)}."
            )
        self.cache = cache
        self._reader: CacheReader | None = None
        self._numbers: Tensor | None = None
        self.batch_size, self.num_workers, self.repeats = batch_size, num_workers, repeats
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.image_format = ImageFormat(size, tuple(mean), tuple(std), interpolation="bilinear")
        self.mixup, self.cutmix = mixup, cutmix
        self.seed = torch.initial_seed() if seed is None else seed

    class_names: Sequence[str]

    @property
    def num_classes(self) -> int:
        """Number of classes K; 0 for images without labels."""
        return len(self.class_names)

    def dataset(self, split: Split) -> Dataset[Any]:
        """Returns a data set that maps a View, or an image's number, to ``(image, target, index)``.

        With ``__getitems__`` it may map a list of them to a Batch at once. For a cache, it has a ``fingerprint()``.
        """
        raise NotImplementedError

    def plain_dataset(self, split: Split) -> Dataset[Any]:
        """Returns the images of a split as an evaluation shows them, those of train, too: for a probe."""
        dataset = copy.copy(self.dataset(split))
        dataset.seed = None  # type: ignore[attr-defined]  # without which data in memory are not augmented
        return dataset

    def fingerprint(self) -> dict[str, Any]:
        """Describes in plain types all that the pixels of the training views depend on: a cache holds for just that.

        The number of images is part of it, and what the data set's own `fingerprint()` says of images and transform.
        """
        dataset: Any = self.dataset("train")
        size, mean, std = self.image_format[:3]
        shared = {"class": type(self).__name__, "seed": self.seed, "repeats": self.repeats, "images": len(dataset)}
        return {**shared, "size": size, "mean": mean, "std": std, **dataset.fingerprint()}

    def source(self, split: Split) -> Split:
        """Returns the split whose images a split shows: another, where the data have none apart for it."""
        return split

    def labels(self, split: Split) -> Any:
        """Returns the class index of each image of a split, or -1, for `summary`; None where nobody knows yet."""
        return None

    def skipped(self, split: Split) -> str:
        """Returns which files of a split are no images, for `summary`."""
        return ""

    def summary(self) -> str:
        """Says in one line how many images there are of how many classes, and which files are skipped."""
        parts = []
        for split in SPLITS:
            source = self.source(split)
            labels = self.labels(source)
            if source != split:
                parts.append(f"{split}: those of {source}")
            elif labels is not None:
                skipped = f" (skipped: {self.skipped(split)})" if self.skipped(split) else ""
                parts.append(f"{split}: {len(labels):,} images {self._classes(labels)}{skipped}")
        return "; ".join(parts)

    def _classes(self, labels: Any) -> str:
        if not self.class_names:
            return "without labels"
        counts = np.bincount(labels, minlength=self.num_classes)
        least = int(counts.argmin())
        return f"of {self.num_classes:,} classes, the smallest {self.class_names[least]} with {counts[least]:,}"

    def setup(self, stage: str) -> None:
        """Says what the images are; opens the cache of a fit, and raises if it was made for another run."""
        checking = self.trainer is not None and self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if stage == "fit" and not checking and (told := self.summary()):  # a check shows it in its table
            rank_zero_info(f"Images: {told}.")
        if stage in ("test", "predict") and self.source("test") == self.source("val"):
            rank_zero_info("There are no images for a test alone: these are those of val.")
        if stage == "fit" and self.cache is not None and self.trainer is not None:
            module: Any = self.trainer.lightning_module
            teacher, wanted = module.teacher, module.distillers.only_request()
            self._reader = open_cache(Path(self.cache), teacher, wanted.maps, wanted.logits, self.fingerprint())

    def number_classes(self, numbers: list[int]) -> None:
        """Gives each class, in all batches from now on, the number that a student knows it by."""
        self._numbers = torch.tensor(numbers)

    @property
    def bases(self) -> dict[str, SharedBasis]:
        """The teacher's axes by which the targets in the cache were made, by name; none without a cache."""
        return {} if self._reader is None else load_bases(self._reader.folder)

    def path(self, index: int, split: Split = "test") -> str:
        """Returns the name of an image, for tables and messages."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the training batches of this rank, as many as make whole steps of the optimizer.

        The images that remain are skipped; another epoch skips others. Only where there are fewer images than a
        step takes, they are the one step of an epoch.

        Raises:
            ShareError: If there are fewer images than processes, or a batch to be mixed has an odd number of them.
        """
        dataset: Any = self.dataset("train")
        sampler = self._sampler(len(dataset), training=True)
        if (self.mixup or self.cutmix) and (odd := len(sampler) % self.batch_size) % 2:
            raise ShareError(
                f"Mixup and CutMix mix pairs, and of the {len(sampler)} images of a process and epoch, the last batch "
                f"would get {odd}: lower the batch_size, or set mixup and cutmix to 0."
            )
        if self._reader is not None:
            dataset = ViewBatches(dataset, self._reader)
        return self._loader(dataset, sampler, self.batch_size, ResumableLoader)

    def replay_dataloader(self, batches: Sampler[list[View]]) -> DataLoader[Any]:
        """Returns augmented training images in the batches of views that a sampler gives."""
        return self._loader(ViewBatches(self.dataset("train")), batches, None)

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the validation batches of this rank, each image on one rank."""
        return self._eval_loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the test batches of this rank, each image on one rank."""
        return self._eval_loader(self.dataset("test"))

    predict_dataloader = test_dataloader

    def plain_dataloader(self, split: Split) -> DataLoader[Any]:
        """Returns this rank's batches of `plain_dataset`, each image on one rank."""
        return self._eval_loader(self.plain_dataset(split))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mixes a training batch, if Mixup or CutMix is on; its target becomes ``[B, K]``, if there are labels.

        Pixels become images before; `number_classes` is applied to other batches. What a subclass's own loader yields
        is left as it is, unless one of these is to be applied: the module looks at the labels of what is no Batch.
        """
        if isinstance(batch, Batch):
            batch = as_batch(batch)
        if self._numbers is not None:
            batch = as_batch(batch)
            return batch._replace(target=self._numbers.to(batch.target.device)[batch.target])
        trainer = self.trainer
        if not (self.mixup or self.cutmix) or trainer is None or not trainer.training:
            return batch
        batch, classes = as_batch(batch), self.num_classes or 1
        mix = Mixup(self.mixup, self.cutmix, label_smoothing=0.0, num_classes=classes)  # type: ignore[no-untyped-call]
        with seeded(mixed_seed(self.seed, trainer.fit_loop.total_batch_idx + 1, trainer.global_rank)):
            image, target = mix(batch.image, batch.target.clamp(min=0))
        return batch._replace(image=image, target=target if self.class_names else batch.target)

    def _eval_loader(self, dataset: Any) -> DataLoader[Any]:
        sampler = self._sampler(len(dataset), training=False)
        batch_size = even_batch_size(len(dataset), sampler.num_replicas, self.batch_size)
        return self._loader(dataset, sampler, batch_size)

    def _sampler(self, size: int, training: bool) -> ViewSampler:
        replicas, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        batches = self.trainer.accumulate_grad_batches if training and self.trainer is not None else 1
        if size < replicas:
            raise ShareError(
                f"{size} {'training' if training else 'evaluation'} image(s) cannot be shared by {replicas} processes: "
                "each needs one. Set --trainer.devices to fewer."
            )
        return ViewSampler(
            size,
            training=training,
            repeats=self.repeats,
            num_replicas=replicas,
            rank=rank,
            seed=self.seed,
            views=None if self._reader is None else self._reader.manifest.views,
            step=self.batch_size * batches,
        )

    def _loader(
        self, dataset: Any, sampler: Any, batch_size: int | None, kind: type[DataLoader[Any]] = DataLoader
    ) -> DataLoader[Any]:
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            worker_init_fn=start_worker,
            multiprocessing_context=FORK if self.num_workers > 0 else None,
        )


def even_batch_size(images: int, ranks: int, batch_size: int) -> int:
    """Returns the least batch size, from the one given on, that lets all ranks have equally many batches.

    DDP broadcasts a network's buffers at every forward, and would wait for a rank that has no batch left.

    Examples:
        >>> even_batch_size(images=512, ranks=2, batch_size=256), even_batch_size(images=513, ranks=2, batch_size=256)
        (256, 257)
    """
    each, more = divmod(images, ranks)
    return next(size for size in count(batch_size) if not (each and more) or each % size)
