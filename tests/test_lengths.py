"""How long a run is: lengthened, shortened, cut amid an epoch, given by steps alone."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
import yaml

from kdvit.training.schedule import RunLength, ScheduleOptions
from tests.runs import QUIET, assert_same_end, column, fit
from tests.test_stopping import signal_at, stopped

EPOCHS = [*QUIET, "--trainer.limit_train_batches=5", "--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1"]
EPOCHS += ["--ema.decay=0.9", "--model.schedule.warmup_epochs=1"]
PEAK, WARMUP_LR, MIN_LR = 4e-3, 1e-5, 1e-5


def rows(root: str = "run") -> list[dict[str, str]]:
    with Path(root, "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def trained_steps() -> list[int]:
    return [int(float(row["step"])) for row in rows() if row["train/lr"]]


def cosine(t: float, length: float, warmup: float) -> float:
    """The rate of the demo's schedule, warmed up linearly."""
    if t < warmup:
        return WARMUP_LR + t * (PEAK - WARMUP_LR) / warmup
    return MIN_LR + (PEAK - MIN_LR) * (1 + math.cos(math.pi * t / length)) / 2


def assert_rates(first: int, length: int) -> None:
    """Asserts that the steps from the epoch `first` on have the rates of a run of so many epochs."""
    for row in rows():
        if row["train/lr"] and (epoch := int(float(row["step"])) // 5) >= first:
            assert float(row["train/lr"]) == pytest.approx(cosine(epoch, length, warmup=1), rel=1e-6)


@pytest.mark.parametrize(("first", "second"), [(2, 4), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_a_run_that_is_lengthened_has_the_learning_rates_of_its_new_length(first: int, second: int) -> None:
    fit("plain", "", *EPOCHS, f"--trainer.max_epochs={first}")
    assert_rates(0, first)
    fit("plain", "", *EPOCHS, f"--trainer.max_epochs={second}")
    assert trained_steps() == list(range(second * 5))
    assert_rates(first, second)


def test_a_run_that_is_shortened_amid_an_epoch_comes_down() -> None:
    fit("plain", "", *EPOCHS, "--trainer.max_epochs=8", "--trainer.max_steps=7")
    assert_rates(0, 8)
    fit("plain", "", *EPOCHS, "--trainer.max_epochs=3")
    assert trained_steps() == list(range(15))
    assert_rates(2, 3)
    by_step = [float(row["train/lr"]) for row in rows() if row["train/lr"]]
    assert by_step[7] == pytest.approx(cosine(1, 3, warmup=1), rel=1e-6)


@pytest.mark.parametrize("cuts", [(7,), pytest.param((3, 5, 9, 11), marks=pytest.mark.slow)])
def test_an_epoch_that_was_cut_goes_on_at_its_next_batch(cuts: tuple[int, ...], demo_teacher: str) -> None:
    more = [*EPOCHS, "--trainer.max_epochs=3", "--model.student.init_args.drop_path_rate=0.2"]
    fit("lift", demo_teacher, *more, "--trainer.default_root_dir=whole")
    for cut in cuts:
        fit("lift", demo_teacher, *more, f"--trainer.max_steps={cut}")
        assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == cut
    fit("lift", demo_teacher, *more)
    assert_same_end("whole", "run")
    names = ("step", "epoch", "train/loss", "train/lr", "val/acc1", "val/acc1_ema")
    assert column("whole", names) == column("run", names)


def test_a_run_by_steps_alone_ends_at_its_step_with_a_validation() -> None:
    by_steps = [*EPOCHS, "--trainer.max_epochs=-1", "--model.schedule.interval=step"]
    by_steps += ["--model.schedule.warmup_epochs=0.4"]
    fit("plain", "", *by_steps, "--trainer.max_steps=7")
    assert trained_steps() == list(range(7))
    assert [row["step"] for row in rows() if row["val/acc1"]] == ["4", "6"]
    for row in rows():
        if row["train/lr"]:
            assert float(row["train/lr"]) == pytest.approx(cosine(int(row["step"]), 7, warmup=2), rel=1e-6)
    fit("plain", "", *by_steps, "--trainer.max_steps=12")
    assert trained_steps() == list(range(12))
    assert [int(float(row["step"])) for row in rows() if row["val/acc1"]] == [4, 6, 9, 11]
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert (last["global_step"], last["epoch"]) == (12, 2)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["max_steps"] == 12


@pytest.mark.parametrize(
    ("hook", "count"),
    [("on_train_batch_start", 7), pytest.param("on_validation_batch_start", 2, marks=pytest.mark.slow)],
)
def test_a_run_stopped_at_its_last_step_validates_when_it_goes_on(hook: str, count: int) -> None:
    by_steps = [*EPOCHS, "--trainer.max_epochs=-1", "--trainer.max_steps=7", "--trainer.check_val_every_n_epoch=2"]
    assert stopped("plain", "", *by_steps, *signal_at(hook, count)) == 143
    assert trained_steps() == list(range(7))
    fit("plain", "", *by_steps)
    assert trained_steps() == list(range(7))
    assert [row["step"] for row in rows() if row["val/acc1"]] == ["6"]
    assert torch.load("run/checkpoints/best.ckpt", weights_only=True)["global_step"] == 7


def test_the_last_row_of_a_run_by_steps_is_measured_at_its_last_step() -> None:
    steps = ["--trainer.max_epochs=-1", "--trainer.max_steps=7", "--model.schedule.interval=step"]
    for every, root in ((5, "some"), (1, "all")):
        fit("plain", "", *EPOCHS, *steps, f"--trainer.log_every_n_steps={every}", f"--trainer.default_root_dir={root}")
    some, every = ({row["step"]: row for row in rows(root) if row["train/lr"]} for root in ("some", "all"))
    assert [*some] == ["4", "6"]
    for step, row in some.items():
        assert [row[name] for name in ("train/loss", "train/lr")] == [
            every[step][name] for name in ("train/loss", "train/lr")
        ]


def test_a_finished_run_by_steps_is_left_alone(caplog) -> None:
    by_steps = [*EPOCHS, "--trainer.max_epochs=-1", "--trainer.max_steps=7"]
    fit("plain", "", *by_steps)
    before = sorted((str(file), file.read_bytes()) for file in Path("run").rglob("*") if file.is_file())
    fit("plain", "", *by_steps)
    assert sorted((str(file), file.read_bytes()) for file in Path("run").rglob("*") if file.is_file()) == before
    assert "has 1 epochs and 7 steps: nothing is left to train." in caplog.text


def test_a_run_that_was_stopped_early_stays_stopped(caplog) -> None:
    callback = "{class_path: EarlyStopping, init_args: {monitor: val/acc1, mode: max, min_delta: 2, patience: 1}}"
    stopping = [*EPOCHS, f"--trainer.callbacks={callback}", "--trainer.max_epochs=6"]
    fit("plain", "", *stopping)
    assert trained_steps() == list(range(10))
    fit("plain", "", *stopping)
    assert trained_steps() == list(range(10))
    assert "EarlyStopping has ended this run in epoch 1, and nothing is left to train." in caplog.text


@pytest.mark.slow
def test_a_run_that_was_stopped_in_its_first_epoch_stays_stopped() -> None:
    stopping = "{class_path: EarlyStopping, init_args: {monitor: val/acc1, mode: max, stopping_threshold: 0.0}}"
    for _ in range(2):
        fit("plain", "", *EPOCHS, f"--trainer.callbacks={stopping}", "--trainer.max_epochs=6")
        assert trained_steps() == list(range(5))


@pytest.mark.parametrize(
    ("options", "length", "expected"),
    [
        ({"name": "constant", "warmup_epochs": 2}, RunLength(4), [0, 0.5, 1, 1]),
        ({"warmup_epochs": 9}, RunLength(3), [0, 1 / 9, 2 / 9]),
        ({"warmup_epochs": 0, "args": {"cycle_limit": 2, "cycle_decay": 0.5}}, RunLength(4), [1, 0.5, 0.5, 0.25]),
        ({"warmup_epochs": 0, "args": {"cooldown_epochs": 2}}, RunLength(4), [1, 0.5, 0, 0]),
        ({"warmup_epochs": 2, "lag_epochs": 1}, RunLength(4), [0, 0, 0.5, 0.5]),
        (
            {"interval": "step", "warmup_steps": 1, "lag_epochs": 1},
            RunLength(2, 4, 2),
            [0, 0, 0, (1 + math.sqrt(0.5)) / 2],
        ),
        ({"warmup_share": 0.5}, RunLength(4), [0, 0.5, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ({"interval": "step", "warmup_steps": 1}, RunLength(2, 4, 2), [0, (1 + math.sqrt(0.5)) / 2, 0.5, 0.1464466]),
        ({"name": "step", "interval": "step", "warmup_epochs": 0}, RunLength(2, 4, 2), [1, 1, 1, 1]),
        (
            {"name": "multistep", "interval": "step", "warmup_epochs": 0, "args": {"decay_milestones": [1]}},
            RunLength(2, 4, 2),
            [1, 0.1, 0.1, 0.1],  # timm decays one before the milestone
        ),
    ],
)
def test_schedules_have_the_rates_of_their_formula(options: dict, length: RunLength, expected: list[float]) -> None:
    rates = ScheduleOptions(**{"warmup_lr": 0.0, "min_lr": 0.0, **options}).rates(1.0, length)
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": {"step_on_epochs": False}}, "schedule.args: .* multiple values for .*'step_on_epochs'"),
        ({"args": {"decay_epochs": 3}}, "decay_epochs has no effect on cosine; it goes with step"),
        ({"name": "multistep", "args": {"decay_epochs": 3}}, "no effect on multistep"),
        ({"args": {"cicle_limit": 3}}, "schedule.args: .*unexpected keyword argument 'cicle_limit'"),
        ({"args": {"decay_rate": 0.5}}, "decay_rate has no effect on cosine; it goes with step or multistep or poly"),
        ({"args": {"plateau_mode": "min"}}, "plateau_mode has no effect on cosine; it goes with a schedule that kdvit"),
        ({"args": {"cycle_limit": 0}}, "schedule.args: division by zero"),
        ({"min_lr": -1}, "schedule.min_lr must be 0 or more, got -1"),
        ({"warmup_steps": 3}, "warmup_steps goes with schedule.interval: step"),
    ],
)
def test_options_without_effect_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleOptions(**options)
