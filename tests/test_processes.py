"""Several processes with gloo: the numbers of one, and an end for all when one has ended."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kdvit import load_student
from kdvit.cli import main
from kdvit.data.sampling import ShareError
from kdvit.runtime.saved import progress
from tests.runs import QUIET, column
from tests.several import PATHS, together
from tests.tiny import STUDENT, SizedData

slow = pytest.mark.slow
SEVERAL = 3
GLOBAL_BATCH = 96
SIZED = ["--data", "tests.tiny.SizedData", "--model.student", "TimmStudent", *QUIET, "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, demo_teacher: str) -> Path:
    """Trains, tests, predicts, analyses and stores with one and with several processes, into a folder each."""
    home = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for processes in (1, SEVERAL):
            together(processes, *_commands(processes, demo_teacher))
    return home


def _commands(processes: int, teacher: str) -> list[list[str]]:
    ranks = ["--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto"]
    lift = ["--config", "demo/lift.yaml", "--model.teacher.init_args.arch", teacher, *ranks, *QUIET]
    fit = ["fit", *lift, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1", "--ema.decay", "0.9"]
    sgd = ["--model.optimizer.name", "sgd", "--model.optimizer.lr_base_batch", "48", "--model.schedule.warmup_epochs=0"]

    def trained(root: str, batch: int, *more: str) -> list[str]:
        sizes = ["--data.init_args.batch_size", str(batch // processes), "--trainer.default_root_dir", root]
        return [*fit, *sgd, *sizes, "--model.optimizer.lr", "0.02", *more]

    run = f"{processes}/run"
    cached = ["--data.init_args.cache", f"{processes}/cache"]
    return [
        trained(run, GLOBAL_BATCH, "--data.init_args.repeats", "3", "--trainer.max_epochs", "2"),
        *([command, "--config", f"{run}/config.yaml", "--ckpt_path", "last"] for command in ("test", "predict")),
        trained(f"{processes}/plain", GLOBAL_BATCH),
        trained(f"{processes}/accumulated", GLOBAL_BATCH // 2, "--trainer.accumulate_grad_batches", "2"),
        ["cache", *lift, "--out", f"{processes}/cache"],
        ["cache", *lift, "--data.init_args.repeats", "2", "--views", "2", "--out", f"{processes}/views"],
        trained(f"{processes}/cached", GLOBAL_BATCH, *cached),
        [
            *[
                "analyze",
                "--model",
                teacher.removeprefix("local-dir:"),
                "--data",
                "Digits",
                "--images",
                "101",
                "--batch_size",
                "1",
            ],
            # images one by one, as float32 rounds with the size of a batch
            *["--layers", "all", "--num_workers", "0", *ranks, "--out", f"{processes}/analysis"],
        ],
    ]


def _same_weights(one: Path, other: Path, **tolerance: float) -> None:
    for ema in (False, True):
        ours, theirs = (load_student(root / "checkpoints/last.ckpt", ema).state_dict() for root in (other, one))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, **(tolerance or {"atol": 1e-6, "rtol": 1e-5}), msg=name)


def _logged(root: Path) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv, all but the speed and what is no mean over images."""
    with (root / "metrics.csv").open() as stream:
        rows = [{name: float(row[name]) for name in row if row[name]} for row in csv.DictReader(stream)]
    left_out = ("images_per_second", "explained_variance", "r2", "r2_median")
    return [{name: value for name, value in row.items() if not name.endswith(left_out)} for row in rows]


@slow
@pytest.mark.parametrize("run", ["run", "plain"], ids=["repeated augmentation", "plain"])
def test_several_processes_take_the_steps_of_one_on_the_same_global_batch(home: Path, run: str) -> None:
    _same_weights(home / "1" / run, home / str(SEVERAL) / run)
    one, several = _logged(home / "1" / run), _logged(home / str(SEVERAL) / run)
    names = {name for row in one for name in row}
    assert {f"val/{score}{suffix}" for score in ("acc1", "acc5", "loss") for suffix in ("", "_ema")} < names
    assert {"teacher/acc1", "train/grad_norm", "train/lr", "train/loss", "train/acc1", "train/logit"} < names
    assert len(one) > 13
    assert several == [pytest.approx(row, abs=1e-5) for row in one]


