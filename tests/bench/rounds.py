"""Timing in interleaved rounds, and the rows of the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        what: What was measured.
        kdvit: Median time of kdvit, in the unit.
        other: Median time of the other side, in the unit.
        unit: Unit of the two.
        result: What is compared with the goal: a ratio or a difference of the two sides in one round; its median.
        spread: Smallest and largest of the rounds.
        goal: The goal for `result`, in words.
        images: Images behind one time, for images/s; 0 where there are none, or not as many on both sides.
        peak_gb: Memory of a GPU that one time takes at most, beside what was taken before: kdvit's and the other's.
    """

    what: str
    kdvit: float
    other: float
    unit: str
    result: float
    spread: tuple[float, float]
    goal: str
    images: int = 0
    peak_gb: tuple[float, float] | None = None


def interleave(kdvit: Callable[[], float], other: Callable[[], float], rounds: int) -> list[tuple[float, float]]:
    """Runs both sides in turn, each returning its own time, after a round that does not count.

    The sides change places from round to round.
    """
    kdvit(), other()
    pairs = []
    for i in range(rounds):
        if i % 2:
            theirs = other()
            pairs.append((kdvit(), theirs))
        else:
            ours = kdvit()
            pairs.append((ours, other()))
    return pairs


def row(
    what: str, pairs: list[tuple[float, float]], compare: Callable[[float, float], float], unit: str, goal: str
) -> Row:
    """Returns the medians over rounds of both sides (seconds) and of their comparison."""
    scale = {"s": 1.0, "ms": 1e3}[unit]
    results = [compare(ours, theirs) for ours, theirs in pairs]
    ours, theirs = (scale * statistics.median(side) for side in zip(*pairs, strict=True))
    return Row(what, ours, theirs, unit, statistics.median(results), (min(results), max(results)), goal)


def speed_up(ours: float, theirs: float) -> float:
    """How many times faster kdvit is."""
    return theirs / ours


def cost(ours: float, theirs: float) -> float:
    """How many times the other side's time kdvit takes."""
    return ours / theirs


def milliseconds(ours: float, theirs: float) -> float:
    """How many milliseconds kdvit takes more."""
    return 1e3 * (ours - theirs)
