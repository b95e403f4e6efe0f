"""Images that are read one by one, from a list of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kdvit.data.base import ImageDataModule, Split
from kdvit.data.cached import collate
from kdvit.data.reading import DamagedImage, read_image
from kdvit.data.splits import SPLIT_SEED, VAL_SHARE
from kdvit.data.transforms import ErasingMode, PixelTransform, Transform, leaves_arithmetic, train_transform
from kdvit.models.network import eval_transform
from kdvit.seeding import mixed_seed, seeded
from kdvit.structures import Batch, View

SUBSTITUTES = 10
"""Images that are tried in place of one that cannot be read."""
OnError = Literal["raise", "skip"]


class ListedImages(ImageDataModule):
    """Images that are read one by one, and augmented by timm's transform. Subclass it and list them in `samples`.

    Args:
        batch_size: Images a step and process.
        num_workers: Processes that load images, for each training process.
        auto_augment: timm's policy; null for none.
        color_jitter: Strength of the colour jitter, which timm leaves out beside a policy.
        random_erasing: Probability of random erasing.
        erasing_mode: What erases: noise for each pixel (the recipe), one random colour (rand), or zeros (const).
        erasing_count: The largest number of erased rectangles, which share the area.
        interpolation: Of the resizing.
        crop_pct: Centre crop of the evaluation, as a share of the resized shorter side.
        val_share: Share of each class that is set apart where there is no val: always the same images, whatever the
            run's seed.
        split_seed: Of what is set apart.
        labels: Whether the images have labels.
        on_error: What happens at a damaged training image: raise, or skip it, and train on another, which follows from
            seed, epoch and image, and is counted as `train/bad_images`. A damaged validation image always raises.
        kwargs: Those of ImageDataModule.

    Attributes:
        samples: What each split that there is shows; without test, the images of val are shown for it.
        root: What the paths that `path` returns are relative to.
    """

    samples: dict[str, Any]
    root: Path

    def __init__(
        self,
        batch_size: PositiveInt = 128,
        num_workers: NonNegativeInt = 8,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.4,
        random_erasing: float = 0.25,
        erasing_mode: ErasingMode = "pixel",
        erasing_count: PositiveInt = 1,
        interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        on_error: OnError = "raise",
        val_share: OpenUnitInterval = VAL_SHARE,
        split_seed: NonNegativeInt = SPLIT_SEED,
        labels: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, **kwargs)
        self.on_error, self.is_labelled = on_error, labels
        self.val_share, self.split_seed = val_share, split_seed
        self.image_format = self.image_format._replace(crop_pct=crop_pct, interpolation=interpolation)
        self.augmentation: dict[str, Any] = {
            "auto_augment": auto_augment,
            "color_jitter": color_jitter,
            "random_erasing": random_erasing,
        }
        if (erasing_mode, erasing_count) != ("pixel", 1):  # the others' fingerprints stay as they were
            self.augmentation |= {"erasing_mode": erasing_mode, "erasing_count": int(erasing_count)}
        self.is_grey = len(self.image_format.mean) == 1
        self.train_transform = train_transform(self.image_format, **self.augmentation)
        self.eval_transform = eval_transform(self.image_format)

    def fingerprint(self) -> dict[str, Any]:
        """Returns also the arguments of the training transform, so that a difference can be named."""
        return {**super().fingerprint(), **self.augmentation, "interpolation": self.image_format.interpolation}

    def source(self, split: Split) -> Split:
        """Returns val for test where there are no images for it."""
        return "val" if split == "test" and "test" not in self.samples else split

    def labels(self, split: Split) -> Any:
        """Returns those of a split; none if there is no such split, or nobody knows yet."""
        return self.samples[split].targets if split in self.samples else None

    def dataset(self, split: Split) -> Dataset[Any]:
        """Returns the images of a split; of val for test where there are none for it."""
        if split == "train":
            transform = self.train_transform
            if self.sends_pixels() and leaves_arithmetic(transform):
                transform = PixelTransform(transform)
            return self.read(split, transform, self.seed)
        return self.plain_dataset(split)

    def sends_pixels(self) -> bool:
        """Tells whether training images travel as uint8, to be normalised and erased on their device: to GPUs."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def plain_dataset(self, split: Split) -> Dataset[Any]:
        """Returns the images of a split as an evaluation shows them."""
        return self.read(self.source(split), self.eval_transform, None)

    def read(self, split: Split, transform: Transform, seed: int | None) -> Dataset[Any]:
        """Returns the images of a split under a transform whose draws follow from the seed."""
        return FolderImages(self.samples[split], transform, seed, self.on_error, self.is_grey)

    def path(self, index: int, split: Split = "test") -> str:
        """Returns the path of an image, relative to the root."""
        return os.path.relpath(self.samples[self.source(split)][index][0], self.root)


