"""`kdvit check` means ready: the plan in numbers, and what of it cannot be."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, IterableDataset

from kdvit import DistillationModule
from kdvit.cli import main
from kdvit.cli.machine import network_costs, process_bytes
from kdvit.distillers import LogitDistiller
from tests.runs import QUIET, demo_fit, fit
from tests.tiny import FORMAT, STUDENT, Blobs, TinyData, _collate, student, teacher

PLAIN = [
    "--model.student.init_args={arch: deit_tiny_patch16_224, img_size: 16, num_classes: 5, model_args: {depth: 1}}"
]
CHECK = ["check", *demo_fit("plain", "", *QUIET)[1:]]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        data = Blobs(40, 0)
        return (data[i] for i in range(40))


class BatchedData(TinyData):
    """Training batches by a sampler of the user's, which has no batch size."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Blobs(16, 0), batch_sampler=[[0, 1, 2], [3, 4]], collate_fn=_collate)


class StreamData(pl.LightningDataModule):
    image_format = FORMAT
    class_names = list("abcde")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), batch_size=8, collate_fn=_collate)

    val_dataloader = train_dataloader


def row(name: str, told: str) -> str:
    found = re.search(rf"^{name} +(.*)$", told, re.MULTILINE)
    assert found, told
    return found[1]


@pytest.mark.filterwarnings("error:GPU available", "error:.*does not have many workers")
def test_the_plan_is_told_in_numbers_and_nothing_of_the_one_step_on_a_cpu(capsys, caplog, monkeypatch) -> None:
    monkeypatch.setattr("lightning.pytorch.accelerators.CUDAAccelerator.is_available", lambda: True)
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.data_connector.suggested_max_num_workers", lambda _: 16
    )  # of a machine with a GPU
    caplog.set_level(logging.INFO)
    main(CHECK)
    told = capsys.readouterr().out
    assert [record.getMessage() for record in caplog.records] == ["Seed set to 0"]
    assert row("steps an epoch", told) == "20"
    assert row("images an epoch", told) == "1,280"  # of 1,297, in whole batches of 64
    assert row("run", told) == "40 epochs, 800 steps"
    assert row("learning rate", told) == (
        "cosine by epoch: 1e-05 at first, 0.00385 at epoch 5, 1.61e-05 at last; warm-up of 5 epochs, 100 steps"
    )
    room = "2 in run/checkpoints, about 165.8 kB each; with one that is being written 497.4 kB"
    assert row("checkpoints", told) == room


@pytest.mark.parametrize(
    ("options", "images", "steps"),
    [
        (["--trainer.accumulate_grad_batches=3"], "1,152", 6),  # of 20 batches, 18 make whole steps
        (["--trainer.accumulate_grad_batches=3", "--data.init_args.repeats=3"], "1,152", 6),
        (["--trainer.accumulate_grad_batches=30"], "1,297", 1),
        ([*PLAIN, "--data=tests.tiny.TinyData", "--data.init_args={batch_size: 48}"], "80", 2),
    ],
)
def test_a_run_has_the_steps_that_are_told(options: list[str], images: str, steps: int, capsys) -> None:
    more = ["--trainer.max_epochs=1", "--model.schedule.warmup_epochs=0", *options]
    main([*CHECK, *more])
    told = capsys.readouterr().out
    assert (row("images an epoch", told), row("steps an epoch", told)) == (images, str(steps))
    fit("plain", "", *QUIET, *more)
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == steps


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (["--checkpoint.save_top_k=3"], 3 + 1 + 1),  # with the copy that is named best
        (["--checkpoint.save_top_k=-1", "--checkpoint.every_n_epochs=4"], 10 + 1 + 1),
        (["--last_checkpoint.save_top_k=-1", "--last_checkpoint.every_n_train_steps=100"], 1 + 8),
    ],
)
def test_checkpoints_are_counted_beside_the_free_disk(options: list[str], files: int, capsys, monkeypatch) -> None:
    monkeypatch.setattr("kdvit.cli.plan.disk_usage", lambda _: SimpleNamespace(free=0.4e6))
    main([*CHECK, *options])
    told = capsys.readouterr().out
    assert row("free disk", told) == "400.0 kB where the run is written"
    assert row("checkpoints", told).startswith(f"{files} in run/checkpoints, ")
    assert re.search(r"warning +the checkpoints need \S+ [kM]B, and /\S+ has 400\.0 kB free: lower checkpoint", told)


