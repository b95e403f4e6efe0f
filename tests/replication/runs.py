"""One run of kdvit in a process of its own, and what it leaves: one JSON file, written whole."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from kdvit import load_student
from kdvit.cli.config_files import find_config, find_configs
from kdvit.cli.fit import KdvitCLI
from kdvit.cli.parsed import parse_fit
from kdvit.files import write_whole
from kdvit.models.cost import parameter_count
from kdvit.runtime.loggers import read_table
from tests.bench.machine import machine
from tests.replication.geometry import measured_layers

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])
WEIGHTS_FILE = "model.safetensors"
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
UNSCORED = ("--trainer.limit_val_batches", "0", "--last_checkpoint.save_on_train_epoch_end", "true")  # but at the end
SELDOM = ("--last_checkpoint.every_n_epochs", "25")  # of many short epochs


class Place(NamedTuple):
    """Where a replication lives.

    Attributes:
        runs: Folder of the run directories and caches.
        results: Folder of the JSON files.
        teacher: Folder of the teacher, as `kdvit fit` exports a student.
        over: Configs that are laid over each of configs/replication: other data, other lengths.
    """

    runs: Path
    results: Path
    teacher: Path
    over: tuple[str, ...] = ()

    def result(self, name: str) -> Path:
        """Returns the file of a result."""
        return self.results / f"{name}.json"

    def read(self, name: str) -> dict[str, Any] | None:
        """Returns a result, if it is there."""
        file = self.result(name)
        return json.loads(file.read_text()) if file.is_file() else None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a result in one piece."""
        self.result(name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.result(name), (json.dumps(content, indent=1) + "\n").encode())

    def files(self, config: str) -> list[str]:
        """Returns a config of configs/replication and what is laid over it."""
        return [f"configs/replication/{config}.yaml", *self.over]

    def configs(self, config: str) -> list[str]:
        """Returns the options that name them."""
        return [word for file in self.files(config) for word in ("--config", file)]

    def taught(self) -> tuple[str, ...]:
        """Returns the options that name the teacher."""
        return ("--model.teacher.init_args.arch", f"local-dir:{self.teacher}")

    def planned(self, config: str, changes: tuple[str, ...] = ()) -> Any:
        """Returns a config as a fit would take it."""
        root = ("--trainer.default_root_dir", str(self.runs / "planned"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
            return parse_fit([*self.configs(config), *changes, *root])


class Run(NamedTuple):
    """A training.

    Attributes:
        name: Of its folder and its result.
        config: Of configs/replication, without suffix.
        seed: Of weights, order and augmentation.
        changes: Options of `kdvit fit`.
        about: What the result tells of it.
        commands: The commands that score it: validate, test.
        geometry: Whether its features are analysed.
        curve: Whether it is validated on its way, by which its length is judged.
    """

    name: str
    config: str
    seed: int
    changes: tuple[str, ...]
    about: dict[str, Any]
    commands: tuple[str, ...] = ("validate",)
    geometry: bool = False
    curve: bool = False


def options(place: Place, run: Run) -> list[str]:
    """Returns a run's options as they are anywhere: with RUNS and TEACHER for the folders of these."""
    return [each.replace(str(place.runs), "RUNS").replace(str(place.teacher), "TEACHER") for each in run.changes]


def settings(place: Place, run: Run) -> str:
    """Returns a digest of all that a run's numbers follow from, but for machine, libraries and where files lie."""
    configs = [yaml.safe_load(Path(find_config(file)).read_text()) for file in place.files(run.config)]
    learns = any(str(place.teacher) in each for each in run.changes)
    teacher = hashlib.sha256((place.teacher / WEIGHTS_FILE).read_bytes()).hexdigest() if learns else None
    return digest([configs, options(place, run), run.seed, teacher])


def digest(facts: Any) -> str:
    """Returns the SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def seeded(seed: int) -> tuple[str, ...]:
    """Returns the options that set the seed of a run's weights, order and augmentation."""
    return ("--seed_everything", str(seed), "--data.init_args.seed", str(seed))


def train(place: Place, run: Run) -> None:
    """Trains, scores the weights of the last step, and writes the result; goes on where it was stopped."""
    root = place.runs / run.name
    where = ("--trainer.default_root_dir", str(root))
    rest = (*(() if run.curve else UNSCORED), *(() if run.config == "teacher" else SELDOM), *QUIET)
    kdvit("fit", *place.configs(run.config), *run.changes, *seeded(run.seed), *where, *rest)
    scores: dict[str, float] = {}
    trained = time.perf_counter()
    for command in run.commands:
        last = ("--config", str(root / "config.yaml"), "--ckpt_path", "last", "--trainer.limit_val_batches", "1.0")
        cli = kdvit(command, *last)
        scores |= {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    student = load_student(root / "student")
    result = {
        **run.about,
        "seed": run.seed,
        "config": f"configs/replication/{run.config}.yaml",
        "changes": options(place, run),
        "settings": settings(place, run),
        "parameters": parameter_count(student),
        "scores": scores,
        "images_per_second": images_per_second(root),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    if run.curve:
        rows = read_table(root / "metrics.csv")
        result["curve"] = {row["epoch"] + 1: row["val/acc1"] for row in rows if "val/acc1" in row}
    if run.geometry:
        result["geometry"] = measured_layers({run.name: student}, cli.datamodule)
    result["seconds"] = student.spec["run"]["seconds"] + time.perf_counter() - trained
    result["cpu_seconds"] = cpu_seconds(root)
    place.write(run.name, result)
    shutil.rmtree(root / "checkpoints")


def store(place: Place, name: str, config: str, seed: int, changes: tuple[str, ...]) -> None:
    """Stores the teacher's outputs for all epochs of a seed, so that a student sees no view twice."""
    start = time.perf_counter()
    epochs = place.planned(config, changes).trainer.max_epochs
    shape = ("--out", str(place.runs / name), "--views", str(epochs), "--data.init_args.seed", str(seed))
    kdvit("cache", *place.configs(config), *changes, *place.taught(), *shape, *QUIET)
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
    before = place.read(name) or {}  # it is stored again for each new run that needs it
    seconds = {key: value + before.get(key, 0.0) for key, value in spent.items()}
    place.write(name, {"seed": seed, **seconds, "machine": machine()})


def cpu_seconds(root: Path) -> float:
    """Returns what this process and those before it that came to an end have computed for a run."""
    file = root / "cpu_seconds"
    total = time.process_time() + (float(file.read_text()) if file.is_file() else 0.0)
    file.write_text(f"{total}\n")
    return total


def images_per_second(root: Path) -> float:
    """Returns the median rate of a run's training steps."""
    name = "train/images_per_second"
    return float(np.median([row[name] for row in read_table(root / "metrics.csv") if name in row] or [math.nan]))


def kdvit(*args: str) -> Any:
    """Runs a command of kdvit and returns its CLI, whose trainer holds the scores."""
    return KdvitCLI(args[0], find_configs(list(args[1:])))


class Job(NamedTuple):
    """Something to do in a process of its own.

    Attributes:
        name: For the log.
        function: What is called.
        args: With what.
    """

    name: str
    function: Callable[..., None]
    args: tuple[Any, ...]


def in_processes(logs: Path, jobs: Sequence[Job], at_once: int) -> None:
    """Does jobs in processes of their own, so many at once, and tells each that is done.

    Args:
        logs: Folder of their logs.
        jobs: The jobs.
        at_once: How many at once.

    Raises:
        RuntimeError: If one fails; those that run are waited for, the others are left.
    """
    with ThreadPoolExecutor(at_once) as threads:
        waiting = [threads.submit(_in_process, logs, job) for job in jobs]
        try:
            for done in as_completed(waiting):
                print(done.result(), flush=True)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _in_process(logs: Path, job: Job) -> str:
    log, start = logs / f"{job.name}.log", time.perf_counter()
    process = PROCESSES.Process(target=_logged, args=(log, job))
    process.start()
    process.join()
    if process.exitcode:
        tail = "\n".join(log.read_text().splitlines()[-5:]) if log.is_file() else ""
        raise RuntimeError(f"{job.name} ended with status {process.exitcode}; see {log}:\n{tail}")
    return f"{datetime.now():%H:%M:%S}  {job.name}: {time.perf_counter() - start:.0f} s"


def _logged(log: Path, job: Job) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        for file in (sys.stdout, sys.stderr):
            os.dup2(stream.fileno(), file.fileno())
        job.function(*job.args)
        sys.stdout.flush()
