"""The logs of a run directory."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


def run_loggers(root: str | Path, resumed_from: str | Path | None = None) -> list[Logger]:
    """Returns loggers that write the event file and metrics.csv straight into the run directory.

    Args:
        root: The run directory.
        resumed_from: The checkpoint that the run goes on from. The rows of metrics.csv up to its step are kept; without
            it the table starts anew.
    """
    file, before = Path(root) / "metrics.csv", Path(root) / "metrics.csv.before"
    goes_on = resumed_from is not None and getattr(rank_zero_only, "rank", 0) == 0
    if goes_on and file.is_file():
        file.replace(before)  # the logger deletes a table that it finds
    table = CSVLogger(root, name="", version="")
    if resumed_from is not None and goes_on and before.is_file():
        table.experiment.metrics.extend(_rows_before(before, resumed_from))
        table.save()
        before.unlink()
    return [TensorBoardLogger(root, name="", version=""), table]


def _rows_before(file: Path, checkpoint: str | Path) -> list[dict[str, float]]:
    steps = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    with file.open(newline="") as stream:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]
    return [row for row in rows if row["step"] < steps]