@slow
@pytest.mark.parametrize("processes", [1, SEVERAL])
def test_accumulated_batches_take_the_steps_of_one_batch_as_large(home: Path, processes: int) -> None:
    _same_weights(home / "1/plain", home / f"{processes}/accumulated")
    checkpoint = torch.load(home / f"{processes}/accumulated/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1297 // GLOBAL_BATCH
    one, several = _logged(home / "1/plain"), _logged(home / f"{processes}/accumulated")
    assert several == [pytest.approx(row, abs=1e-5) for row in one]


@slow
def test_several_processes_predict_each_image_once_and_as_one_does(home: Path) -> None:
    one, several = (
        list(csv.DictReader((home / f"{n}/run/predictions.csv").read_text().splitlines())) for n in (1, SEVERAL)
    )
    assert len(one) == 500
    assert [row["path"] for row in several] == [row["path"] for row in one]
    assert [row["class"] for row in several] == [row["class"] for row in one]
    assert [float(row["probability"]) for row in several] == pytest.approx(
        [float(row["probability"]) for row in one], abs=2e-6
    )


@slow
def test_several_processes_measure_what_one_does(home: Path) -> None:
    one, several = (np.load(home / f"{n}/analysis/curves.npz") for n in (1, SEVERAL))
    assert len(one) > 40
    for name in one:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-9, atol=1e-12, err_msg=name)
    told, other = (json.loads((home / f"{n}/analysis/report.json").read_text()) for n in (1, SEVERAL))
    for report in (told, other):
        assert report.pop("written")  # the time
    _same(other, told, "report")


