"""Which folder of a root is which split, and the validation images of a root that has none apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np

from kdvit.data.labels import first_of_each_class
from kdvit.data.listing import LAYOUT, ImageList, class_folders, list_images

USUAL = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
"""Names of folders that are splits and no classes."""
DEFAULT = {split: split for split in USUAL}
VAL_SHARE, SPLIT_SEED = 0.1, 0
"""What is set apart, and by which seed, unless one says otherwise."""


def split_folders(root: Path, folders: Mapping[str, str] = DEFAULT) -> dict[str, Path]:
    """Returns the folders of the splits that there are.

    Where both train and val have a usual name, a split that goes by its own may have another of these, if only one.
    """
    there = {split: root / name for split, name in folders.items() if (root / name).is_dir()}
    usual = {split: [root / each for each in names if (root / each).is_dir()] for split, names in USUAL.items()}
    if usual["train"] and usual["val"]:
        alone = {split: found[0] for split, found in usual.items() if folders[split] == split and len(found) == 1}
        there = {**alone, **there}
    return there


def list_splits(root: Path, folders: Mapping[str, str], labels: bool, share: float, seed: int) -> dict[str, ImageList]:
    """Lists the images of each split that there is.

    Where there is no folder for val, some training images are set apart (see `set_apart`); where there is none for
    train either, the training images are all those of the root.

    Args:
        root: The folder that holds the others.
        folders: Name of the folder of train, val and test. One that is not the split's own name must be there.
        labels: Whether the folders below are classes. Else all images below count alike.
        share: Of each class, that is set apart.
        seed: Of what is set apart.

    Raises:
        FileNotFoundError: If a folder is missing or empty.
        ValueError: If a folder belongs to two classes, or that of train holds another split's.
    """
    there = split_folders(root, folders)
    for split, name in folders.items():
        if split not in there and name != split:
            raise FileNotFoundError(f"There is no folder {str(root / name)!r}, by which {split} is named. {LAYOUT}")
    listed: dict[str, ImageList]
    if "val" in there:
        listed = {split: list_images(there[split], labels) for split in ("train", "val") if split in there}
    else:
        if folders["train"] == "train":
            _require_no_other(root, ("train", folders["test"]) if "train" in there else ())
        top = there.get("train", root)
        listed = set_apart(list_images(top, labels), top, share, seed)
    if "test" in there and (not labels or class_folders(there["test"])):  # ImageNet's own has none: it has no labels
        listed["test"] = list_images(there["test"], labels)
    top = there.get("train", root)
    if "train" in listed and (inside := [each for each in listed if top in there.get(each, top).parents]):
        raise ValueError(
            f"{str(top)!r}, of the training images, holds those of {' and '.join(inside)}, too: name a folder of "
            "training images alone."
        )
    return listed


def images_to_show(root: Path) -> tuple[bool, ImageList]:
    """Lists the images to look at in a folder that is named alone: those of val, by the rules of `list_splits`.

    Returns:
        Whether the folder holds splits, else classes or images; and the images, without labels where there is no class.

    Raises:
        FileNotFoundError: If there are none, or a split has another name.
        ValueError: If a folder belongs to two classes.
    """
    if val := split_folders(root).get("val"):
        return True, list_images(val, bool(class_folders(val)))
    if {*map(str.lower, class_folders(root))}.isdisjoint(chain(*USUAL.values())):
        return False, list_images(root, bool(class_folders(root)))
    top = root / "train"
    return True, list_splits(root, DEFAULT, top.is_dir() and bool(class_folders(top)), VAL_SHARE, SPLIT_SEED)["val"]


def set_apart(images: ImageList, folder: Path, share: float, seed: int) -> dict[str, ImageList]:
    """Divides images into train and val: of each class those are val whose drawn numbers are the least.

    An image's number is the SHA-256 of ``SEED PATH``, so that it does not depend on the others: to add or remove some
    moves few. Of a class the share is rounded; it keeps one image for val, and at least one for train.

    Args:
        images: All images.
        folder: What paths are relative to.
        share: Of each class, for val.
        seed: Of the draw.

    Raises:
        FileNotFoundError: If no class has two images.
    """
    names = (os.path.relpath(path, folder) for path, _ in images)
    drawn = np.array([hashlib.sha256(os.fsencode(f"{seed} {name}")).hexdigest() for name in names])
    held = first_of_each_class(images.targets, np.argsort(drawn, kind="stable"), share)
    if not held.any():
        raise FileNotFoundError(f"No class in {str(folder)!r} has two images, one to train and one to validate on.")
    rule = f"{share} by {seed}"
    divided = {"train": images.subset(~held, f"train without {rule}"), "val": images.subset(held, f"val of {rule}")}
    divided["train"].skipped = images.skipped
    return divided


def _require_no_other(root: Path, known: tuple[str, ...]) -> None:
    """Raises FileNotFoundError if a folder of the root has the name of a split, and is not known as one."""
    usual = set(chain(*USUAL.values())) - {*known}
    found = [name for name in class_folders(root) if name.lower() in usual] if root.is_dir() else []
    if found:
        raise FileNotFoundError(
            f"{str(root)!r} has the folder(s) {', '.join(found)}, and no folder 'val'. Name those of the splits, such "
            f"as --data.init_args.val {found[0]} (where a command has no such option, rename the folder), or give the "
            "folder of one alone. (If they are classes: --data.init_args.train and a dot, the root.)"
        )
