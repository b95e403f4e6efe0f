"""Runs measurements and prints them as a table: ``python -m tests.bench [NAME ...] [--rounds N] [--out FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench import analyses, cached, data, online, scale, step, teacher
from tests.bench.machine import machine
from tests.bench.rounds import Row

MEASUREMENTS: dict[str, Callable[[int], list[Row]]] = {
    "step": step.tiny,
    "step-deit": step.deit,
    "teacher": teacher.rows,
    "online": online.rows,
    "cached": cached.rows,
    "analyses": analyses.rows,
    "data": data.rows,
    "scale": scale.rows,
}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)}; by default all")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each measurement")
    parser.add_argument("--out", help="a JSON file to write, with the machine")
    args = parser.parse_args()
    if unknown := set(args.names) - set(MEASUREMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(MEASUREMENTS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print("| measured | kdvit | other | result | rounds from, to | goal |\n|---|--:|--:|--:|--:|---|")
    measured = []
    for name in args.names or MEASUREMENTS:
        for each in MEASUREMENTS[name](args.rounds):
            print(_line(each), flush=True)
            measured.append({"name": name, "rounds": args.rounds, **each._asdict()})
    if args.out:
        Path(args.out).write_text(json.dumps({"machine": machine(), "measured": measured}, indent=1) + "\n")


def _line(row: Row) -> str:
    low, high = row.spread
    return (
        f"| {row.what} | {row.kdvit:.3g} {row.unit} | {row.other:.3g} {row.unit} | {row.result:.3f} "
        f"| {low:.2f}, {high:.2f} | {row.goal} |"
    )


if __name__ == "__main__":
    main()
