"""Runs that are stopped from outside: what is saved, what is said, and where the same command ends."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch

from kdvit import load_student
from kdvit.cache.manifest import Manifest
from kdvit.cache.store import encode, missing_shards
from kdvit.callbacks import Preemption
from kdvit.cli import main
from kdvit.runtime.loggers import run_loggers
from kdvit.runtime.saved import newest_checkpoint
from kdvit.runtime.signals import REQUESTS
from tests.runs import QUIET, SHORT, assert_same_end, column, demo_fit, fit

EVERYTHING = [
    *[*QUIET, "--trainer.max_epochs=2", "--ema.decay=0.9", "--trainer.log_every_n_steps=7"],
    *["--data.init_args.mixup=0.8", "--data.init_args.cutmix=1.0", "--data.init_args.repeats=3"],
    *["--model.student.init_args.drop_path_rate=0.2", "--data.init_args.num_workers=1"],
    *["--model.optimizer.lr_base_batch=64"],
]


class SignalAt(pl.Callback):
    """Sends this process a signal at the n-th call of a hook."""

    def __init__(self, hook: str, count: int, name: str) -> None:
        self.hook, self.left, self.signal = hook, count, getattr(signal, name)

    def on_sanity_check_end(self, *_: Any) -> None:
        self._called("on_sanity_check_end")

    def on_train_batch_start(self, *_: Any) -> None:
        self._called("on_train_batch_start")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._called("on_validation_batch_start")

    def _called(self, hook: str) -> None:
        if hook == self.hook:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signal)


def signal_at(hook: str, count: int, name: str = "SIGTERM") -> list[str]:
    given = {"hook": hook, "count": count, "name": name}
    return ["--trainer.callbacks", json.dumps([{"class_path": "tests.test_stopping.SignalAt", "init_args": given}])]


def stopped(method: str, teacher: str, *more: str) -> int:
    """Runs a fit that is stopped, and returns its status without the traceback, which would keep the workers."""
    try:
        fit(method, teacher, *more)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("The run was not stopped.")


@pytest.fixture(scope="module")
def whole(demo_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Trains without interruption, 20 batches and 8 validation batches an epoch."""
    root = str(tmp_path_factory.mktemp("whole"))
    fit("lift", demo_teacher, *EVERYTHING, "--trainer.default_root_dir", root)
    return root


@pytest.mark.parametrize(
    ("hook", "count", "step"),
    [
        pytest.param("on_sanity_check_end", 1, 1, marks=pytest.mark.slow),
        ("on_train_batch_start", 33, 33),
        pytest.param("on_train_batch_start", 20, 20, marks=pytest.mark.slow),
        pytest.param("on_validation_batch_start", 3, 20, marks=pytest.mark.slow),
        pytest.param("on_validation_batch_start", 8, 20, marks=pytest.mark.slow),
        pytest.param("on_validation_batch_start", 16, 40, marks=pytest.mark.slow),
    ],
    ids=["before the first", "amid an epoch", "last of an epoch", "amid a validation", "its last", "the very last"],
)
def test_a_run_told_to_stop_saves_itself_and_ends_where_an_uninterrupted_one_ends(
    hook: str, count: int, step: int, whole: str, demo_teacher: str, caplog
) -> None:
    assert stopped("lift", demo_teacher, *EVERYTHING, *signal_at(hook, count)) == 128 + signal.SIGTERM
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    saved = f"The run is saved in run/checkpoints/last.ckpt at step {step}; the same command goes on from there."
    assert caplog.messages[-1] == f"Stopped by SIGTERM. {saved}"
    assert load_student("run/student")(torch.randn(1, 3, 8, 8)).logits.shape == (1, 10)
    fit("lift", demo_teacher, *EVERYTHING)
    assert f"Going on from run/checkpoints/last.ckpt, step {step}." in caplog.text
    assert_same_end(whole, "run")


@pytest.mark.slow
def test_a_run_stops_where_gradients_are_complete(demo_teacher: str) -> None:
    accumulating = [*QUIET, "--trainer.max_epochs=2", "--ema.decay=0.9", "--trainer.accumulate_grad_batches=3"]
    fit("wide_last", demo_teacher, *accumulating, "--trainer.default_root_dir=whole")
    assert stopped("wide_last", demo_teacher, *accumulating, *signal_at("on_train_batch_start", 4)) == 143
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    fit("wide_last", demo_teacher, *accumulating)
    assert_same_end("whole", "run")


