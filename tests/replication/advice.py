"""The advice of `kdvit analyze`, judged by what is gained: ``python -m tests.replication.advice``.

Eight teachers and three widths of students on scikit-learn's digits make 24 pairs. The weight of each remedy's term is
chosen first, for all pairs by one of them, on held out training images and by seeds of its own. The advice on a pair is
asked before its students are trained. Then every remedy is trained beside soft KD, and its gain over soft KD alone is
measured, over the same three seeds, on the 500 validation images, by which nothing is chosen. A pair is one job and one
JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from scipy.stats import spearmanr

from kdvit import load_student
from kdvit.analysis.mismatch import HOLDS, advise
from kdvit.cli.lookup import build
from kdvit.cli.parsed import parse_fit
from kdvit.data import ImageDataModule
from kdvit.models import Network
from tests.bench.machine import machine
from tests.replication.arms import SELECTION_SEEDS
from tests.replication.claims import estimate, shown
from tests.replication.demo import last_accuracy
from tests.replication.geometry import analysed
from tests.replication.runs import QUIET, SELDOM, Job, Place, digest, in_processes, kdvit, seeded

SEEDS = (0, 1, 2)
WIDTHS = (16, 8, 24)
CHOSEN_BY = "wide_64", 16  # the demo's pair
HELD_OUT = "--data.init_args.holdout=300"
GRID, LESS, MORE = (0.02, 0.1, 0.5, 2.5, 12.5), 0.004, 62.5  # weights that are tried, and those where an end was best
EPOCHS = 40  # of the demo's students, which are scored at their end
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
METHODS = {"soft_kd": "soft_kd", "none": "soft_kd", "phi_s": "soft_kd", "Lift": "lift", "WideLast": "wide_last"}
"""By config of configs/demo."""
PROJECTORS = {"none": "linear", "phi_s": "phi_s"}  # linear is distilled where the advice is "no remedy"
TERMS = tuple(method for method in METHODS if method != "soft_kd")
WEIGHTS = "weights"
STALE = "{} is a result of other settings than those of now. Remove it, and the folder of the runs."
Pair = dict[str, Any]
SHARES = tuple(share / 20 for share in range(6, 20))
"""From which a fixed target may be worth as much as a lift."""


def rule_before(pair: Pair) -> str:
    """Returns the remedy by the rule of `kdvit analyze` when the pairs were trained."""
    if pair["width"] >= pair["advice"]["need"]:
        return "none"
    return "WideLast" if pair["width"] < pair["advice"]["rank"] else "Lift"


def rule_now(pair: Pair, holds: float = HOLDS) -> str:
    """Returns the remedy by the rule that was refitted to the pairs, for students whose WideLast costs too much."""
    if pair["width"] < min(pair["advice"]["need"], pair["advice"]["rank"]):
        return "WideLast"
    return "phi_s" if pair["advice"]["held"] >= holds else "Lift"


RULES: dict[str, Callable[[Pair], str]] = {
    "the rule before": rule_before,
    "the rule now, refitted to these pairs": rule_now,
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


def teach(place: Place, names: Sequence[str]) -> None:
    """Trains the teachers that are not there."""
    missing = [name for name in names if not (place.runs / name / "teacher" / "student").is_dir()]
    in_two(place, [Job(name, train_teacher, (place, name)) for name in missing])


def planned(place: Place, config: str, *changes: str) -> Any:
    """Returns the student of a config, untrained."""
    elsewhere = ("--trainer.default_root_dir", str(place.runs / "planned"))
    student = parse_fit(["--config", f"configs/demo/{config}.yaml", *changes, *elsewhere]).model.student
    return build("student", Network, student)


def settings(name: str, width: int, *more: Any) -> str:
    """Returns a digest of all that the numbers of a pair follow from, but for machine and libraries."""
    used = sorted({"teacher", *METHODS.values()})
    configs = [yaml.safe_load(Path(f"configs/demo/{config}.yaml").read_text()) for config in used]
    return digest([configs, TEACHERS[name], SOFT, PROJECTORS, SEEDS, EPOCHS, width, *more])


def term(method: str, weight: float) -> tuple[str, ...]:
    """Returns the options that give a method's term a weight."""
    if method not in PROJECTORS:
        return (f"--model.distillers.{METHODS[method]}.weight={weight}",)
    feature = {"class_path": "FeatureDistiller", "init_args": {"projector": PROJECTORS[method], "weight": weight}}
    return ("--model.distillers", json.dumps({"logit": SOFT, "feature": feature}))


