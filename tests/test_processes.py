"""Two processes with gloo: the step of one process, and a whole run by the command line."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdvit import DistillationModule, load_student
from kdvit.data import Digits
from kdvit.distillers import FeatureDistiller, LogitDistiller
from kdvit.models import TimmStudent
from kdvit.optim import OptimizerOptions, ScheduleOptions
from tests.tiny import trainer

pytestmark = pytest.mark.slow
SIZES = {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def _trained(processes: int, batch_size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    args = {"arch": "deit_tiny_patch16_224", "img_size": 8, "num_classes": 10}
    module = DistillationModule(
        TimmStudent(**args, model_args=SIZES),
        teacher=TimmStudent(**args, model_args={**SIZES, "embed_dim": 24}),
        distillers={"logit": LogitDistiller(), "feature": FeatureDistiller(projector="linear")},
        optimizer=OptimizerOptions(name="sgd", lr=0.1, lr_base_batch=None, args={"momentum": 0.9}),
        schedule=ScheduleOptions(warmup_epochs=0),
    )
    data = Digits(batch_size=batch_size, seed=3, repeats=2)
    run = trainer(".", devices=processes, strategy="ddp_spawn" if processes > 1 else "auto", max_steps=4)
    run.fit(module, datamodule=data)
    return module.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_take_the_steps_of_one_on_the_same_global_batch() -> None:
    one, two = _trained(1, 32), _trained(2, 16)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-6, rtol=1e-4, msg=name)


def test_the_command_line_trains_validates_and_predicts_with_two_processes() -> None:
    run = ["--trainer.default_root_dir", "run", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    short = ["--trainer.max_epochs", "2", "--ema.decay", "0.9", "--trainer.enable_progress_bar", "false"]
    _kdvit("fit", "--config", "demo/teacher.yaml", *run, *short, "--data.init_args.repeats", "3")
    with Path("run/metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["val/acc1"]]
    shown = _kdvit("validate", "--config", "run/config.yaml", "--ckpt_path", "last", "--trainer.devices", "1")
    (line,) = (line for line in shown.splitlines() if " val/acc1 " in line)
    assert float(line.split()[-1]) == pytest.approx(float(rows[-1]["val/acc1"]), abs=1e-6)
    _kdvit("predict", "--config", "run/config.yaml", "--ckpt_path", "last")
    with Path("run/predictions.csv").open() as stream:
        paths = [row["path"] for row in csv.DictReader(stream)]
    assert len(paths) == len(set(paths)) == 500


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    _kdvit("fit", "--config", "demo/teacher.yaml", "--trainer.max_epochs", "1", "--trainer.default_root_dir", "run")
    given = ["analyze", "--model", "run/student", "--data", "Digits", "--images", "101", "--layers", "all"]
    for devices in ("1", "2"):
        _kdvit(*given, "--trainer.devices", devices, "--out", f"out{devices}", "--num_workers", "0")
    one, two = (np.load(f"out{devices}/curves.npz") for devices in "12")
    assert len(one) > 40
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-9, atol=1e-12, err_msg=name)


def _kdvit(*args: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kdvit", *args],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_write_and_train_from_the_cache_of_one() -> None:
    _kdvit("fit", "--config", "demo/teacher.yaml", "--trainer.max_epochs", "1", "--trainer.default_root_dir", "teacher")
    given = ["--config", "demo/lift.yaml", "--model.teacher.init_args.arch", "local-dir:teacher/student"]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    views = ["--data.init_args.repeats", "2", "--views", "2"]
    _kdvit("cache", *given, *views, "--out", "one")
    _kdvit("cache", *given, *views, "--out", "two", *two)
    one, other = ({file.name: file.read_bytes() for file in Path(name).iterdir()} for name in ("one", "two"))
    assert len(one) == 7
    assert one == other
    short = ["--trainer.max_epochs", "2", "--ema.decay", "0.9", "--data.init_args.repeats", "2"]
    cached, online = (
        _kdvit("fit", *given, *two, *short, *more, "--trainer.default_root_dir", root)
        and load_student(f"{root}/student").state_dict()
        for root, more in (("cached", ["--data.init_args.cache", "two"]), ("online", []))
    )
    for name, value in online.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-2, atol=2e-3, msg=name)
