"""The figure: what each arm gains on the plain student, with intervals and every seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kdvit.analysis.plots import BLUE, GREY, ORANGE
from tests.replication.arms import ARMS
from tests.replication.claims import Results, paired


def draw_arms(results: Results, file: Path) -> None:
    """Draws the paired gain of each arm on the plain student: mean, interval, and a small dot for each seed."""
    gains = {name: paired(results, name, "plain") for name in ARMS if name != "plain"}
    drawn = [(ARMS[name], gain) for name, gain in gains.items() if gain is not None]
    figure = Figure(figsize=(7, 1.2 + 0.27 * len(drawn)), layout="constrained")
    axes: Any = figure.add_subplot()
    for i, (arm, gain) in enumerate(drawn):
        colour = ORANGE if arm.needs_teacher else BLUE
        axes.plot(gain.values, [i] * len(gain.values), ".", color=colour, alpha=0.4, markersize=5)
        bounds = [[gain.mean - gain.low], [gain.high - gain.mean]]
        axes.errorbar(gain.mean, i, xerr=bounds, color=colour, marker="o" if arm.needs_teacher else "s", markersize=5)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(drawn)), [arm.title for arm, _ in drawn], fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_xlabel("gain on the plain student (points); blue squares: no teacher", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=160)
