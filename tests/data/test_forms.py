"""Images by table, in arrays, in data sets of others, and all that timm reads: each a whole data module."""

from __future__ import annotations

import csv
import io
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

from kdvit.cli import main
from kdvit.data import Arrays, ImageDataModule, Images, ImageTable, TimmData
from kdvit.data.items import Items, known_labels
from kdvit.data.labels import LabelError, class_indices, held_out
from kdvit.data.reading import DamagedImage
from kdvit.errors import UserError
from kdvit.structures import View
from tests.runs import QUIET, assert_same_end
from tests.several import PATHS, together

PIXELS = np.random.RandomState(0).randint(0, 255, (40, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(40) % 2
SHOWN: dict[str, Any] = {"batch_size": 4, "img_size": 16, "seed": 0}
FOUND: dict[str, Any] = {**SHOWN, "num_workers": 0, "crop_pct": 1.0}


class Pairs(Dataset):
    """A data set as a user writes one."""

    def __init__(self, size: int = 40, labels: Any = LABELS, images: Any = PIXELS) -> None:
        self.size, self.given, self.images = size, labels, images

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return Image.fromarray(self.images[index]), self.given[index]


class Stream(IterableDataset):
    """A stream as a user writes one."""

    def __iter__(self) -> Any:
        yield from ((Image.fromarray(pixels), int(label)) for pixels, label in zip(PIXELS, LABELS, strict=True))


def write() -> None:
    """Writes the images as PNG files with a table, as a tar file, and as two shards of webdataset."""
    Path("images").mkdir()
    rows: list[tuple[str, str]] = []
    tars: dict[str, dict[str, bytes]] = {name: {} for name in ("train.tar", "shard-0000.tar", "shard-0001.tar")}
    for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        packed, name = io.BytesIO(), ("cat", "dog")[label]
        Image.fromarray(pixels).save(packed, "PNG")
        content = packed.getvalue()
        Path(f"images/{i}.png").write_bytes(content)
        rows.append((f"images/{i}.png", name))
        tars["train.tar"][f"{name}/{i:02d}.png"] = content
        tars[f"shard-000{i % 2}.tar"] |= {f"{i:02d}.png": content, f"{i:02d}.cls": str(label).encode()}
    for file, entries in tars.items():
        with tarfile.open(file, "w") as tar:
            for name, content in entries.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    _table("train.csv", rows)
    np.savez("arrays.npz", train_images=PIXELS, train_labels=LABELS[:, None])


def _table(file: str, rows: Any, columns: tuple[str, ...] = ("path", "label")) -> str:
    with Path(file).open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return file


FORMS: dict[str, Callable[..., ImageDataModule]] = {
    "table": lambda **more: ImageTable("train.csv", **FOUND, **more),
    "arrays": lambda **more: Arrays("arrays.npz", **SHOWN, **more),
    "data set": lambda **more: Images(Pairs(), classes=["cat", "dog"], **FOUND, **more),
    "tar": lambda **more: TimmData(root="train.tar", val=None, **FOUND, **more),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_right_pixels_and_labels_and_a_view_once_for_all(form: str) -> None:
    write()
    data, again = FORMS[form](), FORMS[form]()
    val, train = data.dataset("val"), data.dataset("train")
    assert (len(train), len(val)) == (36, 4)
    mean, std = (np.array(values)[:, None, None] for values in data.image_format[1:3])
    for split, dataset in (("train", data.plain_dataset("train")), ("val", val)):
        for index in range(0, len(dataset), 3):
            image, target, _ = dataset[index]
            number = next(i for i in range(40) if _is_named(data.path(index, split), i))
            expected = (PIXELS[number].transpose(2, 0, 1) / 255 - mean) / std
            np.testing.assert_allclose(image.numpy(), expected, rtol=0, atol=2e-6)
            assert target == LABELS[number]
    assert data.class_names == (["0", "1"] if form == "arrays" else ["cat", "dog"])
    view = train[View(5, 1)][0]
    torch.manual_seed(1)
    assert torch.equal(again.dataset("train")[View(5, 1)][0], view)
    assert not torch.equal(train[View(5, 2)][0], view)
    if form != "data set":
        assert "val: 4 images of 2 classes" in data.summary()


def _is_named(path: str, number: int) -> bool:
    return path.rpartition("/")[2].removesuffix(".png").lstrip("0") == str(number).lstrip("0")


def test_a_fingerprint_changes_with_a_pixel_a_label_or_an_option() -> None:
    write()
    other, labels = PIXELS.copy(), LABELS.copy()
    other[7, 0, 0, 0] ^= 1
    labels[[0, 1]] = 1, 0
    for form, make in FORMS.items():
        assert make().fingerprint() == make().fingerprint(), form
    of = [
        Images(Pairs(images=images, labels=given), Pairs(), classes=2, **FOUND, **more).fingerprint()
        for images, given, more in (
            (PIXELS, LABELS, {}),
            (other, LABELS, {}),
            (PIXELS, labels, {}),
            (PIXELS, LABELS, {"color_jitter": 0.1}),
        )
    ]
    assert len({str(each) for each in of}) == 4


def test_labels_and_classes_are_read_off_the_data_set() -> None:
    cifar = Pairs()
    cifar.targets, cifar.classes = LABELS.tolist(), ["cat", "dog"]
    data = Images(Subset(cifar, range(1, 40, 2)), Subset(cifar, [0, 1, 3]), **FOUND)
    assert data.class_names == ["cat", "dog"]
    assert data.labels("train").tolist() == [1] * 20
    assert data.dataset("val").targets.tolist() == [0, 1, 1]
    del cifar.classes
    assert Images(cifar, **FOUND).class_names == ["0", "1"]


def test_images_come_in_every_usual_form_and_without_labels() -> None:
    packed = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(packed, "PNG")
    forms = [
        Image.fromarray(PIXELS[0]),
        packed.getvalue(),
        packed,
        PIXELS[0],
        torch.from_numpy(PIXELS[0].transpose(2, 0, 1)),
    ]
    for form in (*forms, {"image": forms[0], "label": 1}):
        items = Items([form] if isinstance(form, dict) else [(form, 1)], 2, False, "train")
        image, target = items[0]
        assert (np.asarray(image) == PIXELS[0]).all()
        assert target == 1
    assert Items(Pairs(), 2, True, "train")[0][0].mode == "L"
    data = Images([Image.fromarray(each) for each in PIXELS], labels=False, **FOUND)
    assert (list(data.class_names), data.dataset("train")[0][1]) == ([], -1)


def test_what_is_held_out_is_a_share_of_each_class() -> None:
    labels = np.array([0] * 30 + [1] * 10 + [2] * 2 + [3])
    held = held_out(labels, 0.2, 0)
    assert np.bincount(labels[held], minlength=4).tolist() == [6, 2, 1, 0]
    assert (held == held_out(labels, 0.2, 0)).all()
    assert (held != held_out(labels, 0.2, 1)).any()


class Broken(Pairs):
    def __getitem__(self, index: int) -> Any:
        return b"no image" if self.size == 1 else PIXELS.astype(np.float32)[index], 0


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "multi-hot": (
        lambda: Arrays({"train_images": PIXELS, "train_labels": np.eye(40)[:, :5]}),
        LabelError,
        r"train_labels: expected 40 class index.*got float64 \[40, 5\].*multi-hot.*numbers to regress",
    ),
    "a list of labels an image": (
        lambda: Images(Pairs(labels=[[0, 1]] * 40), classes=2, **FOUND).dataset("train")[0],
        LabelError,
        r"item 0 of train: expected 1 class index\(es\), got \[0, 1\]. kdvit trains",
    ),
    "a number": (lambda: class_indices(0.5, 1, 2, "train"), LabelError, "got 0.5. kdvit trains classifiers"),
    "text": (lambda: class_indices("cat", 1, 2, "train"), LabelError, "got 'cat'"),
    "-1": (lambda: class_indices([0, -1], 2, 2, "val"), LabelError, "val: expected labels of 0 to 1, .*got -1"),
    "too high": (lambda: class_indices([0, 2], 2, 2, "val"), LabelError, "expected labels of 0 to 1, .*got 2"),
    "unknown classes": (lambda: Images(Pairs(), **FOUND), ValueError, "Pairs does not say what its classes are"),
    "a stream alone": (lambda: Images(Stream(), classes=2, **FOUND), ValueError, "no images can be set apart"),
    "one image a class": (lambda: held_out([0, 1], 0.5, 0), ValueError, "No class has two images"),
    "tensors of floats": (
        lambda: Images(Broken(), classes=2, **FOUND).dataset("train")[0],
        TypeError,
        r"item \d of train: expected an image of Pillow, .*got float32 \[16, 16, 3\]. Leave out the data set's own",
    ),
    "no image": (
        lambda: Items(Broken(1), 2, False, "train")[0],
        DamagedImage,
        "Cannot read item 0 of train: it is no image of a known format",
    ),
    "arrays of floats": (
        lambda: Arrays({"train_images": PIXELS / 255, "train_labels": LABELS}),
        ValueError,
        r"train_images is float64 \[40, 16, 16, 3\]; expected uint8",
    ),
    "arrays without labels": (
        lambda: Arrays({"train_images": PIXELS}),
        ValueError,
        "expected train_images and train_labels.*got train_images",
    ),
    "no array file": (lambda: Arrays("train.csv"), ValueError, "'train.csv' is no array file"),
    "grey format": (
        lambda: Arrays("arrays.npz", mean=(0.5,), std=(0.5,), **SHOWN).dataset("val"),
        ValueError,
        "images have 3 channels, and mean and std 1",
    ),
    "no column": (
        lambda: ImageTable("train.csv", label_column="class"),
        ValueError,
        "no column 'class'; it has 'path'",
    ),
    "an empty label": (
        lambda: ImageTable(_table("empty.csv", [("a.png", "cat"), ("b.png", "")])),
        ValueError,
        r"row 3 has no path or no label \(1 such rows\)",
    ),
    "no row": (lambda: ImageTable(_table("empty.csv", [])), ValueError, "has no row"),
    "numbers to regress": (
        lambda: ImageTable(_table("age.csv", [("a.png", "1.5"), ("b.png", "2")])),
        LabelError,
        "the labels are numbers, and 1.5 is no class. kdvit trains",
    ),
    "a label of val alone": (
        lambda: ImageTable("train.csv", _table("val.csv", [("a.png", "ox")])),
        LabelError,
        "labels that are no classes of train: 'ox'. Classes: cat, dog.",
    ),
    "timm's unknown": (
        lambda: TimmData("torch/cifar1000", "data", **FOUND),
        ValueError,
        "timm cannot read 'torch/cifar1000', split 'train', root 'data': Unknown torchvision dataset",
    ),
    "a class less": (
        lambda: (
            write_folders("train/cat", "train/cow", "train/dog", "val/cat", "val/dog"),
            TimmData(root="folders", classes=["cat", "cow", "dog"], **FOUND),
        ),
        ValueError,
        "different classes, 3 and 2: cat, dog. A number means another class in each",
    ),
    "no folder of val": (
        lambda: (write_folders("train/cat", "train/dog"), TimmData(root="folders", **FOUND)),
        ValueError,
        "there is no val 'validation' in 'folders', and timm would show training images for it",
    ),
    "no folder of test": (
        lambda: (
            write_folders("train/cat", "train/dog", "val/cat", "val/dog"),
            TimmData(root="folders", test="test", **FOUND),
        ),
        ValueError,
        "there is no test 'test' in 'folders'",
    ),
    "one tar file for all": (
        lambda: TimmData(root="train.tar", **FOUND),
        ValueError,
        "there is no val 'validation' in 'train.tar'.* or set val to null",
    ),
    "folders of other classes": (
        lambda: (write_folders("train/cat", "train/dog", "val/cat"), TimmData(root="folders", **FOUND)),
        ValueError,
        "train and val have different classes, 2 and 1: cat",
    ),
}


def write_folders(*names: str) -> None:
    for name in names:
        folder = Path("folders", name)
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(PIXELS[i]).save(folder / f"{i}.png")


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_with_a_reason(what: str) -> None:
    write()
    make, error, text = REFUSED[what]
    with pytest.raises(error, match=text):
        make()


def test_a_table_can_be_parquet_elsewhere_and_without_labels() -> None:
    write()
    data = ImageTable("train.csv", labels=False, **FOUND)
    assert (list(data.class_names), data.dataset("train")[0][1]) == ([], -1)
    rows = [(f"{i}.png", str(2 + 8 * label)) for i, label in enumerate(LABELS)]
    assert ImageTable(_table("n.csv", rows), root="images", **FOUND).class_names == ["2", "10"]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"file": [name for name, _ in rows], "label": LABELS}), "train.parquet")
    data = ImageTable("train.parquet", root="images", path_column="file", **FOUND)
    assert data.class_names == ["0", "1"]
    assert {data.path(i, "train") for i in range(36)} | {data.path(i) for i in range(4)} == {name for name, _ in rows}