def _same(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for name in theirs:
            _same(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            _same(mine, other, f"{where}[{i}]")
    else:
        assert ours == (pytest.approx(theirs, rel=1e-9, abs=1e-12) if isinstance(theirs, float) else theirs), where


@slow
def test_several_processes_write_the_cache_of_one_and_train_from_it(home: Path) -> None:
    for cache, files in (("cache", 3), ("views", 7)):  # fewer shards than three processes, and more
        folders = (home / f"{n}/{cache}" for n in (1, SEVERAL))
        one, several = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
        assert len(one) == files
        assert one == several
    _same_weights(home / "1/cached", home / f"{SEVERAL}/cached")
    _same_weights(home / "1/plain", home / f"{SEVERAL}/cached", rtol=1e-2, atol=2e-3)


def _sized(processes: int, root: str, train: int, val: int, *more: str, arch: str = "") -> list[str]:
    args = {"arch": arch, "num_classes": 5} if arch else STUDENT
    ranks = ["--trainer.devices", str(processes), "--trainer.strategy", "ddp", "--trainer.default_root_dir", root]
    sizes = ["--data.init_args.train", str(train), "--data.init_args.val", str(val)]
    return [*SIZED, "--model.student.init_args", json.dumps(args), *ranks, *sizes, *more]


@slow
def test_images_that_do_not_divide_among_the_processes_are_each_seen_once_and_nothing_hangs() -> None:
    more = ["--trainer.max_epochs", "1", "--ema.decay", "0.9", "--trainer.log_every_n_steps", "1"]
    sizes = [(SEVERAL, SEVERAL), (SEVERAL + 1, SEVERAL + 1), (11 * SEVERAL - 1, 10 * SEVERAL + 1)]
    commands = [
        [command, *_sized(SEVERAL, f"{train}_{val}", train, val, *more)]
        for train, val in sizes
        for command in ("fit", "validate", "test", "predict")
    ]
    buffers = _sized(SEVERAL, "buffers", 9 * SEVERAL + 1, 10 * SEVERAL + 1, *more, arch="test_resnet")
    together(SEVERAL, *commands, ["fit", *buffers])
    for train, val in sizes:
        with Path(f"{train}_{val}/predictions.csv").open() as stream:
            paths = [row["path"] for row in csv.DictReader(stream)]
        assert sorted(paths) == sorted(f"blob/{i}" for i in range(val))


def test_fewer_images_than_processes_are_refused() -> None:
    data = SizedData(train=1)
    data.trainer = SimpleNamespace(world_size=2, global_rank=0, accumulate_grad_batches=1)
    with pytest.raises(ShareError, match=r"^1 training image\(s\) cannot be shared by 2 processes"):
        data.train_dataloader()


LAUNCHERS = {
    "lightning": [sys.executable, "-m", "kdvit"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdvit"],
}
DDP = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def _launched(launcher: str, *args: str, **more: str) -> subprocess.Popen[bytes]:
    given = ["fit", "--config", "demo/plain.yaml", *QUIET, "--trainer.default_root_dir", "run", *args]
    environment = {**os.environ, **PATHS, **more}
    with Path("said.txt").open("w") as out:
        return subprocess.Popen([*LAUNCHERS[launcher], *given], stdout=out, stderr=subprocess.STDOUT, env=environment)


def _living() -> list[int]:
    """Returns the processes in this test's folder, besides this one."""
    here, found = Path.cwd(), []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cwd").readlink() == here and int(process.name) != os.getpid():
                found.append(int(process.name))
        except OSError:
            continue
    return [process for process in found if Path(f"/proc/{process}/cmdline").read_bytes()]


@slow
@pytest.mark.parametrize(
    ("launcher", "faults", "message"),
    [
        ("lightning", {1: "raise"}, "RuntimeError: rank 1 has met its fault"),
        ("lightning", {0: "exit"}, "the connection to another process of this run is lost"),
        ("lightning", {0: "hang", 1: "killed"}, "terminated with code -9"),
        ("lightning", {0: "killed", 1: "hang"}, "kdvit: error: the process"),
        ("torchrun", {0: "hang", 1: "killed"}, "exitcode  : -9"),
    ],
    ids=lambda value: "-".join(f"{rank} {fault}" for rank, fault in value.items()) if isinstance(value, dict) else "",
)
def test_no_process_outlives_another_by_a_minute(launcher: str, faults: dict[int, str], message: str) -> None:
    fault = {"class_path": "tests.several.Fault", "init_args": {"faults": faults}}
    run = _launched(launcher, *DDP, "--trainer.max_epochs", "2", f"--trainer.callbacks+={json.dumps(fault)}")
    assert run.wait(90) != 0
    _nothing_lives(60)
    said = Path("said.txt").read_text()
    assert message in said, said[-3000:]


@slow
def test_a_cache_that_is_stopped_leaves_no_process_that_writes(demo_teacher: str) -> None:
    given = ["cache", "--config", "demo/lift.yaml", *QUIET, *DDP, "--out", "cache", "--views", "200"]
    given += ["--model.teacher.init_args.arch", demo_teacher]
    with Path("said.txt").open("w") as out:
        environment = {**os.environ, **PATHS}
        run = subprocess.Popen([*LAUNCHERS["lightning"], *given], stdout=out, stderr=out, env=environment)
    end = time.monotonic() + 120
    while len(list(Path("cache").glob("*.npy"))) < 2:
        assert time.monotonic() < end, Path("said.txt").read_text()
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(90) == 143, Path("said.txt").read_text()
    assert _living() == []
    assert "Stopped by SIGTERM. The same command goes on from what is written." in Path("said.txt").read_text()


def _nothing_lives(seconds: float) -> None:
    ended = time.monotonic()
    while living := _living():
        if time.monotonic() > ended + seconds:
            for process in living:
                os.kill(process, signal.SIGKILL)
            pytest.fail(f"{len(living)} process(es) live on: {Path('said.txt').read_text()[-3000:]}")
        time.sleep(0.2)


@slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_error_of_all_processes_is_told_once(launcher: str) -> None:
    few = ["--data", "tests.tiny.SizedData", "--data.init_args", "{val: 1}", "--model.student.init_args.img_size=16"]
    run = _launched(launcher, *DDP, *few, "--model.student.init_args.num_classes=5", "--trainer.max_epochs=1")
    assert run.wait(300) != 0
    _nothing_lives(45)
    said = Path("said.txt").read_text()
    assert said.count("kdvit: error: ") == 1, said[-3000:]
    assert "kdvit: error: 1 evaluation image(s) cannot be shared by 2 processes" in said
    assert not Path("run/checkpoints").exists()


@slow
def test_a_port_that_is_taken_is_one_message_and_no_process_waits_for_it() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert _launched("lightning", *DDP, "--trainer.max_epochs=1", MASTER_PORT=port).wait(90) == 2
        _nothing_lives(5)
    said = Path("said.txt").read_text()
    assert f"kdvit: error: MASTER_PORT {port} is taken on this machine" in said
    assert said.count("kdvit: error:") == 1


@pytest.mark.parametrize(("starter", "status"), [("gone", 1), ("lives", 0)])
def test_a_process_whose_starter_is_gone_before_it_begins_ends(starter: str, status: int) -> None:
    with subprocess.Popen(["sleep", "60" if starter == "lives" else "0"]) as other:
        if starter == "gone":
            other.wait()
        environment = {**os.environ, **PATHS, "LOCAL_RANK": "1", "KDVIT_PARENT": str(other.pid)}
        version = [sys.executable, "-m", "kdvit", "--version"]
        assert subprocess.run(version, env=environment, capture_output=True, check=False).returncode == status
        other.kill()


@slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_launcher_trains_one_run_in_one_folder(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = _launched(launcher, *DDP, "--trainer.max_epochs", "1", "--data.init_args.repeats", "3")
    assert run.wait(300) == 0, Path("said.txt").read_text()[-3000:]
    assert Path("said.txt").read_text().count("run/student holds the last") == 1
    assert {file.name for file in Path("run/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len(list(Path("run").glob("events*"))) == 1
    with Path("run/metrics.csv").open() as stream:
        (logged,) = (float(row["val/acc1"]) for row in csv.DictReader(stream) if row["val/acc1"])
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    main(["validate", "--config", "run/config.yaml", "--ckpt_path", "last", *one])
    assert f" images: accuracy {logged:.2%}, " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_strategy_that_splits_networks_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    sharded = json.dumps({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"})
    torch.save({"state_dict": {}}, "weights.ckpt")
    named = ["--ckpt_path", "weights.ckpt"] if command == "validate" else []
    two = ["--trainer.devices", "2", "--trainer.strategy", sharded]
    with pytest.raises(SystemExit):
        main([command, "--config", "demo/plain.yaml", *QUIET, *two, *named])
    assert "ModelParallelStrategy splits networks over the processes" in capsys.readouterr().err.splitlines()[-1]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NAME": "train"}


@pytest.mark.filterwarnings("ignore:.*srun:UserWarning")
@pytest.mark.parametrize(
    ("environment", "args", "message"),
    [
        (
            TORCHRUN,
            [],
            "torchrun has started 2 process(es) of this run, and trainer.devices x trainer.num_nodes is 1 x 1",
        ),
        (SRUN, [], "Slurm has started 2 of the 1 processes of this run (trainer.devices x trainer.num_nodes)"),
    ],
    ids=["torchrun", "srun"],
)
@pytest.mark.parametrize("command", ["fit", "analyze"])
def test_a_launcher_that_starts_another_number_of_processes_is_refused(
    command: str, environment: dict[str, str], args: list[str], message: str, monkeypatch, capsys
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = {
        "fit": ["fit", "--config", "demo/plain.yaml", *QUIET, "--trainer.default_root_dir", "run"],
        "analyze": ["analyze", "--config", "demo/plain.yaml", "--images", "4"],
    }
    with pytest.raises(SystemExit) as end:
        main([*given[command], *args])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("run").exists()


@slow
def test_ranks_that_see_different_checkpoints_do_not_train() -> None:
    main(["fit", *_sized(1, "run", 8, 4, "--trainer.max_epochs", "1", "--trainer.strategy", "auto")])
    late = ["fit", *_sized(2, "run", 8, 4, "--trainer.max_epochs", "2")]
    before = Path("run/config.yaml").read_text()
    said = together(2, ["apart"], late, status=2)
    assert "rank 1 finds none, rank 0 run/checkpoints/last.ckpt" in said[1]
    assert Path("run/config.yaml").read_text() == before


@slow
def test_a_run_goes_on_with_other_processes_from_an_epochs_end_and_not_amid_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    amid = ["--last_checkpoint.every_n_train_steps", "5"]  # an epoch of two processes has 4 steps, of one 8
    together(2, ["fit", *_sized(2, "run", 32, 4, "--trainer.max_epochs", "2", "--trainer.max_steps", "5", *amid)])
    one = _sized(1, "run", 32, 4, "--trainer.max_epochs", "3", "--trainer.strategy", "auto", *amid)
    trained = Path("run/checkpoints/last.ckpt").read_bytes()
    with pytest.raises(SystemExit):
        main(["fit", *one, "--ckpt_path", "last"])
    assert (
        "amid epoch 1, which began in batches of 8 images over all processes, and in batches of 4"
        in capsys.readouterr().err
    )
    assert Path("run/checkpoints/last.ckpt").read_bytes() == trained
    steps = progress(Path("run/checkpoints/best.ckpt")).step
    main(["fit", *one, "--ckpt_path", "best"])
    rows = [row for row in column("run", ("step", "val/acc1")) if "nan" not in row]
    assert rows[-1].startswith(f"({steps + 8 * (3 - steps // 4) - 1}.0,")
