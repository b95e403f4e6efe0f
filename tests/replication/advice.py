"""The advice of `kdvit analyze`, judged by what is gained: ``python -m tests.replication.advice``.

Eight teachers and three widths of students on scikit-learn's digits make 24 pairs. The advice on each is asked before
its students are trained. Then every remedy is trained beside soft KD, and its gain over soft KD alone is measured, over
the same three seeds, on the 500 validation images, by which nothing is chosen. A pair is one job and one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from scipy.stats import spearmanr

from kdvit import load_student
from kdvit.analysis.mismatch import advise
from kdvit.cli.lookup import build
from kdvit.cli.parsed import parse_fit
from kdvit.data import ImageDataModule
from kdvit.models import Network
from tests.bench.machine import machine
from tests.replication.demo import last_accuracy
from tests.replication.geometry import analysed
from tests.replication.runs import QUIET, SELDOM, Job, Place, digest, in_processes, kdvit, seeded

SEEDS = (0, 1, 2)
WIDTHS = (8, 16, 24)
GIANT = "giant_channel"
SIZE = "--model.student.init_args.model_args"
TEACHERS = {  # how each differs from that of the demo, 64 wide and 4 blocks
    "wide_32": (f"{SIZE}.embed_dim=32",),
    "wide_48": (f"{SIZE}.embed_dim=48",),
    "wide_64": (),
    "wide_96": (f"{SIZE}.embed_dim=96",),
    "deep": (f"{SIZE}.depth=8",),
    "short": ("--trainer.max_epochs=15",),
    "decayed": ("--model.optimizer.weight_decay=1.0",),
    GIANT: ("--model.student.init_args.checkpoint=RUNS/giant_channel.safetensors",),
}
SOFT = {"class_path": "LogitDistiller", "init_args": {"weight": 0.5}}


def _beside_soft(projector: str, weight: float) -> tuple[str, ...]:
    feature = {"class_path": "FeatureDistiller", "init_args": {"projector": projector, "weight": weight}}
    return ("--model.distillers", json.dumps({"logit": SOFT, "feature": feature}))


METHODS = {  # by config of configs/demo and options; the weights are those chosen on Fashion-MNIST
    "soft_kd": ("soft_kd", ()),
    "none": ("soft_kd", _beside_soft("linear", 0.5)),  # what is distilled where the advice is "no remedy"
    "phi_s": ("soft_kd", _beside_soft("phi_s", 12.5)),
    "Lift": ("lift", ("--model.distillers.lift.weight=0.5",)),
    "WideLast": ("wide_last", ("--model.distillers.wide_last.weight=0.5",)),
}
RULES: dict[str, Callable[[dict[str, Any]], str]] = {
    "the advice": lambda pair: str(pair["advice"]["remedy"]),
    "always phi_s": lambda pair: "phi_s",
    "always Lift": lambda pair: "Lift",
    "always WideLast": lambda pair: "WideLast",
    "always the linear projector": lambda pair: "none",
    "the best of each pair, known afterwards": lambda pair: best(pair),
}
PREDICTORS = {
    "shared axes over channels": lambda pair: pair["advice"]["need"] / pair["width"],
    "energy that the channels cannot hold": lambda pair: 1 - pair["advice"]["held"],
}


def train_teacher(place: Place, name: str) -> None:
    """Trains a teacher; that of the giant channel from weights of which one channel is far from zero, in all blocks."""
    changes = [change.replace("RUNS", str(place.runs)) for change in TEACHERS[name]]
    if name == GIANT:
        torch.manual_seed(0)
        weights = planned(place, "teacher").model.state_dict()
        weights["pos_embed"][..., 0] += 30.0
        save_file(weights, place.runs / f"{GIANT}.safetensors")
    kdvit("fit", "--config", "configs/demo/teacher.yaml", *changes, *_where(place.runs / name / "teacher", 0))


def planned(place: Place, config: str, *changes: str) -> Any:
    """Returns the student of a config, untrained."""
    elsewhere = ("--trainer.default_root_dir", str(place.runs / "planned"))
    student = parse_fit(["--config", f"configs/demo/{config}.yaml", *changes, *elsewhere]).model.student
    return build("student", Network, student)


def settings(name: str, width: int) -> str:
    """Returns a digest of all that the numbers of a pair follow from, but for machine and libraries."""
    used = sorted({"teacher", *(config for config, _ in METHODS.values())})
    configs = [yaml.safe_load(Path(f"configs/demo/{config}.yaml").read_text()) for config in used]
    return digest([configs, TEACHERS[name], METHODS, SEEDS, width])


def judge(place: Place, name: str, width: int) -> None:
    """Asks the advice on a pair, trains its students, and writes both."""
    root = place.runs / name
    data = build("data", ImageDataModule, parse_fit(["--config", str(root / "teacher" / "config.yaml")]).data)
    teacher = load_student(root / "teacher" / "student")
    layer = analysed({"teacher": teacher}, data).networks[0].layers[-1]
    found = advise(layer, planned(place, "soft_kd", f"{SIZE}.embed_dim={width}"))
    advice = {key: getattr(found, key) for key in ("remedy", "decided", "need", "rank", "held")}
    scores: dict[str, list[float]] = {method: [] for method in METHODS}
    for method, (config, changes) in METHODS.items():
        for seed in SEEDS:
            run = root / f"{width}" / f"{method}_{seed}"
            student = (f"{SIZE}.embed_dim={width}",)
            if method in ("Lift", "WideLast"):
                student += (f"--model.student.init_args.width={teacher.spec['init_args']['model_args']['embed_dim']}",)
            taught = ("--model.teacher.init_args.arch", f"local-dir:{root / 'teacher' / 'student'}")
            kdvit("fit", "--config", f"configs/demo/{config}.yaml", *student, *changes, *taught, *_where(run, seed))
            scores[method].append(100 * last_accuracy(run))
    content = {
        "teacher": name,
        "width": width,
        "settings": settings(name, width),
        "advice": advice,
        "scores": scores,
        "machine": machine(),
    }
    place.write(f"{name}_{width}", content)


def gain(pair: dict[str, Any], method: str) -> float:
    """Returns the mean gain of a method over soft KD alone, in points."""
    return float(np.mean(np.subtract(pair["scores"][method], pair["scores"]["soft_kd"])))


def best(pair: dict[str, Any]) -> str:
    """Returns the method that gained most."""
    return max((method for method in METHODS if method != "soft_kd"), key=lambda method: gain(pair, method))


def correlations(pairs: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Returns Spearman's correlation of what is predicted with what was gained, and its range without each teacher."""
    rows = []
    for name, predicted in PREDICTORS.items():
        for method in ("phi_s", "Lift", "WideLast"):
            found = [
                float(spearmanr([predicted(p) for p in kept], [gain(p, method) for p in kept]).statistic)
                for left_out in (None, *sorted({pair["teacher"] for pair in pairs}))
                for kept in [[pair for pair in pairs if pair["teacher"] != left_out]]
            ]
            rows.append((name, method, f"{found[0]:+.2f} ({min(found[1:]):+.2f} to {max(found[1:]):+.2f})"))
    return rows


