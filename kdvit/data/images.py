"""Any data set of ``(image, label)``."""

from __future__ import annotations

from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kdvit.cache import CacheError
from kdvit.data.base import Split
from kdvit.data.cached import collate
from kdvit.data.items import ItemImages, Items, known_classes
from kdvit.data.labels import held_out
from kdvit.data.listed import ListedImages
from kdvit.data.streams import STREAM, StreamImages, StreamLoader
from kdvit.data.transforms import Transform
from kdvit.data.workers import FORK, start_worker
from kdvit.errors import UserError


class Images(ListedImages):
    """Images of data sets of ``(image, label)``, such as torchvision's; in YAML a class path and its arguments.

    A map-style data set has seeds for each view, resumes at the batch, and can have a cache. A stream (torch's
    IterableDataset) has neither numbers nor an order to go back to: it trains, and a run that goes on amid an epoch
    reads it from its beginning.

    Args:
        train: The training images, without transform; see `Items` for the forms of an image.
        val: The validation images; without them, `val_share` of the training images are set apart.
        test: Those of `kdvit test` and `predict`; without them, those of val.
        classes: Names of the classes, or their number; by default as the data set says.
        kwargs: Those of ListedImages.

    Raises:
        ValueError: If the classes are not known, or a stream has no validation images.
        LabelError: If the labels are no class indices.
    """

    divides_evenly = False  # whether a stream gives all processes as many batches

    def __init__(
        self,
        train: Dataset,  # type: ignore[type-arg]  # jsonargparse reads it
        val: Dataset | None = None,  # type: ignore[type-arg]
        test: Dataset | None = None,  # type: ignore[type-arg]
        classes: list[str] | PositiveInt | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given: dict[Split, Any] = {"train": train, "val": val, "test": test}
        self.given = {split: data for split, data in given.items() if data is not None}
        self.streams = {split for split, data in self.given.items() if isinstance(data, IterableDataset)}
        named = [str(i) for i in range(classes)] if isinstance(classes, int) else classes or known_classes(train)
        if self.is_labelled and not named:
            raise ValueError(
                f"{type(self).__name__}: {type(train).__name__} does not say what its classes are. Give their names or "
                "their number (classes), or say that there are none (labels: false)."
            )
        self.class_names = list(named or ()) if self.is_labelled else ()
        self.samples = {split: self._items(split) for split in self.given if split not in self.streams}
        ours = known_classes(train) or []
        for split, data in self.given.items() if self.is_labelled else ():
            theirs = known_classes(data) or ours
            same = len(theirs) == len(ours) or theirs[: len(ours)] == ours[: len(theirs)]  # of a class, the number
            if theirs != ours and not (same and classes):
                way_out = "Give the names of all (classes), if they are the same."
                if not same:
                    way_out = "A number means another class in each: give both folders of all classes."
                raise ValueError(
                    f"{type(self).__name__}: train and {split} have different classes, {len(ours)} and {len(theirs)}: "
                    f"{', '.join(theirs[:5])}. {way_out}"
                )
        if val is None and "train" in self.streams:
            raise ValueError(f"{type(self).__name__}: of a stream no images can be set apart. Give val, too.")
        if val is None:
            every = self.samples["train"]
            held = held_out(
                np.zeros(len(every)) if every.targets is None else every.targets, self.val_share, self.split_seed
            )
            self.given["val"] = train
            self.samples |= {"train": self._items("train", ~held), "val": self._items("val", held)}

    def _items(self, split: Split, chosen: NDArray[np.bool_] | None = None) -> Items:
        numbers = None if chosen is None else np.flatnonzero(chosen)
        return Items(self.given[split], self.num_classes, self.is_grey, split, numbers)

    def source(self, split: Split) -> Split:
        """Returns val for test where no data set is given for it."""
        return "val" if split == "test" and split not in self.given else split

    def summary(self) -> str:
        """Says in one line how many images there are of which classes, and which come as a stream."""
        told = [f"{split}: {STREAM if split == 'train' else 'a stream'}" for split in sorted(self.streams)]
        told += [f"{split}: {len(x):,} images, labels unread" for split, x in self.samples.items() if x.targets is None]
        return "; ".join(filter(None, (*told, super().summary())))

    def fingerprint(self) -> dict[str, Any]:
        """Returns that of map-style images.

        Raises:
            CacheError: If it is a stream.
        """
        if "train" in self.streams:
            raise CacheError(f"The training images are {STREAM}.")
        return super().fingerprint()

    def read(self, split: Split, transform: Transform, seed: int | None) -> Dataset[Any]:
        """Returns the images of a split under a transform whose draws follow from the seed."""
        if split in self.streams:
            skip = seed is not None and self.on_error == "skip"
            return StreamImages(self.stream(split), transform, seed, self.num_classes, self.is_grey, split, skip)
        return ItemImages(self.samples[split], transform, seed, self.on_error)

    def stream(self, split: Split) -> Any:
        """Returns the stream of a split as this process is to read it."""
        return self.given[split]

    def path(self, index: int, split: Split = "test") -> str:
        """Returns the name that the data set gives by `filename`, else ``SPLIT/N``, N the number in the data set."""
        source = self.source(split)
        number = index if source in self.streams else int(self.samples[source].numbers[index])
        name = getattr(self.given[source], "filename", None)
        return (source not in self.streams and name and name(number)) or f"{source}/{number}"

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the training batches of this rank; of a stream, those that it gives."""
        return self._stream_loader(self.dataset("train")) if "train" in self.streams else super().train_dataloader()

    def _eval_loader(self, dataset: Any) -> DataLoader[Any]:
        return self._stream_loader(dataset) if isinstance(dataset, StreamImages) else super()._eval_loader(dataset)

    def _stream_loader(self, dataset: Any) -> DataLoader[Any]:
        loader = StreamLoader(
            dataset,
            self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            worker_init_fn=start_worker,
            multiprocessing_context=FORK if self.num_workers else None,
            drop_last=dataset.seed is not None,
        )
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1 and dataset.skip:
            raise UserError(
                "on_error: skip leaves damaged images of a stream out, so that one process may have fewer batches than "
                "another, which then waits for ever: mend them, or set --trainer.devices 1."
            )
        if trainer is not None and trainer.world_size > 1 and not self.divides_evenly:
            raise UserError(
                "A stream of your own may give one process more batches than another, which then waits for ever: set "
                "--trainer.devices 1, or take a map-style data set or TimmData. (If all get as many, a subclass of "
                "Images with divides_evenly = True.)"
            )
        if trainer is not None:
            loader.epoch = lambda: trainer.current_epoch
        return loader
