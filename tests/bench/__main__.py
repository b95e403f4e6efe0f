"""Runs measurements and prints them as a table: ``python -m tests.bench [NAME ...] [--rounds N] [--out FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from tests.bench import analyses, cached, data, gpu, online, scale, step, teacher
from tests.bench.machine import machine
from tests.bench.rounds import Row

MEASUREMENTS: dict[str, Callable[[int], Iterable[Row]]] = {
    "step": step.tiny,
    "step-deit": step.deit,
    "teacher": teacher.rows,
    "online": online.rows,
    "cached": cached.rows,
    "analyses": analyses.rows,
    "data": data.rows,
    "scale": scale.rows,
    "gpu": gpu.rows,
}
ON_GPU = ("gpu",)
SECONDS = 480  # after which no row is begun on a GPU


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(MEASUREMENTS)}; by default all of the CPU's, or where there is a GPU, its own",
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each measurement")
    parser.add_argument("--out", help="a JSON file to write, with the machine")
    args = parser.parse_args()
    if unknown := set(args.names) - set(MEASUREMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(MEASUREMENTS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    has_gpu = torch.cuda.is_available()
    end = time.monotonic() + (SECONDS if has_gpu else float("inf"))
    print("| measured | kdvit | other | result | rounds from, to | images/s | peak GB | goal |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    measured = []
    for name in args.names or [name for name in MEASUREMENTS if (name in ON_GPU) == has_gpu]:
        for each in MEASUREMENTS[name](args.rounds):
            print(_line(each), flush=True)
            measured.append({"name": name, "rounds": args.rounds, **each._asdict()})
            if time.monotonic() > end:
                print(f"{SECONDS} s are over: the rows that follow are left out.")
                break
    if args.out:
        Path(args.out).write_text(json.dumps({"machine": machine(), "measured": measured}, indent=1) + "\n")


def _line(row: Row) -> str:
    low, high = row.spread
    seconds = row.kdvit / {"s": 1, "ms": 1e3}[row.unit]
    rate = f"{row.images / seconds:,.0f}" if row.images else ""
    peaks = "{:.1f}, {:.1f}".format(*row.peak_gb) if row.peak_gb else ""
    return (
        f"| {row.what} | {row.kdvit:.3g} {row.unit} | {row.other:.3g} {row.unit} | {row.result:.3f} "
        f"| {low:.2f}, {high:.2f} | {rate} | {peaks} | {row.goal} |"
    )


if __name__ == "__main__":
    main()
