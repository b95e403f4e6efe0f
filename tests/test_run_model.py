"""A run under any sequence of commands, against a plain model of what it should be."""

from __future__ import annotations

import csv
import functools
import math
import os
import random
import signal
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch

from kdvit.cli import main
from tests.runs import QUIET

IMAGES = 20
LR, WARMUP_LR, MIN_LR = 1e-2, 1e-4, 1e-5
ACTIONS = ["train", "lengthen", "shorten", "cut", "signal", "fail", "batch", "logger", "move", "evaluate"]


class Step(NamedTuple):
    epoch: int
    images: list[int]
    lr: float


SEEN: dict[int, Step] = {}
"""What each step was trained on, as it was last taken."""


class Recorder(pl.Callback):
    """Keeps what a step sees, and interrupts the run at the n-th batch of a start."""

    def __init__(self, signal_at: int | None = None, fail_at: int | None = None) -> None:
        self.signal_at, self.fail_at, self.batches, self.lr = signal_at, fail_at, 0, 0.0

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        SEEN[trainer.global_step - 1] = Step(trainer.current_epoch, batch.index.tolist(), self.lr)
        self.batches += 1
        if self.batches == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.batches == self.fail_at:
            raise MemoryError("as if the memory were full")


class Run:
    """The plain model: where a run stands, and what its command should make of it."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.root, self.epochs, self.batch, self.own_logger = Path("run0"), 2, 4, False
        self.step, self.epoch, self.done = 0, 0, 0  # done: images of the epoch that begins or goes on
        self.saved = (0, 0, 0)
        self.lengths: dict[int, int] = {}  # planned epochs by step
        self.log: list[str] = []

    def fit(self, *more: str, batches: int | None = None, fails: bool = False) -> None:
        """Trains, and moves the model on by as many batches; to the end by default."""
        start, ended = self.saved, None
        self.step, self.epoch, self.done = start
        before = len(SEEN)
        try:
            main(["fit", *self.options(), *more])
        except SystemExit as end:
            ended = end.code
        except MemoryError:
            assert fails
        taken = 0
        while self.epoch < self.epochs and (batches is None or taken < batches):
            self.lengths[self.step] = self.epochs
            self.step, self.done, taken = self.step + 1, self.done + self.batch, taken + 1
            if self.done == IMAGES:
                self.epoch, self.done = self.epoch + 1, 0
                self.saved = (self.step, self.epoch, self.done)
        if not fails:
            self.saved = (self.step, self.epoch, self.done)
        assert ended in (None, 143), (ended, before)
        self.check(fails, ended)

    def options(self) -> list[str]:
        """The command."""
        given = {
            "data": "tests.tiny.SizedData",
            "data.init_args.train": IMAGES,
            "data.init_args.batch_size": self.batch,
            "model.student": "TimmStudent",
            "model.student.init_args.arch": "deit_tiny_patch16_224",
            "model.student.init_args.img_size": 16,
            "model.student.init_args.num_classes": 5,
            "model.student.init_args.model_args": "{patch_size: 8, embed_dim: 8, depth: 1, num_heads: 1}",
            "model.optimizer.lr": LR,
            "model.optimizer.lr_base_batch": "null",
            "model.schedule.warmup_epochs": 1,
            "model.schedule.warmup_lr": WARMUP_LR,
            "model.schedule.min_lr": MIN_LR,
            "trainer.max_epochs": self.epochs,
            "trainer.default_root_dir": self.root,
            "trainer.log_every_n_steps": 1,
            "trainer.accelerator": "cpu",
        }
        if self.own_logger:
            given["trainer.logger"] = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: own}}"
        return [*(f"--{name}={value}" for name, value in given.items()), *QUIET]

    def act(self) -> None:
        """Draws an action and takes it."""
        action = self.draw.choice(ACTIONS)
        self.log.append(action)
        recorder = "--trainer.callbacks+={{class_path: tests.test_run_model.Recorder, init_args: {{{}}}}}"
        left = (self.epochs - self.saved[1]) * IMAGES // self.batch - self.saved[2] // self.batch
        n = self.draw.randint(1, 7)
        if action in ("lengthen", "cut", "signal", "fail") and left < n:
            self.epochs += 1 + n // 5
            left += IMAGES // self.batch * (1 + n // 5)
        if action == "shorten":
            self.epochs = max(self.saved[1] + 1, self.epochs - 1)
        if action == "batch":
            if self.saved[2]:
                return
            self.batch = 6 - self.batch
        if action == "logger":
            self.own_logger = not self.own_logger
        if action == "move" and self.root.exists():
            moved = Path(f"run{len(self.log)}")
            self.root.rename(moved)
            self.root = moved
        if action == "evaluate":
            self.evaluate()
        elif action == "cut":
            self.fit(f"--trainer.max_steps={self.saved[0] + n}", recorder.format(""), batches=n)
        elif action == "signal":
            self.fit(recorder.format(f"signal_at: {n}"), batches=n)
        elif action == "fail":
            self.fit(recorder.format(f"fail_at: {n}"), batches=n - 1, fails=True)  # the last one is not completed
        else:
            self.fit(recorder.format(""))

    def rows(self) -> list[dict[str, str]]:
        with (self.root / "metrics.csv").open() as stream:
            return list(csv.DictReader(stream))

    def check(self, failed: bool, ended: Any) -> None:
        """Asserts what holds after every command."""
        step, epoch, done = self.saved
        by_epoch: dict[int, list[int]] = {}
        for i in range(step):
            seen = SEEN[i]
            by_epoch.setdefault(seen.epoch, []).extend(seen.images)
            assert seen.lr == pytest.approx(rate(seen.epoch, self.lengths[i]), rel=1e-6), (i, self.log)
        for each in range(epoch):
            assert sorted(by_epoch[each]) == list(range(IMAGES)), (each, self.log)
        assert len(set(by_epoch.get(epoch, []))) == len(by_epoch.get(epoch, [])) == done, self.log
        if step == 0:
            return
        assert self.of("last")["global_step"] == step, self.log
        if failed:
            return
        rows = self.rows()
        assert [int(float(row["step"])) for row in rows if row["train/lr"]] == list(range(step)), self.log
        scores = {int(float(row["step"])): float(row["val/acc1"]) for row in rows if row.get("val/acc1")}
        due = ended == 143 and done == 0  # the validation behind the last batch is held by the next start
        assert len(scores) == epoch - due, self.log
        if scores:
            best = max(scores, key=lambda at: scores[at])
            assert self.of("best")["global_step"] == best + 1, (scores, self.log)

    def of(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self.root / "checkpoints" / f"{name}.ckpt", weights_only=True)
        return content

    def evaluate(self) -> None:
        """Asserts that the best checkpoint has the score that was logged."""
        if self.saved[1] == 0:
            return
        scores = [float(row["val/acc1"]) for row in self.rows() if row.get("val/acc1")]
        main(["validate", *self.options()])
        assert VALIDATED["val/acc1"] == pytest.approx(max(scores), abs=1e-6), self.log


VALIDATED: dict[str, float] = {}


def rate(epoch: int, epochs: int) -> float:
    if epoch < 1:
        return WARMUP_LR
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@pytest.mark.slow
def test_a_run_is_what_its_commands_say_in_any_order(monkeypatch) -> None:
    SEEN.clear()
    validate = pl.Trainer.validate

    @functools.wraps(validate)
    def kept(self: pl.Trainer, *args: Any, **kwargs: Any) -> Any:
        (scores,) = validate(self, *args, **kwargs)
        VALIDATED.update(scores)
        return [scores]

    monkeypatch.setattr(pl.Trainer, "validate", kept)
    run = Run(seed=0)
    for _ in range(int(os.environ.get("KDVIT_ACTIONS", 40))):
        run.act()
