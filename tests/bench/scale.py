"""What a step costs against batch size, tokens, depth of the teacher and number of processes; no goals."""

from __future__ import annotations

import os
import socket
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.bench.plain_step import PUBLISHED, build, images, step
from tests.bench.rounds import Row, cost, interleave, row

BATCH = 8


def rows(rounds: int) -> list[Row]:
    """Measures Lift, DeiT-Tiny from CaiT-S24, bfloat16, each beside 8 images of 224 in one process."""
    base = build("Lift")
    usual = step(base, images(BATCH))
    shallow = PUBLISHED._replace(teacher={**PUBLISHED.teacher, "model_args": {"depth": 12}})
    found = []
    for name, other in (
        ("batch 4", step(base, images(4))),
        ("batch 16", step(base, images(16))),
        ("112 x 112, 49 tokens", step(build("Lift", size=112), images(BATCH, 112))),
        ("320 x 320, 400 tokens", step(build("Lift", size=320), images(BATCH, 320))),
        ("teacher of 12 blocks", step(build("Lift", pair=shallow), images(BATCH))),
    ):
        found.append(row(f"step, {name}: share of batch 8 at 224", interleave(other, usual, rounds), cost, "s", "none"))
    pairs = interleave(lambda: processes(2, 4, 1).wall, lambda: processes(1, BATCH, 2).wall, rounds)
    found.append(row("step, 2 processes of 4 images, a thread each: share of 1 process", pairs, cost, "s", "none"))
    for count in (2, 4):
        pairs = interleave(lambda count=count: processes(count, 4, 1).cpu, lambda: processes(1, 4, 1).cpu, rounds)
        name = f"processor time of a step of 4 images, {count} processes of a thread: share of that of 1 process"
        found.append(row(name, pairs, cost, "s", "none"))
    return found


class Seconds(NamedTuple):
    """What a step takes: elapsed, and of a process's processor (with cores for all, the two are alike)."""

    wall: float
    cpu: float


def processes(count: int, batch: int, threads: int) -> Seconds:
    """Returns the median seconds of a step in each of several processes, with the gradients summed over them.

    Args:
        count: Processes.
        batch: Images of each.
        threads: Of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_worker, (count, batch, threads, port, results), nprocs=count)
    return Seconds(*results.get())


def _worker(rank: int, count: int, batch: int, threads: int, port: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", rank=rank, world_size=count)
    module = build("Lift")

    def share() -> None:
        flat = torch.cat([weight.grad.flatten() for weight in module.parameters() if weight.grad is not None])
        dist.all_reduce(flat)

    run = step(module, images(batch), share=share if count > 1 else lambda: None)
    walls, cpus = [], []
    for _ in range(4):
        before = time.process_time()
        walls.append(run())
        cpus.append(time.process_time() - before)
    if rank == 0:
        results.put((statistics.median(walls[1:]), statistics.median(cpus[1:])))
    dist.destroy_process_group()
