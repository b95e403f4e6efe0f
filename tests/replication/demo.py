"""The demo: a teacher, and six ways to train its student with three seeds each: ``python -m tests.replication.demo``.

All runs are `kdvit fit`, in processes that share what is imported, two at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from kdvit import load_student
from kdvit.cli import main as command
from kdvit.cli.lookup import build
from kdvit.cli.parsed import parse_fit
from kdvit.data import ImageDataModule
from kdvit.runtime.loggers import read_table
from tests.replication.claims import estimate
from tests.replication.figure import Gain, draw_claim
from tests.replication.geometry import measured_layers
from tests.replication.runs import QUIET, SELDOM, Job, in_processes, kdvit, seeded

FOLDER = Path("runs/demo")  # where the configs look for the teacher
SEEDS = (0, 1, 2)
TEACHERS_EPOCHS, EPOCHS = 40, 24  # of 80 and 40 in the configs: enough for the order
METHODS = {
    "plain": "plain",
    "soft_kd": "soft KD",
    "feature": "feature KD, pooled channels",
    "fixed_target": "feature KD, phi_s",
    "lift": "Lift + soft KD",
    "wide_last": "WideLast + soft KD",
}


def main() -> None:
    """Trains, compares and draws."""
    os.environ["OMP_NUM_THREADS"] = "1"  # two runs at once, a core each
    for name, options in {"teacher": "", "METHOD": "--seed_everything SEED --data.init_args.seed SEED "}.items():
        print(f"$ kdvit fit --config configs/demo/{name}.yaml {options}{' '.join(_length(name))}", flush=True)
    runs = {f"{name}/seed_{seed}": _fit(name, f"{name}/seed_{seed}", seed) for name in METHODS for seed in SEEDS}
    alone = [run for run in runs if run.startswith("plain/")]  # they need no teacher
    in_processes(FOLDER / "logs", [_fit("teacher", "teacher", 0), *(runs[run] for run in alone)], 2)
    in_processes(FOLDER / "logs", [runs[run] for run in reversed(runs) if run not in alone], 2)  # the longest first
    print("$ kdvit compare runs/demo/*/seed_* --out runs/demo", flush=True)
    command(["compare", *(str(FOLDER / run) for run in runs), "--out", str(FOLDER)])
    draw()
    print(f"{FOLDER / 'demo.png'} shows the mismatch of this pair, and the gains.")


def _fit(name: str, run: str, seed: int) -> Job:
    where = (*_length(name), "--trainer.default_root_dir", str(FOLDER / run))
    return Job(run, kdvit, ("fit", "--config", f"configs/demo/{name}.yaml", *seeded(seed), *where, *SELDOM, *QUIET))


def _length(name: str) -> tuple[str, str]:
    return "--trainer.max_epochs", str(TEACHERS_EPOCHS if name == "teacher" else EPOCHS)


def draw() -> None:
    """Draws the mismatch beside the gains, of the last epoch."""
    teacher = {"teacher": load_student(FOLDER / "teacher" / "student")}
    elsewhere = ("--trainer.default_root_dir", str(FOLDER / "drawn"))
    config = parse_fit(["--config", str(FOLDER / "teacher" / "config.yaml"), *elsewhere])
    data = build("data", ImageDataModule, config.data)
    last = {name: [last_accuracy(FOLDER / name / f"seed_{seed}") for seed in SEEDS] for name in METHODS}
    found = [
        Gain(METHODS[name], True, estimate([100 * (a - b) for a, b in zip(scores, last["plain"], strict=True)]))
        for name, scores in last.items()
        if name != "plain"
    ]
    width = load_student(FOLDER / "plain" / f"seed_{SEEDS[0]}" / "student").output_shapes((-1,)).features[0][0]
    draw_claim(measured_layers(teacher, data)[0], width, found, FOLDER / "demo.png")


def last_accuracy(run: Path) -> float:
    return [row["val/acc1"] for row in read_table(run / "metrics.csv") if "val/acc1" in row][-1]


if __name__ == "__main__":
    main()
