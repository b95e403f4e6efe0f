"""Runs side by side: what they say, and what is written of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdvit.cli.runs import Run, read_run
from kdvit.cli.seeds import SEED, differing, estimate, group, setting_name, short_names
from kdvit.pages import PALETTE, render
from kdvit.tables import markdown_table, text_table

Cells = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Head and rows of a table."""
STYLES = ("-", "--", ":", "-.")


class Setting(NamedTuple):
    """Runs that differ in seed and paths alone."""

    name: str
    runs: list[Run]


class Comparison(NamedTuple):
    """Runs, each alone and by setting."""

    runs: list[Run]
    settings: list[Setting]

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Comparison:
        """Reads runs, and finds those of one setting."""
        names = short_names(folders)
        runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
        settings: list[Setting] = []
        for members in group([run.settings for run in runs]):
            ours = [runs[i] for i in members]
            named = setting_name([run.folder for run in ours]) if len(ours) > 1 else ours[0].name
            taken = named in [setting.name for setting in settings]
            settings.append(Setting(f"{ours[0].name} and {len(ours) - 1} more" if taken and ours[1:] else named, ours))
        return cls(runs, settings)

    def table(self) -> Cells:
        """Returns what each run says."""
        columns = {
            "run": [run.name for run in self.runs],
            "best (%)": [_cell(run.best, ".2f", 100) for run in self.runs],
            "after epochs": [_cell(run.best_after, "") for run in self.runs],
            "last (%)": [_cell(run.last, ".2f", 100) for run in self.runs],
            "parameters": [_cell(run.parameters, ",") for run in self.runs],
            "latency (ms)": [_cell(run.latency_ms, ".2f") for run in self.runs],
        }
        if any(run.folded for run in self.runs):
            columns["folded: parameters"] = ["" if run.folded is None else f"{run.folded[0]:,}" for run in self.runs]
            columns["folded: latency"] = ["" if run.folded is None else f"{run.folded[1]:.2f}" for run in self.runs]
        columns["seconds"] = [_cell(run.seconds, ".0f") for run in self.runs]
        if any(run.knn is not None for run in self.runs):
            columns["k-NN (%)"] = [_cell(run.knn, ".2f", 100) for run in self.runs]
            columns["linear (%)"] = [_cell(run.linear, ".2f", 100) for run in self.runs]
        return list(columns), list(zip(*columns.values(), strict=True))

    def means(self) -> Cells | None:
        """Returns mean and interval of each setting; None where none has several seeds."""
        if len(self.settings) == len(self.runs):
            return None
        rows = []
        for setting in self.settings:
            found = [_values(setting.runs, which) for which in ("best", "last")]
            told = (str(estimate(list(values.values()))) if values else "" for values in found)
            rows.append([setting.name, str(len(setting.runs)), *told])
        return ("setting", "runs", "best (%)", "last (%)"), rows

    def differences(self) -> Cells | None:
        """Returns the differences to the first setting, of runs with one seed; None where no two seeds agree."""
        rows = []
        for setting in self.settings[1:]:
            pairs = [
                (_values(setting.runs, which), _values(self.settings[0].runs, which)) for which in ("best", "last")
            ]
            found = [[ours[seed] - theirs[seed] for seed in ours if seed in theirs] for ours, theirs in pairs]
            if min(map(len, found)) > 1:
                told = (f"{each.mean:+.2f} ± {each.half:.2f}" for each in map(estimate, found))
                rows.append([f"{setting.name} - {self.settings[0].name}", str(len(found[0])), *told])
        return (("difference", "seeds", "best (points)", "last (points)"), rows) if rows else None

    def differing(self) -> Cells | None:
        """Returns the settings that differ; None where fewer than two runs have a config, or nothing differs."""
        known = [setting for setting in self.settings if setting.runs[0].settings]
        keys, rows = differing([setting.runs[0].settings for setting in known])
        head = ("option", *(setting.name for setting in known))
        return (head, [[key, *row] for key, row in zip(keys, rows, strict=True)]) if keys else None

    def notes(self) -> list[str]:
        """Returns what is to be known of the runs besides."""
        return [f"{run.name}: {note}" for run in self.runs for note in run.notes]

    def tables(self) -> dict[str, Cells]:
        """Returns all tables by their titles."""
        found = {
            "Runs": self.table(),
            "Over seeds": self.means(),
            "By seed": self.differences(),
            "Settings that differ": self.differing(),
        }
        return {title: cells for title, cells in found.items() if cells}

    def text(self) -> str:
        """Returns the tables and notes for the terminal, without the settings."""
        cells = filter(None, (self.table(), self.means(), self.differences()))
        return "\n\n".join(filter(None, [*(text_table(*each) for each in cells), "\n".join(self.notes())]))

    def markdown(self) -> str:
        """Returns all tables and notes in Markdown."""
        parts = [f"## {title}\n\n{markdown_table(*cells)}" for title, cells in self.tables().items()]
        notes = "".join(f"- {note}\n" for note in self.notes())
        return "\n\n".join(filter(None, [parts[0], notes.rstrip(), "![Curves](curves.png)", *parts[1:]])) + "\n"

    def draw(self) -> Figure:
        """Draws the validation accuracy and loss over epochs; of several seeds mean and interval."""
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels: Any = figure.subplots(1, 2)
        for number, setting in enumerate(self.settings):
            look = {"color": PALETTE[number % len(PALETTE)], "linestyle": STYLES[number // len(PALETTE) % len(STYLES)]}
            for axes, metric, scale in zip(panels, ("val/acc1", "val/loss"), (100, 1), strict=True):
                points = list(_mean_curve([dict(run.curves[metric]) for run in setting.runs], scale))
                if points:
                    epochs, means, halves = zip(*points, strict=True)
                    axes.plot(epochs, means, **look, marker="." * (len(epochs) == 1), label=setting.name)
                    bounds = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
                    axes.fill_between(epochs, *bounds, color=look["color"], alpha=0.2, linewidth=0)
        for axes, label in zip(panels, ("validation top-1 (%)", "validation loss"), strict=True):
            axes.set(xlabel="epochs", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
        shown = {label: line for each in panels for line, label in zip(*each.get_legend_handles_labels(), strict=True)}
        handles, labels = list(shown.values()), list(shown)
        if handles:
            columns = max(1, 100 // (8 + max(map(len, labels))))
            figure.legend(handles, labels, loc="outside upper center", fontsize=8, frameon=False, ncols=columns)
        return figure

    def to_json(self) -> list[dict[str, Any]]:
        """Returns every number in plain types, a dictionary a run."""
        named = {run.folder: setting.name for setting in self.settings for run in setting.runs}
        return [{**run._asdict(), "folder": str(run.folder), "setting": named[run.folder]} for run in self.runs]


def save(comparison: Comparison, folder: Path) -> tuple[Path, Path]:
    """Writes the page, Markdown, numbers and curves into a folder, and returns the files of page and numbers."""
    curves, html, numbers = (folder / name for name in ("curves.png", "comparison.html", "comparison.json"))
    comparison.draw().savefig(curves, dpi=160)
    template = Path(__file__).with_name("comparison.html.jinja")
    html.write_text(render(template, {"curves": curves}, comparison=comparison))
    (folder / "comparison.md").write_text(comparison.markdown())
    numbers.write_text(json.dumps(comparison.to_json(), indent=1) + "\n")
    return html, numbers


def _cell(value: float | None, shape: str, scale: int = 1) -> str:
    return "" if value is None else format(scale * value, shape)


def _values(runs: Sequence[Run], which: str) -> dict[Any, float]:
    """Returns the best or last accuracy of each run, in per cent, by its seed."""
    return {run.settings.get(SEED): 100 * getattr(run, which) for run in runs if getattr(run, which) is not None}


def _mean_curve(curves: Sequence[dict[int, float]], scale: float) -> Iterator[tuple[int, float, float]]:
    """Yields epoch, mean and half of the interval where all runs have a value; epochs from 1."""
    for epoch in sorted(set.intersection(*map(set, curves))):
        mean, half = estimate([scale * curve[epoch] for curve in curves])
        yield 1 + epoch, mean, half or 0.0
