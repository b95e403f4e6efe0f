"""The figures: what each arm gains on the plain student, and the claim in one picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from kdvit.analysis.plots import BLUE, GREY, ORANGE
from tests.replication.arms import ARMS
from tests.replication.claims import Estimate, Results, paired

SHOWN = (
    *("soft_kd", "pool", "phi_s", "lift_mse", "pool_soft", "phi_s_soft"),
    *("lift_soft_mse", "wide_last_soft_mse", "uniform_soft_phi_s"),
)


class Gain(NamedTuple):
    """What a way to train the student gains on the plain student.

    Attributes:
        title: Its name in the figure.
        taught: Whether it has a teacher.
        found: The difference in points of accuracy.
    """

    title: str
    taught: bool
    found: Estimate


def gains(results: Results, names: Iterable[str]) -> list[Gain]:
    """Returns the gains of arms, as far as they are trained."""
    found = [(ARMS[name], paired(results, name, "plain")) for name in names]
    return [Gain(arm.title, arm.needs_teacher, gain) for arm, gain in found if gain is not None]


def draw_arms(results: Results, file: Path) -> None:
    """Draws the gain of each arm, ranked: mean, interval, and a small dot for each seed."""
    found = gains(results, [name for name, arm in ARMS.items() if name != "plain" and not arm.long])
    figure = Figure(figsize=(7, 1.2 + 0.27 * len(found)), layout="constrained")
    _draw_gains(figure.add_subplot(), found)
    figure.savefig(file, dpi=160)


def draw_claim(teacher: dict[str, Any], student_width: int, found: Sequence[Gain], file: Path) -> None:
    """Draws the mismatch (left) beside the gains of the methods (right).

    Args:
        teacher: Of its last block: width, svd_rank and pca_dimension.
        student_width: Channels of the student.
        found: The gains.
        file: The file to write.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    bars = {"all images together": teacher["pca_dimension"], "one image": teacher["svd_rank"]}
    left.barh(list(bars), [each["p99"] for each in bars.values()], color=[ORANGE, BLUE], height=0.5)
    left.axvline(student_width, color=GREY, linestyle="--", linewidth=1)
    left.text(student_width, 0.5, f" the student's\n {student_width} channels", fontsize=8, color=GREY, va="center")
    left.set_xlabel(f"directions for 95 % of the teacher's features (of {teacher['width']})", fontsize=8)
    left.set_xlim(0, 1.15 * max(*(each["p99"] for each in bars.values()), student_width))
    _draw_gains(right, found)
    for axes, title in ((left, "The mismatch"), (right, "What each method gains")):
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=160)


def _draw_gains(axes: Any, found: Sequence[Gain]) -> None:
    ranked = sorted(found, key=lambda gain: gain.found.mean)
    for i, (_, taught, gain) in enumerate(ranked):
        colour = ORANGE if taught else BLUE
        axes.plot(gain.values, [i] * len(gain.values), ".", color=colour, alpha=0.35, markersize=4)
        bounds = [[gain.mean - gain.low], [gain.high - gain.mean]]
        axes.errorbar(gain.mean, i, xerr=bounds, color=colour, marker="o" if taught else "s", markersize=5)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(ranked)), [gain.title for gain in ranked])
    axes.tick_params(labelsize=8)
    alone = "" if all(gain.taught for gain in ranked) else "\n(blue squares: without a teacher)"
    axes.set_xlabel(f"gain over the plain student, points of accuracy{alone}", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
