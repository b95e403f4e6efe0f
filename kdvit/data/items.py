"""What a map-style data set gives, as images and class indices."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from kdvit.data.labels import class_indices
from kdvit.data.listed import FolderImages
from kdvit.data.reading import FORMATS, DamagedImage, converted, reading
from kdvit.errors import WorkerError
from kdvit.seeding import seeded
from kdvit.structures import image_and_target

FINGERPRINTED = 64
"""Images whose pixels a fingerprint reads: to read all of a large data set takes as long as to write a cache."""


class ItemError(WorkerError, TypeError):
    """An item that is no image."""


class Items(Sequence[Any]):
    """Images and class indices of a map-style data set, or of some of its items.

    Args:
        data: Maps a number to ``(image, label)``, or to a mapping of them; without labels, an image alone will do. An
            image is of Pillow, an open file or bytes of one, or uint8 pixels: an array ``[H, W, 3]`` or ``[H, W]``, a
            tensor ``[3, H, W]``.
        classes: Number of classes K; 0 for images without labels.
        grey: Whether images have one channel.
        name: What messages call it.
        numbers: Those of the items; by default all.

    Raises:
        LabelError: If the labels are known beforehand and are no class indices.
    """

    def __init__(self, data: Any, classes: int, grey: bool, name: str, numbers: NDArray[Any] | None = None) -> None:
        self.data, self.classes, self.grey, self.name = data, classes, grey, name
        self.numbers = np.arange(len(data)) if numbers is None else numbers
        known = known_labels(data)
        self.targets: Any = np.full(len(self), -1) if not classes else None
        if classes and known is not None:
            self.targets = class_indices(known, len(data), classes, name)[self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        number = int(self.numbers[index])
        where = f"item {number} of {self.name}"
        with reading(where):
            return read_item(self.data[number], self.classes, self.grey, where)

    def digest_of_some(self) -> str:
        """Returns a digest of all labels, where known, and of the pixels and labels of some images."""
        digest = hashlib.sha256(repr((type(self.data).__name__, len(self))).encode())
        digest.update(b"" if self.targets is None else np.ascontiguousarray(self.targets).tobytes())
        for index in np.unique(np.linspace(0, len(self) - 1, FINGERPRINTED).astype(int)):
            with seeded(0), suppress(DamagedImage):
                image, target = self[index]
                digest.update(repr((image.size, target)).encode() + image.tobytes())
        return digest.hexdigest()


class ItemImages(FolderImages):
    """Images of `Items`, read when they are asked for."""

    samples: Any

    @property
    def targets(self) -> Any:
        """Class index of each image; None where nobody knows before it is read."""
        return self.samples.targets

    def read(self, number: int) -> tuple[Image.Image, int]:
        """Returns an image and its class index."""
        return self.samples[number]  # type: ignore[no-any-return]

    def fingerprint(self) -> dict[str, Any]:
        """Describes in plain types what the pixels of a view depend on: labels, some of the images, and transform."""
        transform = hashlib.sha256(repr(self.transform).encode()).hexdigest()
        return {"content": self.samples.digest_of_some(), "transform": transform}


def read_item(item: Any, classes: int, grey: bool, where: str) -> tuple[Image.Image, int]:
    """Returns the image of an item as RGB, or grey, and its class index, -1 where there are no classes.

    Raises:
        OSError: If bytes or a file are no image.
        ItemError: If the image is none of the forms that `Items` names.
        LabelError: If the label is no class index.
    """
    image, label = image_and_target(item) or (item, None)
    target = int(class_indices(label, 1, classes, where)[0]) if classes else -1
    return converted(as_image(image, where), grey), target


def as_image(image: Any, where: str) -> Image.Image:
    """Returns an image as Pillow's; see `read_item`."""
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    if hasattr(image, "read"):
        with image, Image.open(image, formats=FORMATS) as opened:
            opened.load()
            return opened
    if isinstance(image, Tensor):
        image = image.numpy() if image.ndim == 2 else image.permute(1, 2, 0).squeeze(2).numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)
    if not isinstance(image, Image.Image):
        what = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ItemError(
            f"{where}: expected an image of Pillow, bytes of a file, or uint8 pixels, got {what}. Leave out the data "
            "set's own transform: kdvit augments and normalises."
        )
    return image


def known_labels(data: Any) -> Any:
    """Returns the labels of a data set ``[n]`` without reading an image; None where `targets` or `labels` are none.

    A transform of the labels is not applied to them, so it hides them.
    """
    if isinstance(data, Subset):
        labels = known_labels(data.dataset)
        return None if labels is None else labels[np.asarray(data.indices)]
    found = getattr(data, "targets", getattr(data, "labels", None))
    if found is None or getattr(data, "target_transform", None) is not None:
        return None
    labels = np.asarray(found)
    return labels if labels.dtype.kind in "iub" and labels.shape == (len(data),) else None


def known_classes(data: Any) -> list[str] | None:
    """Returns the names of a data set's classes; None where it does not offer them."""
    if isinstance(data, Subset):
        return known_classes(data.dataset)
    if names := getattr(data, "wnids", None) or getattr(data, "classes", None):  # ImageNet's classes are synonyms
        return list(map(str, names))
    owners = data, getattr(data, "reader", None)  # timm's readers of streams know them
    if numbers := next(filter(None, (getattr(owner, "class_to_idx", None) for owner in owners)), None):
        return sorted(numbers, key=numbers.__getitem__)
    labels = known_labels(data)
    return None if labels is None else [str(i) for i in range(int(np.max(labels)) + 1)]
