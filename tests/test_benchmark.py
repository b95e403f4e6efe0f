"""`kdvit benchmark`: a table, a file, and what it answers to what cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kdvit.cli import main
from kdvit.models import export_student
from kdvit.models.checkpoint import student_spec
from tests.tiny import FORMAT, student


def export(remedy: str | None, folder: str) -> None:
    network = student(remedy)
    export_student(network, student_spec(network, FORMAT), folder)


def test_a_table_and_a_file_have_medians_quartiles_and_the_conditions(monkeypatch, capsys) -> None:
    export("lift", "lift")
    export(None, "plain")
    timed: list[tuple] = []
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def times(networks, batch_size: int = 1, rounds: int = 50) -> list[list[float]]:
        timed.append((len(networks), batch_size, rounds, {each.blank_image().dtype for each in networks}))
        return [[(k + 1.0) * (n + 1) for n in range(rounds)] for k in range(len(networks))]

    monkeypatch.setattr("kdvit.models.cost.round_times_ms", times)
    options = ["--batch_size", "8", "--threads", "3", "--precision", "bf16", "--out", "new/costs.json"]
    main(["benchmark", "lift", "plain", *options])
    assert timed == [(3, 1, 50, {torch.bfloat16}), (3, 8, 10, {torch.bfloat16})]
    assert threads == [3]

    told, head, *rows = capsys.readouterr().out.splitlines()
    assert told.startswith(
        "Median (quartiles) of 50 rounds of one image and 10 of 8, every network once a round. cpu, "
    )
    assert told.endswith(" threads, bf16.")
    assert re.split("  +", head) == ["network", "parameters", "GFLOP", "latency (ms)", "images/s at 8"]
    cells = [re.split("  +", row) for row in rows]
    assert [row[:2] for row in cells] == [["lift", "11,469"], ["lift, folded", "11,133"], ["plain", "11,029"]]
    assert [row[3] for row in cells] == ["25.50 (13.25-37.75)", "51.00 (26.50-75.50)", "76.50 (39.75-113.25)"]

    written = json.loads(Path("new/costs.json").read_text())
    assert written["batch_size"] == 8
    machine = written["machine"]
    assert (machine["device"], machine["precision"], machine["torch"]) == ("cpu", "bf16", torch.__version__)
    for k, each in enumerate(written["networks"]):
        latencies = (k + 1.0) * np.arange(1, 51)
        rates = 8000 / ((k + 1.0) * np.arange(1, 11))
        for name, values in (("latency_ms", latencies), ("images_per_second", rates)):
            assert each[f"{name}_rounds"] == pytest.approx(values)
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
            assert each[name] == pytest.approx(median)
            assert each[f"{name}_quartiles"] == pytest.approx([low, high])
        assert f"{each['images_per_second']:.1f} (" in rows[k]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_networks_are_really_timed(precision: str, capsys) -> None:
    export("wide_last", "wide")
    main(["benchmark", "wide", "--batch_size", "2", "--precision", precision, "--out", "costs.json"])
    (network,) = json.loads(Path("costs.json").read_text())["networks"]
    assert (len(network["latency_ms_rounds"]), len(network["images_per_second_rounds"])) == (50, 10)
    assert min(*network["latency_ms_rounds"], *network["images_per_second_rounds"]) > 0
    assert "Timing" not in capsys.readouterr().err  # no terminal, no progress bar


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["deit_tny_patch16_224"], "Did you mean deit_tiny_patch16_224"),
        (["x", "--device", "gpu"], "--device 'gpu': Expected one of cpu, cuda"),
        (["x", "--precision", "int8"], "precision: expected Literal['float32', 'bf16', 'fp16'], got 'int8'."),
        (["x", "--threads", "0"], "threads: expected a number >0 (got '0')"),
        (["x", "--out", "."], "--out '.': [Errno 21] Is a directory: '.'"),
    ],
)
def test_what_cannot_be_is_answered_in_one_line(words: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["benchmark", *words])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert error.count("\n") == 1, error
