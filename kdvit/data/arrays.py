"""Images in arrays, held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, OpenUnitInterval, PositiveInt
from torch import Tensor

from kdvit.data.base import SPLITS, Split
from kdvit.data.in_memory import InMemoryData
from kdvit.data.labels import class_indices, held_out

NAMES = "train_images and train_labels, and the same for val and test where there are any"


class Arrays(InMemoryData):
    """Small images in arrays, augmented by crops and flips, a whole batch at once.

    Args:
        arrays: A ``.npz`` file, a folder of ``.npy`` files, or in Python a mapping, of ``train_images`` and
            ``train_labels``, and the same for val and test where there are any, as in MedMNIST. Images are uint8,
            ``[n, H, W]`` grey or ``[n, H, W, 3]``; labels are class indices ``[n]``.
        classes: Names of the classes; by default the numbers of the labels.
        batch_size: Images a step and process.
        img_size: Height and width in pixels, or one number for both; resized bilinearly, once.
        padding: Zero pixels around an image, of which a random crop is taken in training.
        hflip: Probability of a horizontal flip in training.
        val_share: Share of each class that is set apart where there is no val: always the same.
        split_seed: Of what is set apart.
        kwargs: Those of ImageDataModule.

    Raises:
        ValueError: If a file or an array is missing or of another form.
        LabelError: If labels are no class indices.
    """

    def __init__(
        self,
        arrays: str | dict[str, Any],
        classes: list[str] | None = None,
        batch_size: PositiveInt = 128,
        img_size: int | tuple[int, int] = 32,
        padding: NonNegativeInt = 2,
        hflip: ClosedUnitInterval = 0.5,
        val_share: OpenUnitInterval = 0.1,
        split_seed: NonNegativeInt = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, img_size=img_size, **kwargs)
        read = read_arrays(Path(arrays)) if isinstance(arrays, str) else arrays
        given: list[Split] = [split for split in SPLITS if f"{split}_images" in read]
        if "train" not in given or any(f"{split}_labels" not in read for split in given):
            raise ValueError(f"Arrays: expected {NAMES}; got {', '.join(read) or 'nothing'}.")
        highest = int(np.max(np.asarray(read["train_labels"])))
        self.class_names = classes or [str(i) for i in range(highest + 1)]
        self.parts = {split: self._part(read, split) for split in given}
        self.numbers = {split: torch.arange(len(targets)) for split, (_, targets) in self.parts.items()}
        if "val" not in given:
            held = torch.from_numpy(held_out(self.parts["train"][1].numpy(), val_share, split_seed))
            self.parts["val"] = self.parts["train"]
            self.numbers |= {"train": (~held).nonzero().flatten(), "val": held.nonzero().flatten()}
        self.padding, self.hflip = padding, hflip

    def _part(self, read: Mapping[str, Any], split: str) -> tuple[Tensor, Tensor]:
        images = np.asarray(read[f"{split}_images"])
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
            raise ValueError(
                f"Arrays: {split}_images is {images.dtype} {list(images.shape)}; expected uint8 [n, H, W] or "
                "[n, H, W, 3]."
            )
        labels = class_indices(read[f"{split}_labels"], len(images), self.num_classes, f"{split}_labels")
        return torch.from_numpy(images), torch.from_numpy(labels)


def read_arrays(file: Path) -> dict[str, Any]:
    """Reads a ``.npz`` file, or the ``.npy`` files of a folder, by name. Pickled objects are refused.

    Raises:
        ValueError: If there is none, or one cannot be read.
    """
    files = sorted(file.glob("*.npy")) if file.is_dir() else [file]
    arrays: dict[str, Any] = {}
    for each in files:
        try:
            loaded = np.load(each, allow_pickle=False)
            arrays |= dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {each.stem: loaded}
        except Exception as error:  # damaged bytes can lead numpy anywhere
            raise ValueError(
                f"{str(each)!r} is no array file that can be read without running code: {error}"
            ) from error
    return arrays
