"""Pairs whose students show what the advice of `kdvit analyze` is worth: ``python -m tests.replication.pairs``.

24 pairs are of scikit-learn's digits, eight teachers and three widths of students; the rule was refitted to them. 12
are of Fashion-MNIST, four teachers and three widths, and came afterwards. The advice on a pair is asked before its
students are trained. Then every remedy is trained beside soft KD, and its gain over soft KD alone is measured, over the
same three seeds, on images by which nothing is chosen. A pair is one job and one JSON file. The weight of each remedy's
term is one for all pairs of a data set: on digits it is chosen first, on held out training images and by seeds of its
own; on Fashion-MNIST it is the replication's, and the learning rates are too.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from kdvit import load_student
from kdvit.analysis.mismatch import advise
from kdvit.cli.lookup import build
from kdvit.cli.parsed import parse_fit
from kdvit.data import ImageDataModule
from kdvit.models import Network
from tests.bench.machine import machine
from tests.replication.arms import SELECTION_SEEDS, recipe_changes
from tests.replication.demo import last_accuracy
from tests.replication.geometry import analysed
from tests.replication.runs import QUIET, SELDOM, Job, Place, digest, in_processes, kdvit, seeded
from tests.replication.stages import RECIPE
from tests.replication.stages import WEIGHTS as REPLICATIONS

SEEDS = (0, 1, 2)
CHOSEN_BY = "wide_64", 16  # the demo's pair
HELD_OUT = ("--data.init_args.holdout=300",)
GRID, LESS, MORE = (0.02, 0.1, 0.5, 2.5, 12.5), 0.004, 62.5  # weights that are tried, and those where an end was best
GIANT = "giant_channel"
SIZE = "--model.student.init_args.model_args"
SOFT = {"class_path": "LogitDistiller", "init_args": {"weight": 0.5}}
METHODS = {"soft_kd": "soft_kd", "none": "soft_kd", "phi_s": "soft_kd", "Lift": "lift", "WideLast": "wide_last"}
"""By config."""
PROJECTORS = {"none": "linear", "phi_s": "phi_s"}  # linear is distilled where the advice is "no remedy"
TERMS = tuple(method for method in METHODS if method != "soft_kd")
WEIGHTS = "weights"
STALE = "{} is a result of other settings than those of now. Remove it, and the folder of the runs."
Pair = dict[str, Any]


class Study(NamedTuple):
    """Pairs of one data set.

    Attributes:
        configs: Folder of the configs.
        teachers: How each differs from its config.
        committed: The teacher that is not trained, as it is in the folder of the configs.
        widths: Of the students.
        epochs: Of the students, which are scored at their end.
        options: Of all trainings of students.
        soft: The logit term.
    """

    configs: str
    teachers: dict[str, tuple[str, ...]]
    committed: str | None
    widths: tuple[int, ...]
    epochs: int
    options: tuple[str, ...]
    soft: dict[str, Any]

    def folder(self, place: Place, name: str) -> Path:
        """Returns the folder of a teacher."""
        return Path(self.configs, "teacher") if name == self.committed else place.runs / name / "teacher" / "student"


def _giant(name: str) -> str:
    return f"--model.student.init_args.checkpoint=RUNS/{name}.safetensors"


FEWER = "--data.init_args.train_size=20000"  # a third
DIGITS = Study(
    "configs/demo",
    {  # that of the demo is 64 wide, with 4 blocks
        "wide_32": (f"{SIZE}.embed_dim=32",),
        "wide_48": (f"{SIZE}.embed_dim=48",),
        "wide_64": (),
        "wide_96": (f"{SIZE}.embed_dim=96",),
        "deep": (f"{SIZE}.depth=8",),
        "short": ("--trainer.max_epochs=15",),
        "decayed": ("--model.optimizer.weight_decay=1.0",),
        GIANT: (_giant(GIANT),),
    },
    None,
    (16, 8, 24),
    40,
    (),
    SOFT,
)
FASHION = Study(
    "configs/replication",
    {  # that of the replication is 96 wide, with 6 blocks
        "fashion_96": (),
        "fashion_48": (f"{SIZE}.embed_dim=48", FEWER),
        "fashion_short": ("--trainer.max_epochs=3", FEWER),
        "fashion_giant": (_giant("fashion_giant"), FEWER),
    },
    "fashion_96",
    (24, 12, 36),
    100,
    ("--data.init_args.holdout=0", "--model.task_weight=0.1"),  # what is validated on is then the test set
    {"class_path": "LogitDistiller", "init_args": {"weight": 0.9}},
)
STUDIES = (DIGITS, FASHION)


def train_teacher(place: Place, study: Study, name: str) -> None:
    """Trains a teacher; one of a giant channel from weights of which one channel is far from zero, in all blocks."""
    changes = [change.replace("RUNS", str(place.runs)) for change in study.teachers[name]]
    if "giant" in name:
        torch.manual_seed(0)
        weights = planned(place, study, "teacher").model.state_dict()
        weights["pos_embed"][..., 0] += 30.0
        save_file(weights, place.runs / f"{name}.safetensors")
    kdvit("fit", "--config", f"{study.configs}/teacher.yaml", *changes, *_where(place.runs / name / "teacher", 0))


def teach(place: Place, study: Study, names: Sequence[str]) -> None:
    """Trains the teachers that are not there."""
    missing = [name for name in names if not study.folder(place, name).is_dir()]
    in_two(place, [Job(name, train_teacher, (place, study, name)) for name in missing])


def planned(place: Place, study: Study, config: str, *changes: str) -> Any:
    """Returns the student of a config, untrained."""
    elsewhere = ("--trainer.default_root_dir", str(place.runs / "planned"))
    student = parse_fit(["--config", f"{study.configs}/{config}.yaml", *changes, *elsewhere]).model.student
    return build("student", Network, student)


def settings(study: Study, name: str, width: int, *more: Any) -> str:
    """Returns a digest of all that the numbers of a pair follow from, but for machine and libraries."""
    used = sorted({"teacher", *METHODS.values()})
    configs = [yaml.safe_load(Path(f"{study.configs}/{config}.yaml").read_text()) for config in used]
    facts = [configs, study.teachers[name], study.soft, PROJECTORS, SEEDS, study.epochs, width, *more]
    return digest([*facts, *([study.options] if study.options else [])])


def term(study: Study, method: str, weight: float) -> tuple[str, ...]:
    """Returns the options that distil by a method beside soft KD, its term with a weight."""
    if method in PROJECTORS:
        name, feature = "feature", {"projector": PROJECTORS[method]}
    else:
        name, feature = METHODS[method], {}
    kind = {"feature": "FeatureDistiller", "lift": "LiftDistiller", "wide_last": "WideLastDistiller"}[name]
    term = {"class_path": kind, "init_args": {**feature, "weight": weight}}
    return ("--model.distillers", json.dumps({"logit": study.soft, name: term}))


def pair_of(place: Place, study: Study, name: str, width: int, method: str) -> tuple[str, ...]:
    """Returns the options that make a method's config one of a pair."""
    taught = study.folder(place, name)
    student = [f"{SIZE}.embed_dim={width}"]
    if method in ("Lift", "WideLast"):
        wide = load_student(taught).spec["init_args"]["model_args"]["embed_dim"]
        student.append(f"--model.student.init_args.width={wide}")
        if method == "WideLast":  # heads as near to the student's, two, as divide the width
            heads = min((n for n in range(1, wide + 1) if wide % n == 0), key=lambda n: abs(wide / n - width / 2))
            student.append(f"--model.student.init_args.num_heads={heads}")
    teacher = ("--model.teacher.init_args.arch", f"local-dir:{taught}")
    return ("--config", f"{study.configs}/{METHODS[method]}.yaml", *student, *teacher, *study.options)


