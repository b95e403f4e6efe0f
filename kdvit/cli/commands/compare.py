"""`kdvit compare`: finished runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from kdvit.errors import UserError
from kdvit.tables import text_table

COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442"]
"""Of Okabe and Ito: colour-blind readers tell them apart."""
STYLES = ["-", "--", "-.", ":"]


class Run(NamedTuple):
    """One finished run; None for what its folder does not tell.

    Attributes:
        name: Name of the run directory.
        parameters: Parameters of the student.
        latency_ms: Median time of one image through the student, in milliseconds.
        acc1: Validation accuracy after the last epoch, 0..1.
        seconds: Time of the training, validation included.
        curve: Epoch and validation accuracy, after every epoch.
        note: What is missing, and why.
    """

    name: str
    parameters: int | None
    latency_ms: float | None
    acc1: float | None
    seconds: float | None
    curve: list[tuple[int, float]]
    note: str = ""


def compare(runs: list[str], out: str = "runs/comparison") -> None:
    """Show finished runs side by side: parameters, latency, accuracy and time as a table, the curves as a picture.

    Args:
        runs: Run directories of `kdvit fit`.
        out: Folder of curves.png and comparison.json.

    Example:
        kdvit compare runs/demo/lift runs/demo/plain
    """
    for each in runs:
        require_run(Path(each))
    results = [read_run(Path(each)) for each in runs]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    head = ("run", "parameters", "latency (ms)", "top-1 (%)", "seconds")
    print(text_table(head, [_cells(run) for run in results]))
    for run in results:
        if run.note:
            print(f"{run.name}: {run.note}")
    (folder / "comparison.json").write_text(json.dumps([run._asdict() for run in results], indent=1) + "\n")
    draw_curves(results, folder / "curves.png")
    print(f"\nCurves: {folder / 'curves.png'}. Numbers: {folder / 'comparison.json'}.")


def require_run(folder: Path) -> None:
    """Raises UserError if a folder is no run at all."""
    if not (folder / "metrics.csv").is_file() and not (folder / "student").is_dir():
        raise UserError(f"{str(folder.absolute())!r} holds no run: expected metrics.csv or student/ in it.")


def read_run(folder: Path) -> Run:
    """Reads what a run directory tells, and times its student."""
    from kdvit.models import load_student
    from kdvit.models.cost import latency_ms, parameter_count
    from kdvit.runtime.loggers import read_table

    missing = []
    table = folder / "metrics.csv"
    rows = read_table(table) if table.is_file() else []
    curve = [(int(row["epoch"]), row["val/acc1"]) for row in rows if {"epoch", "val/acc1"} <= set(row)]
    if not curve:
        missing.append("there is no val/acc1 in metrics.csv")
    parameters = latency = seconds = None
    try:
        student = load_student(folder / "student")
        parameters, latency = parameter_count(student), latency_ms(student)
        seconds = student.spec.get("run", {}).get("seconds")
        if seconds is None:
            missing.append("student/ does not tell the seconds of training")
    except (ValueError, OSError, TypeError) as error:
        missing.append(str(error))
    acc1 = curve[-1][1] if curve else None
    return Run(folder.name, parameters, latency, acc1, seconds, curve, "; ".join(missing))


def _cells(run: Run) -> tuple[str, ...]:
    return (
        run.name,
        "" if run.parameters is None else f"{run.parameters:,}",
        "" if run.latency_ms is None else f"{run.latency_ms:.2f}",
        "" if run.acc1 is None else f"{100 * run.acc1:.2f}",
        "" if run.seconds is None else f"{run.seconds:.0f}",
    )


def draw_curves(runs: list[Run], file: Path) -> None:
    """Draws the validation accuracy over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes: Any = figure.add_subplot()
    for i, run in enumerate(run for run in runs if run.curve):
        epochs, accuracies = zip(*run.curve, strict=True)
        axes.plot(
            [epoch + 1 for epoch in epochs],
            [100 * accuracy for accuracy in accuracies],
            STYLES[(i // len(COLOURS)) % len(STYLES)],
            color=COLOURS[i % len(COLOURS)],
            label=f"{run.name} ({100 * accuracies[-1]:.1f} %)",
        )
    axes.set(xlabel="epoch", ylabel="validation top-1 (%)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, dpi=150)
