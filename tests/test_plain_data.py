"""Data modules that know nothing of kdvit: what they yield is trained on as it stands, or refused with a reason."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kdvit.cli import main
from kdvit.structures import Batch, BatchError, as_batch
from kdvit.training.batches import TargetError, read_batch
from tests.data.test_forms import config
from tests.runs import QUIET
from tests.tiny import FORMAT, Blobs, SizedData

MULTI_HOT = torch.tensor([1.0, 1.0])


class Samples(Dataset):
    """Images of two classes, in a form."""

    def __init__(self, of: Callable[[Any, int], Any], size: int = 16) -> None:
        self.of, self.blobs = of, Blobs(size, 0)

    def __len__(self) -> int:
        return len(self.blobs)

    def __getitem__(self, index: int) -> Any:
        return self.of(self.blobs[index][0], index % 2)


class Streamed(IterableDataset):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return (self.samples[i] for i in range(len(self.samples)))


def _pair(image: Any, label: int) -> Any:
    return image, label


def _mapping(image: Any, label: int) -> Any:
    return {"pixel_values": image, "labels": label}


def _multi_hot(image: Any, label: int) -> Any:
    return image, MULTI_HOT


def _one_below(image: Any, label: int) -> Any:
    return image, label - 1


def _image(image: Any, label: int) -> Any:
    return image


class Unsaid(pl.LightningDataModule):
    """Gives its loaders once it is set up, as many do, and does not say how the images are normalised."""

    form = staticmethod(_pair)
    kind = staticmethod(lambda samples: samples)

    def setup(self, stage: str) -> None:
        self.samples = Samples(self.form)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.kind(self.samples), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Plain(Unsaid):
    image_format = FORMAT


class Mappings(Plain):
    form = staticmethod(_mapping)


class Stream(Plain):
    kind = Streamed


class MultiHot(Plain):
    form = staticmethod(_multi_hot)


class Alone(Plain):
    form = staticmethod(_image)


class PairsOfASubclass(SizedData):
    """Makes its batches itself, and the labels of training begin at -1."""

    class_names = list("ab")
    image_format = property(lambda self: FORMAT, lambda self, _: None)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(_one_below), batch_size=4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Samples(_pair), batch_size=4)


def command(name: str, kind: str, *more: str) -> list[str]:
    return [name, "--config", config({"class_path": f"tests.test_plain_data.{kind}"}), *QUIET, *more]


@pytest.mark.filterwarnings("ignore")
def test_mappings_and_streams_are_trained_and_predicted() -> None:
    for kind in ("Mappings", "Stream"):
        run = ["--trainer.default_root_dir", kind]
        main(command("fit", kind, *run, "--ema.decay", "0.5"))
        main(command("predict", kind, *run))
    tables = [
        list(csv.DictReader(Path(kind, "predictions.csv").read_text().splitlines())) for kind in ("Mappings", "Stream")
    ]
    assert tables[0] == tables[1]
    assert [row["path"] for row in tables[0]] == [str(i) for i in range(16)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_plain_module_is_checked_measured_in_training_and_analysed() -> None:
    for kind in ("Plain", "Mappings", "Stream"):
        main(command("check", kind))
        main(command("fit", kind, "--trainer.default_root_dir", f"run_{kind}", "--geometry.every_n_epochs", "2"))
        name = config({"class_path": f"tests.test_plain_data.{kind}"})
        main(["analyze", "--config", name, "--images", "8", "--num_workers", "0", "--out", kind])
        assert "8 images" in Path(kind, "report.html").read_text()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("Unsaid", "Unsaid does not say how its images are normalised, .*image_format = kdvit.ImageFormat"),
        (
            "MultiHot",
            r"Expected class indices \[4\], got torch.float32 \[4, 2\]. kdvit trains classifiers of one class",
        ),
        ("PairsOfASubclass", "Expected labels of 0 to 1, for 2 classes; got -1 to 0."),
        ("Alone", r"Expected a kdvit.Batch, a pair .* or a mapping.*got Tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_plain_module_must_not_do_is_said_before_the_first_step(kind: str, text: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(command("fit", kind))
    assert end.value.code == 2
    assert re.search(text, capsys.readouterr().err.splitlines()[-1])
    assert not Path("run/checkpoints").exists()


IMAGE = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (torch.tensor([0, -1]), "Expected labels of 0 to 4, for 5 classes; got -1 to 0."),
        (torch.tensor([0, 5]), "Expected labels of 0 to 4, for 5 classes; got 0 to 5."),
        (torch.tensor([0.2, 1.0]), r"Expected class indices \[2\], got torch.float32 \[2\]. kdvit trains"),
        (torch.zeros(2, 1, dtype=torch.long), r"Expected class indices \[2\], got torch.int64 \[2, 1\]"),
        (torch.eye(5)[:2] * 2, "or probabilities of sum 1"),
        (torch.eye(6)[:2], r"Expected class indices \[2\], got torch.float32 \[2, 6\]"),
    ],
)
def test_targets_that_no_loss_is_for_are_refused_unless_nobody_wants_them(target: torch.Tensor, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        read_batch((IMAGE, target), 0, 5, mixed=True)
    assert read_batch((IMAGE, target), 0, 0).target is target


def test_a_batch_of_kdvit_is_looked_at_in_validation_alone() -> None:
    batch = Batch(IMAGE, torch.tensor([0, -1]), torch.tensor([0, 1]))
    with pytest.raises(TargetError, match="got -1 to 0"):
        read_batch(batch, 0, 5)
    assert read_batch(batch, 0, 5, mixed=True) is batch


def test_indices_and_mixed_probabilities_pass() -> None:
    for target in (torch.tensor([4, 0]), torch.tensor([[0.3, 0.7, 0, 0, 0], [1, 0, 0, 0, 0]])):
        assert read_batch([IMAGE, target], 0, 5, mixed=True).target is target


def test_a_batch_of_any_form_becomes_a_batch() -> None:
    target, given = torch.tensor([1, 0]), Batch(IMAGE, torch.tensor([1, 0]), torch.tensor([7, 8]))
    assert as_batch(given) is given
    for form in ([IMAGE, target], (IMAGE, target, "more"), {"image": IMAGE, "label": target, "name": "a"}):
        batch = as_batch(form)
        assert batch.image is IMAGE
        assert (batch.target.tolist(), batch.index.tolist()) == ([1, 0], [-1, -1])
    assert as_batch({"img": IMAGE}).target.tolist() == [-1, -1]
    for wrong, told in (
        (IMAGE, "got Tensor"),
        ([IMAGE.byte(), target], r"got list \(0: torch.uint8 \[2, 3, 4, 4\], 1: torch.int64 \[2\]\)"),
        ({"x": IMAGE}, r"got dict \(x: torch.float32"),
    ):
        with pytest.raises(BatchError, match=told):
            as_batch(wrong)
