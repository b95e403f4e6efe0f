"""Students split over two processes: the steps, files and scores of one process."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.tensor import DTensor

from kdvit import DistillationModule, load_student
from kdvit.callbacks import StudentEMA
from kdvit.cli import main
from kdvit.errors import UserError
from kdvit.models import LiftViT, TimmStudent
from kdvit.training.schedule import ScheduleOptions
from tests.runs import QUIET
from tests.several import together
from tests.test_stopping import signal_at
from tests.tiny import FORMAT, STUDENT, WIDE, TinyData, student, trainer

slow = pytest.mark.slow
GLOBAL_BATCH = 12
DISTILLERS = {
    "lift": {"class_path": "LiftDistiller", "init_args": {"weight": 0.5}},
    "feature": {"class_path": "FeatureDistiller", "init_args": {"weight": 0.5, "projector": "linear"}},
}
EPOCHS = 3
STEPS = 12


class Shares(pl.Callback):
    """Notes what a rank holds at the end of training: elements of weights and of moments, and of the whole."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        weights = list(pl_module.parameters())
        assert all(isinstance(each, DTensor) for each in weights)
        moments = [s["exp_avg"] for s in trainer.optimizers[0].state.values() if "exp_avg" in s]
        teacher = list(pl_module.teacher.network.parameters())
        assert not any(isinstance(each, DTensor) for each in teacher)
        counts = {
            "weights": sum(each.to_local().numel() for each in weights),
            "moments": sum(each.to_local().numel() for each in moments),
            "all": sum(each.numel() for each in weights),
        }
        Path(trainer.default_root_dir, f"share{trainer.global_rank}.json").write_text(json.dumps(counts))


