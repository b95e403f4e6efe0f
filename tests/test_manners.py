"""What a run says where nobody watches, and what a misplaced file or option is answered with."""

from __future__ import annotations

import csv
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdvit import load_student
from kdvit.cli import main
from kdvit.cli.help import FIT, OPTIONS
from kdvit.models import TimmStudent
from kdvit.runtime.loggers import read_table
from kdvit.training.metrics import StepMeans
from tests.runs import QUIET, demo_fit

STEPS = ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=1"]

LIFT = ["--config", "demo/lift.yaml", "--model.teacher.init_args.arch"]


def fit(*more: str) -> None:
    main(demo_fit("plain", "", *STEPS, *more))


def test_a_run_without_a_terminal_says_a_line_an_epoch_and_at_last_its_best(caplog, capsys) -> None:
    caplog.set_level(logging.INFO)
    fit("--trainer.max_epochs=2", "--callbacks.student_export.weights=best")
    printed = capsys.readouterr()
    assert "it/s" not in printed.out + printed.err
    said = [record.getMessage() for record in caplog.records]
    assert not [line for line in said if "Tip" in line or "Flops" in line or "TPU" in line]
    epochs = [line for line in said if line.startswith("Epoch ")]
    assert [line.partition("): ")[0] for line in epochs] == ["Epoch 0 (last: 1", "Epoch 1 (last: 1"]
    assert all(word in epochs[1] for word in ("train loss ", "val accuracy ", " images/s, 0:00:00 left."))
    assert "Warning: the warm-up of 5 epochs fills the run of 2, which never comes to its learning rate: " in str(said)
    scores = [(row["val/acc1"], row["epoch"]) for row in read_table(Path("run/metrics.csv")) if "val/acc1" in row]
    best = max(scores, key=lambda each: each[0])
    assert said[-1].startswith(f"Best val/acc1 {best[0]:.2%}, of epoch {best[1]}, in run/checkpoints/best.ckpt.")
    assert "run/student holds the best: kdvit.load_student('run/student')" in said[-1]
    ours, theirs = load_student("run/student"), load_student("run/checkpoints/best.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_steps_that_are_taken_again_are_in_no_log_twice() -> None:
    fit(*QUIET, "--trainer.max_epochs=1")
    before = Path("run/checkpoints/last.ckpt").read_bytes()
    fit(*QUIET, "--trainer.max_epochs=2")
    Path("run/checkpoints/last.ckpt").write_bytes(before)
    Path("run/checkpoints/best.ckpt").unlink()
    fit(*QUIET, "--trainer.max_epochs=2")
    events = EventAccumulator("run").Reload()
    assert [each.step for each in events.Scalars("2_train/loss")] == list(range(6))
    assert [each.step for each in events.Scalars("1_val/acc1")] == [2, 5]
    with Path("run/metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows if row["train/loss"]] == [str(i) for i in range(6)]
    assert {row["epoch"] for row in rows} == {"0", "1"}


def test_means_of_a_step_are_over_its_accumulated_batches() -> None:
    means, parts = StepMeans(), np.random.default_rng(0).normal(size=(3, 2))
    for loss, acc1 in torch.tensor(parts):
        means.add({"loss": loss, "acc1": acc1})
    told = means.take(ranks=1)
    assert [float(told[name]) for name in ("loss", "acc1")] == pytest.approx(parts.mean(0), abs=1e-6)
    assert means.take(ranks=1) == {}


@pytest.fixture
def misplaced(tmp_path: Path) -> None:
    for file in ("runs/lift/student/config.json", "runs/lift/checkpoints/best.ckpt", "b.onnx", "runs/lift/config.yaml"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("{}")
    Path("bad.yaml").write_text("trainer:\n  max_epochs: 3\n model: x\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export", "--ckpt", "runs/lift", "--out", "x"], "Did you mean 'runs/lift/student'?"),
        (["analyze", "--teacher", "runs/lift", "--student", "x"], "Did you mean 'runs/lift/student'?"),
        (["probe", "runs/lift", "--data", "Digits"], "Did you mean 'runs/lift/student'?"),
        (["check", *LIFT, "local-dir:runs/lift"], "Did you mean 'runs/lift/student'?"),
        (["check", *LIFT, "runs/lift/student"], "is a path: expected timm's name, or local-dir:FOLDER"),
        (["check", *LIFT, "lift.ckpt"], "/lift.ckpt', nor a network of that name in timm."),
        (["benchmark", "runs/lifd/student"], "/runs/lifd/student', nor a network of that name in timm."),
        (
            ["check", "--config", "demo/plain.yaml", "--model.student.init_args.checkpoint", "runs/lift"],
            "model.safetensors'. Did you mean 'runs/lift/student'?",
        ),
        (
            ["export", "--ckpt", "runs/lift/checkpoints", "--out", "x"],
            "Did you mean 'runs/lift/checkpoints/best.ckpt'?",
        ),
        (
            ["export", "--ckpt", "b.onnx", "--out", "x"],
            "'b.onnx' is a program for ONNX Runtime, which holds no student",
        ),
        (
            ["validate", "--config", "demo/plain.yaml", "--ckpt_path", "runs/lift"],
            "There is no file 'runs/lift': train first, or give --ckpt_path one, as RUN/checkpoints/best.ckpt.",
        ),
        (["fit", "--config", "runs/lift"], "'runs/lift' is a folder. Did you mean runs/lift/config.yaml?"),
        (["fit", "--config", "bad.yaml"], "'<block mapping start>' in \"bad.yaml\", line 3, column 2."),
        (
            ["fit", "--config", "demo/plain.yaml", "--model.optimizer.lrr", "3"],
            "there is no option '--model.optimizer.lrr'. Did you mean --model.optimizer.lr?",
        ),
        (
            ["check", "--config", "demo/plain.yaml", "--trainer.max_epoch", "3"],
            "there is no option '--trainer.max_epoch'. Did you mean --trainer.max_epochs?",
        ),
        (["benchmark", "x", "--batch", "3"], "there is no option '--batch'. Did you mean --batch_size?"),
        (["benchmark", "x", "--batchsize", "3"], "there is no option '--batchsize'. Did you mean --batch_size?"),
        (["check", "demo/lift.yaml"], "'demo/lift.yaml' belongs to no option. Did you mean --config demo/lift.yaml?"),
        (["fit"], "fit.data. Give a config that has them: --config NAME, such as --config demo/plain.yaml."),
        (
            ["analyze", "--model", "x", "--model.width", "3"],
            "there is no option '--model.width'. Did you mean --model?",
        ),
        (["slurm", "--config", "x", "--job-name", "y"], "there is no option '--job-name'. Did you mean --job_name?"),
        (["analyze", "--model", "x", "--against", "y"], "against: expected one of 'published' (got 'y')"),
        (["fit", "--help", "modl"], "No option starts with --modl. Did you mean model? Groups: trainer, data"),
        (
            ["predict", "--config", "demo/plain.yaml", "--ckpt_path", "none.ckpt"],
            "There is no file 'none.ckpt': train first",
        ),
    ],
)
def test_what_is_in_the_wrong_place_is_one_message(args: list[str], message: str, misplaced, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch) -> None:
    asked = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        asked.append((address, timeout))
        raise OSError

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("kdvit.models.timm_model.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.getcwd())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RuntimeError, match=r"weights of deit_tiny_patch16_224 cannot be fetched .*pass the file as"):
        TimmStudent("deit_tiny_patch16_224", pretrained=True)
    assert len(asked) == 1
    assert asked[0][1] <= 10
    assert constants.HF_HUB_OFFLINE is False


def test_the_short_help_names_twenty_options_that_are_there(capsys) -> None:
    assert len(FIT) == 20
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help", "all"])
    assert end.value.code == 0
    everything = capsys.readouterr().out
    inside = ("--data.init_args", "--model.student.init_args", "--model.teacher.init_args", "--model.distillers.NAME")
    for option, _ in FIT:
        assert option.startswith(inside) or f"{option.split()[0]} " in everything, option
    for command in OPTIONS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) < 40
        assert max(map(len, lines)) <= 120
    for group in ("--data.help", "--model.help"):
        with pytest.raises(SystemExit):
            main(["fit", group])
        told = capsys.readouterr().out
        assert ("kdvit.data.FashionMNIST" if "data" in group else "--model.optimizer.lr ") in told
        assert "--trainer." not in told


def test_a_reader_that_has_enough_ends_a_command_without_a_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "kdvit", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as ended:
        assert ended.stdout is not None
        assert ended.stderr is not None
        ended.stdout.close()
        assert ended.stderr.read() == b""
    assert ended.returncode == 1