@pytest.mark.parametrize(
    ("options", "run", "rate"),
    [
        (
            ["--trainer.max_epochs=3"],
            "3 epochs, 60 steps",
            "the warm-up of 5 epochs fills the run of 3, which never comes to its learning rate: lower schedule.warmup",
        ),
        (
            ["--trainer.max_epochs=-1", "--trainer.max_steps=45", "--model.schedule.interval=step"],
            "3 epochs, 45 steps",
            "the warm-up of 100 steps fills the run of 45",
        ),
        (["--trainer.max_steps=50", "--trainer.accumulate_grad_batches=2"], "40 epochs, 50 steps", "at epoch 5"),
    ],
)
def test_a_short_run_is_told_what_becomes_of_its_warm_up(options: list[str], run: str, rate: str, capsys) -> None:
    main([*CHECK, *options])
    told = capsys.readouterr().out
    assert row("run", told) == run
    assert rate in told


def test_a_plan_is_compared_with_the_machine(capsys, monkeypatch) -> None:
    monkeypatch.setattr("kdvit.cli.machine.cores", lambda: 2)
    monkeypatch.setattr("kdvit.cli.machine.memory", lambda: 4 * 10**9)
    more = ["--data.init_args.batch_size=2000", "--data.init_args.num_workers=12", "--trainer.devices=4"]
    main([*CHECK, *more])
    told = capsys.readouterr().out
    assert told.count("the smallest 8 with 126") == 1
    assert row("this machine", told).startswith(
        "training processes: 4, processes that load images: 48, on 2 cores; about "
    )
    for warning in (
        "a global batch of 8000 is more than the 1,297 images of an epoch",
        "52 processes would share 2 cores: lower --trainer.devices, --data.init_args.num_workers.",
        "GB, and this machine has 4.0 GB: lower --trainer.devices, --data.init_args.batch_size",
    ):
        assert warning in told
    main([*CHECK, "--trainer.accelerator=gpu", "--trainer.devices=99"])
    assert "99 GPUs are planned, and this machine has" in capsys.readouterr().out


def test_the_memory_of_a_process_follows_its_formula() -> None:
    module = DistillationModule(student(), teacher(), {"logit": LogitDistiller()})
    costs = network_costs(module)
    trained, frozen = (sum(p.numel() for p in each.parameters()) for each in (module.student, teacher()))
    (one, rest), (two, more) = (process_bytes(module, costs, batch, workers) for batch, workers in ((1, 0), (2, 3)))
    assert 2 * one - two == 16 * trained + 4 * frozen
    assert more - rest == pytest.approx(3 * (0.1e9 + 2 * 2 * 4 * 3 * 16 * 16))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.val_check_interval=50", "val_check_interval is 50, and an epoch has 20 batches: no validation"),
        ("--trainer.check_val_every_n_epoch=50", "is 50, and the run has 40 epochs: no validation would be held"),
        ("--trainer.limit_train_batches=0.01", "limit_train_batches 0.01 leaves none of the 20 batches of an epoch."),
        (
            "--data.init_args={mixup: 1, batch_size: 2000}",
            "of the 1297 images of a process and epoch, the last batch would",
        ),
        ("--trainer.default_root_dir=file/run", "trainer.default_root_dir: 'file/run' cannot be made or written to."),
    ],
)
def test_what_cannot_be_is_refused(option: str, message: str, capsys) -> None:
    Path("file").touch()
    with pytest.raises(SystemExit) as end:
        main([*CHECK, option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_stream_of_images_is_checked_and_trained_on(capsys) -> None:
    student = {"arch": STUDENT["arch"], "img_size": 16, "num_classes": 5, "model_args": "{patch_size: 8, depth: 1}"}
    run = ["--data=tests.test_check.StreamData", "--model.student=TimmStudent", "--trainer.accelerator=cpu", *QUIET]
    run += [f"--model.student.init_args.{key}={value}" for key, value in student.items()]
    run += ["--model.optimizer.lr_base_batch=null", "--trainer.max_epochs=1", "--trainer.default_root_dir=run"]
    main(["check", *run])
    assert row("steps an epoch", capsys.readouterr().out) == "unknown: the training images are a stream"
    main(["fit", *run])
    assert Path("run/checkpoints/last.ckpt").is_file()
    main(["fit", *run, "--data=tests.test_check.BatchedData", "--trainer.default_root_dir=batched"])
    (event,) = EventAccumulator("batched").Reload().Tensors("plan/text_summary")
    assert "The run cannot be described: unsupported operand" in event.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ("LearningRateMonitor", "Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger."),
        ("LearningRateFinder", "LearningRateFinder would train with other numbers than config.yaml says. Leave it out"),
        ("BatchSizeFinder", "BatchSizeFinder would train with other numbers than config.yaml says. Leave it out"),
    ],
)
def test_a_callback_that_cannot_work_is_one_message(callback: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        fit("plain", "", *QUIET, "--trainer.logger=false", f"--trainer.callbacks={callback}")
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_timer_ends_a_run() -> None:
    fit("plain", "", *QUIET, "--trainer.callbacks={class_path: Timer, init_args: {duration: 00:00:00:01}}")
    written = yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["callbacks"]
    assert written["init_args"]["interval"] == "step"
    assert 0 < torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] < 800
