"""The logs of a run directory."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from kdvit.checkpoints import training_step


def run_loggers(root: str | Path, resumed_from: str | Path | None = None) -> list[Logger]:
    """Returns loggers that write the event file and metrics.csv straight into the run directory.

    Args:
        root: The run directory.
        resumed_from: The checkpoint that the run goes on from. The rows of metrics.csv up to its step are kept; without
            it the table starts anew.
    """
    file, before = Path(root) / "metrics.csv", Path(root) / "metrics.csv.before"
    first = getattr(rank_zero_only, "rank", 0) == 0
    if first and resumed_from is None:
        before.unlink(missing_ok=True)
    elif first and file.is_file() and not before.is_file():  # else the start before this one was killed, right here
        file.replace(before)  # the logger deletes a table that it finds
    table = CSVLogger(root, name="", version="")
    if first and resumed_from is not None and before.is_file():
        table.experiment.metrics.extend(_rows_before(before, training_step(Path(resumed_from))))
        table.save()
        before.unlink()
    return [TensorBoardLogger(root, name="", version=""), table]


def _rows_before(file: Path, step: int) -> list[dict[str, float]]:
    """Returns the rows of the steps before one, without those that a kill or a full disk has torn."""
    lines = [line for line in file.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
    whole = [row for row in csv.DictReader(lines) if None not in (*row, *row.values())]
    rows = [_numbers(row) for row in whole]
    return [row for row in rows if row.get("step", step) < step]


def _numbers(row: dict[str, str]) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in row.items() if value}
    except ValueError:
        return {}