def pair_of(place: Place, name: str, width: int, method: str) -> tuple[str, ...]:
    """Returns the options that make a method's config one of a pair."""
    taught = place.runs / name / "teacher" / "student"
    student = [f"{SIZE}.embed_dim={width}"]
    if method in ("Lift", "WideLast"):
        wide = load_student(taught).spec["init_args"]["model_args"]["embed_dim"]
        student.append(f"--model.student.init_args.width={wide}")
        if method == "WideLast":  # heads as near to the student's, two, as divide the width
            heads = min((n for n in range(1, wide + 1) if wide % n == 0), key=lambda n: abs(wide / n - width / 2))
            student.append(f"--model.student.init_args.num_heads={heads}")
    teacher = ("--model.teacher.init_args.arch", f"local-dir:{taught}")
    return ("--config", f"configs/demo/{METHODS[method]}.yaml", *student, *teacher)


def cache(place: Place, name: str, seed: int, held_out: bool) -> Path:
    """Returns the folder of a teacher's outputs for all epochs of a seed."""
    return place.runs / "caches" / f"{name}_{seed}{'_held_out' * held_out}"


def store(place: Place, name: str, seed: int, held_out: bool) -> None:
    """Stores a teacher's outputs for the students of all widths and methods."""
    views = ("--views", str(EPOCHS), "--data.init_args.seed", str(seed), *([HELD_OUT] if held_out else []))
    pair = pair_of(place, name, min(WIDTHS), "Lift")
    folder = cache(place, name, seed, held_out)
    part = folder.with_name(f"{folder.name}.part")  # which goes on, where it was stopped
    kdvit("cache", *pair, "--out", str(part), *views, *QUIET)
    part.rename(folder)


def fit(
    place: Place, name: str, width: int, method: str, seed: int, run: Path, weight: float | None, held_out: bool
) -> None:
    """Trains a student of a teacher by a method, from the cache."""
    pair = pair_of(place, name, width, method)
    length = ("--trainer.max_epochs", str(EPOCHS), "--trainer.check_val_every_n_epoch", str(EPOCHS))
    images = ("--data.init_args.cache", str(cache(place, name, seed, held_out)), *([HELD_OUT] if held_out else []))
    weighted = () if weight is None else term(method, weight)
    kdvit("fit", *pair, *weighted, *images, *length, *_where(run, seed))


def in_two(place: Place, jobs: Sequence[Job]) -> None:
    """Does jobs, two at once."""
    in_processes(place.runs / "logs", jobs, 2)


def store_all(place: Place, names: Sequence[str], seeds: Sequence[int], held_out: bool) -> None:
    """Stores what is missing."""
    missing = [each for each in product(names, seeds) if not cache(place, *each, held_out).is_dir()]
    in_two(place, [Job(f"cache_{name}_{seed}", store, (place, name, seed, held_out)) for name, seed in missing])


def choose(place: Place) -> dict[str, float]:
    """Returns the weight of each method's term: the best of one grid, and of one more where an end of it was best."""
    facts = settings(*CHOSEN_BY, GRID, LESS, MORE, SELECTION_SEEDS, HELD_OUT)
    found = place.read(WEIGHTS)
    if found is not None and found["settings"] != facts:
        raise RuntimeError(STALE.format(place.result(WEIGHTS)))
    if found is not None:
        return dict(found["chosen"])
    name, width = CHOSEN_BY
    store_all(place, [name], SELECTION_SEEDS, held_out=True)
    scores: dict[str, dict[float, float]] = {method: {} for method in TERMS}
    for grid, end in ((GRID, None), ((LESS,), GRID[0]), ((MORE,), GRID[-1])):
        asked = [method for method in TERMS if end is None or best_of(scores[method]) == end]
        tries = list(product(asked, grid, SELECTION_SEEDS))
        runs = {each: place.runs / "selection" / "{}_{:g}_{}".format(*each) for each in tries}
        jobs = [
            Job(f"selection_{run.name}", fit, (place, name, width, method, seed, run, weight, True))
            for (method, weight, seed), run in runs.items()
            if not (run / "student").is_dir()
        ]
        in_two(place, jobs)
        for method, weight in product(asked, grid):
            reached = [100 * last_accuracy(runs[method, weight, seed]) for seed in SELECTION_SEEDS]
            scores[method][weight] = float(np.mean(reached))
    chosen = {method: best_of(scores[method]) for method in TERMS}
    place.write(WEIGHTS, {"chosen": chosen, "scores": scores, "settings": facts, "machine": machine()})
    return chosen


def best_of(scores: dict[float, float]) -> float:
    """Returns the value of the highest score."""
    return max(scores, key=lambda value: scores[value])


