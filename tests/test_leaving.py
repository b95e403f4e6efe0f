"""A student leaves: exports that other runtimes read, and what networks cost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdvit import load_student
from kdvit.callbacks import StudentEMA
from kdvit.cli import main
from kdvit.models.export import export_onnx, export_program
from kdvit.training.module import DistillationModule
from tests.tiny import FORMAT, TinyData, student, trainer


@pytest.fixture
def checkpoint() -> str:
    """Trains a Lift student for an epoch, with EMA."""
    module = DistillationModule(student("lift"), image_format=FORMAT, class_names=list("abcde"))
    run = trainer(".", callbacks=[StudentEMA(0.5)])
    run.fit(module, datamodule=TinyData())
    run.save_checkpoint("end.ckpt")
    return "end.ckpt"


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_checkpoint_is_exported_with_all_that_is_known_of_it(weights: str, checkpoint: str, capsys) -> None:
    main(["export", "--ckpt", checkpoint, "--out", "out", "--weights", weights])
    assert f"LiftViT, 11,469 parameters, {weights} weights, in out." in capsys.readouterr().out
    exported, source = load_student("out"), load_student(checkpoint, ema=weights == "ema")
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(exported(image).logits, source(image).logits)
    told = json.loads(Path("out/config.json").read_text())["kdvit"]
    assert told["class"] == "LiftViT"
    assert told["init_args"]["width"] == 24
    assert told["class_names"] == list("abcde")
    assert told["image_format"] == {
        "size": [16, 16],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    assert 0 <= told["run"]["val/acc1"] <= 1
    assert told["kdvit_version"]


def test_onnx_runs_elsewhere_with_any_batch(checkpoint: str, capsys) -> None:
    import onnxruntime

    main(["export", "--ckpt", checkpoint, "--out", "out", "--format", "onnx"])
    largest = float(re.search(r"by at most (\S+)\.$", capsys.readouterr().out.strip())[1])
    assert largest <= 1e-4
    session = onnxruntime.InferenceSession("out/model.onnx")
    network = load_student("out")
    for batch in (1, 5):
        image = np.random.RandomState(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)
        (logits,) = session.run(["logits"], {"image": image})
        np.testing.assert_allclose(logits, network(torch.from_numpy(image)).logits.detach(), atol=1e-4)


@pytest.mark.slow
def test_a_program_of_torch_export_runs_without_kdvit(checkpoint: str, capsys) -> None:
    main(["export", "--ckpt", checkpoint, "--out", "out", "--format", "torch-export"])
    assert "differ from PyTorch's by at most" in capsys.readouterr().out
    run = (
        "import sys, torch; program = torch.export.load('out/model.pt2').module(); "
        "assert program(torch.zeros(7, 3, 16, 16)).shape == (7, 5); assert 'kdvit' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", run], check=True)


@pytest.mark.parametrize("write", [export_onnx, export_program])
def test_an_export_that_differs_is_refused(write, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("kdvit.models.export.TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match=r"exported student differs from the original by .*; at most -1 is right"):
        write(student(), tmp_path / "file")


def test_what_cannot_be_exported_is_one_message(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "--ckpt", "nothing.ckpt", "--out", "out"])
    assert end.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "no exported folder or checkpoint" in message


def test_a_lift_is_compared_with_what_it_is_once_folded(checkpoint: str, capsys) -> None:
    main(["export", "--ckpt", checkpoint, "--out", "out"])
    main(["export", "--ckpt", checkpoint, "--out", "folded", "--fold"])
    parameters = sum(each.numel() for each in load_student("folded").parameters())
    capsys.readouterr()
    main(["compare", "out", "folded"])
    (note,) = (line for line in capsys.readouterr().out.splitlines() if "once folded" in line)
    assert note.startswith(f"out: once folded (kdvit export --fold) it has {parameters:,} parameters and takes ")


@pytest.mark.slow
def test_costs_are_shown_side_by_side(checkpoint: str, capsys) -> None:
    main(["export", "--ckpt", checkpoint, "--out", "out"])
    capsys.readouterr()
    main(["benchmark", "out", "cait_xxs24_224", "lift_no_teacher.yaml", "--batch_size", "2", "--out", "costs.json"])
    table = capsys.readouterr().out.splitlines()[1:]
    assert table[0].split() == ["network", "parameters", "GFLOP", "latency", "(ms)", "images/s", "at", "2"]
    costs = {cost["name"]: cost for cost in json.loads(Path("costs.json").read_text())["networks"]}
    assert [cost["parameters"] for cost in costs.values()] == [11_469, 11_133, 11_956_264, 5_983_528, 5_735_560]
    assert costs["lift_no_teacher: student"]["gflops"] == pytest.approx(2.54, abs=0.01)
    assert costs["lift_no_teacher: student, folded"]["gflops"] == pytest.approx(2.52, abs=0.01)
    assert all(cost["latency_ms"] > 0 and cost["images_per_second"] > 0 for cost in costs.values())
