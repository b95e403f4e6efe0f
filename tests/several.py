"""Several processes that run commands of kdvit, and a way for one of them to fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl

from kdvit.cli import main

PATHS = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def together(processes: int, *commands: list[str], status: int | list[int] = 0, seconds: float = 200) -> list[str]:
    """Runs commands one after the other in processes that have found each other, and returns what each prints.

    The test fails if they end with another status (or others, in the order of the ranks), or not within `seconds`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, **PATHS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    run = [sys.executable, "-m", "tests.several", json.dumps(commands)]
    files = [Path(f"rank{rank}.txt") for rank in range(processes)]
    started = []
    for rank, file in enumerate(files):
        with file.open("w") as out:
            environment = {**shared, "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(run, stdout=out, stderr=subprocess.STDOUT, env=environment))
    try:
        end = time.monotonic() + seconds
        statuses = [process.wait(max(1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    said = [file.read_text() for file in files]
    expected = status if isinstance(status, list) else [status] * processes
    assert statuses == expected, "\n".join(text[-3000:] for text in said)
    return said


def apart() -> None:
    """Lets the ranks but the first work in a folder of their own, as on a machine that sees no files of the run."""
    if os.environ["LOCAL_RANK"] != "0":
        Path("apart").mkdir()
        os.chdir("apart")


class Fault(pl.Callback):
    """Fails on some ranks before a training step: by an exception, by a signal, without a word, or not at all."""

    def __init__(self, faults: dict[int, str], step: int = 3) -> None:
        self.faults, self.step = faults, step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch, batch_idx: int) -> None:
        fault = self.faults.get(trainer.global_rank)
        if fault is None or trainer.global_step != self.step:
            return
        if fault == "raise":
            raise RuntimeError(f"rank {trainer.global_rank} has met its fault")
        if fault == "killed":
            time.sleep(1)  # for the others to hang
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "exit":
            os._exit(7)
        time.sleep(1000)


if __name__ == "__main__":
    for command in json.loads(sys.argv[1]):
        if command == ["apart"]:
            apart()
        else:
            main(command)
