"""Kills, 15 times: what is on the disk is whole, and the same command ends where an uninterrupted one ends."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch

from kdvit.cli import main
from tests.runs import QUIET, assert_same_end, demo_fit, fit

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["kdvit.cli", __name__])
EVERYTHING = [
    *[*QUIET, "--trainer.max_epochs=40", "--ema.decay=0.9", "--trainer.log_every_n_steps=7"],
    *["--data.init_args.mixup=0.8", "--data.init_args.cutmix=1.0", "--data.init_args.repeats=3"],
    *["--model.student.init_args.drop_path_rate=0.2", "--data.init_args.num_workers=1"],
    *["--last_checkpoint.every_n_train_steps=6", "--model.optimizer.lr_base_batch=64"],
]


def _kill_at(where: str, name: str, calls: int) -> None:
    """Kills this process at the n-th call of a function."""
    owner = resolve_name(where)
    original, left = getattr(owner, name), iter(range(calls - 1))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def _process(args: list[str], at: tuple[str, str, int] | None, largest_file: int | None) -> None:
    os.dup2(os.open("stderr.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    if at is not None:
        _kill_at(*at)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    main(args)


def _started(
    args: list[str], at: tuple[str, str, int] | None = None, largest_file: int | None = None
) -> multiprocessing.process.BaseProcess:
    process = PROCESSES.Process(target=_process, args=(args, at, largest_file))
    process.start()
    return process


def _ended(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join(timeout=300)
    return process.exitcode


@pytest.mark.slow
def test_a_run_killed_at_twelve_moments_ends_where_an_uninterrupted_one_ends(demo_teacher: str) -> None:
    fit("lift", demo_teacher, *EVERYTHING, "--trainer.default_root_dir=whole")
    args, draw, last = demo_fit("lift", demo_teacher, *EVERYTHING), random.Random(0), Path("run/checkpoints/last.ckpt")
    moments = ["any"] * 4 + ["step"] * 3 + ["validation"] * 3 + ["writing"] * 2
    draw.shuffle(moments)
    steps = []
    for moment in moments:
        at = {
            "step": ("kdvit.training.module:DistillationModule", "training_step", draw.randrange(1, 25)),
            "validation": ("kdvit.training.module:DistillationModule", "validation_step", draw.randrange(3, 12)),
            "writing": ("os", "replace", draw.randrange(1, 8)),  # the table, config.yaml, or a checkpoint
        }.get(moment)
        process = _started(args, at)
        if moment == "any":
            time.sleep(draw.uniform(0.5, 3))
            process.kill()
        assert _ended(process) == -signal.SIGKILL, moment
        steps.append(torch.load(last, weights_only=True)["global_step"] if last.exists() else 0)
    assert steps == sorted(steps)
    assert 40 < steps[-1] < 800
    assert _ended(_started(args)) == 0
    assert_same_end("whole", "run")
    assert not list(Path("run").rglob("*.tmp"))


@pytest.mark.slow
def test_a_cache_killed_while_it_is_written_ends_with_the_same_bytes(demo_teacher: str) -> None:
    config = ["cache", "--config", "demo/lift.yaml", "--model.teacher.init_args.arch", demo_teacher, "--views", "9"]
    main([*config, "--out", "whole"])
    for at in (
        ("kdvit.cache.writer:CacheWriting", "take", 3),
        ("kdvit.cache.writer:CacheWriting", "take", 12),
        ("os", "replace", 3),
    ):
        assert _ended(_started([*config, "--out", "cache"], at)) == -signal.SIGKILL
    assert _ended(_started([*config, "--out", "cache"])) == 0
    whole, other = ({file.name: file.read_bytes() for file in Path(name).iterdir()} for name in ("whole", "cache"))
    assert len(whole) > 3
    assert whole == other


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_leaves_the_checkpoint_before(demo_teacher: str) -> None:
    more = [*QUIET, "--trainer.max_epochs=2", "--ema.decay=0.9"]
    fit("lift", demo_teacher, *more, "--trainer.default_root_dir=whole")
    fit("lift", demo_teacher, *more, "--trainer.max_steps=20")
    before = Path("run/checkpoints/last.ckpt").read_bytes()
    assert _ended(_started(demo_fit("lift", demo_teacher, *more), largest_file=100_000)) == 2
    said = Path("stderr.txt").read_text()
    *_, message = said.strip().splitlines()
    assert message.startswith("kdvit: error: cannot write '")
    assert "File too large. What was there before is left as it was. Make room and give the same command" in message
    assert "Traceback" not in said
    assert "The same command goes on from run/checkpoints/last.ckpt" in said
    assert Path("run/checkpoints/last.ckpt").read_bytes() == before
    assert not list(Path("run").rglob("*.tmp"))
    fit("lift", demo_teacher, *more)
    assert_same_end("whole", "run")
