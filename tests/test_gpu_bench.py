"""The code of `make bench` on a GPU, run on the CPU with tiny networks: every row comes, and CUDA is asked rightly."""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench import __main__ as bench
from tests.bench import device, gpu
from tests.bench.plain_step import Pair
from tests.tiny import STUDENT, WIDE

TINY = gpu.Sizes(
    pair=Pair(
        {**STUDENT, "img_size": 16},
        {
            "arch": "cait_xxs24_224",
            "img_size": 16,
            "model_args": {**WIDE, "depth": 2, "num_classes": 5, "init_values": 0.1},
        },
        width=24,
    ),
    batch=4,
    size=16,
    steps=2,
    workers=0,
)


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """The bench silences Lightning, which later tests of this process listen to."""
    logger = logging.getLogger("lightning.pytorch")
    level, threads = logger.level, torch.get_num_threads()
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_every_row_of_the_table_comes_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def compiled(graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiled))
    monkeypatch.setattr(gpu, "peak_gb", lambda work, on: 1.0)
    monkeypatch.setattr(gpu, "rows", functools.partial(gpu.rows, sizes=TINY))
    monkeypatch.setitem(bench.MEASUREMENTS, "gpu", gpu.rows)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", "--rounds", "1", "--out", str(tmp_path / "bench.json")])
    bench.main()
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["machine"]["device"] == "cpu"
    assert [cells[0].removeprefix("| ") for cells in table] == [each["what"] for each in written["measured"]]
    assert len({each["what"] for each in written["measured"]}) == len(table) == 4 + 2 * 5 + 2 + 4 + 2 * 2
    for each, cells in zip(written["measured"], table, strict=True):
        assert min(each["kdvit"], each["other"]) > 0
        assert cells[5] == f"{1e3 * 4 / each['kdvit']:,.0f}"
        alone = any(word in each["what"] for word in ("Lightning", "waits", "workers"))
        assert each["peak_gb"] == (None if alone else [1.0, 1.0])


def test_a_gpu_is_timed_by_its_events_and_asked_for_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            asked.append("event")

        def elapsed_time(self, last: Event) -> float:
            return 1e3 * (last.at - self.at)

    cuda = SimpleNamespace(
        Event=Event,
        synchronize=lambda on: asked.append("synchronize"),
        memory_allocated=lambda on: 3 * 10**9,
        reset_peak_memory_stats=lambda on: asked.append("reset"),
        max_memory_allocated=lambda on: 5 * 10**9,
        set_sync_debug_mode=asked.append,
    )
    monkeypatch.setattr(device.torch, "cuda", cuda)
    on = torch.device("cuda")
    assert 0.01 <= device.timed(lambda: time.sleep(0.01), on)() < 1
    assert asked == ["synchronize", "event"]
    asked.clear()
    assert device.peak_gb(lambda: asked.append("work"), on) == pytest.approx(2.0)
    assert asked == ["synchronize", "reset", "work", "synchronize"]
    asked.clear()
    with device.waits(on) as places:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert asked == ["warn", "default"]
    assert [Path(each.filename).name for each in places] == ["test_gpu_bench.py"]
    assert device.now(on) <= time.perf_counter()