@pytest.mark.slow
def test_validations_amid_an_epoch_are_held_anew(demo_teacher: str) -> None:
    often = [*QUIET, "--trainer.max_epochs=2", "--ema.decay=0.9", "--trainer.val_check_interval=6"]
    fit("plain", demo_teacher, *often, "--trainer.default_root_dir=whole")
    for count in (20, 9, 3):
        assert stopped("plain", demo_teacher, *often, *signal_at("on_validation_batch_start", count)) == 143
    fit("plain", demo_teacher, *often)
    assert_same_end("whole", "run")


@pytest.mark.slow
def test_a_checkpoint_saved_just_before_a_validation_does_not_lose_it(demo_teacher: str) -> None:
    saving = [*QUIET, "--trainer.max_epochs=2", "--ema.decay=0.9", "--last_checkpoint.every_n_train_steps=20"]
    fit("plain", demo_teacher, *saving, "--trainer.default_root_dir=whole")
    with pytest.raises(RuntimeError, match="by the test"):
        fit("plain", demo_teacher, *saving, "--trainer.callbacks", "tests.test_stopping.FailsToValidate")
    assert not Path("run/checkpoints/best.ckpt").exists()
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 20
    fit("plain", demo_teacher, *saving)
    assert_same_end("whole", "run")


class FailsToValidate(pl.Callback):
    """Fails when a validation starts."""

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            raise RuntimeError("by the test")


def test_ctrl_c_stops_after_the_batch_and_says_so_at_once(demo_teacher: str, capfd, caplog) -> None:
    assert stopped("plain", demo_teacher, *SHORT, *signal_at("on_train_batch_start", 2, "SIGINT")) == 130
    assert "The run stops after this batch. Ctrl-C again stops it at once, without saving." in capfd.readouterr().err
    assert caplog.messages[-1].startswith("Stopped by Ctrl-C. The run is saved in run/checkpoints/last.ckpt at step 2;")


def test_outside_slurm_a_warning_signal_saves_and_training_goes_on(demo_teacher: str, caplog) -> None:
    fit("plain", demo_teacher, *SHORT, *signal_at("on_train_batch_start", 2, "SIGUSR1"))
    said = caplog.text
    assert "is saved in run/checkpoints/last.ckpt at step 2. It is not requeued: this is no Slurm job. Training" in said
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


