"""DeiT's training images a second, of one loading process: photographs as they come, and prepared ones."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdvit.data.listed import FolderImages, read_image
from kdvit.data.transforms import PixelTransform, train_transform
from kdvit.structures import ImageFormat
from tests.bench.rounds import Row, interleave, row, speed_up

PHOTOGRAPHS = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rows(rounds: int) -> list[Row]:
    """Measures the whole transform against decoding alone, and against images whose short side is 256."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _rows(Path(folder), rounds)
    finally:
        torch.set_num_threads(threads)


def _rows(folder: Path, rounds: int) -> list[Row]:
    full, prepared = [], []
    for i in range(PHOTOGRAPHS):
        whole = photograph(i)
        full.append((str(folder / f"{i}.jpg"), 0))
        prepared.append((str(folder / f"{i}_256.jpg"), 0))
        whole.save(full[-1][0], quality=90)
        whole.resize((341, 256), Image.Resampling.BICUBIC).save(prepared[-1][0], quality=90)
    transform = train_transform(ImageFormat((224, 224), MEAN, STD), "rand-m9-mstd0.5-inc1", 0.4, 0.25)
    sets = [FolderImages(samples, transform, seed=0) for samples in (full, prepared)]
    pixels = FolderImages(full, PixelTransform(transform), seed=0)
    decode = interleave(lambda: _each(sets[0].__getitem__), lambda: _each(lambda i: read_image(full[i][0])), rounds)
    sent = interleave(lambda: _batch(pixels), lambda: _batch(sets[0]), rounds)
    smaller = interleave(lambda: _each(sets[1].__getitem__), lambda: _each(sets[0].__getitem__), rounds)
    return [
        row("training image of 500 x 375, against decoding it alone", decode, speed_up, "ms", "none"),
        row("training image sent as uint8 pixels, against floats: speed-up", sent, speed_up, "ms", ">= 1.15"),
        row(
            "training image of short side 256, against 500 x 375: speed-up",
            smaller,
            speed_up,
            "ms",
            ">= 1.5 to be worth it",
        ),
    ]


def _each(read: object) -> float:
    """Returns the seconds an image."""
    start = time.perf_counter()
    for i in range(PHOTOGRAPHS):
        read(i)
    return (time.perf_counter() - start) / PHOTOGRAPHS


def _batch(images: FolderImages) -> float:
    """Returns the seconds an image of a batch that is put into shared memory, as a worker does."""
    start = time.perf_counter()
    batch = images.__getitems__(range(PHOTOGRAPHS))
    batch.image.share_memory_()
    return (time.perf_counter() - start) / PHOTOGRAPHS


def photograph(seed: int) -> Image.Image:
    """Returns smooth colours with a little noise, some 60 kB as JPEG, like a photograph of ImageNet's usual size."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(smooth) + rng.normal(0, 8, (375, 500, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
