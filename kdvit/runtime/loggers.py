"""The logs of a run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from kdvit.runtime.processes import is_first_process
from kdvit.tables import read_table

GROUPS = {"val": "1_val", "train": "2_train", "data": "4_data", "geometry": "5_geometry"}
WEIGHTED = "3_weighted"


class BoardLogger(TensorBoardLogger):
    """TensorBoard's events, each scalar under the name of its `card`; metrics.csv has the plain names.

    What is measured of a teacher, once, is a text.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes scalars."""
        once = {name: value for name, value in metrics.items() if name.startswith("teacher")}
        for name, value in once.items():
            self.experiment.add_text(name, f"{value:.4g}", step)
        super().log_metrics({card(name): value for name, value in metrics.items() if name not in once}, step)


def is_logged(trainer: Any, step: int) -> bool:
    """Tells whether Lightning logs a step, of those from 1 on; of a run also the last of `max_steps`."""
    every: int = trainer.log_every_n_steps
    is_last = step == trainer.max_steps and not trainer.fast_dev_run
    return every > 0 and (step % every == 0 or is_last)


def card(name: str) -> str:
    """Returns the name of a card in TensorBoard, which sorts by name: a number puts its group where it is read.

    Examples:
        >>> [card(name) for name in ("val/acc1", "train/lift", "train/lift_weighted", "epoch", "teacher/acc1")]
        ['1_val/acc1', '2_train/lift', '3_weighted/lift_weighted', '4_data/epoch', 'teacher/acc1']
    """
    group, _, rest = name.rpartition("/")
    if group == "train" and rest.endswith(("_weighted", "_weight")):
        return f"{WEIGHTED}/{rest}"
    return f"{GROUPS.get(group or 'data', group)}/{rest}"


def boards(trainer: pl.Trainer) -> list[Any]:
    """Returns what writes pictures and texts for TensorBoard (torch's SummaryWriter), on the first rank alone."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [each.experiment for each in loggers if isinstance(each, TensorBoardLogger)]


def run_loggers(root: str | Path, resumed_from: str | Path | None = None) -> list[Logger]:
    """Returns loggers that write the event file and metrics.csv straight into the run directory.

    Args:
        root: The run directory.
        resumed_from: The checkpoint that the run goes on from. The rows of metrics.csv up to its step are kept, and
            TensorBoard drops what event files say of later steps; without it both start anew.
    """
    file, before = Path(root) / "metrics.csv", Path(root) / "metrics.csv.before"
    first = is_first_process()
    if first and resumed_from is None:
        before.unlink(missing_ok=True)
    elif first and file.is_file() and not before.is_file():  # else the start before this one was killed right here
        file.replace(before)  # the logger deletes a table that it finds
    table, step = CSVLogger(root, name="", version=""), 0
    rows: list[dict[str, float]] = []
    if first and resumed_from is not None:
        rows, step = _rows_before(before if before.is_file() else None, resumed_from)
    board = BoardLogger(root, name="", version="", default_hp_metric=False, purge_step=step)
    if rows:
        table.experiment.metrics.extend(rows)
        table.save()
    if first:
        before.unlink(missing_ok=True)
    for row in rows:
        if row["step"] >= step:  # a training step whose validation is held again
            board.log_metrics({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
    return [board, table]


def _rows_before(file: Path | None, checkpoint: str | Path) -> tuple[list[dict[str, float]], int]:
    """Returns the rows of a table up to the step of a checkpoint, and the first step that will be logged anew."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    step = content["global_step"]
    validated = content["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    again = validated["ready"] > validated["processed"]  # a validation that is due, and had been held before a kill
    rows = [row for row in read_table(file) if row.get("step", step) < step] if file is not None else []
    return [row for row in rows if not (again and row["step"] == step - 1 and "val/loss" in row)], step - again
