"""Trains, chooses and reports; what is done is skipped: ``python -m tests.replication [STAGE ...] [options]``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from tests.replication.arms import ARMS, SEEDS
from tests.replication.report import write_report
from tests.replication.runs import Place
from tests.replication.stages import choose_recipe, choose_weights, draw_analysis, train_arms, train_teacher

STAGES: dict[str, Callable[[Place, argparse.Namespace], None]] = {
    "teacher": lambda place, args: train_teacher(place),
    "recipe": lambda place, args: choose_recipe(place),
    "weights": lambda place, args: choose_weights(place),
    "arms": lambda place, args: train_arms(place, args.seeds, args.arms, (args.choices or args.results).absolute()),
    "figures": lambda place, args: draw_analysis(place, args.report.absolute().parent),
    "report": lambda place, args: write_report(place.results, args.report),
}


def main(given: list[str] | None = None) -> None:
    """Runs stages in their order."""
    parser = argparse.ArgumentParser(prog="python -m tests.replication", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; by default all")
    parser.add_argument("--runs", type=Path, default=Path("runs/replication"), help="folder of runs and caches")
    parser.add_argument("--results", type=Path, default=Path("configs/replication/results"), help="of the JSON files")
    parser.add_argument("--report", type=Path, default=Path("configs/replication/README.md"), help="file to fill in")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED", help="of the arms")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}"
    )
    parser.add_argument(
        "--teacher", type=Path, default=Path("configs/replication/teacher"), help="folder of the teacher"
    )
    parser.add_argument("--choices", type=Path, help="folder of the choices, if not that of the results")
    parser.add_argument("--over", nargs="+", default=[], help="configs laid over all others: other data, other lengths")
    args = parser.parse_args(given)
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # two runs at once, a core each
    place = Place(args.runs.absolute(), args.results.absolute(), args.teacher.absolute(), tuple(args.over))
    for name, stage in STAGES.items():
        if name in (args.stages or STAGES):
            stage(place, args)


if __name__ == "__main__":
    main()
