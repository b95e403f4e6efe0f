"""The order of a replication: teacher, recipe of the plain student, feature weights, the arms seed by seed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.replication.arms import (
    ARMS,
    FEATURE_WEIGHTS,
    LEARNING_RATES,
    SEEDS,
    SELECTION_SEED,
    TEACHER,
    TUNED,
    WEIGHT_DECAYS,
    Arm,
    recipe_changes,
    weight_changes,
)
from tests.replication.geometry import draw
from tests.replication.runs import Job, Place, Run, in_processes, settings, store, train

PROCESSES = 2
DRAWN = ("plain", "lift_mse", "wide_last_mse")
CACHE = "--data.init_args.cache"
RECIPE, WEIGHTS = "chosen_recipe", "chosen_weights"


def choose_recipe(place: Place) -> None:
    """Trains the teacher; meanwhile chooses learning rate and weight decay for the plain student, on held out images.

    Raises:
        RuntimeError: If the data hold none out, so that would be chosen on what is tested on.
    """
    if not place.planned(ARMS["plain"].config).data.init_args.get("holdout"):
        raise RuntimeError(
            "These data hold no training images out, and choices would be made on the test images. Take a data module "
            "with an argument `holdout`, as FashionMNIST has for files of its format (data.init_args.root), and set it."
        )
    candidates = {
        f"selection/plain_lr_{rate:g}_decay_{decay:g}": {"learning_rate": rate, "weight_decay": decay}
        for rate in LEARNING_RATES
        for decay in WEIGHT_DECAYS
    }
    runs = [
        Run(name, ARMS["plain"].config, SELECTION_SEED, recipe_changes(**values), {"arm": "plain", **values})
        for name, values in candidates.items()
    ]
    _perform(place, [*_training(place, [_teacher(scored=False)]), *_training(place, runs)])
    place.write(RECIPE, _best(place, list(candidates)))


def choose_weights(place: Place) -> None:
    """Chooses the weight of the feature term for each method, on held out training images, from one grid for all."""
    recipe = chosen_recipe(place)
    names = {arm: [f"selection/{arm}_weight_{weight:g}" for weight in FEATURE_WEIGHTS] for arm in TUNED}
    runs = [
        _run(place, name, ARMS[arm], SELECTION_SEED, recipe, weight, {"arm": arm, "weight": weight})
        for arm in TUNED
        for name, weight in zip(names[arm], FEATURE_WEIGHTS, strict=True)
    ]
    _train_from_cache(place, SELECTION_SEED, runs)
    place.write(WEIGHTS, {arm: _best(place, candidates) for arm, candidates in names.items()})


def train_arms(place: Place, seeds: Sequence[int] = SEEDS) -> None:
    """Scores the teacher, and trains and tests all arms of one seed after those of another."""
    recipe, weights = chosen_recipe(place), place.read(WEIGHTS)
    assert weights is not None
    _perform(place, _training(place, [_teacher(scored=True)]))
    for seed in seeds:
        runs = []
        for name, arm in ARMS.items():
            weight = None if arm.weight_of is None else weights[arm.weight_of]["chosen"]["weight"]
            about = {"arm": name, "weight": weight}
            run = _run(place, f"{name}_seed_{seed}", arm, seed, recipe, weight, about)
            runs.append(run._replace(commands=("validate", "test"), geometry=arm.geometry))
        _train_from_cache(place, seed, runs)


def draw_analysis(place: Place, folder: Path) -> None:
    """Draws the analysis of the teacher and of students of the first seed, as far as they are in the folder of runs."""
    runs = {TEACHER: TEACHER, **{name: f"{name}_seed_{SEEDS[0]}" for name in DRAWN}}
    exported = {name: place.runs / run / "student" for name, run in runs.items()}
    networks = {name: str(student) for name, student in exported.items() if student.is_dir()}
    if not {TEACHER, "plain"} <= set(networks):
        print(
            f"No ranks.png and sep.png are drawn: {place.runs} has no teacher or no plain student of seed {SEEDS[0]}."
        )
        return
    config = str(place.runs / runs["plain"] / "config.yaml")
    _perform(place, [Job("figures", draw, (networks, config, folder))])


def chosen_recipe(place: Place) -> tuple[str, ...]:
    """Returns the options of the recipe that was chosen."""
    found = place.read(RECIPE)
    assert found is not None
    return recipe_changes(found["chosen"]["learning_rate"], found["chosen"]["weight_decay"])


def _run(
    place: Place,
    name: str,
    arm: Arm,
    seed: int,
    recipe: tuple[str, ...],
    weight: float | None,
    about: dict[str, Any],
) -> Run:
    changes = (*arm.changes, *recipe)
    if weight is not None:
        changes += weight_changes(arm, weight)
    if arm.needs_teacher:
        changes += (*place.teacher(), CACHE, _cache(place, seed))
    return Run(name, arm.config, seed, changes, about)


def _cache(place: Place, seed: int) -> str:
    return str(place.runs / f"cache_seed_{seed}")


def _teacher(scored: bool) -> Run:
    """Returns the training of the teacher; it is scored on the test set only when everything is chosen."""
    return Run(TEACHER, "teacher", 0, (), {"arm": TEACHER}, ("test",) if scored else (), geometry=scored)


def _training(place: Place, runs: Sequence[Run]) -> list[Job]:
    """Returns the runs that have no result yet, as jobs.

    Raises:
        RuntimeError: If a result is of other settings than those of now.
    """
    jobs = []
    for run in runs:
        found = place.read(run.name)
        if found is None:
            jobs.append(Job(run.name, train, (place, run)))
        elif found["settings"] != settings(place, run):
            raise RuntimeError(
                f"{place.result(run.name)} is a result of other settings than the configs and choices. Remove it, and "
                "the run is made again; or give other folders (--results, --runs)."
            )
    return jobs


def _perform(place: Place, jobs: Sequence[Job]) -> None:
    in_processes(place.runs / "logs", jobs, PROCESSES)


def _train_from_cache(place: Place, seed: int, runs: Sequence[Run]) -> None:
    """Trains what is missing: what needs no teacher while the cache is written, then the others; removes the cache."""
    alone = [run for run in runs if CACHE not in run.changes]
    learning = _training(place, [run for run in runs if CACHE in run.changes])
    if learning and not (place.runs / TEACHER / "student").is_dir():
        raise RuntimeError(
            f"{learning[0].name} learns from the teacher, whose weights are not in {place.runs / TEACHER}. Bring "
            "them back, or give an empty folder of --results: those at hand are of that teacher."
        )
    folder, both = _cache(place, seed), ARMS["lift_soft_mse"]
    storing = [Job(f"cache_seed_{seed}", store, (place, folder, both.config, seed, both.changes))] if learning else []
    _perform(place, [*storing, *_training(place, alone)])
    _perform(place, learning)
    shutil.rmtree(folder, ignore_errors=True)


def _best(place: Place, names: Sequence[str]) -> dict[str, Any]:
    """Returns the candidate with the highest validation accuracy (the first of equals), beside all of them."""
    found = {name: place.read(name) for name in names}
    tried = [
        {key: value for key, value in each.items() if key in ("learning_rate", "weight_decay", "weight")}
        | {"validation_acc1": each["scores"]["val/acc1"]}
        for each in found.values()
        if each is not None
    ]
    chosen = max(tried, key=lambda each: each["validation_acc1"])
    return {"chosen": chosen, "candidates": tried, "seed": SELECTION_SEED}