def cache(place: Place, name: str, seed: int, held_out: bool) -> Path:
    """Returns the folder of a teacher's outputs for all epochs of a seed."""
    return place.runs / "caches" / f"{name}_{seed}{'_held_out' * held_out}"


def store(place: Place, study: Study, name: str, seed: int, held_out: bool) -> None:
    """Stores a teacher's outputs for the students of all widths and methods."""
    views = ("--views", str(study.epochs), "--data.init_args.seed", str(seed), *(HELD_OUT if held_out else ()))
    pair = (*pair_of(place, study, name, min(study.widths), "Lift"), *term(study, "Lift", 1.0))
    folder = cache(place, name, seed, held_out)
    part = folder.with_name(f"{folder.name}.part")  # which goes on, where it was stopped
    kdvit("cache", *pair, "--out", str(part), *views, *QUIET)
    part.rename(folder)


def fit(
    place: Place,
    study: Study,
    name: str,
    width: int,
    method: str,
    seed: int,
    run: Path,
    changes: tuple[str, ...],
    held_out: bool = False,
) -> None:
    """Trains a student of a teacher by a method, from the cache."""
    pair = pair_of(place, study, name, width, method)
    length = ("--trainer.max_epochs", str(study.epochs), "--trainer.check_val_every_n_epoch", str(study.epochs))
    images = ("--data.init_args.cache", str(cache(place, name, seed, held_out)), *(HELD_OUT if held_out else ()))
    kdvit("fit", *pair, *changes, *images, *length, *_where(run, seed))


def in_two(place: Place, jobs: Sequence[Job]) -> None:
    """Does jobs, two at once."""
    in_processes(place.runs / "logs", jobs, 2)


def store_all(place: Place, study: Study, names: Sequence[str], seeds: Sequence[int], held_out: bool) -> None:
    """Stores what is missing."""
    missing = [each for each in product(names, seeds) if not cache(place, *each, held_out).is_dir()]
    in_two(place, [Job(f"cache_{name}_{seed}", store, (place, study, name, seed, held_out)) for name, seed in missing])


