"""Fashion-MNIST (Xiao et al., arXiv:1708.07747): 70,000 real images, from a package, a folder or a download."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torchvision
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor

from kdvit.data.in_memory import InMemoryData
from kdvit.files import existing, one_after_the_other

DEBIAN = "/usr/share/datasets/fashion-mnist"
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class FashionMNIST(InMemoryData):
    """60,000 training and 10,000 test images of clothes, 28 x 28 grey.

    Args:
        root: Folder of the four idx files (gzipped or not), or a torchvision root. By default the folder of Debian's
            package dataset-fashion-mnist, else ``data``.
        download: Download them into the root, by torchvision, if they are nowhere.
        batch_size: Images a step and process.
        img_size: Height and width in pixels, or one number for both; resized bilinearly from 28.
        padding: Zero pixels around an image, of which a random crop is taken in training.
        hflip: Probability of a horizontal flip in training.
        train_size: Train on so many images, the first of a fixed random order; null for all.
        holdout: Hold out so many training images (the last of that order) and validate on them; the official test set
            is then only for `kdvit test`. With 0, validation and test are both the official test set.
        kwargs: Those of ImageDataModule.

    Raises:
        FileNotFoundError: If the images are not found and cannot be downloaded.
        ValueError: If `train_size` and `holdout` are more than there is.
    """

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        batch_size: PositiveInt = 128,
        img_size: int | tuple[int, int] = 28,
        padding: NonNegativeInt = 2,
        hflip: ClosedUnitInterval = 0.5,
        train_size: PositiveInt | None = None,
        holdout: NonNegativeInt = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, img_size=img_size, **kwargs)
        folder = find_fashion_mnist(root, download)
        images, targets, *test = (read_idx(folder, name) for name in FILES)
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(targets)))
        kept = len(targets) - holdout
        size = train_size or kept
        if size > kept:
            raise ValueError(
                f"FashionMNIST has {len(targets)} training images: train_size and holdout must be no more together, "
                f"got {size} and {holdout}."
            )
        self.numbers = {"train": order[:size], "test": torch.arange(len(test[1]))}
        self.parts = {"train": (images, targets), "test": (test[0], test[1])}
        if holdout:
            self.numbers["val"], self.parts["val"] = order[kept:], self.parts["train"]
        self.class_names = list(torchvision.datasets.FashionMNIST.classes)
        self.padding, self.hflip = padding, hflip


def find_fashion_mnist(root: str | None, download: bool) -> Path:
    """Returns the folder of the four files, downloading them if need be.

    Raises:
        FileNotFoundError: If there is no such folder and no download.
    """
    wanted = Path(root or "data").absolute()
    folders = [wanted, wanted / "FashionMNIST" / "raw", *([] if root else [Path(DEBIAN)])]
    for folder in folders:
        if all(_file(folder, name).is_file() for name in FILES):
            return folder
    reason: object = "download is false"
    if download:
        try:
            download_whole(folders[1])
            return folders[1]
        except Exception as error:
            reason = error
    raise FileNotFoundError(
        f"Fashion-MNIST is in none of {', '.join(map(str, folders))}, and cannot be downloaded ({reason}). Install "
        "Debian's package dataset-fashion-mnist, or name the folder of its four idx files by --data.init_args.root."
    )


def download_whole(folder: Path) -> None:
    """Downloads beside the folder and moves each file there: no other process reads half a file.

    Of processes that start together, one downloads, and the others wait for it.
    """
    place = existing(folder.parent)
    with one_after_the_other(place), TemporaryDirectory(dir=place) as beside:
        if all(_file(folder, name).is_file() for name in FILES):
            return
        fetched = Path(torchvision.datasets.FashionMNIST(beside, download=True).raw_folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            file = _file(fetched, name)
            os.replace(file, folder / file.name)


def read_idx(folder: Path, name: str) -> Tensor:
    """Reads an idx file: images ``[n, H, W]`` as uint8, labels ``[n]`` as int64.

    Raises:
        ValueError: If the file is damaged.
    """
    file = _file(folder, name)
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise ValueError(f"The file {str(file)!r} is damaged: {error}. Fetch it again.") from error
    tensor = torch.from_numpy(values.copy())
    return tensor if tensor.ndim > 1 else tensor.long()


def _file(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.gz"
    return packed if packed.is_file() else folder / name
