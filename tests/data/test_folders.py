"""Folders of any name, what is set apart to validate on, images without labels, and grey and non-square ones."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdvit.cli.images import find_images
from kdvit.data import Digits, FashionMNIST, ImageFolder
from kdvit.data.labelled import labelled_images
from kdvit.data.reading import read_image
from kdvit.errors import UserError
from kdvit.structures import ImageFormat
from tests.data.test_data_modules import fashion_root, image_folder, training
from tests.data.test_listing import put

SIZES = {"ant": 21, "bee": 10, "cow": 2, "doe": 1}


def read(root: str = "images", **more: object) -> ImageFolder:
    return ImageFolder(root, **{"batch_size": 4, "num_workers": 0, "img_size": 16, **more})


def paths(data: ImageFolder, split: str) -> list[str]:
    return [data.path(i, split) for i in range(len(data.dataset(split)))]


def classes(top: str = "train") -> None:
    put(*(f"{top}/{name}/{i}.png" for name, count in SIZES.items() for i in range(count)))


def test_folders_may_have_any_names() -> None:
    put(*(f"{split}/{name}/1.png" for split in ("training", "2024/held out", "old") for name in ("cat", "dog")))
    data = read(train="training", val="2024/held out", test="old")
    assert [paths(data, split)[0] for split in ("train", "val", "test")] == [
        "training/cat/1.png",
        "2024/held out/cat/1.png",
        "old/cat/1.png",
    ]
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*images/valid', by which val is named"):
        read(train="training", val="valid")
    with pytest.raises(FileNotFoundError, match=r"has the folder\(s\) training, and no folder 'val'. Name those"):
        read()
    assert read(train=".").class_names == ["2024", "old", "training"]
    put(*(f"{split}/{name}/1.png" for split in ("Dev", "validation", "testing") for name in ("cat", "dog")))
    data = read()
    assert [paths(data, split)[0] for split in ("train", "val", "test")] == [
        "training/cat/1.png",
        "validation/cat/1.png",
        "testing/cat/1.png",
    ]
    assert "of train, by seed" not in data.summary()
    put("dev/cat/1.png")
    with pytest.raises(
        FileNotFoundError, match=r"has the folder\(s\) Dev, dev, testing, training, validation, and no fol"
    ):
        read()


@pytest.mark.parametrize("inside", [{"val": "val"}, {"test": "old/held"}])
def test_images_of_another_split_are_not_trained_on(inside: dict[str, str]) -> None:
    put("a.png", "b.png", *(f"{folder}/{i}.png" for folder in inside.values() for i in range(2)))
    with pytest.raises(ValueError, match=rf"images', of the training images, holds those of {next(iter(inside))}, too"):
        read(train=".", labels=False, **inside)


def test_a_folder_comes_before_a_data_module_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    put("Digits/cat/1.png", "Digits/cat/2.png", "Digits/dog/1.png", "Digits/dog/2.png")
    monkeypatch.chdir("images")
    form = ImageFormat((16, 16), (0.5,) * 3, (0.5,) * 3)
    assert find_images("Digits", form).classes == labelled_images("Digits", form).num_classes == 2


def test_an_analysis_shows_the_images_that_would_be_validated_on() -> None:
    classes()
    images = ImageFormat((16, 16), (0.5,) * 3, (0.5,) * 3)
    found, data = find_images("images", images), read()
    shown = [found.dataset.samples[i][0] for i in range(len(found.dataset))]
    assert [os.path.relpath(path, "images") for path in shown] == paths(data, "val")
    assert (found.classes, found.spec["class_path"]) == (len(SIZES), "ImageFolder")
    assert found.name == f"{Path('images').absolute()}, 10% of train"
    put("Valid/ant/1.png")
    with pytest.raises(
        UserError, match=r"has the folder\(s\) Valid, and no folder 'val'\. Name .* the folder of one alone"
    ):
        find_images("images", images)
    assert len(find_images("images/Valid", images).dataset) == 1
    put("valid/ant/1.png", "valid/ant/2.png")
    assert len(find_images("images", images).dataset) == 2
    put("val/ant/1.png", "val/bee/1.png")
    assert (find_images("images", images).classes, len(find_images("images", images).dataset)) == (2, 2)


@pytest.mark.parametrize(("top", "share", "seed"), [("train", 0.1, 0), (".", 0.25, 3)])
def test_without_val_a_share_of_each_class_is_set_apart_by_the_stated_rule(top: str, share: float, seed: int) -> None:
    classes(top)
    data = read(val_share=share, split_seed=seed)
    expected = []
    for name, count in SIZES.items():
        names = [f"{name}/{i}.png" for i in range(count)]
        drawn = sorted(names, key=lambda each: hashlib.sha256(f"{seed} {each}".encode()).hexdigest())
        expected += sorted(drawn[: min(max(int(share * count + 0.5), 1), count - 1)])
    assert sorted(os.path.relpath(each, top) for each in paths(data, "val")) == sorted(expected)
    everything = sorted(str(Path(top, name, f"{i}.png")) for name, count in SIZES.items() for i in range(count))
    assert sorted(paths(data, "train") + paths(data, "val")) == everything
    assert data.summary().endswith(f"; test: those of val; val is {share:.0%} of train, by seed {seed}")
    assert read(val_share=share, split_seed=seed, seed=7).samples["val"].digest == data.samples["val"].digest
    other = read(val_share=share, split_seed=seed + 1)
    assert paths(other, "val") != paths(data, "val")
    assert other.dataset("train").digest != data.dataset("train").digest
    assert other.fingerprint() != data.fingerprint()


def test_images_that_are_added_move_few() -> None:
    classes()
    before = set(paths(read(val_share=0.3), "val"))
    put("train/ant/a.png", "train/ant/b.png")
    assert len(before - set(paths(read(val_share=0.3), "val"))) <= 2


def test_one_image_a_class_cannot_be_divided() -> None:
    put("cat/1.png", "dog/1.png")
    with pytest.raises(FileNotFoundError, match=r"No class in '.*images' has two images, one to train and one to val"):
        read()


def test_without_labels_a_tree_is_listed_whole_and_nothing_hidden() -> None:
    put("1.png", "a/2.png", "a/b/3.png", ".ipynb_checkpoints/1.png", "a/.hidden/2.png", "a/4.svg", "test/5.png")
    with pytest.raises(FileNotFoundError, match=r"has the folder\(s\) test, and no folder 'val'"):
        read(labels=False)
    data = read(labels=False, train=".", test=".", val_share=0.5)
    assert sorted(paths(data, "train") + paths(data, "val")) == ["1.png", "a/2.png", "a/b/3.png", "test/5.png"]
    assert len(paths(data, "test")) == 4
    assert (data.class_names, data.num_classes) == ((), 0)
    assert data.summary().startswith("train: 2 images without labels (skipped: 1 .svg); val: 2 images without labels; ")
    assert next(iter(data.train_dataloader())).target.tolist() == [-1, -1]
    with pytest.raises(FileNotFoundError, match=r"There is no class folder. \(Images without labels: --data.init_args"):
        read("images/a/b")
    put("a/5.png")
    Path("images/test/5.png").unlink()
    Path("images/test").rmdir()
    found = find_images("images/a/b", ImageFormat((16, 16), (0.5,) * 3, (0.5,) * 3))
    assert (len(found.dataset), found.targets, found.classes, found.spec) == (1, None, None, None)
    with pytest.raises(ValueError, match=r"The images of 'images' have fewer than two classes"):
        labelled_images("images", ImageFormat((16, 16), (0.5,) * 3, (0.5,) * 3))


def test_mixup_without_labels_mixes_images_alone() -> None:
    put(*(f"{i}.png" for i in range(8)))
    data = read(labels=False, mixup=0.8)
    batch = next(iter(data.train_dataloader()))
    data.trainer = training(1)
    mixed = data.on_after_batch_transfer(batch._replace(image=batch.image.clone()), 0)
    assert not torch.equal(mixed.image, batch.image)
    assert mixed.target.tolist() == [-1] * len(batch.image)


@pytest.mark.parametrize("augment", [{}, {"auto_augment": None}, {"auto_augment": "original"}])
def test_grey_images_of_any_shape_have_one_channel_and_the_luma_of_the_colours(augment: dict) -> None:
    image_folder(Path("images"))
    grey = {"img_size": (32, 16), "mean": (0.5,), "std": (0.25,), "crop_pct": 1.0, "interpolation": "bilinear"}
    data = read(**grey, **augment)
    assert (data.image_format.size, data.image_format.mean) == ((32, 16), (0.5,))
    for epoch in range(10):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        assert {tuple(batch.image.shape[1:]) for batch in loader} == {(1, 32, 16)}
    colours = np.asarray(Image.open("images/val/cat/0.jpg").convert("RGB")).astype(float)
    luma = np.asarray(read_image("images/val/cat/0.jpg", grey=True)).astype(float)
    np.testing.assert_allclose(luma, colours @ [0.299, 0.587, 0.114], atol=0.51)
    pixels = data.dataset("val")[0][0] * 0.25 + 0.5
    assert (pixels.shape, 0.3 < float(pixels.mean()) < 0.7) == ((1, 32, 16), True)


def test_data_in_memory_come_grey_and_of_any_shape(tmp_path) -> None:
    for data in (Digits, lambda **more: FashionMNIST(str(fashion_root(tmp_path)), **more)):
        grey = data(img_size=[12, 8], mean=[0.3], std=[0.4]).dataset("train")
        three = data(img_size=[12, 8], mean=[0.3] * 3, std=[0.4] * 3).dataset("train")
        assert grey[0][0].shape == (1, 12, 8)
        assert torch.equal(grey[0][0].expand(3, -1, -1), three[0][0])
    with pytest.raises(ValueError, match=r"Digits: mean and std have three numbers each, or one for .*; got 1 and 3"):
        Digits(mean=[0.3])


def test_a_probe_sees_training_images_as_an_evaluation_shows_them() -> None:
    image_folder(Path("images"))
    data = read()
    plain = data.plain_dataset("train")
    assert torch.equal(plain[3][0], data.eval_transform(read_image("images/train/cat/3.jpg")))
    digits = Digits(seed=1)
    assert torch.equal(digits.plain_dataset("train")[5][0], Digits(seed=2, padding=0).dataset("train")[5][0])
    assert digits.dataset("train").seed == 1
