"""The first training images of a run, as a picture in TensorBoard."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdvit import DistillationModule
from kdvit.callbacks import FirstBatch, first_batch
from kdvit.callbacks.first_batch import BLACK, BLUE, ORANGE
from kdvit.distillers import FeatureDistiller, LogitDistiller
from tests.tiny import FORMAT, SizedData, TinyData, student, teacher, trainer


def _drawn(monkeypatch: pytest.MonkeyPatch, module: Any, data: Any) -> tuple[torch.Tensor, Any]:
    """Trains for two epochs, and returns what was drawn: once."""
    drawn: list[Any] = []
    picture = first_batch.picture
    monkeypatch.setattr(first_batch, "picture", lambda *given: drawn.append(given) or picture(*given))
    trainer(".", max_epochs=2, callbacks=[FirstBatch(6)], logger=TensorBoardLogger("."), limit_train_batches=2).fit(
        module, datamodule=data
    )
    ((image, lines),) = drawn
    return image, lines


def test_it_shows_the_images_their_labels_and_what_each_teacher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = {"one": teacher(), "other": teacher(num_classes=3)}
    objectives = {"logit": LogitDistiller(teacher="one"), "maps": FeatureDistiller(projector="pool", teacher="other")}
    module = DistillationModule(student(), None, objectives, 1.0, image_format=FORMAT, teachers=teachers)
    module.class_names = list("abcde")
    image, lines = _drawn(monkeypatch, module, TinyData())
    batch = next(iter(TinyData().train_dataloader()))
    torch.testing.assert_close(image, (batch.image[:6] * 0.5 + 0.5).clamp(0, 1))
    labels, *predictions = lines
    assert labels == [(name, BLACK) for name in "abcdea"]
    for (name, classes), told in zip({"one": "abcde", "other": "012"}.items(), predictions, strict=True):
        logits = module.teachers[name](batch.image[:6]).logits.double().numpy()
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        for row, label, (text, colour) in zip(shares, "abcdea", told, strict=True):
            found = classes[int(row.argmax())]
            said, share = text.removesuffix("%)").split(" (")
            assert said == f"teacher_{name}: {found}"
            assert int(share) == pytest.approx(100 * row.max(), abs=0.6)
            known = name == "one"  # of the other's three classes nobody knows which of ours they are
            assert colour == (BLACK if not known else BLUE if found == label else ORANGE)
    events = EventAccumulator("lightning_logs/version_0").Reload()
    (event,) = events.Images("4_data/first_batch")
    assert event.step == 0
    sheet = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    expected = (255 * image[1]).round().byte().permute(1, 2, 0).numpy()  # the second, each pixel 10 x 10
    np.testing.assert_array_equal(sheet[4:164:10, 172:332:10], expected)


def test_a_mixed_image_has_both_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SizedData(mixup=1.0, batch_size=8)
    _, (labels,) = _drawn(monkeypatch, DistillationModule(student(), image_format=data.image_format), data)
    assert all(text.count("%") in (1, 2) for text, _ in labels)
    first, second = next(text.split(" + ") for text, _ in labels if "+" in text)
    shares = [int(each.split("(")[1].rstrip("%)")) for each in (first, second)]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert shares[0] >= shares[1] > 0


def test_a_long_name_is_cut_to_the_width_of_its_image() -> None:
    long, short = (first_batch.picture(torch.zeros(1, 3, 8, 8), [[("W" * length, BLACK)]]) for length in (90, 9))
    assert (long[170:182, 165:] == 255).all()
    assert (short[170:182, 4:164] < 128).any()