def record(pairs: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Returns what each rule gains on average, and how often it names the best."""
    rows = []
    for name, rule in RULES.items():
        gains = [gain(pair, rule(pair)) for pair in pairs]
        hits = sum(rule(pair) == best(pair) for pair in pairs)
        rows.append((name, f"{np.mean(gains):+.2f}", f"{hits} of {len(pairs)}"))
    return rows


def rows(pairs: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the row of each pair."""
    return [
        (
            pair["teacher"],
            str(pair["width"]),
            str(pair["advice"]["need"]),
            str(pair["advice"]["rank"]),
            f"{100 * pair['advice']['held']:.0f}",
            pair["advice"]["remedy"] + ("" if pair["advice"]["decided"] else " (undecided)"),
            *(f"{gain(pair, method):+.1f}" for method in METHODS if method != "soft_kd"),
            best(pair),
        )
        for pair in pairs
    ]


def _where(root: Path, seed: int) -> tuple[str, ...]:
    return (*seeded(seed), "--trainer.default_root_dir", str(root), *SELDOM, *QUIET)


def main(given: list[str] | None = None) -> None:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.replication.advice", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/advice"))
    parser.add_argument("--results", type=Path, default=Path("configs/replication/results/advice"))
    args = parser.parse_args(given)
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = args.runs.absolute()
    place = Place(runs, args.results.absolute(), runs)  # each pair's teacher is among the runs
    wanted = []
    for name, width in product(TEACHERS, WIDTHS):
        found = place.read(f"{name}_{width}")
        if found is None:
            wanted.append((name, width))
        elif found["settings"] != settings(name, width):
            file = place.result(f"{name}_{width}")
            raise RuntimeError(f"{file} is a result of other settings than those of now. Remove it.")
    untaught = [name for name in TEACHERS if not (place.runs / name / "teacher" / "student").is_dir()]
    needed = [name for name in untaught if name in {name for name, _ in wanted}]
    in_processes(place.runs / "logs", [Job(name, train_teacher, (place, name)) for name in needed], 2)
    jobs = [Job(f"{name}_{width}", judge, (place, name, width)) for name, width in wanted]
    in_processes(place.runs / "logs", jobs, 2)


if __name__ == "__main__":
    main()