class StopsWhileSaving(pl.Callback):
    """Sends SIGTERM when a checkpoint is saved."""

    def on_save_checkpoint(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_stop_that_comes_while_another_is_answered_stops_the_run(demo_teacher: str, caplog) -> None:
    signals = json.loads(signal_at("on_train_batch_start", 2, "SIGUSR1")[1])
    signals.append({"class_path": "tests.test_stopping.StopsWhileSaving"})
    assert stopped("plain", demo_teacher, *SHORT, "--trainer.callbacks", json.dumps(signals)) == 143
    assert "at step 2. It is not requeued: this is no Slurm job. Training goes on." in caplog.text
    assert caplog.messages[-1].startswith(
        "Stopped by SIGTERM. The run is saved in run/checkpoints/last.ckpt at step 3;"
    )


LESS = "--trainer.limit_train_batches=10"


@pytest.mark.parametrize("command", ["check", "fit"])
@pytest.mark.parametrize(
    ("every", "message"),
    [
        (
            ["4"],
            "every 4 batches would come amid the 3 of a step .* multiple of 3 .*: say, 3.",
        ),
        (["0.25"], "every 4 batches would come amid .*: say, 3."),
        (["12", "--trainer.check_val_every_n_epoch=null", LESS], "12 .* amid .* and epochs that are one: say, 12."),
    ],
)
def test_a_validation_amid_the_batches_of_a_step_is_refused(every: list[str], message: str, command, capsys) -> None:
    interval = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval", *every]
    with pytest.raises(SystemExit) as end:
        main([command, *demo_fit("plain", "", *QUIET)[1:], *interval])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    main(
        [
            "check",
            *demo_fit("plain", "", *QUIET)[1:],
            "--trainer.accumulate_grad_batches=3",
            "--trainer.val_check_interval=6",
        ]
    )


@pytest.mark.parametrize(("status", "words"), [(0, "Slurm has requeued the job"), (1, "presently disabled.")])
def test_a_warning_of_slurm_requeues_the_job(status: int, words: str, demo_teacher: str, monkeypatch, caplog) -> None:
    Path("bin").mkdir()
    fake = Path("bin/scontrol")
    fake.write_text(
        f'#!/bin/sh\necho "$@" > asked\necho "Requested operation is presently disabled" >&2\nexit {status}\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:{os.environ['PATH']}")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    warned = [*SHORT, *signal_at("on_train_batch_start", 2, "SIGUSR2")]
    if status == 0:
        assert stopped("plain", demo_teacher, *warned) == 0
    else:
        fit("plain", demo_teacher, *warned)
    assert Path("asked").read_text() == "requeue 5_2\n"
    assert words in caplog.text


def test_a_warning_before_the_training_is_remembered(demo_teacher: str, caplog) -> None:
    REQUESTS.listen(signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    try:
        fit("plain", demo_teacher, *SHORT)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert "is saved in run/checkpoints/last.ckpt at step 1." in caplog.text


def test_a_cache_told_to_stop_keeps_what_is_written(demo_teacher: str, monkeypatch, caplog) -> None:
    config = ["cache", "--config", "demo/lift.yaml", "--model.teacher.init_args.arch", demo_teacher, "--out", "cache"]

    def encode_and_stop(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr("kdvit.cache.writer.encode", encode_and_stop)
        with pytest.raises(SystemExit) as end:
            main(config)
    assert end.value.code == 143
    assert "Stopped by SIGTERM. The same command goes on from what is written." in caplog.messages
    assert missing_shards(Path("cache"), Manifest.load(Path("cache")))
    main(config)
    assert not missing_shards(Path("cache"), Manifest.load(Path("cache")))


def test_a_finished_run_leaves_the_signals_as_they_were(demo_teacher: str) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    fit("plain", demo_teacher, *SHORT)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_the_furthest_whole_checkpoint_is_taken(plain_run: str, caplog) -> None:
    folder = Path("run/checkpoints")
    last = folder / "last.ckpt"
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    assert newest_checkpoint(folder) == folder / "best.ckpt"
    assert "last.ckpt is no whole checkpoint" in caplog.text
    torch.save({"state_dict": {}}, folder / "weights.ckpt")
    assert newest_checkpoint(folder) == folder / "best.ckpt"
    assert "weights.ckpt is no whole checkpoint (it has no global_step, loops, optimizer_states)" in caplog.text
    last.write_bytes(content)
    assert newest_checkpoint(folder) == last
    assert newest_checkpoint(Path("nowhere")) is None


def test_an_error_tells_from_where_the_run_goes_on(demo_teacher: str, caplog) -> None:
    with pytest.raises(RuntimeError, match="by the test"):
        fit("plain", demo_teacher, *SHORT, "--trainer.callbacks", "tests.test_stopping.Fails")
    said = caplog.text
    assert "The run has ended at step 4. The same command goes on from run/checkpoints/last.ckpt." in said
    assert load_student("run/student")(torch.randn(1, 3, 8, 8)).logits.shape == (1, 10)


class Fails(pl.Callback):
    """Fails in the second epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("by the test")


def test_a_preemption_callback_has_no_state_of_its_own() -> None:
    assert Preemption().state_dict() == {}


@pytest.mark.slow
def test_a_run_that_was_moved_keeps_its_best_checkpoint(demo_teacher: str) -> None:
    more = [*QUIET, "--trainer.max_epochs=4", "--trainer.limit_train_batches=5", "--ema.decay=0.9"]
    fit("plain", demo_teacher, *more, "--trainer.default_root_dir=whole")
    before = [*signal_at("on_train_batch_start", 13), "--trainer.default_root_dir=before"]
    assert stopped("plain", demo_teacher, *more, *before) == 143
    Path("before").rename("run")
    fit("plain", demo_teacher, *more)
    assert_same_end("whole", "run")
    states = torch.load("run/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    paths = [state["best_model_path"] for name, state in states.items() if name.startswith("StepCheckpoint")]
    assert {Path(path).parent for path in paths} == {Path("run/checkpoints").absolute()}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_table_is_not_lost_by_a_kill_while_a_run_is_resumed(plain_run: str, monkeypatch) -> None:
    scores = ("step", "train/loss", "val/acc1")
    before = column("run", scores)
    with monkeypatch.context() as patch:
        patch.setattr("kdvit.runtime.loggers._rows_before", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_loggers("run", "run/checkpoints/last.ckpt")
    assert not Path("run/metrics.csv").exists()
    run_loggers("run", "run/checkpoints/last.ckpt")
    assert len(before) > 6
    assert column("run", scores) == before