class FolderImages(Dataset[Any]):
    """Images read when they are asked for.

    Args:
        samples: Path and class index of each image.
        transform: Makes a tensor ``[C, H, W]`` of an image.
        seed: Seed of the transform's draws, together with the view; None for a transform without any.
        on_error: Whether a damaged image raises, or another replaces it. (Without a seed, for evaluation, it raises.)
        grey: Whether the transform gets one channel.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        transform: Transform,
        seed: int | None,
        on_error: OnError = "raise",
        grey: bool = False,
    ) -> None:
        self.samples, self.transform, self.seed, self.on_error, self.grey = samples, transform, seed, on_error, grey

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def digest(self) -> str:
        """Digest of the names of the images."""
        return getattr(self.samples, "digest", "")

    @property
    def targets(self) -> list[int]:
        """Class index of each image."""
        return [target for _, target in self.samples]

    def __getitem__(self, index: View | int) -> tuple[Tensor, int, int]:
        return self._sample(View.of(index))[0]

    def __getitems__(self, indices: Sequence[View | int]) -> Batch:
        samples, bad = zip(*(self._sample(View.of(index)) for index in indices), strict=True)
        return collate(list(samples))._replace(bad=tuple(filter(None, bad)))

    def read(self, number: int) -> tuple[Image.Image, int]:
        """Returns an image and its class index."""
        path, target = self.samples[number]
        return read_image(path, self.grey), target

    def _sample(self, view: View) -> tuple[tuple[Tensor, int, int], str]:
        """Returns a sample, and what is wrong with the view's own image where another replaces it."""
        with nullcontext() if self.seed is None else seeded(mixed_seed(self.seed, *view)):
            (image, target), number, bad = self._readable(view)
            return (self.transform(image), target, number), bad

    def _readable(self, view: View) -> tuple[tuple[Image.Image, int], int, str]:
        """Reads the image of a view, or the one that replaces it, which follows from seed and view."""
        try:
            return self.read(view.image), view.image, ""
        except DamagedImage as error:
            if self.seed is None:
                raise
            bad = error
        if self.on_error == "raise":
            raise DamagedImage(f"{bad} (Or skip it in training: --data.init_args.on_error skip.)") from bad
        for attempt in range(1, SUBSTITUTES + 1):
            number = mixed_seed(self.seed, *view, attempt) % len(self)
            with suppress(DamagedImage):
                return self.read(number), number, str(bad)
        raise DamagedImage(f"{bad} (Of {SUBSTITUTES} others in its place, none can be read.)") from bad

    def fingerprint(self) -> dict[str, Any]:
        """Describes in plain types what the pixels of a view depend on: files, by their sizes, and transform."""
        root = os.path.commonpath({os.path.dirname(path) for path, _ in self.samples})
        listing = hashlib.sha256()
        for path, target in self.samples:
            size = os.path.getsize(path) if os.path.exists(path) else -1  # -1: a link to nothing
            listing.update(os.fsencode(f"{os.path.relpath(path, root)} {target} {size}\n"))
        transform = hashlib.sha256(repr(self.transform).encode()).hexdigest()
        return {"content": listing.hexdigest(), "transform": transform}
