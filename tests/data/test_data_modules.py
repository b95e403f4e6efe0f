"""The data sets, their transforms and Mixup, and what they say of bad input."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from kdvit.data import Digits, FashionMNIST, ImageFolder
from kdvit.data.transforms import posterize, train_transform
from kdvit.errors import UserError
from kdvit.seeding import seeded
from kdvit.structures import Batch, ImageFormat

CLASSES = ("cat", "dog")


def image_folder(root: Path, train: int = 6, val: int = 3) -> Path:
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = np.random.RandomState(i).randint(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.jpg")
    return root


def test_an_image_folder_gives_batches_and_names(tmp_path) -> None:
    data = ImageFolder(str(image_folder(tmp_path)), batch_size=4, num_workers=0, img_size=16)
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (4, 3, 16, 16)
    assert data.class_names == ["cat", "dog"]
    assert data.num_classes == 2
    seen = list(data.val_dataloader())
    assert torch.cat([batch.target for batch in seen]).tolist() == [0, 0, 0, 1, 1, 1]
    assert data.path(4) == "val/dog/1.jpg"
    assert data.path(7, "train") == "train/dog/1.jpg"


def test_pixels_do_not_depend_on_workers_or_the_random_state(tmp_path) -> None:
    image_folder(tmp_path)

    def epoch(workers: int) -> torch.Tensor:
        torch.manual_seed(workers)
        data = ImageFolder(str(tmp_path), batch_size=4, num_workers=workers, img_size=16, repeats=3, seed=7)
        loader = data.train_dataloader()
        return torch.cat([batch.image for batch in loader])

    expected = epoch(0)
    assert torch.equal(epoch(2), expected)
    assert len(torch.unique(expected.flatten(1), dim=0)) == len(expected)


@pytest.mark.parametrize(
    ("mode", "count", "most"), [("pixel", 1, 999), ("rand", 1, 2), ("rand", 3, 4), ("const", 3, 2)]
)
def test_erased_rectangles_have_the_mode_and_number_that_is_asked_for(
    mode: str, count: int, most: int, tmp_path: Path
) -> None:
    image_folder(tmp_path)
    plain = {"auto_augment": None, "color_jitter": 0.0, "random_erasing": 1.0, "img_size": 32}
    data = ImageFolder(str(tmp_path), **plain, erasing_mode=mode, erasing_count=count)
    grey = Image.new("RGB", (40, 40), (200, 100, 50))
    with seeded(0):
        views = [data.train_transform(grey).flatten(1).T.unique(dim=0) for _ in range(40)]
    colours = {len(each) for each in views}
    assert max(colours) <= most
    assert max(colours) == most or mode == "pixel"
    assert (mode == "pixel") == (min(colours) > 4)
    if mode == "const":
        assert all((each == 0).all(1).any() for each in views)


def test_the_papers_augmentation_does_not_crash_in_4000_draws() -> None:
    transform = train_transform(ImageFormat((16, 16), (0.5,) * 3, (0.5,) * 3))
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (20, 20, 3), dtype=np.uint8))
    for _ in range(4000):
        assert transform(image).shape == (3, 16, 16)


def test_posterize_to_0_bits_is_black_and_else_timms() -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    assert not np.asarray(posterize(image, 0)).any()
    assert np.array_equal(np.asarray(posterize(image, 3)), np.asarray(image) & 0b11100000)
    assert posterize(image, 8) is image
    assert rand_augment_transform("rand-m9-mstd0.5-inc1", {}).ops[4].aug_fn is not posterize  # timm's own is left alone


def training(step: int) -> SimpleNamespace:
    fit_loop = SimpleNamespace(total_batch_idx=step)
    return SimpleNamespace(training=True, world_size=1, global_rank=0, global_step=step, fit_loop=fit_loop)


def test_mixup_is_drawn_from_run_and_step(tmp_path) -> None:
    data = Digits(batch_size=8, mixup=0.8, cutmix=1.0, seed=3)
    batch = next(iter(data.train_dataloader()))

    def mixed(step: int) -> Batch:
        data.trainer = training(step)
        return data.on_after_batch_transfer(Batch(batch.image.clone(), batch.target, batch.index), 0)

    one = mixed(4)
    assert one.target.shape == (8, 10)
    torch.testing.assert_close(one.target.sum(1), torch.ones(8))
    assert torch.equal(one.image, mixed(4).image)
    assert not torch.equal(one.image, mixed(5).image)
    data.trainer.training = False
    assert data.on_after_batch_transfer(batch, 0) is batch


def test_digits_are_split_once_for_all() -> None:
    data, again = Digits(seed=1), Digits(seed=2)
    assert (len(data.dataset("train")), len(data.dataset("val"))) == (1297, 500)
    assert torch.equal(data.numbers["val"], again.numbers["val"])
    assert sorted(torch.cat(list(data.numbers.values())).tolist()) == list(range(1797))
    shares = [torch.bincount(data.dataset(split).targets) / len(data.dataset(split)) for split in ("train", "val")]
    torch.testing.assert_close(*shares, rtol=0, atol=0.002)
    image, target, _ = data.dataset("val")[next(iter(data.val_dataloader().sampler))]
    assert image.shape == (3, 8, 8)
    assert target in range(10)
    assert [data.path(0), data.path(0, "train")] == [f"digits/{data.numbers[split][0]}" for split in ("val", "train")]


def test_another_size_is_reached_by_resizing_once() -> None:
    native, doubled = (Digits(img_size=size, mean=(0,) * 3, std=(1,) * 3).dataset("val") for size in (8, 16))
    expected = torch.nn.functional.interpolate(native[3][0][None], size=16, mode="bilinear")[0]
    torch.testing.assert_close(doubled[3][0], expected, rtol=0, atol=1.5 / 255)  # held in 8 bits


@pytest.mark.parametrize("images", [500, 499])
def test_every_rank_of_an_evaluation_gets_its_own_images(images: int) -> None:
    data = Digits(batch_size=249)
    data.numbers["val"] = data.numbers["val"][:images]
    batches = []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        batches.append([batch.index for batch in data.val_dataloader()])
    assert len(batches[0]) == len(batches[1])
    assert sorted(torch.cat(batches[0] + batches[1]).tolist()) == list(range(images))


def _idx(file: Path, array: np.ndarray, packed: bool) -> None:
    content = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    file.with_suffix(".gz" if packed else "").write_bytes(gzip.compress(content) if packed else content)


def fashion_root(folder: Path, packed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.RandomState(0)
    for part, count in (("train", 50), ("t10k", 20)):
        _idx(folder / f"{part}-images-idx3-ubyte", draw.randint(0, 255, (count, 28, 28), dtype=np.uint8), packed)
        _idx(folder / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8), packed)
    return folder


@pytest.mark.parametrize(("place", "packed"), [(".", True), ("FashionMNIST/raw", False)])
def test_fashion_mnist_is_read_from_either_layout(place: str, packed: bool, tmp_path) -> None:
    fashion_root(tmp_path / place, packed)
    data = FashionMNIST(str(tmp_path), batch_size=8, train_size=30, holdout=10)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [30, 10, 20]
    assert next(iter(data.train_dataloader())).image.shape == (8, 3, 28, 28)
    assert data.class_names[9] == "Ankle boot"
    official = FashionMNIST(str(tmp_path))
    assert len(official.dataset("train")) == 50
    assert torch.equal(official.dataset("val").targets, official.dataset("test").targets)


def _slow_download(self) -> None:
    raw = Path(self.raw_folder)
    Path(f"downloaded-{os.getpid()}").touch()
    fashion_root(raw)
    files = {file: file.read_bytes() for file in raw.iterdir()}
    for file in files:
        file.write_bytes(b"")
    time.sleep(0.5)
    for file, content in files.items():
        file.write_bytes(content)


def _number_of_images(root: str, later: float) -> int:
    time.sleep(later)
    return len(FashionMNIST(root).dataset("train"))


def test_of_processes_that_start_together_one_downloads_and_the_others_wait(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torchvision.datasets.mnist.MNIST.download", _slow_download)
    monkeypatch.setattr("torchvision.datasets.mnist.MNIST._load_data", lambda self: (None, None))
    monkeypatch.setattr("torchvision.datasets.mnist.MNIST._check_exists", lambda self: True)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(_number_of_images, [(str(tmp_path), 0), (str(tmp_path), 0.2)]) == [50, 50]
    assert len(list((tmp_path / "FashionMNIST/raw").iterdir())) == 4
    assert len(list(Path().glob("downloaded-*"))) == 1


def test_the_held_out_images_are_none_of_the_training_images(tmp_path) -> None:
    data = FashionMNIST(str(fashion_root(tmp_path)), holdout=20)
    train, held = (data.dataset(split).pixels.flatten(1) for split in ("train", "val"))
    assert not (train[:, None] == held[None]).all(2).any()
    official = FashionMNIST(str(tmp_path)).dataset("train").pixels.flatten(1)
    numbers = {FashionMNIST(str(tmp_path)).path(i, "train"): i for i in range(50)}
    for split, pixels in (("train", train), ("val", held)):
        for i in range(len(pixels)):
            assert torch.equal(pixels[i], official[numbers[data.path(i, split)]])
    assert data.path(3) == "test/3"


def _no_download(*_, **__):
    raise RuntimeError("no internet")


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda root: ImageFolder(str(root / "none")),
            FileNotFoundError,
            r"Expected layout: ROOT/train/CLASS.* In '.*none': .*No such file or directory",
        ),
        (
            lambda root: (image_folder(root), (root / "val").rename(root / "Valid"), ImageFolder(str(root))),
            FileNotFoundError,
            r"has the folder\(s\) Valid, and no folder 'val'. Name those of the splits, such as --data.init_",
        ),
        (
            lambda root: ((root / "val").mkdir(), ImageFolder(str(root))),
            FileNotFoundError,
            r"In '.*/val': There is no class folder.",
        ),
        (
            lambda root: (image_folder(root), (root / "train" / "eel").mkdir(), ImageFolder(str(root))),
            FileNotFoundError,
            r"In '.*/train': There is no image of the classes eel. Files are read that end in .*jpeg",
        ),
        (
            lambda root: (image_folder(root), (root / "val/dog").rename(root / "val/hog"), ImageFolder(str(root))),
            ValueError,
            r"different classes \(2 and 2\); only in train: dog; only in val: hog",
        ),
        (lambda root: Digits(mixup=0.8, batch_size=7), ValueError, "need an even batch_size, got 7"),
        (
            lambda root: FashionMNIST(str(fashion_root(root)), train_size=45, holdout=10),
            ValueError,
            "has 50 training images.*got 45 and 10",
        ),
        (
            lambda root: FashionMNIST(str(root), download=False),
            FileNotFoundError,
            "is in none of .*FashionMNIST/raw, and cannot be downloaded .download is false",
        ),
        (
            lambda root: FashionMNIST(str(root)),
            FileNotFoundError,
            "cannot be downloaded .no internet.*dataset-fashion-mnist, or name the folder",
        ),
    ],
)
def test_bad_data_say_where_and_what_to_do(make, error, text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torchvision.datasets.mnist.MNIST.download", _no_download)
    with pytest.raises(error, match=text):
        make(tmp_path)


def test_an_unreadable_image_is_named(tmp_path) -> None:
    image_folder(tmp_path)
    broken = tmp_path / "val" / "cat" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    data = ImageFolder(str(tmp_path), batch_size=2, num_workers=0, img_size=16)
    with pytest.raises(RuntimeError, match=r"Cannot read the image '.*val/cat/1.jpg': .*Repair or remove it"):
        list(data.val_dataloader())


def test_validation_images_alone_can_be_evaluated_and_not_trained_on(tmp_path) -> None:
    image_folder(tmp_path)
    (tmp_path / "train").rename(tmp_path / "gone")
    data = ImageFolder(str(tmp_path), batch_size=2, num_workers=0, img_size=16)
    assert len(list(data.val_dataloader())) == 3
    with pytest.raises(UserError, match=r"no folder '.*/train' to train on. Expected layout"):
        data.train_dataloader()


def test_a_damaged_idx_file_is_named(tmp_path) -> None:
    fashion_root(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz' is damaged"):
        FashionMNIST(str(tmp_path))
