"""scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from kdvit.data.base import Split
from kdvit.data.in_memory import InMemoryData


class Digits(InMemoryData):
    """1,797 digits of 8 x 8 pixels (UCI Optical Recognition of Handwritten Digits): 1,297 to train, 500 to validate.

    The split is always the same, with each digit's share alike in both parts.

    Args:
        batch_size: Images a step and process.
        img_size: Height and width in pixels, or one number for both; resized bilinearly from 8.
        padding: Zero pixels around an image, of which a random crop is taken in training.
        holdout: Hold out so many training images and validate on them, to choose by them what the 500 will judge.
        kwargs: Those of ImageDataModule.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If no image would be left to train on.
    """

    def __init__(
        self,
        batch_size: PositiveInt = 64,
        img_size: int | tuple[int, int] = 8,
        padding: NonNegativeInt = 1,
        holdout: NonNegativeInt = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, img_size=img_size, **kwargs)
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("Digits needs scikit-learn: pip install 'kdvit[demo]'.") from error
        images, targets = load_digits(return_X_y=True)
        pixels = torch.from_numpy(np.round(images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8))
        train, val = train_test_split(np.arange(len(targets)), test_size=500, stratify=targets, random_state=0)
        if (kept := len(train) - holdout) < 1:
            raise ValueError(f"Digits has {len(train)} training images: holdout must be less, got {holdout}.")
        self.parts = dict.fromkeys(("train", "val"), (pixels, torch.from_numpy(targets).long()))
        parts = {"train": train[:kept], "val": train[kept:] if holdout else val}
        self.numbers = {split: torch.from_numpy(numbers) for split, numbers in parts.items()}
        self.class_names = [str(digit) for digit in range(10)]
        self.padding = padding

    def path(self, index: int, split: Split = "test") -> str:
        """Returns ``digits/N``, N the number in scikit-learn's order."""
        return f"digits/{int(self.numbers[self.source(split)][index])}"
