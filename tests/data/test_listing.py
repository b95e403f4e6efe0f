"""Which files of a folder are read, which are counted as skipped, and which split shows which images."""

from __future__ import annotations

import csv
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from kdvit.cli import main
from kdvit.data import Digits, FashionMNIST, ImageFolder
from kdvit.data.listing import list_images
from kdvit.data.reading import ENDINGS, read_image
from tests.data.test_bad_images import command, last_line
from tests.data.test_data_modules import fashion_root, image_folder

NOISE = np.random.RandomState(0).randint(0, 255, (20, 24, 3), dtype=np.uint8)


def put(*names: str) -> None:
    for name in names:
        file = Path("images", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE).save(file, format="PNG")  # by content, a file is read whatever it is called


def names(folder: str) -> list[str]:
    return [os.path.relpath(path, folder) for path, _ in list_images(Path(folder))]


def test_what_torchvision_lists_is_listed_in_its_order() -> None:
    tree = ["b/1.jpg", "b/sub/2.JPEG", "b/sub-x/0.png", "b/sub/a/9.bmp", "a/10.webp", "a/9.tif", "a/Z.ppm", "a/a.PGM"]
    put(*(f"train/{name}" for name in tree))
    Path("elsewhere").mkdir()
    put("../elsewhere/linked.tiff")
    Path("images/train/a/link").symlink_to(Path("elsewhere").absolute())
    expected = make_dataset("images/train", {"a": 0, "b": 1}, IMG_EXTENSIONS)
    found = list_images(Path("images/train"))
    assert list(found) == expected
    assert len(expected) == 9
    assert not found.skipped


@pytest.mark.parametrize("ending", ["gif", "jfif", "JPE", "GIF", "jp2", "avif"])
def test_an_image_that_pillow_opens_is_listed_and_read(ending: str) -> None:
    kind = {"jfif": "JPEG", "JPE": "JPEG", "jp2": "JPEG2000"}.get(ending, ending.upper())
    if ending == "avif" and not features.check("avif"):
        pytest.skip("Pillow has no AVIF here")
    file = Path(f"images/train/cat/1.{ending}")
    file.parent.mkdir(parents=True)
    Image.fromarray(np.full((16, 16, 3), (200, 100, 50), np.uint8)).save(file, format=kind)
    assert names("images/train") == [f"cat/1.{ending}"]
    assert np.abs(np.asarray(read_image(str(file))).astype(int) - (200, 100, 50)).max() < 16


def test_formats_that_start_programs_or_have_no_known_white_are_not_listed() -> None:
    assert not {".eps", ".ps", ".pdf", ".pfm", ".wmf"} & set(ENDINGS)
    assert set(IMG_EXTENSIONS) < set(ENDINGS)


def test_hidden_files_and_those_of_systems_are_no_images_and_no_classes() -> None:
    put("train/cat/1.jpg", "train/cat/._1.jpg", "train/cat/.ipynb_checkpoints/1-checkpoint.jpg", "train/.hidden/1.jpg")
    put("train/__MACOSX/1.jpg", "train/cat/__MACOSX/1.jpg", "train/cat/Thumbs.db", "train/cat/.DS_Store")
    found = list_images(Path("images/train"))
    assert names("images/train") == ["cat/1.jpg"]
    assert (found.class_names, found.skipped) == (["cat"], {})


def test_other_files_are_counted_by_their_ending() -> None:
    put("train/cat/1.jpg", "train/cat/2.svg", "train/cat/sub/3.SVG", "train/cat/README", "train/4.jpg", "train/all.csv")
    found = list_images(Path("images/train"))
    assert found.skipped == {".svg": 2, "without an ending": 1, "beside the class folders": 1, ".csv": 1}
    assert len(found) == 1


def test_a_class_of_skipped_files_alone_says_which_they_are() -> None:
    put("train/cat/1.jpg", "train/dog/1.heic", "train/dog/2.heic")
    with pytest.raises(FileNotFoundError, match=r"no image of the classes dog. Passed over: 2 .heic. Files are "):
        list_images(Path("images/train"))