def choose(place: Place) -> dict[str, float]:
    """Returns the weight of each method's term on digits: the best of a grid, and of one more where an end was best."""
    facts = settings(DIGITS, *CHOSEN_BY, GRID, LESS, MORE, SELECTION_SEEDS, *HELD_OUT)
    found = place.read(WEIGHTS)
    if found is not None and found["settings"] != facts:
        raise RuntimeError(STALE.format(place.result(WEIGHTS)))
    if found is not None:
        return dict(found["chosen"])
    name, width = CHOSEN_BY
    teach(place, DIGITS, [name])
    store_all(place, DIGITS, [name], SELECTION_SEEDS, held_out=True)
    scores: dict[str, dict[float, float]] = {method: {} for method in TERMS}
    for grid, end in ((GRID, None), ((LESS,), GRID[0]), ((MORE,), GRID[-1])):
        asked = [method for method in TERMS if end is None or best_of(scores[method]) == end]
        tries = list(product(asked, grid, SELECTION_SEEDS))
        runs = {each: place.runs / "selection" / "{}_{:g}_{}".format(*each) for each in tries}
        jobs = [
            Job(
                f"selection_{run.name}",
                fit,
                (place, DIGITS, name, width, method, seed, run, term(DIGITS, method, weight), True),
            )
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


def changes_of(place: Place, study: Study) -> dict[str, tuple[str, ...]]:
    """Returns the options of each method, the weight of its term and the learning rate among them."""
    if study is DIGITS:
        weights = choose(place)
        return {method: term(study, method, weights[method]) if method in TERMS else () for method in METHODS}
    replication = place._replace(results=place.results.parent)
    recipe, found = replication.read(RECIPE), replication.read(REPLICATIONS)
    assert recipe is not None
    assert found is not None
    arms = {"none": "linear", "phi_s": "phi_s", "Lift": "lift_mse", "WideLast": "wide_last_mse"}
    rates = {"Lift": "lift_none", "WideLast": "wide_last_none"}
    changes = {}
    for method in METHODS:
        rate = recipe_changes(recipe[rates.get(method, "plain")]["chosen"]["rate"])
        own = term(study, method, found[arms[method]]["chosen"]["weight"]) if method in TERMS else ()
        changes[method] = (*rate, *own)
    return changes


def judge(place: Place, study: Study, name: str, width: int, changes: dict[str, tuple[str, ...]], facts: str) -> None:
    """Asks the advice on a pair, trains its students, and writes both."""
    data = build("data", ImageDataModule, parse_fit(["--config", f"{study.configs}/teacher.yaml"]).data)
    teacher = load_student(study.folder(place, name))
    layer = analysed({"teacher": teacher}, data).networks[0].layers[-1]
    found = advise(layer, planned(place, study, "soft_kd", f"{SIZE}.embed_dim={width}"))
    advice = {key: getattr(found, key) for key in ("verdict", "decided", "need", "rank", "held", "outliers")}
    advice["variant"] = found.rests_on.variant
    scores: dict[str, list[float]] = {method: [] for method in METHODS}
    for seed, method in product(SEEDS, METHODS):
        run = place.runs / name / f"{width}" / f"{method}_{seed}"
        fit(place, study, name, width, method, seed, run, changes[method])
        scores[method].append(100 * last_accuracy(run))
    content = {
        "teacher": name,
        "width": width,
        "settings": facts,
        "advice": advice,
        "scores": scores,
        "machine": machine(),
    }
    place.write(f"{name}_{width}", content)


def complete(place: Place, study: Study) -> None:
    """Trains what is missing of a study."""
    changes = changes_of(place, study)
    weights = choose(place) if study is DIGITS else changes
    missing = []
    for width, name in product(study.widths, study.teachers):
        facts, found = settings(study, name, width, weights), place.read(f"{name}_{width}")
        if found is None:
            missing.append((name, width, changes, facts))
        elif found["settings"] != facts:
            raise RuntimeError(STALE.format(place.result(f"{name}_{width}")))
    names = list(dict.fromkeys(name for name, *_ in missing))
    teach(place, study, names)
    store_all(place, study, names, SEEDS, held_out=False)
    in_two(place, [Job(f"{each[0]}_{each[1]}", judge, (place, study, *each)) for each in missing])


def _where(root: Path, seed: int) -> tuple[str, ...]:
    return (*seeded(seed), "--trainer.default_root_dir", str(root), *SELDOM, *QUIET)


def main(given: list[str] | None = None) -> None:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.replication.pairs", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/advice"))
    parser.add_argument("--results", type=Path, default=Path("configs/replication/results/advice"))
    args = parser.parse_args(given)
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = args.runs.absolute()
    place = Place(runs, args.results.absolute(), runs)  # each pair's teacher is among the runs
    for study in STUDIES:
        complete(place, study)


if __name__ == "__main__":
    main()