def judge(place: Place, name: str, width: int, weights: dict[str, float]) -> None:
    """Asks the advice on a pair, trains its students, and writes both."""
    root = place.runs / name
    data = build("data", ImageDataModule, parse_fit(["--config", str(root / "teacher" / "config.yaml")]).data)
    teacher = load_student(root / "teacher" / "student")
    layer = analysed({"teacher": teacher}, data).networks[0].layers[-1]
    found = advise(layer, planned(place, "soft_kd", f"{SIZE}.embed_dim={width}"))
    advice = {key: getattr(found, key) for key in ("remedy", "decided", "need", "rank", "held")}
    scores: dict[str, list[float]] = {method: [] for method in METHODS}
    for method, seed in product(METHODS, SEEDS):
        run = root / f"{width}" / f"{method}_{seed}"
        fit(place, name, width, method, seed, run, weights.get(method), False)
        scores[method].append(100 * last_accuracy(run))
    content = {
        "teacher": name,
        "width": width,
        "settings": settings(name, width, weights),
        "advice": advice,
        "scores": scores,
        "machine": machine(),
    }
    place.write(f"{name}_{width}", content)


def gain(pair: Pair, method: str) -> float:
    """Returns the mean gain of a method over soft KD alone, in points."""
    return float(np.mean(np.subtract(pair["scores"][method], pair["scores"]["soft_kd"])))


def share_without(pairs: Sequence[Pair], teacher: str) -> float:
    """Returns the share by which the refitted rule gains most on the pairs of all teachers but one."""
    kept = [pair for pair in pairs if pair["teacher"] != teacher]
    return max(SHARES, key=lambda share: sum(gain(pair, rule_now(pair, share)) for pair in kept))


def best(pair: Pair) -> str:
    """Returns the method that gained most."""
    return max(TERMS, key=lambda method: gain(pair, method))


GAINS: dict[str, Callable[[Pair], float]] = {
    **{method: partial(gain, method=method) for method in ("phi_s", "Lift", "WideLast")},
    "phi_s more than Lift": lambda pair: gain(pair, "phi_s") - gain(pair, "Lift"),
}


def correlations(pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    """Returns Spearman's correlation of what is predicted with what was gained, and its range without each teacher."""
    rows = []
    for name, predicted in PREDICTORS.items():
        for method, gained in GAINS.items():
            found = [
                float(spearmanr([predicted(p) for p in kept], [gained(p) for p in kept]).statistic)
                for left_out in (None, *sorted({pair["teacher"] for pair in pairs}))
                for kept in [[pair for pair in pairs if pair["teacher"] != left_out]]
            ]
            rows.append((name, method, f"{found[0]:+.2f} ({min(found[1:]):+.2f} to {max(found[1:]):+.2f})"))
    return rows


def record(pairs: Sequence[Pair]) -> list[tuple[str, str, str, str]]:
    """Returns what each rule gains on average, what more than the first, and how often it names the best.

    The interval of what it gains more is Student's over the teachers, whose pairs are not independent.
    """
    rows = []
    shares = {teacher: share_without(pairs, teacher) for teacher in {pair["teacher"] for pair in pairs}}
    left_out = {"... its share chosen without the pair's teacher": lambda pair: rule_now(pair, shares[pair["teacher"]])}
    for name, rule in [*RULES.items(), *left_out.items()]:
        gains = [gain(pair, rule(pair)) for pair in pairs]
        hits = sum(rule(pair) == best(pair) for pair in pairs)
        more: dict[str, list[float]] = {}
        for pair, gained in zip(pairs, gains, strict=True):
            more.setdefault(pair["teacher"], []).append(gained - gain(pair, rule_before(pair)))
        of_teachers = [float(np.mean(each)) for each in more.values()]
        beside = "" if rule is rule_before or len(more) < 2 else shown(estimate(of_teachers))
        rows.append((name, f"{np.mean(gains):+.2f}", beside, f"{hits} of {len(pairs)}"))
    return rows


def rows(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    """Returns the row of each pair."""
    return [
        (
            pair["teacher"],
            str(pair["width"]),
            str(pair["advice"]["need"]),
            str(pair["advice"]["rank"]),
            f"{100 * pair['advice']['held']:.0f}",
            rule_before(pair) + ("" if pair["advice"]["decided"] else " (undecided)"),
            rule_now(pair),
            *(f"{gain(pair, method):+.1f}" for method in TERMS),
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
    if place.read(WEIGHTS) is None:
        teach(place, CHOSEN_BY[:1])
    weights = choose(place)
    missing = []
    for width, name in product(WIDTHS, TEACHERS):
        found = place.read(f"{name}_{width}")
        if found is None:
            missing.append((name, width))
        elif found["settings"] != settings(name, width, weights):
            raise RuntimeError(STALE.format(place.result(f"{name}_{width}")))
    names = list(dict.fromkeys(name for name, _ in missing))
    teach(place, names)
    store_all(place, names, SEEDS, held_out=False)
    in_two(place, [Job(f"{name}_{width}", judge, (place, name, width, weights)) for name, width in missing])


if __name__ == "__main__":
    main()