def test_each_folder_is_walked_once_however_many_links_lead_to_it() -> None:
    put("train/cat/1.jpg", "train/cat/sub/2.jpg", "train/dog/3.jpg", "../apart/4.jpg", "val/cat/5.jpg")
    cat = Path("images/train/cat").absolute()
    for name, target in {
        "self": cat,
        "up": cat.parent,
        "root": cat.parents[1],
        "one": Path("apart").absolute(),
    }.items():
        (cat / name).symlink_to(target)
    (cat / "sub/back").symlink_to(cat)
    (cat / "two").symlink_to(Path("apart").absolute())
    assert names("images/train") == ["cat/1.jpg", "cat/one/4.jpg", "cat/sub/2.jpg", "dog/3.jpg"]


@pytest.mark.parametrize("link", ["dog/more", "hound"])
def test_a_folder_of_two_classes_is_refused(link: str) -> None:
    put("train/cat/1.jpg", "train/dog/3.jpg")
    Path("images/train", link).symlink_to(Path("images/train/cat").absolute())
    with pytest.raises(ValueError, match=r"cat' belongs to two classes, '.*/cat' and '.*/(dog|hound)'. Remove it"):
        list_images(Path("images/train"))


def test_a_fit_and_a_check_say_what_is_read_and_what_is_skipped(caplog, capsys) -> None:
    image_folder(Path("images"))
    put("train/dog/7.gif", "train/cat/8.svg", "train/cat/9.svg")
    said = "train: 13 images of 2 classes, the smallest cat with 6 (skipped: 2 .svg); "
    said += "val: 6 images of 2 classes, the smallest cat with 3; test: those of val"
    main(command("fit"))
    assert [line for line in caplog.messages if line.startswith("Images: ")] == [f"Images: {said}."]
    capsys.readouterr()
    main(command("check"))
    assert re.search(rf"^data +{re.escape(said)}$", capsys.readouterr().out, re.MULTILINE)


def test_data_in_memory_say_how_many_there_are(tmp_path) -> None:
    train, val, test = Digits().summary().split("; ")
    assert train == "train: 1,297 images of 10 classes, the smallest 8 with 126"
    assert (val[:16], test) == ("val: 500 images ", "test: those of val")
    official = FashionMNIST(str(fashion_root(tmp_path)), train_size=5)
    assert official.summary().split("; ")[1:] == [
        "val: those of test",
        "test: 20 images of 10 classes, the smallest T-shirt/top with 2",
    ]
    assert "; val: 8 images of 10 " in FashionMNIST(str(tmp_path), holdout=8).summary()


def predicted() -> list[str]:
    with Path("run/predictions.csv").open() as stream:
        return [row["path"] for row in csv.DictReader(stream)]


def test_a_test_folder_is_what_test_and_predict_show(caplog, capsys) -> None:
    image_folder(Path("images"))
    put("test/cat/0.jpg", "test/dog/0.jpg", "test/dog/1.jpg")
    data = ImageFolder("images", num_workers=0, img_size=16)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [12, 6, 3]
    assert [data.path(2, split) for split in ("train", "val", "test")] == [
        "train/cat/2.jpg",
        "val/cat/2.jpg",
        "test/dog/1.jpg",
    ]
    main(command("fit"))
    main(command("predict"))
    assert predicted() == ["test/cat/0.jpg", "test/dog/0.jpg", "test/dog/1.jpg"]
    assert not any("for a test alone" in line for line in caplog.messages)


@pytest.mark.parametrize("labelled", [True, False], ids=["none", "without classes"])
def test_without_test_images_the_log_says_that_val_is_shown(labelled: bool, caplog) -> None:
    image_folder(Path("images"))
    if not labelled:
        put("test/ILSVRC2012_test_1.JPEG")
    main(command("fit"))
    main(command("test"))
    said = "There are no images for a test alone: these are those of val."
    assert caplog.messages.count(said) == 1
    main(command("predict"))
    assert caplog.messages.count(said) == 2
    assert len(predicted()) == 6


def test_a_test_folder_of_other_classes_is_refused(capfd) -> None:
    image_folder(Path("images"))
    put("test/cat/0.jpg", "test/eel/0.jpg")
    message = last_line(command("fit"), capfd)
    assert "test and val in '" in message
    assert "have different classes (2 and 2); only in test: eel; only in val: dog." in message
    shutil.rmtree("images/test/eel")
    assert "(1 and 2); only in val: dog." in last_line(command("fit"), capfd)
