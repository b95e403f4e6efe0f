"""`kdvit compare`: runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from kdvit.errors import UserError, shown
from kdvit.tables import text_table

PROBES = ("val/knn_acc1", "val/linear_acc1")


class Run(NamedTuple):
    """One run; None is what it does not say.

    Attributes:
        name: Name of the run directory.
        parameters: Parameters of the student.
        latency_ms: Median time of one image through the student, in milliseconds.
        acc1: Validation accuracy after the last epoch, 0..1.
        seconds: Time of the training, validation included.
        curve: Epoch and validation accuracy, after every epoch.
        knn: Accuracy of the last k-NN probe, 0..1.
        linear: The same of the linear probe.
        notes: Why something is missing, and what a Lift costs once folded.
    """

    name: str
    parameters: int | None
    latency_ms: float | None
    acc1: float | None
    seconds: float | None
    curve: list[tuple[int, float]]
    notes: list[str]
    knn: float | None = None
    linear: float | None = None


def compare(runs: list[str], out: str = "runs/comparison") -> None:
    """Show runs side by side: parameters, latency, accuracy and time as a table, the curves as a picture.

    What a run does not say is left blank.

    Args:
        runs: Run directories of `kdvit fit`, or exported students.
        out: Folder of curves.png and comparison.json.

    Example:
        kdvit compare runs/demo/lift runs/demo/plain
    """
    for each in runs:
        require_run(Path(each))
    results = [read_run(Path(run)) for run in runs]
    folder = Path(out)
    with shown((OSError,), prefix=f"--out {out!r}: "):
        folder.mkdir(parents=True, exist_ok=True)
    print(table(results))
    print("".join(f"\n{run.name}: {note}" for run in results for note in run.notes))
    (folder / "comparison.json").write_text(json.dumps([run._asdict() for run in results], indent=1) + "\n")
    draw_curves([run for run in results if run.curve], folder / "curves.png")
    print(f"Curves: {folder / 'curves.png'}. Numbers: {folder / 'comparison.json'}.")


def require_run(folder: Path) -> None:
    """Raises UserError if a folder is neither a run nor an exported student."""
    if not any((folder / name).exists() for name in ("metrics.csv", "student", "model.safetensors")):
        raise UserError(
            f"{str(folder.absolute())!r} holds no run: expected metrics.csv or student/ in it, or an exported student."
        )


def read_run(folder: Path) -> Run:
    """Reads a run directory, or the folder of an exported student, and times the student."""
    from kdvit.models import LiftViT, load_student
    from kdvit.models.checkpoint import WEIGHTS
    from kdvit.models.cost import latency_ms, parameter_count
    from kdvit.runtime.loggers import read_table

    log, exported = folder / "metrics.csv", folder if (folder / WEIGHTS).is_file() else folder / "student"
    notes = []
    rows = read_table(log) if log.is_file() else []
    curve = [(int(row["epoch"]), row["val/acc1"]) for row in rows if {"epoch", "val/acc1"} <= set(row)]
    if not curve:
        notes.append("no curve, as its metrics.csv has no val/acc1." if rows else "no curve, as it has no metrics.csv.")
    parameters = latency = None
    told: dict[str, Any] = {}
    try:
        student = load_student(exported)
        parameters, latency = parameter_count(student), latency_ms(student)
        told = student.spec.get("run", {})
        if "seconds" not in told:
            notes.append("no seconds, as its student was not written by the training itself.")
        if isinstance(student, LiftViT) and student.folds:
            folded = student.folded()
            cost = f"has {parameter_count(folded):,} parameters and takes {latency_ms(folded):.2f} ms"
            notes.append(f"once folded (kdvit export --fold) it {cost}.")
    except Exception as error:  # a class of the user's may raise anything
        notes.append(f"no parameters, latency and seconds: {' '.join(str(error).split())}")
    acc1 = curve[-1][1] if curve else told.get("val/acc1")
    probes = [next((row[name] for row in reversed(rows) if name in row), told.get(name)) for name in PROBES]
    return Run(folder.absolute().name, parameters, latency, acc1, told.get("seconds"), curve, notes, *probes)


def table(runs: list[Run]) -> str:
    """Returns the table of a comparison."""
    columns: dict[str, list[str]] = {"run": [run.name for run in runs]}
    columns["parameters"] = [_cell(run.parameters, ",") for run in runs]
    columns["latency (ms)"] = [_cell(run.latency_ms, ".2f") for run in runs]
    columns["top-1 (%)"] = [_cell(run.acc1 and 100 * run.acc1, ".2f") for run in runs]
    columns["seconds"] = [_cell(run.seconds, ".0f") for run in runs]
    if any(run.knn is not None for run in runs):
        columns["k-NN (%)"] = [_cell(run.knn and 100 * run.knn, ".2f") for run in runs]
        columns["linear (%)"] = [_cell(run.linear and 100 * run.linear, ".2f") for run in runs]
    return text_table(list(columns), list(zip(*columns.values(), strict=True)))


def _cell(value: float | None, shape: str) -> str:
    return "" if value is None else format(value, shape)


def draw_curves(runs: list[Run], file: Path) -> None:
    """Draws the validation accuracy over epochs, in colours that colour-blind readers tell apart."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("tableau-colorblind10"):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes: Any = figure.add_subplot()
    for run in runs:
        epochs, accuracies = zip(*((1 + epoch, 100 * accuracy) for epoch, accuracy in run.curve), strict=True)
        axes.plot(epochs, accuracies, label=f"{run.name} ({accuracies[-1]:.1f} %)")
    axes.set(xlabel="epoch", ylabel="validation top-1 (%)")
    axes.grid(alpha=0.3)
    if runs:
        axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, dpi=150)
