"""Which files of a folder are images, and of which class; and which files are passed over."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdvit.data.reading import ENDINGS

LAYOUT = "Expected layout: ROOT/train/CLASS/image.jpg and ROOT/val/CLASS/image.jpg."
OF_SYSTEMS = ("__macosx", "thumbs.db", "desktop.ini")
"""What systems leave behind in folders, beside files and folders whose names begin with a dot."""


class ImageList(Sequence[Any]):
    """Paths and class indices in two arrays.

    A list of tuples has two counted references an image, and a loader process that reads one copies its page: each
    process would come to hold the whole list.

    Args:
        samples: Path and class index of each image.
        class_names: Name of each class.
        digest: Of the names of all images, relative to their folder.
        skipped: Number of files that are no images, by their ending.
    """

    def __init__(
        self,
        samples: Iterable[tuple[str, int]],
        class_names: Sequence[str] = (),
        digest: str = "",
        skipped: Counter[str] | None = None,
    ) -> None:
        self.class_names, self.digest, self.skipped = list(class_names), digest, skipped or Counter()
        paths, targets = zip(*samples, strict=True)
        self._paths, self.targets = np.array([os.fsencode(path) for path in paths]), np.array(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> Any:
        return os.fsdecode(self._paths[index]), int(self.targets[index])

    def subset(self, chosen: NDArray[np.bool_], name: str) -> ImageList:
        """Returns some of the images, under a digest that follows from that of all and the name."""
        part = copy.copy(self)
        part._paths, part.targets, part.skipped = self._paths[chosen], self.targets[chosen], Counter()
        part.digest = hashlib.sha256(f"{self.digest} {name}".encode()).hexdigest()
        return part


def list_images(folder: Path, labels: bool = True) -> ImageList:
    """Lists the images of a split with the index of their class, in a fixed order, without opening a file.

    A class has the images of all folders below its own. Without labels, all images below the folder, and in it, have
    the index -1. Each real folder is walked once, however many links lead to
    it. Hidden files and folders, and those of systems, are ignored; files with another ending are counted.

    Raises:
        FileNotFoundError: If there is no class folder, or one without an image.
        ValueError: If one folder belongs to two classes.
    """
    try:
        return _list_images(str(folder), labels)
    except FileNotFoundError as error:
        layout = f"{LAYOUT} In " if labels else ""
        raise FileNotFoundError(f"{layout}{str(folder)!r}: {error}") from error


def class_folders(folder: str | Path) -> list[str]:
    """Returns the names of the class folders in a folder, sorted."""
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def _list_images(folder: str, labels: bool) -> ImageList:
    names = class_folders(folder) if labels else [os.curdir]
    if not names:
        raise FileNotFoundError("There is no class folder. (Images without labels: --data.init_args.labels false.)")
    beside = [entry.name for entry in _entries(folder) if labels and not entry.is_dir()]
    skipped = Counter("beside the class folders" if _is_image(name) else _ending(name) for name in beside)
    walked: dict[str, str] = {}
    for name in names:
        _claim(os.path.realpath(os.path.join(folder, name)), _top(folder, name), walked)
    samples: list[tuple[str, int]] = []
    empty, digest = [], hashlib.sha256()
    for target, name in enumerate(names, start=0 if labels else -1):
        before, top = len(samples), _top(folder, name)
        for place, files in sorted(_walk(top, os.path.realpath(top), top, walked)):
            images = [file for file in files if _is_image(file)]
            skipped.update(map(_ending, {*files}.difference(images)))
            samples += [(os.path.join(place, file), target) for file in images]
            digest.update(os.fsencode("\0".join([os.path.relpath(place, folder), *images, ""])) if images else b"")
        if len(samples) == before:
            empty.append(name)
    if empty:
        found = f" Passed over: {told(skipped)}." if skipped else ""
        read = f" Files are read that end in {', '.join(sorted(ENDINGS))}."
        of = f" of the classes {', '.join(empty[:5])}" if labels else ""
        raise FileNotFoundError(f"There is no image{of}.{found}{read}")
    return ImageList(samples, names if labels else (), digest.hexdigest(), skipped)


def _top(folder: str, name: str) -> str:
    return folder if name == os.curdir else os.path.join(folder, name)


def told(skipped: Counter[str]) -> str:
    """Returns files by their ending, as text.

    Examples:
        >>> told(Counter({".svg": 1200, ".txt": 1}))
        '1,200 .svg, 1 .txt'
    """
    return ", ".join(f"{count:,} {ending}" for ending, count in skipped.most_common())


def _walk(folder: str, real: str, top: str, walked: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Gives a folder of the class folder `top`, and all below it, with the names of their files, sorted."""
    files = []
    for entry in _entries(folder):
        if not entry.is_dir():
            files.append(entry.name)
            continue
        inner = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
        if not f"{real}/".startswith(f"{inner.rstrip('/')}/") and _claim(inner, top, walked):
            yield from _walk(entry.path, inner, top, walked)
    yield folder, files


def _claim(real: str, top: str, walked: dict[str, str]) -> bool:
    """Notes that a real folder belongs to the class folder `top`, and returns whether that is new."""
    owner = walked.get(real)
    if owner not in (None, top):
        raise ValueError(f"{real!r} belongs to two classes, {owner!r} and {top!r}. Remove it, or a link, from one.")
    walked[real] = top
    return owner is None


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not (entry.name[0] == "." or entry.name.lower() in OF_SYSTEMS)]
    return sorted(seen, key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an ending"
