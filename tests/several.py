"""Commands of kdvit, one after the other, in several processes that have found each other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from kdvit.cli import main


def together(processes: int, *commands: list[str], seconds: float = 180) -> str:
    """Runs commands in so many processes, and returns what the first of them prints.

    A run that hangs fails after so many seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
    }
    run = [sys.executable, "-m", "tests.several", json.dumps(commands)]
    started = [
        subprocess.Popen(
            run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**shared, "LOCAL_RANK": str(rank)}
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text[-3000:]
    return said[0]


if __name__ == "__main__":
    for command in json.loads(sys.argv[1]):
        main(command)
