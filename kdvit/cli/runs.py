"""What a run directory, or an exported student, says of its run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from kdvit.cli.seeds import Settings, flat, read_config
from kdvit.models import LiftViT, load_student
from kdvit.models.checkpoint import WEIGHTS
from kdvit.models.cost import parameter_count, round_times_ms
from kdvit.tables import read_table

Curve = list[tuple[int, float]]
PROBES = ("val/knn_acc1", "val/linear_acc1")


class Run(NamedTuple):
    """One run; None is what it does not say.

    Attributes:
        name: The end of its path.
        folder: The path.
        parameters: Parameters of the student.
        latency_ms: Median time of one image through the student, in milliseconds.
        folded: Both of a Lift student once it is folded.
        best: Highest validation accuracy of an epoch, 0..1.
        best_after: After how many epochs that was.
        last: Validation accuracy after the last epoch, 0..1.
        seconds: Time of the training, validation included.
        curves: Epoch and value of ``val/acc1`` (0..1) and ``val/loss``, after every epoch.
        settings: What its config.yaml sets.
        notes: Why something is missing.
        knn: Accuracy of the last k-NN probe, 0..1.
        linear: The same of the linear probe.
    """

    name: str
    folder: Path
    parameters: int | None
    latency_ms: float | None
    folded: tuple[int, float] | None
    best: float | None
    best_after: int | None
    last: float | None
    seconds: float | None
    curves: dict[str, Curve]
    settings: Settings
    notes: list[str]
    knn: float | None
    linear: float | None


def read_run(folder: Path, name: str) -> Run:
    """Reads a run directory, or the folder of an exported student, and times the student."""
    log, exported = folder / "metrics.csv", folder if (folder / WEIGHTS).is_file() else folder / "student"
    notes = []
    rows = read_table(log) if log.is_file() else []
    curves = {
        metric: [(int(row["epoch"]), row[metric]) for row in rows if {"epoch", metric} <= set(row)]
        for metric in ("val/acc1", "val/loss")
    }
    curve = curves["val/acc1"]
    if not any(curves.values()):
        notes.append("no curve, as no metrics.csv of it has val/acc1 or val/loss.")
    parameters = latency = folded = None
    told: dict[str, Any] = {}
    try:
        student: Any = load_student(exported)
        folds = isinstance(student, LiftViT) and student.folds
        networks = [student, student.folded()] if folds else [student]
        counts = [parameter_count(each) for each in networks]
        times = [statistics.median(each) for each in round_times_ms(networks)]
        parameters, latency = counts[0], times[0]
        folded = (counts[1], times[1]) if folds else None
        told = student.spec.get("run", {})
        if "seconds" not in told:
            notes.append("no seconds, as its student was not written by the training itself.")
    except Exception as error:  # a class of the user's may raise anything
        notes.append(f"no parameters, latency and seconds: {' '.join(str(error).split())}")
    epoch, best = max(curve, key=lambda point: point[1]) if curve else (-1, None)
    last = curve[-1][1] if curve else told.get("val/acc1")
    config = read_config(folder / "config.yaml")
    settings = flat(config) if config else {}
    scores = best, None if best is None else 1 + epoch, last
    probes = [next((row[each] for row in reversed(rows) if each in row), told.get(each)) for each in PROBES]
    return Run(
        *(name, folder, parameters, latency, folded, *scores, told.get("seconds"), curves, settings, notes), *probes
    )
