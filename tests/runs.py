"""Short runs of the demo, by the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from kdvit import load_student
from kdvit.cli import main

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHORT = [*QUIET, "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"]


def demo_fit(method: str, teacher: str, *more: str) -> list[str]:
    """Returns the arguments of `kdvit fit` of a demo config into the folder "run"."""
    from_teacher = ["--model.teacher.init_args.arch", teacher] if method not in ("teacher", "plain") else []
    return ["fit", "--config", f"demo/{method}.yaml", "--trainer.default_root_dir", "run", *from_teacher, *more]


def fit(method: str, teacher: str, *more: str) -> None:
    """Runs `demo_fit`."""
    main(demo_fit(method, teacher, *more))


def column(root: str, names: tuple[str, ...]) -> list[str]:
    """Returns the rows of a run's table, in some columns; as text, since NaN is equal to nothing."""
    with Path(root, "metrics.csv").open() as stream:
        return [str(tuple(float(row[name] or "nan") for name in names)) for row in csv.DictReader(stream)]


def numbers(root: str, name: str) -> list[float]:
    """Returns the values of a column of a run's table."""
    with Path(root, "metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


def assert_same_end(one: str, other: str) -> None:
    """Asserts that two runs with EMA have ended with the same weights, to the last bit, and told the same scores."""
    for file, ema in (("last", False), ("last", True), ("best", False), ("best", True)):
        ours, theirs = (load_student(f"{root}/checkpoints/{file}.ckpt", ema).state_dict() for root in (one, other))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), (file, ema)
    ours, theirs = (load_student(f"{root}/student").state_dict() for root in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    scores = ("step", "val/acc1", "val/acc1_ema")
    assert [row for row in column(one, scores) if "nan" not in row] == [
        row for row in column(other, scores) if "nan" not in row
    ]
