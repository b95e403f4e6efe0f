"""The logs of a run directory."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from kdvit.runtime.processes import is_first_process


def run_loggers(root: str | Path, resumed_from: str | Path | None = None) -> list[Logger]:
    """Returns loggers that write the event file and metrics.csv straight into the run directory.

    Args:
        root: The run directory.
        resumed_from: The checkpoint that the run goes on from. The rows of metrics.csv up to its step are kept; without
            it the table starts anew.
    """
    file, before = Path(root) / "metrics.csv", Path(root) / "metrics.csv.before"
    first = is_first_process()
    if first and resumed_from is None:
        before.unlink(missing_ok=True)
    elif first and file.is_file() and not before.is_file():  # else the start before this one was killed right here
        file.replace(before)  # the logger deletes a table that it finds
    table = CSVLogger(root, name="", version="")
    if first and resumed_from is not None and before.is_file():
        table.experiment.metrics.extend(_rows_before(before, resumed_from))
        table.save()
        before.unlink()
    return [TensorBoardLogger(root, name="", version="", default_hp_metric=False), table]


def read_table(file: Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics.csv by column, without those that a kill or a full disk has torn."""
    lines = file.read_text(errors="replace").splitlines(keepends=True)
    names, *table = [line.rstrip().split(",") for line in lines if line.endswith("\n")] or [[]]
    rows = (_numbers(dict(zip(names, cells, strict=True))) for cells in table if len(cells) == len(names))
    return [row for row in rows if row]


def _rows_before(file: Path, checkpoint: str | Path) -> list[dict[str, float]]:
    """Returns the rows up to the step of a checkpoint."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    step = content["global_step"]
    validated = content["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    again = validated["ready"] > validated["processed"]  # a validation that is due, and had been held before a kill
    rows = [row for row in read_table(file) if row.get("step", step) < step]
    return [row for row in rows if not (again and row["step"] == step - 1 and "val/loss" in row)]


def _numbers(row: dict[str, str]) -> dict[str, float]:
    try:
        values = {name: float(value) for name, value in row.items() if value}
        return {name: int(value) if name in ("epoch", "step") else value for name, value in values.items()}
    except ValueError:
        return {}
