"""The order of a replication: teacher, recipe of each student, feature weights, the arms seed by seed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.replication.arms import (
    ARMS,
    BEYOND,
    FEATURE_WEIGHTS,
    LEARNING_RATES,
    RATED,
    SEEDS,
    SELECTION_SEEDS,
    TEACHER,
    TUNED,
    rated_as,
    recipe_changes,
    weight_changes,
)
from tests.replication.geometry import draw
from tests.replication.runs import WEIGHTS_FILE, Job, Place, Run, in_processes, settings, store, train

PROCESSES = 2
DRAWN = ("plain", "lift_mse", "wide_last_mse")
CACHE = "--data.init_args.cache"
RECIPE, WEIGHTS = "chosen_recipe", "chosen_weights"


def train_teacher(place: Place) -> None:
    """Trains the teacher, tests and analyses it, and copies it to where it is committed.

    Raises:
        RuntimeError: If another teacher is there.
    """
    _perform(place, _training(place, [Run(TEACHER, "teacher", 0, (), {"arm": TEACHER}, ("test",), geometry=True)]))
    trained = place.runs / TEACHER / "student"
    if not place.teacher.is_dir():
        part = place.teacher.with_name(f"{place.teacher.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(trained, part)
        part.rename(place.teacher)
    elif trained.is_dir() and (trained / WEIGHTS_FILE).read_bytes() != (place.teacher / WEIGHTS_FILE).read_bytes():
        raise RuntimeError(f"{trained} is another teacher than {place.teacher}, from which students learn: remove one.")


def choose_recipe(place: Place) -> None:
    """Chooses the learning rate of each student without a teacher, on held out images.

    Raises:
        RuntimeError: If the data hold none out, so that would be chosen on what is tested on.
    """
    if not place.planned(ARMS["plain"].config).data.init_args.get("holdout"):
        raise RuntimeError(
            "These data hold no training images out, and choices would be made on the test images. Take a data module "
            "with an argument `holdout`, as FashionMNIST has for files of its format (data.init_args.root), and set it."
        )

    def run(arm: str, rate: float, seed: int) -> Run:
        about, changes = {"arm": arm, "rate": rate}, (*ARMS[arm].changes, *recipe_changes(rate))
        name = f"selection/{arm}_lr_{rate:g}_seed_{seed}"
        return Run(name, ARMS[arm].config, seed, changes, about, curve=arm == "plain")

    chosen = _search(place, "rate", RATED, LEARNING_RATES, run)
    best = chosen["plain"]["chosen"]["rate"]
    curves = [(place.read(run("plain", best, seed).name) or {})["curve"] for seed in SELECTION_SEEDS]
    place.write(RECIPE, {**chosen, "plain": {**chosen["plain"], "curves": curves}})


def choose_weights(place: Place) -> None:
    """Chooses the weight of the feature term for each method, on held out training images."""
    recipe = place.read(RECIPE)
    assert recipe is not None

    def run(arm: str, weight: float, seed: int) -> Run:
        return _run(place, f"selection/{arm}_weight_{weight:g}_seed_{seed}", arm, seed, recipe, weight)

    place.write(WEIGHTS, _search(place, "weight", TUNED, FEATURE_WEIGHTS, run))


def _search(
    place: Place,
    key: str,
    arms: Sequence[str],
    grid: Sequence[float],
    run: Callable[[str, float, int], Run],
) -> dict[str, Any]:
    """Returns the best value for each arm: of one grid for all, and of one more value where an end was best."""
    found: dict[str, Any] = {}
    less, more = BEYOND[key]
    for values, end in ((grid, None), ((less, *grid), grid[0]), ((*grid, more), grid[-1])):
        asked = [arm for arm in arms if arm not in found or found[arm]["chosen"][key] == end]
        runs = {(arm, seed): [run(arm, value, seed) for value in values] for seed in SELECTION_SEEDS for arm in asked}
        for seed in SELECTION_SEEDS if asked else ():
            _train_from_cache(place, f"cache_seed_{seed}", [each for arm in asked for each in runs[arm, seed]])
        for arm in asked:
            found[arm] = _best(place, key, [each for seed in SELECTION_SEEDS for each in runs[arm, seed]])
    return found


def train_arms(place: Place, seeds: Sequence[int], names: Iterable[str], choices: Path) -> None:
    """Trains and tests arms, all of one seed after those of another, the long ones last."""
    chosen = place._replace(results=choices)
    recipe, weights = chosen.read(RECIPE), chosen.read(WEIGHTS)
    assert recipe is not None
    assert weights is not None
    for long in (False, True):
        wanted = {name: ARMS[name] for name in names if ARMS[name].long is long}
        for seed in seeds if wanted else ():
            cache, runs = f"cache{'_long' * long}_seed_{seed}", []
            for name, arm in wanted.items():
                weight = None if arm.weight_of is None else weights[arm.weight_of]["chosen"]["weight"]
                run = _run(place, f"{name}_seed_{seed}", name, seed, recipe, weight, cache)
                runs.append(run._replace(commands=("test",), geometry=arm.geometry))
            _train_from_cache(place, cache, runs)


def draw_analysis(place: Place, folder: Path) -> None:
    """Draws the analysis of the teacher and of students of the first seed, as far as they are in the folder of runs."""
    runs = {name: place.runs / f"{name}_seed_{SEEDS[0]}" for name in DRAWN}
    exported = {TEACHER: place.teacher, **{name: run / "student" for name, run in runs.items()}}
    networks = {name: str(student) for name, student in exported.items() if student.is_dir()}
    if not {TEACHER, "plain"} <= set(networks):
        print(
            f"No ranks.png and sep.png are drawn: {place.runs} has no teacher or no plain student of seed {SEEDS[0]}."
        )
        return
    config = str(runs["plain"] / "config.yaml")
    _perform(place, [Job("figures", draw, (networks, config, folder))])


def _run(
    place: Place,
    name: str,
    arm_name: str,
    seed: int,
    recipe: dict[str, Any],
    weight: float | None,
    cache: str | None = None,
) -> Run:
    arm = ARMS[arm_name]
    changes = (*arm.changes, *recipe_changes(recipe[rated_as(arm_name)]["chosen"]["rate"]))
    if weight is not None:
        changes += weight_changes(arm, weight)
    if arm.needs_teacher:
        changes += (*place.taught(), CACHE, str(place.runs / (cache or f"cache_seed_{seed}")))
    return Run(name, arm.config, seed, changes, {"arm": arm_name, "weight": weight})


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
                f"{place.result(run.name)} is a result of other settings than the configs, the choices and the teacher."
                " Remove it, and the run is made again; or give other folders (--results, --runs)."
            )
    return jobs


def _perform(place: Place, jobs: Sequence[Job]) -> None:
    in_processes(place.runs / "logs", jobs, PROCESSES)


def _train_from_cache(place: Place, cache: str, runs: Sequence[Run]) -> None:
    """Trains what is missing: what needs no teacher while the cache is written, then the others; removes the cache."""
    if not (place.teacher / WEIGHTS_FILE).is_file():
        raise RuntimeError(f"There is no teacher in {place.teacher}: run the stage `teacher` first.")
    learning = _training(place, [run for run in runs if CACHE in run.changes])
    alone = _training(place, [run for run in runs if CACHE not in run.changes])
    folder, both = place.runs / cache, ARMS["lift_soft_mse"]
    changes = (*both.changes, *(ARMS["lift_soft_mse_long"].changes[-2:] if "long" in cache else ()))
    storing = [Job(cache, store, (place, cache, both.config, runs[0].seed, changes))] if learning else []
    _perform(place, [*storing, *alone])
    _perform(place, learning)
    shutil.rmtree(folder, ignore_errors=True)


def _best(place: Place, key: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the value with the highest mean accuracy on held out images (the first of equals), beside all of them."""
    found: dict[float, list[float]] = {}
    for run in runs:
        result = place.read(run.name)
        assert result is not None
        found.setdefault(run.about[key], []).append(result["scores"]["val/acc1"])
    tried: list[dict[str, Any]] = [
        {key: value, "validation_acc1": scores, "mean": float(np.mean(scores))} for value, scores in found.items()
    ]
    chosen = max(tried, key=lambda each: each["mean"])
    return {"chosen": chosen, "candidates": tried, "seeds": SELECTION_SEEDS}