def _run(command: str, root: str, strategy: str, *more: str, batch: int = GLOBAL_BATCH) -> list[str]:
    processes = 1 if strategy == "auto" else 2
    networks = {"student": {**STUDENT, "width": 24}, "teacher": {**STUDENT, "model_args": WIDE}}
    options = {
        "data.init_args.train": 48,
        "data.init_args.val": 25,  # 13 for one rank, 12 for the other
        "data.init_args.batch_size": batch // processes,
        "model.student": "LiftViT",
        "model.student.init_args": json.dumps(networks["student"]),
        "model.teacher": "TimmStudent",
        "model.teacher.init_args": json.dumps(networks["teacher"]),
        "model.distillers": json.dumps(DISTILLERS),
        "model.schedule.warmup_epochs": 0,
        "model.optimizer.lr": 0.002,
        "model.optimizer.lr_base_batch": GLOBAL_BATCH,
        "trainer.accelerator": "cpu",
        "trainer.devices": processes,
        "trainer.strategy": strategy,
        "trainer.default_root_dir": root,
        "trainer.max_epochs": EPOCHS,
        "trainer.log_every_n_steps": 1,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [command, "--data", "tests.tiny.SizedData", *given, *QUIET, *more]


SGD = ["--model.optimizer.name", "sgd", "--trainer.gradient_clip_val", "0.5"]
HALF = ["--trainer.accumulate_grad_batches", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains with one process, with DDP and with a split student, into a folder each."""
    home = tmp_path_factory.mktemp("sharding")
    shares = f"--trainer.callbacks+={json.dumps({'class_path': 'tests.test_sharding.Shares'})}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for strategy in ("auto", "ddp", "sharded"):
            more = [shares] if strategy == "sharded" else []
            commands = [
                _run("fit", f"{strategy}/adamw", strategy, "--geometry.every_n_epochs", "1", *more),
                _run("fit", f"{strategy}/sgd", strategy, *SGD),
                _run("fit", f"{strategy}/accumulated", strategy, *SGD, *HALF, batch=GLOBAL_BATCH // 2),
                *(_run(name, f"{strategy}/adamw", strategy, "--ckpt_path", "last") for name in ("test", "predict")),
            ]
            together(1 if strategy == "auto" else 2, *commands)
    return home


def _weights(root: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(root / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return dict(checkpoint["state_dict"])


def _rows(root: Path) -> list[dict[str, float]]:
    with (root / "metrics.csv").open() as stream:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]
    kept = ("step", "val/", "train/grad_norm", "train/lr", "geometry/", "teacher/")
    return [{name: value for name, value in row.items() if name.startswith(kept)} for row in rows]


@slow
@pytest.mark.parametrize("other", ["auto", "ddp"])
@pytest.mark.parametrize("run", ["adamw", "sgd", "accumulated"])
def test_a_split_student_takes_the_steps_of_a_whole_one(home: Path, run: str, other: str) -> None:
    whole, split = _weights(home / other / run), _weights(home / "sharded" / run)
    assert set(split) == set(whole)
    assert {name.split(".")[0] for name in split} == {"student", "distillers"}
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, atol=2e-6, rtol=1e-5, msg=name)
    ours, theirs = _rows(home / "sharded" / run), _rows(home / other / run)
    assert len(theirs) >= STEPS + EPOCHS
    assert {"val/loss", "val/acc1", "train/grad_norm", "teacher/acc1"} < {name for row in theirs for name in row}
    assert ours == [pytest.approx(row, abs=2e-5) for row in theirs]


@slow
def test_each_process_holds_half_of_the_weights_and_moments_and_the_whole_teacher(home: Path) -> None:
    ours, theirs = (json.loads((home / f"sharded/adamw/share{rank}.json").read_text()) for rank in (0, 1))
    for part in ("weights", "moments"):
        assert ours[part] + theirs[part] == ours["all"]
        assert max(ours[part], theirs[part]) < 0.55 * ours["all"]


@slow
def test_the_student_of_a_split_run_is_that_of_its_checkpoint(home: Path) -> None:
    root = home / "sharded/adamw"
    exported, kept = load_student(root / "student"), load_student(root / "checkpoints/last.ckpt")
    assert type(exported) is type(kept) is LiftViT
    _same_student(root)
    assert exported.spec["run"]["val/acc1"] == kept.spec["run"]["val/acc1"]


def _same_student(root: Path) -> None:
    exported, kept = (load_student(root / file).state_dict() for file in ("student", "checkpoints/last.ckpt"))
    assert all(torch.equal(exported[name], value) for name, value in kept.items())


@slow
def test_a_split_student_is_tested_and_predicts_as_a_whole_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    split, whole = (
        list(csv.DictReader((home / f"{each}/adamw/predictions.csv").read_text().splitlines()))
        for each in ("sharded", "auto")
    )
    assert len(whole) == 25
    assert [(row["path"], row["class"]) for row in split] == [(row["path"], row["class"]) for row in whole]
    assert [float(row["probability"]) for row in split] == pytest.approx(
        [float(row["probability"]) for row in whole], abs=2e-5
    )
    monkeypatch.chdir(home)
    root = Path("sharded/adamw")
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--ckpt_path", "last"]
    main(["validate", "--config", f"{root}/config.yaml", *one])
    told = re.search(r"Validation on [\d,]+ images: .*loss ([\d.]+)\.$", capsys.readouterr().out)
    logged = [row["val/loss"] for row in _rows(root) if "val/loss" in row]
    assert float(told[1]) == pytest.approx(logged[-1], rel=5e-4)


@slow
def test_a_split_run_that_is_stopped_goes_on_split_or_whole(home: Path) -> None:
    stop = signal_at("on_train_batch_start", 5)
    for strategy in ("sharded", "ddp"):
        together(2, _run("fit", strategy, strategy, *stop), status=[128 + signal.SIGTERM, 0])
    assert torch.load("sharded/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    _same_student(Path("sharded"))
    shutil.copytree("sharded", "changed")
    goes_on = (("sharded", "sharded"), ("ddp", "sharded"), ("changed", "ddp"))
    said = together(2, *(_run("fit", root, strategy) for root, strategy in goes_on))
    assert all(f"Going on from {root}/checkpoints/last.ckpt, step 6" in said[0] for root, _ in goes_on)
    whole = _weights(home / "sharded/adamw")
    for name, value in _weights(Path("sharded")).items():
        assert torch.equal(value, whole[name]), name
    for root in ("ddp", "changed"):
        for name, value in _weights(Path(root)).items():
            torch.testing.assert_close(value, whole[name], atol=2e-6, rtol=1e-5, msg=name)


@slow
def test_a_step_that_is_not_finite_is_left_out_on_all_ranks() -> None:
    breaks = {
        "class_path": "tests.callbacks.test_nonfinite.Breaks",
        "init_args": {"at": [2], "gradient": True, "rank": 1},
    }
    more = ["--model.distillers", json.dumps({**DISTILLERS, "odd": breaks}), "--trainer.max_epochs", "1"]
    for strategy in ("ddp", "sharded"):
        said = together(2, _run("fit", strategy, strategy, *SGD, *more, "--nonfinite.skip_steps", "1"))
        assert "the gradient of student.model.cls_token, student.model.pos_embed" in said[0], said[0][-2000:]
    whole, split = (torch.load(f"{each}/checkpoints/last.ckpt", weights_only=True) for each in ("ddp", "sharded"))
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(split["state_dict"][name], value, atol=1e-6, rtol=1e-5, msg=name)
    said = together(2, _run("fit", "stopped", "sharded", *SGD, *more), status=2)
    assert "At step 2 of epoch 0, the gradient of student.model.cls_token" in said[0].splitlines()[-1]
    left, exported = (load_student(f"stopped/{file}").state_dict() for file in ("nonfinite/step_2.ckpt", "student"))
    assert all(torch.equal(exported[name], value) for name, value in left.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ema.decay", "0.9"], "sharded has no averaged student"),
        (["--trainer.precision", "64-true"], "goes with trainer.precision 32-true or bf16-mixed, got 64-true"),
        (["--trainer.precision", "bf16-true"], "goes with trainer.precision 32-true or bf16-mixed, got bf16-true"),
        (["--model.compile", "both"], "does not go with model.compile both"),
        (["--model.optimizer.name", "lamb"], "goes with the optimizers sgd, momentum, adam, adamw, got"),
    ],
    ids=["ema", "float64", "bfloat16", "compile", "optimizer"],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_what_does_not_go_with_a_split_student_is_refused(
    command: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}}, "weights.ckpt")
    named = [] if command == "fit" else ["--ckpt_path", "weights.ckpt"]
    with pytest.raises(SystemExit) as end:
        main(_run(command, "run", "sharded", *more, *named))
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("run").exists()


@pytest.mark.parametrize("command", ["cache", "analyze"])
def test_what_measures_whole_networks_refuses_a_split_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = _run("fit", "run", "sharded")[1:]
    args = {
        "cache": [*given, "--out", "cache"],
        "analyze": ["--config", "demo/plain.yaml", "--trainer.strategy", "sharded"],
    }
    with pytest.raises(SystemExit) as end:
        main([command, *args[command]])
    assert end.value.code == 2
    assert "ShardedStrategy splits networks over the processes" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_in_python_is_refused_as_on_the_command_line() -> None:
    for given, callbacks, message in (
        (student(), [StudentEMA(0.9)], "has no averaged student"),
        (TimmStudent("test_resnet", num_classes=5), [], "keeps no buffers alike over the processes"),
    ):
        module = DistillationModule(given, image_format=FORMAT, schedule=ScheduleOptions(warmup_epochs=0))
        with pytest.raises(UserError, match=message):
            trainer("run", strategy="sharded", callbacks=callbacks).fit(module, TinyData())
