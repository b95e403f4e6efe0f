"""Reading an image file as RGB or grey, or saying what is wrong with it."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from kdvit.errors import WorkerError

OF_THE_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR)
"""Errors that come again whenever the file is read; any other (of a disk, of too many open files) may not."""
NOT_OF_THE_FILE = "The file may be whole: check the disk or the machine."

WANTED = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")
_ENDINGS = Image.registered_extensions()
FORMATS = tuple(name for name in WANTED if name in Image.OPEN)
"""Those that are read, whatever a file is called: others, such as EPS, let Pillow start programs."""
ENDINGS = tuple(ending for ending, name in _ENDINGS.items() if name in FORMATS and ending != ".pfm")
"""Those of files that are listed as images, in lower case. (The pixels of a pfm are floats, whose white is unknown.)"""


class ImageError(WorkerError, RuntimeError):
    """An image that cannot be read."""

    then = "Then give the same command again: a run goes on from its last checkpoint."


class DamagedImage(ImageError):
    """An image that cannot be read, today or tomorrow, and that training may skip."""


def read_image(path: str, grey: bool = False) -> Image.Image:
    """Reads an image as RGB, or its luma (ITU-R 601) alone.

    16 bits are rounded to 8, and transparency is left out, as torchvision and timm do. An image of more pixels than
    Pillow takes without a warning (``PIL.Image.MAX_IMAGE_PIXELS``) is refused before it is unpacked.

    Raises:
        DamagedImage: If the file is at fault; the message names the path.
        ImageError: If reading failed for another reason, such as the disk.
    """
    with reading(f"the image {path!r}", path), Image.open(path, formats=FORMATS) as image:
        return converted(image, grey)


@contextmanager
def reading(what: str, path: str | None = None) -> Iterator[None]:
    """Turns whatever damaged bytes lead Pillow to into a DamagedImage or ImageError that says what was read.

    Args:
        what: What is read.
        path: Its file, if it has one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except WorkerError:
        raise
    except Exception as error:
        damaged = not isinstance(error, MemoryError) and getattr(error, "errno", None) in OF_THE_FILE
        raise (DamagedImage if damaged else ImageError)(
            f"Cannot read {what}: {_reason(path, error)}. {'Repair or remove it.' if damaged else NOT_OF_THE_FILE}"
        ) from error


def converted(image: Image.Image, grey: bool) -> Image.Image:
    """Returns an image as RGB, or its luma (ITU-R 601) alone; see `read_image`."""
    return _rgb(image).convert("L") if grey else _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose white is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels reach from {values.min()} to {values.max()}; expected 0 to 65535")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _reason(path: str | None, error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"it unpacks to more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down"
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if path and not os.path.getsize(path) else "it is no image of a known format"
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
