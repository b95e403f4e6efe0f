"""Labelled images by a name alone, as a network wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdvit.data.base import ImageDataModule
from kdvit.data.image_folder import ImageFolder
from kdvit.structures import ImageFormat, subclasses


def module_named(name: str) -> type[ImageDataModule] | None:
    """Returns the data module of a class name; a folder of that name comes first."""
    return None if Path(name).is_dir() else subclasses(ImageDataModule).get(name)


def labelled_images(name: str, image_format: ImageFormat, **loading: Any) -> ImageDataModule:
    """Returns the images of a folder as `ImageFolder` reads it, or those of a data module by its class name.

    Args:
        name: The folder; or the name, of a data module that needs no other argument.
        image_format: How they are to come.
        loading: `batch_size` and `num_workers`.

    Raises:
        ValueError: If the images have no labels, or there is nothing of that name.
    """
    size, mean, std, crop_pct, interpolation = image_format
    given = {"img_size": size, "mean": mean, "std": std, **loading}
    module = module_named(name)
    if module is not None:
        data: ImageDataModule = module(**given)
    else:
        data = ImageFolder(name, crop_pct=crop_pct, interpolation=interpolation, **given)
    if data.num_classes < 2:
        raise ValueError(f"The images of {name!r} have fewer than two classes: there is nothing to tell apart.")
    return data
