"""What must not grow with the length of a run: memory, open files, processes, checkpoints, the cost of a row."""

from __future__ import annotations

import csv
import ctypes
import gc
import os
import subprocess
import sys
import threading
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from kdvit import DistillationModule
from kdvit.callbacks import NonFiniteGuard, StudentEMA, Throughput
from kdvit.data import Digits, listed
from kdvit.data.listing import ImageList
from kdvit.data.workers import start_worker
from kdvit.distillers import LiftDistiller, LogitDistiller
from kdvit.models import LiftViT, TimmStudent
from kdvit.runtime.loggers import run_loggers
from tests.runs import QUIET, fit
from tests.several import PATHS
from tests.tiny import trainer

MEBIBYTE = 2**20
SIZES = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
NETWORK = {"arch": "deit_tiny_patch16_224", "img_size": 8, "num_classes": 10}


class Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2 tells."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def bytes_in_use() -> int:
    """Returns what is allocated by malloc and by Python in this process, which unlike resident memory has no gaps."""
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd) + 64 * sys.getallocatedblocks()  # a block is 64 bytes on average


class Usage(pl.Callback):
    """Notes at the end of every epoch what this process holds: bytes, open files, threads, children."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gc.collect()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        self.rows.append((bytes_in_use(), len(os.listdir("/proc/self/fd")), threading.active_count(), len(children)))


@pytest.fixture(scope="module")
def usage(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, int, int, int]]:
    """Trains for 2,000 steps in 20 epochs with two workers, with all that a run writes."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    data = Digits(batch_size=13, num_workers=2, seed=0)
    module = DistillationModule(
        LiftViT(**NETWORK, width=16, model_args=SIZES),
        teacher=TimmStudent(**NETWORK, model_args={**SIZES, "embed_dim": 16}),
        distillers={"logit": LogitDistiller(), "lift": LiftDistiller()},
        image_format=data.image_format,
    )
    seen = Usage()
    saved = ModelCheckpoint(root / "checkpoints", "best", monitor="val/acc1", mode="max", enable_version_counter=False)
    run = trainer(
        root,
        max_epochs=21,
        max_steps=2000,
        callbacks=[StudentEMA(0.99), NonFiniteGuard(), Throughput(), saved, seen],
        logger=run_loggers(root),
        enable_checkpointing=True,
        log_every_n_steps=50,
        limit_val_batches=3,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the folder of the logs exists
        run.fit(module, datamodule=data)
    assert run.global_step == 2000
    return seen.rows


@pytest.mark.slow
def test_the_memory_of_a_run_does_not_grow_with_its_steps(usage: list[tuple[int, int, int, int]]) -> None:
    held = [row[0] for row in usage[5:]]
    assert max(held) - held[0] < MEBIBYTE // 2  # 0.3 KiB a step


@pytest.mark.slow
def test_open_files_threads_and_processes_do_not_grow_with_the_epochs(usage: list[tuple[int, int, int, int]]) -> None:
    early, late = usage[1:6], usage[-5:]
    assert max(row[1] for row in late) < max(row[1] for row in early) + 8  # some are batches on their way
    assert {row[2:] for row in late} == {row[2:] for row in early}


@pytest.mark.slow
def test_a_loader_process_shares_the_list_of_images_with_its_parent() -> None:
    program = "from tests.test_long_runs import print_memory_of_a_worker; print_memory_of_a_worker()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, **PATHS}
    )
    before, after = map(int, done.stdout.split())
    assert after - before < 80 * MEBIBYTE  # 120 without gc.freeze, 350 with a list of tuples


def print_memory_of_a_worker() -> None:
    """Prints what a worker has for itself at the beginning and at the end of an epoch of 1.28 million images."""
    size = 1_281_167
    images = ImageList((f"/imagenet/train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG", i % 1000) for i in range(size))
    listed.read_image = lambda path, grey: path
    loader = DataLoader(
        listed.FolderImages(images, lambda _: torch.zeros(1), None),
        batch_size=2048,
        num_workers=1,
        sampler=np.random.RandomState(0).permutation(size).tolist(),
        worker_init_fn=start_worker,
        collate_fn=_private_bytes,
    )
    rows = list(loader)
    print(rows[0], rows[-1])


def _private_bytes(_: Any) -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def test_a_list_of_images_is_a_sequence_of_paths_and_classes() -> None:
    samples = [("/a/b.jpg", 0), ("/a/\udce9t\u00e9.jpg", 3), ("/c.jpg", 2)]
    images = ImageList(samples)
    assert list(images) == samples
    assert (len(images), images[-1]) == (3, samples[-1])
    with pytest.raises(IndexError):
        images[3]


def test_checkpoints_take_the_room_that_they_are_given_also_after_a_restart(demo_teacher: str) -> None:
    kept = ["--checkpoint.save_top_k", "3", "--checkpoint.filename", "{epoch}"]
    short = [*QUIET, "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", *kept]
    fit("plain", demo_teacher, *short, "--trainer.max_epochs", "4")
    assert len(list(Path("run/checkpoints").iterdir())) == 4
    root = ["--trainer.default_root_dir", str(Path("run").absolute())]
    fit("plain", demo_teacher, *short, "--trainer.max_epochs", "6", *root)
    files = sorted(file.name for file in Path("run/checkpoints").iterdir())
    assert len(files) == 4
    assert "last.ckpt" in files
    none = ["--checkpoint.save_top_k", "0", "--trainer.default_root_dir", "none"]
    fit("plain", demo_teacher, *short, "--trainer.max_epochs", "2", *none)
    assert [file.name for file in Path("none/checkpoints").iterdir()] == ["last.ckpt"]


def test_rows_are_on_disk_when_they_are_logged_and_only_added(demo_teacher: str, monkeypatch) -> None:
    seen: list[str] = []

    def look(self: Throughput, trainer: pl.Trainer, *_: Any) -> None:
        seen.append(Path("run/metrics.csv").read_text() if trainer.global_step > 1 else "")

    monkeypatch.setattr(Throughput, "on_train_batch_end", look)
    fit("plain", demo_teacher, *QUIET, "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1")
    for step, text in enumerate(seen[1:], start=1):
        rows = [row["step"] for row in csv.DictReader(text.splitlines()) if row.get("train/loss")]
        assert rows == [str(i) for i in range(step)]
    complete = [text for text in seen if "val/acc1" in text]
    assert len(complete) > 10
    assert all(after.startswith(before) for before, after in pairwise(complete))