def config(data: dict[str, Any], **trainer: Any) -> str:
    """Writes the config of a tiny distillation, and returns its name."""
    sizes = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    network = {"arch": "deit_tiny_patch16_224", "img_size": 16}
    student = {**network, "num_classes": 2, "model_args": sizes}
    teacher = {**network, "pretrained": False, "model_args": {**sizes, "num_classes": 2}}
    content = {
        "trainer": {"max_epochs": 2, "default_root_dir": "run", **trainer},
        "data": data,
        "model": {
            "student": {"class_path": "TimmStudent", "init_args": student},
            "teacher": {"class_path": "TimmTeacher", "init_args": teacher},
            "distillers": {"logit": {"class_path": "LogitDistiller"}},
            "schedule": {"warmup_epochs": 0},
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(content))
    return "config.yaml"


def spec(kind: str, **init_args: Any) -> dict[str, Any]:
    sized = {"batch_size": 8, "img_size": 16} | ({} if kind == "Arrays" else {"num_workers": 0})
    return {"class_path": kind, "init_args": {**sized, **init_args}}


FAKE = {"size": 40, "image_size": [3, 16, 16], "num_classes": 2, "random_offset": 3}
TRAINED: dict[str, dict[str, Any]] = {
    "data set": spec(
        "Images",
        train={"class_path": "torchvision.datasets.FakeData", "init_args": FAKE},
        val={"class_path": "torchvision.datasets.FakeData", "init_args": {**FAKE, "size": 12}},
        classes=2,
    ),
    "table": spec("ImageTable", train="train.csv"),
    "arrays": spec("Arrays", arrays="arrays.npz"),
    "tar": spec("TimmData", root="{split}.tar", val=None),
}


def whole_life(data: dict[str, Any]) -> None:
    """Checks, caches, trains, interrupts and goes on, and predicts."""
    name = config(data)
    main(["check", "--config", name])
    main(["cache", "--config", name, *QUIET, "--out", "cache", "--views", "2"])
    cached = ["--config", name, *QUIET, "--data.init_args.cache", "cache", "--ema.decay", "0.5"]
    main(["fit", *cached])
    parted = [*cached, "--trainer.default_root_dir", "parted", "--last_checkpoint.every_n_train_steps", "3"]
    main(["fit", *parted, "--trainer.max_steps", "3"])
    main(["fit", *parted])
    assert_same_end("run", "parted")
    main(["predict", "--config", name, *QUIET])
    with Path("run/predictions.csv").open() as stream:
        paths = [row["path"] for row in csv.DictReader(stream)]
    assert len(set(paths)) == len(paths) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", TRAINED)
def test_a_form_is_checked_cached_trained_resumed_predicted_and_analysed(form: str) -> None:
    write()
    whole_life(TRAINED[form])
    if form == "data set":
        main(["analyze", "--config", "config.yaml", "--images", "4", "--num_workers", "0", "--out", "analysis"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_data_set_of_hugging_face_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_folders("train/cat", "train/dog", "validation/cat", "validation/dog")
    whole_life(spec("TimmData", name="hfds/./folders", root="hf", batch_size=2))


class Streamed(Images):
    """A stream of one's own, as a data module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Stream(), Pairs(12), classes=["cat", "dog"], **kwargs)


@pytest.mark.filterwarnings("ignore")
def test_a_stream_trains_says_what_it_cannot_do_and_has_no_cache(caplog, capsys) -> None:
    name = config(spec("tests.data.test_forms.Streamed"))
    main(["check", "--config", name])
    told = "a stream: a run that goes on amid an epoch reads it from its beginning, and there can be no cache"
    assert f"train: {told}; val: 12 images" in capsys.readouterr().out
    often = ["--last_checkpoint.every_n_train_steps", "2"]
    main(["fit", "--config", name, *QUIET, *often, "--trainer.max_steps", "2"])
    assert f"Images: train: {told}" in caplog.text
    main(["fit", "--config", name, *QUIET, *often])
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    for command in (["cache", "--out", "cache"], ["fit", "--data.init_args.cache", "cache"]):
        with pytest.raises(SystemExit):
            main([command[0], "--config", name, *QUIET, *command[1:], "--trainer.default_root_dir", "other"])
        assert "no cache" in capsys.readouterr().err.splitlines()[-1]


def test_the_pixels_of_a_stream_follow_from_seed_epoch_and_place() -> None:
    def epoch(number: int, workers: int = 0) -> torch.Tensor:
        torch.manual_seed(number)
        loader = Streamed(**{**FOUND, "num_workers": workers}).train_dataloader()
        loader.epoch = lambda: number
        return torch.cat([batch.image for batch in loader])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))
    assert len(epoch(1, workers=1)) == 40


@pytest.mark.slow
def test_two_processes_share_the_shards_of_a_webdataset(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.setitem(PATHS, "PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    write()
    shards = "shard-{0000..0001}.tar|40"
    data = spec("TimmData", name="wds/", root=".", train=shards, val=shards, classes=2)
    name = config(data, devices=2, strategy="ddp", accelerator="cpu")
    together(2, ["fit", "--config", name, *QUIET], ["predict", "--config", name, *QUIET])
    with Path("run/predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len({row["probability"] for row in rows}) == 40


def test_folders_by_timm_have_its_names_and_order() -> None:
    write_folders("train/cat", "train/dog", "val/cat", "val/dog")
    data = TimmData(root="folders", **FOUND)
    assert [data.path(i) for i in range(2)] == ["cat/0.png", "cat/1.png"]
    assert data.labels("train").tolist() == [0, 0, 1, 1]


class DamagedStream(Stream):
    """Five images, the third of them damaged."""

    classes = ("cat", "dog")

    def __iter__(self) -> Any:
        for number, item in zip(range(5), super().__iter__(), strict=False):
            yield (b"no image", 0) if number == 2 else item


def test_a_damaged_item_of_a_stream_is_named_or_left_out() -> None:
    given: dict[str, Any] = {**FOUND, "train": DamagedStream(), "val": Pairs(), "batch_size": 2}
    given["classes"] = ["cat", "dog"]
    with pytest.raises(DamagedImage, match="Cannot read item 2 of train: it is no image of a known format"):
        list(Images(**given).train_dataloader())
    batches = list(Images(**given, on_error="skip").train_dataloader())
    assert [batch.index.tolist() for batch in batches] == [[0, 1], [3, 4]]
    skipping = Images(**given, on_error="skip")
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    skipping.trainer = SimpleNamespace(world_size=2, global_rank=0, strategy=strategy)
    with pytest.raises(UserError, match="on_error: skip leaves damaged images of a stream out"):
        skipping.train_dataloader()


def test_labels_are_read_off_labels_too() -> None:
    pairs = Pairs()
    pairs.labels = LABELS  # as torchvision's SVHN has them
    np.testing.assert_array_equal(known_labels(pairs), LABELS)


def test_a_stream_of_ones_own_is_for_one_process_unless_it_says_that_it_divides_evenly() -> None:
    data = Images(Stream(), val=Pairs(), classes=2, **FOUND)
    on_cpu = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(world_size=2, current_epoch=0, strategy=on_cpu)
    with pytest.raises(UserError, match=r"which then waits for ever: set --trainer\.devices 1"):
        data.train_dataloader()
    data.divides_evenly = True
    assert next(iter(data.train_dataloader())).image.shape == (4, 3, 16, 16)
