"""Tiny stand-ins: data and networks that make a whole run cost a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from kdvit.data import ImageDataModule
from kdvit.models import LiftViT, TimmNetwork, TimmStudent, WideLastViT
from kdvit.structures import Batch, ImageFormat, View

FORMAT = ImageFormat((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STUDENT: dict[str, Any] = {
    "arch": "deit_tiny_patch16_224",
    "img_size": 16,
    "num_classes": 5,
    "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2},
}
WIDE = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}


def student(remedy: str | None = None, **more: Any) -> TimmNetwork:
    """Returns a student 16 wide, plain or with a remedy to 24."""
    if remedy is None:
        return TimmStudent(**{**STUDENT, **more})
    return {"lift": LiftViT, "wide_last": WideLastViT}[remedy](**{**STUDENT, "width": 24, **more})


def teacher(**more: Any) -> TimmNetwork:
    """Returns a teacher 24 wide."""
    return TimmStudent(**{**STUDENT, "model_args": WIDE, **more})


class Blobs(Dataset):
    """Images of 5 classes that differ in colour and slope; the same for one index every time."""

    def __init__(self, size: int, offset: int) -> None:
        self.size, self.offset = size, offset

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        target = index % 5
        generator = torch.Generator().manual_seed(self.offset + index)
        slope = torch.linspace(-1, 1, 16).view(1, 1, 16) * (target - 2)
        colour = torch.tensor([target % 2, target % 3, target / 4]).view(3, 1, 1)
        return slope + colour + 0.3 * torch.randn(3, 16, 16, generator=generator), target, index


class TinyData(pl.LightningDataModule):
    """Eighty training and forty validation images."""

    image_format = FORMAT
    class_names = list("abcde")
    num_classes = 5

    def __init__(self, batch_size: int = 16, size: int = 80) -> None:
        super().__init__()
        self.batch_size, self.size = batch_size, size

    def _loader(self, size: int, offset: int) -> DataLoader:
        return DataLoader(Blobs(size, offset), batch_size=self.batch_size, collate_fn=_collate)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.size, 0)

    def val_dataloader(self) -> DataLoader:
        return self._loader(40, 1000)

    test_dataloader = predict_dataloader = val_dataloader

    def path(self, index: int) -> str:
        return f"blob/{index}"


class SizedData(ImageDataModule):
    """So many training and evaluation images, dealt out to the processes."""

    class_names = list("abcde")

    def __init__(self, train: int = 40, val: int = 20, batch_size: int = 4, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, img_size=16, **kwargs)
        self.sizes = {"train": train, "val": val, "test": val}

    def dataset(self, split: str) -> Dataset:
        return _Views(self.sizes[split], 0 if split == "train" else 1000)

    def path(self, index: int, split: str = "test") -> str:
        return f"blob/{index}"


class _Views(Blobs):
    def __getitem__(self, index: Any) -> tuple[torch.Tensor, int, int]:
        return super().__getitem__(View.of(index).image)


def _collate(samples: list[tuple[torch.Tensor, int, int]]) -> Batch:
    images, targets, indices = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(indices))


def trainer(folder: Path | str, **more: Any) -> pl.Trainer:
    """Returns a quiet Trainer on the CPU."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": str(folder), **quiet, **more}
    )
