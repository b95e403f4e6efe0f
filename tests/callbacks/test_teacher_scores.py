"""How good the teacher is, on a share of the validation images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from kdvit import DistillationModule
from kdvit.callbacks import TeacherScores
from kdvit.distillers import LogitDistiller
from kdvit.runtime.loggers import read_table
from tests.tiny import FORMAT, TinyData, student, teacher, trainer


@pytest.mark.parametrize(
    ("images", "limit", "taken"),
    [
        (10, 1.0, [0, 4, 8, 13, 17, 21, 26, 30, 34, 39]),
        (None, 1.0, range(40)),
        (2000, 1.0, range(40)),
        (None, 1, range(16)),
    ],
    ids=["a share", "all", "more than there are", "as the trainer limits"],
)
def test_the_accuracy_is_that_on_evenly_spaced_images_and_the_log_says_how_many(
    images: int | None, limit: float, taken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    module = DistillationModule(student(), teacher(), {"logit": LogitDistiller()}, image_format=FORMAT)
    table = CSVLogger(".", name="", version="")
    callback = TeacherScores(images)
    with caplog.at_level("INFO"):
        trainer(
            ".", max_steps=1, callbacks=[callback], logger=table, limit_val_batches=limit, num_sanity_val_steps=0
        ).fit(module, datamodule=TinyData())
    data = TinyData().val_dataloader()
    batch = data.collate_fn([data.dataset[i] for i in taken])
    logits = module.teacher(batch.image).logits
    accuracy = (logits.argmax(1) == batch.target).float().mean().item()
    logged = next(row for row in read_table(Path("metrics.csv")) if "teacher/acc1" in row)
    assert logged["teacher/acc1"] == pytest.approx(accuracy)
    assert logged["teacher/loss"] == pytest.approx(F.cross_entropy(logits, batch.target).item(), rel=1e-5)
    assert f"Teacher on {len(batch.target)} validation images: {accuracy:.2%} top-1." in caplog.text


def test_a_teacher_that_knows_more_classes_is_scored_among_them_by_name(caplog: pytest.LogCaptureFixture) -> None:
    knows = teacher(num_classes=7)
    knows.spec["class_names"] = names = ["e", "x", "d", "y", "c", "b", "a"]
    logit = {"logit": LogitDistiller(classes="by_name")}
    module = DistillationModule(student(), knows, logit, image_format=FORMAT, class_names=list("abcde"))
    with caplog.at_level("INFO"):
        trainer(".", max_steps=1, callbacks=[TeacherScores(None)], num_sanity_val_steps=0).fit(
            module, datamodule=TinyData()
        )
    data = TinyData().val_dataloader()
    batch = data.collate_fn([data.dataset[i] for i in range(40)])
    answers = [names[answer] for answer in module.teacher(batch.image).logits.argmax(1)]
    accuracy = sum(answer == "abcde"[target] for answer, target in zip(answers, batch.target, strict=True)) / 40
    told = f"Teacher on 40 validation images: {accuracy:.2%} top-1 among its 7 classes, matched by name."
    assert told in caplog.text


def test_each_rank_takes_its_share_of_the_same_images() -> None:
    loader = TinyData().val_dataloader()

    def share(rank: int, ranks: int) -> list[int]:
        run: Any = SimpleNamespace(val_dataloaders=loader, num_val_batches=[3], global_rank=rank, world_size=ranks)
        return torch.cat([batch.index for batch in TeacherScores(21)._batches(run)]).tolist()

    assert share(0, 2) == share(0, 1)[::2]
    assert share(1, 2) == share(0, 1)[1::2]
