"""ImageNet and everything that is laid out like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from kdvit.data.base import Split
from kdvit.data.listed import ListedImages
from kdvit.data.listing import LAYOUT, told
from kdvit.data.splits import list_splits, split_folders
from kdvit.errors import UserError


class ImageFolder(ListedImages):
    """Images in folders, one a class: ``root/train/CLASS/*.jpg`` and ``root/val/CLASS/*.jpg``, as of ImageNet.

    Args:
        root: The folder that holds train and val. (With val alone, a student can be evaluated.) A folder test beside
            them, of the same classes, is for `kdvit test` and `predict`; without one they show the images of val.
            Where there is no folder for val, `val_share` of the training images are set apart; without one for train
            either, the root itself holds the classes. Without labels, all images below a split's folder, and in it,
            are its.
        train: Name of the folder in the root that has the training images; a dot for the root itself. (Training with
            valid, validation or dev, and testing, are found, too.)
        val: The same of the validation images.
        test: The same of the test images.
        kwargs: Those of ListedImages.

    Raises:
        FileNotFoundError: If a folder is missing or empty; the message names it and the layout.
        ValueError: If train, val and test have different classes, or a folder belongs to two.
    """

    def __init__(self, root: str, train: str = "train", val: str = "val", test: str = "test", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).absolute()
        folders, of = {"train": train, "val": val, "test": test}, (self.val_share, self.split_seed)
        self.samples = list_splits(self.root, folders, self.is_labelled, *of)
        self.class_names = self.samples["val"].class_names or ()
        self.set_apart = (
            "" if "val" in split_folders(self.root, folders) else "val is {:.0%} of train, by seed {}".format(*of)
        )
        for split in self.samples:
            self._require_same_classes(split)

    def _require_same_classes(self, split: str) -> None:
        ours, theirs = self.samples[split].class_names, self.samples["val"].class_names
        if ours != theirs:
            only = {split: sorted({*ours} - {*theirs}), "val": sorted({*theirs} - {*ours})}
            named = "; ".join(f"only in {place}: {', '.join(names[:5])}" for place, names in only.items() if names)
            counts = f"({len(ours)} and {len(theirs)})"
            raise ValueError(f"{split} and val in {str(self.root)!r} have different classes {counts}; {named}.")

    def summary(self) -> str:
        """Says also which images are set apart to validate on."""
        return "; ".join(filter(None, (super().summary(), self.set_apart)))

    def skipped(self, split: Split) -> str:
        """Returns the files that are no images, by their ending."""
        return told(self.samples[split].skipped)

    def dataset(self, split: Split) -> Dataset[Any]:
        """Returns the images of a split.

        Raises:
            UserError: If the root has no images to train on.
        """
        if split == "train" and split not in self.samples:
            raise UserError(f"There is no folder {str(self.root / 'train')!r} to train on. {LAYOUT}")
        return super().dataset(split)
