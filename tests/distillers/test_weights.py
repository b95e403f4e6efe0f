"""Weights that change over the epochs: their values, where they are applied and logged, and what is refused."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdvit import DistillationModule
from kdvit.cache import store as cache_store
from kdvit.cli import main
from kdvit.distillers import Distiller, LogitDistiller, WeightSchedule
from kdvit.structures import Batch
from tests.runs import QUIET, assert_same_end, demo_fit, fit
from tests.tiny import FORMAT, TinyData, student, teacher, trainer


def test_a_schedule_goes_from_start_to_end_and_stays_there() -> None:
    epochs = np.arange(8)
    done = np.clip(epochs / 5, 0, 1)
    for shape, gone in {"linear": done, "cosine": np.sin(np.pi / 2 * done) ** 2, "step": epochs >= 5}.items():
        for start, end in ((2.0, 0.5), (0.0, 1.0)):
            schedule = WeightSchedule(start, end, 5, shape)
            expected = start + (end - start) * gone
            assert [schedule.at(int(epoch)) for epoch in epochs] == pytest.approx(expected.tolist(), abs=1e-12)
            assert (schedule.at(0), schedule.at(5), schedule.at(99)) == (start, end, end)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"start": -1.0}, "start and end must be 0 or more, got -1.0 and 0.0"),
        ({"end": float("nan")}, "start and end must be 0 or more, got 1.0 and nan"),
        ({"epochs": 0}, r"epochs must be 1 or more, got 0. \(A constant weight is a number.\)"),
        ({"shape": "sine"}, "shape must be one of linear, cosine, step, got 'sine'"),
    ],
)
def test_a_wrong_schedule_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        WeightSchedule(**{"start": 1.0, "end": 0.0, "epochs": 2, **given})


def test_a_weight_of_null_is_refused() -> None:
    with pytest.raises(ValueError, match="LogitDistiller: weight must be 0 or more, got None"):
        LogitDistiller(weight=None)


def test_the_loss_of_an_epoch_has_the_weights_of_that_epoch(tmp_path) -> None:
    seen = []

    class Recording(DistillationModule):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            seen.append(
                (self.current_epoch, float(loss.detach()), {name: float(x) for name, x in self.last_terms.items()})
            )
            return loss

    distillers: dict[str, Distiller] = {
        "falling": LogitDistiller(WeightSchedule(1.0, 0.0, 2)),
        "constant": LogitDistiller(0.5, temperature=2.0),
    }
    rising = WeightSchedule(0.0, 1.0, 1, "step")
    module = Recording(student(), teacher(), distillers, task_weight=rising, image_format=FORMAT)
    trainer(tmp_path, max_epochs=3).fit(module, datamodule=TinyData())
    by_hand = {0: (0.0, 1.0), 1: (1.0, 0.5), 2: (1.0, 0.0)}
    assert {epoch for epoch, *_ in seen} == set(by_hand)
    for epoch, loss, terms in seen:
        task, falling = by_hand[epoch]
        expected = task * terms["task"] + falling * terms["falling"] + 0.5 * terms["constant"]
        assert loss == pytest.approx(expected, rel=1e-5)


SCHEDULE = ["--model.distillers.lift.weight", "{start: 1, end: 0, epochs: 4, shape: cosine}", "--model.task_weight"]
SCHEDULE += ["{start: 0, end: 2, epochs: 1, shape: step}"]


@pytest.mark.slow
def test_a_run_stopped_in_mid_epoch_goes_on_with_the_weights_of_its_epoch_and_logs_them(demo_teacher: str) -> None:
    more = [*QUIET, "--trainer.max_epochs=3", "--ema.decay=0.9", "--last_checkpoint.every_n_train_steps=33", *SCHEDULE]
    fit("lift", demo_teacher, *more, "--trainer.default_root_dir=whole")
    fit("lift", demo_teacher, *more, "--trainer.max_steps=33")
    fit("lift", demo_teacher, *more)
    assert_same_end("whole", "run")
    with Path("run/metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/lift_weight"]]
    for name, expected in {"lift": [1.0, np.cos(np.pi / 8) ** 2, 0.5], "task": [0.0, 2.0, 2.0]}.items():
        logged = {float(row["epoch"]): float(row[f"train/{name}_weight"]) for row in rows}
        assert logged == pytest.approx(dict(enumerate(expected)), rel=1e-6)
    assert "train/logit_weight" not in rows[0]


@pytest.mark.slow
def test_a_cached_run_has_the_weights_of_the_online_run(demo_teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "PRECISION", np.dtype("<f4"))
    main(["cache", *demo_fit("lift", demo_teacher, *QUIET, "--views", "2", "--out", "cache")[1:]])
    for root, more in {"online": [], "cached": ["--data.init_args.cache", "cache"]}.items():
        ends = [*SCHEDULE, *more, "--trainer.max_epochs=2", f"--trainer.default_root_dir={root}", "--ema.decay=0.9"]
        fit("lift", demo_teacher, *QUIET, *ends)
    assert_same_end("online", "cached")


def test_a_check_shows_where_a_weight_goes(demo_teacher: str, capsys) -> None:
    main(["check", *demo_fit("lift", demo_teacher, *QUIET, *SCHEDULE)[1:]])
    shown = capsys.readouterr().out
    assert re.search(r"distiller lift +LiftDistiller x 1 \(epoch 0\) to 0 \(epoch 4 on, cosine\);", shown)
    assert re.search(r"distiller logit +LogitDistiller x 0.5\b", shown)
    assert re.search(r"task +cross-entropy x 0 \(epoch 0\) to 2 \(epoch 1 on, step\), label smoothing", shown)


@pytest.mark.parametrize(
    ("key", "given", "text"),
    [
        ("distillers.lift.weight", "heavy", "weight: expected a number, or a schedule of start, end, epochs and shape"),
        ("task_weight", "heavy", "task_weight: expected a number, or a schedule of start, end, epochs and shape"),
        ("task_weight", "{start: 1}", "task_weight: the following arguments are required: end, epochs"),
        ("task_weight", "{start: 1, end: -1, epochs: 2}", "error: weight: start and end must be 0 or more"),
        ("distillers.lift.weight", "{stat: 1}", "Option 'stat' is not accepted. Did you mean start?"),
    ],
)
def test_a_wrong_weight_is_answered_in_one_line(key: str, given: str, text: str, demo_teacher: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(demo_fit("lift", demo_teacher, f"--model.{key}", given))
    assert text in capsys.readouterr().err.splitlines()[-1]
