"""The images of an analysis: where they come from, and which are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from kdvit.cli.fit import format_of
from kdvit.cli.lookup import Experiment
from kdvit.data import ImageDataModule
from kdvit.data.cached import collate
from kdvit.data.labelled import module_named
from kdvit.data.listed import FolderImages
from kdvit.data.listing import LAYOUT
from kdvit.data.splits import VAL_SHARE, images_to_show
from kdvit.data.workers import start_worker
from kdvit.errors import UserError, shown
from kdvit.models.network import eval_transform
from kdvit.structures import ImageFormat


class Images(NamedTuple):
    """Where images come from.

    Attributes:
        dataset: Of images.
        targets: Their classes, if known.
        image_format: How they arrive.
        collate: Makes a batch of samples.
        name: For the report.
        spec: What a config says of them; None where a config could not train on them.
        classes: Number of classes, if known.
    """

    dataset: Dataset[Any]
    targets: list[int] | None
    image_format: ImageFormat
    collate: Any
    name: str
    spec: dict[str, Any] | None
    classes: int | None


class ChosenImages(pl.LightningDataModule):
    """The images that were chosen, each on one rank.

    Args:
        images: Where they come from.
        numbers: Of `choose`.
        batch_size: Images at once.
        num_workers: Processes that load them.
    """

    def __init__(self, images: Images, numbers: list[int], batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.images, self.numbers = images, numbers
        self.batch_size, self.num_workers = batch_size, num_workers

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns this rank's share."""
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        share = Subset(self.images.dataset, self.numbers[rank::ranks])
        return DataLoader(
            share,
            self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self.images.collate,
            worker_init_fn=start_worker,
        )


def choose(images: Images, count: int, seed: int) -> list[int]:
    """Chooses images at random: one of each class first, then a second of each, and so on; in the data set's order."""
    size = len(images.dataset)  # type: ignore[arg-type]
    order = np.random.default_rng(seed).permutation(size)
    if images.targets is not None:
        seen: dict[int, int] = {}
        turn = np.empty(size, dtype=np.int64)
        for position, index in enumerate(order):
            target = int(images.targets[index])
            turn[position] = seen[target] = seen.get(target, -1) + 1
        order = order[np.argsort(turn, kind="stable")]
    return sorted(order[:count].tolist())


def find_images(name: str | None, image_format: ImageFormat) -> Images:
    """Finds the images of a folder, or of a data module by its class name, in a network's own format.

    Raises:
        UserError: If there are none.
    """
    if name is not None and (kind := module_named(name)) is not None:
        with shown((ValueError, TypeError, ImportError), prefix=f"--data {name}: "):
            module = kind(img_size=image_format.size, mean=image_format.mean, std=image_format.std)
        return _of_module(module, name, {"class_path": name, "init_args": {}})
    if name is None or not Path(name).is_dir():
        raise UserError(f"--data: expected a folder of images, Digits or FashionMNIST; got {name!r}. {LAYOUT}")
    root = Path(name)
    with shown((OSError, ValueError)):
        splits, samples = images_to_show(root)
    targets = samples.targets.tolist() if samples.class_names else None
    spec: dict[str, Any] | None = None
    if splits and samples.class_names:
        spec = {"class_path": "ImageFolder", "init_args": {"root": str(root.absolute())}}
    dataset = FolderImages(samples, eval_transform(image_format), None, grey=len(image_format.mean) == 1)
    classes = len(samples.class_names) or None
    apart = f", {VAL_SHARE:.0%} of train" if splits and not (root / "val").is_dir() else ""
    return Images(dataset, targets, image_format, collate, f"{root.absolute()}{apart}", spec, classes)


def batches(name: str, image_format: ImageFormat, count: int) -> list[Tensor]:
    """Returns images ``[B, C, H, W]`` of a folder or data module, chosen over its classes, in batches of 16.

    Raises:
        UserError: If there are none.
    """
    images = find_images(name, image_format)
    chosen = ChosenImages(images, choose(images, count, seed=0), batch_size=16, num_workers=0)
    return [batch.image for batch in chosen.test_dataloader()]


def images_of_config(experiment: Experiment, file: str) -> Images:
    """Returns the validation images of a config."""
    data, spec, name = experiment.data, experiment.config["data"], f"the validation images of {file}"
    assert data is not None
    if isinstance(data, ImageDataModule):
        return _of_module(data, name, spec)
    data.prepare_data()
    data.setup("validate")
    loader = data.val_dataloader()
    names = getattr(data, "class_names", None)
    return Images(loader.dataset, None, format_of(data), loader.collate_fn, name, spec, names and len(names))


def _of_module(module: ImageDataModule, name: str, spec: dict[str, Any]) -> Images:
    dataset: Any = module.dataset("val")
    known = getattr(dataset, "targets", None)
    targets = None if known is None else [int(target) for target in known]
    return Images(dataset, targets, module.image_format, collate, name, spec, module.num_classes or None)
