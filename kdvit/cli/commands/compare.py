"""Finished runs side by side: a table and the validation curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from kdvit.cli.commands.benchmark import latency_ms
from kdvit.errors import UserError
from kdvit.models import load_student
from kdvit.models.cost import parameter_count
from kdvit.runtime.loggers import read_table


class Run(NamedTuple):
    """One finished run.

    Attributes:
        name: Name of the run directory.
        parameters: Parameters of the student.
        latency_ms: Median time of one image through the student, in milliseconds.
        acc1: Validation accuracy after the last epoch, 0..1.
        seconds: Time of the training, validation included.
        curve: Epoch and validation accuracy, after every epoch.
    """

    name: str
    parameters: int
    latency_ms: float
    acc1: float
    seconds: float
    curve: list[tuple[int, float]]


def compare(runs: list[str], out: str = "runs/comparison") -> None:
    """Shows finished runs side by side: parameters, latency, accuracy and time as a table, the curves as a picture.

    Args:
        runs: Run directories of `kdvit fit`.
        out: Where to write curves.png and comparison.json.
    """
    results = [read_run(Path(run)) for run in runs]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    print(table(results))
    (folder / "comparison.json").write_text(json.dumps([run._asdict() for run in results], indent=1) + "\n")
    draw_curves(results, folder / "curves.png")
    print(f"\nCurves: {folder / 'curves.png'}. Numbers: {folder / 'comparison.json'}.")


def read_run(folder: Path) -> Run:
    """Reads a run directory and times its student.

    Raises:
        UserError: If the folder holds no finished run.
    """
    if not (folder / "metrics.csv").is_file() or not (folder / "student").is_dir():
        raise UserError(f"{str(folder.absolute())!r} holds no finished run: expected metrics.csv and student/ in it.")
    rows = read_table(folder / "metrics.csv")
    curve = [(int(row["epoch"]), row["val/acc1"]) for row in rows if {"epoch", "val/acc1"} <= set(row)]
    if not curve:
        raise UserError(f"{str(folder.absolute())!r} has no val/acc1 in its metrics.csv: it was never validated.")
    try:
        student = load_student(folder / "student")
    except ValueError as error:
        raise UserError(str(error)) from error
    seconds = student.spec["run"]["seconds"]
    return Run(folder.name, parameter_count(student), latency_ms(student), curve[-1][1], seconds, curve)


def table(runs: list[Run]) -> str:
    """Returns the table of a comparison."""
    width = max(len("run"), *(len(run.name) for run in runs))
    lines = [f"{'run':<{width}}  parameters  latency (ms)  top-1 (%)  seconds"]
    lines += [
        f"{run.name:<{width}}  {run.parameters:>10,}  {run.latency_ms:>12.2f}  {100 * run.acc1:>9.2f}  {run.seconds:>7.0f}"
        for run in runs
    ]
    return "\n".join(lines)


def draw_curves(runs: list[Run], file: Path) -> None:
    """Draws the validation accuracy over epochs; colours of Okabe and Ito, which colour-blind readers tell apart."""
    from matplotlib.figure import Figure

    colours = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442"]
    styles = ["-", "--", "-.", ":"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes: Any = figure.add_subplot()
    for i, run in enumerate(runs):
        epochs, accuracies = zip(*run.curve, strict=True)
        style = styles[(i // len(colours)) % len(styles)]
        axes.plot(
            [epoch + 1 for epoch in epochs],
            [100 * accuracy for accuracy in accuracies],
            style,
            color=colours[i % len(colours)],
            label=f"{run.name} ({100 * run.acc1:.1f} %)",
        )
    axes.set(xlabel="epoch", ylabel="validation top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, dpi=150)
