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
from kdvit.models.checkpoint import export_student, student_spec
from kdvit.models.export import agreement, export_program
from kdvit.models.onnx import export_onnx
from kdvit.models.timm_network import TimmStudent
from kdvit.training.module import DistillationModule
from tests.tiny import FORMAT, TinyData, student, trainer

ANY_SIZE = {"dynamic_img_size": True}


def run_onnx(file: str, image: np.ndarray) -> tuple[np.ndarray, dict]:
    """Returns an ONNX file's logits of a batch, and its metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    (logits,) = session.run(["logits"], {"image": image})
    told = session.get_modelmeta().custom_metadata_map
    return logits, {name: json.loads(value) for name, value in told.items() if "." not in name}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Trains a Lift student for an epoch, with EMA."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("trained")
    module = DistillationModule(student("lift"), image_format=FORMAT, class_names=list("abcde"))
    run = trainer(home, callbacks=[StudentEMA(0.5)])
    run.fit(module, datamodule=TinyData())
    run.save_checkpoint(home / "end.ckpt")
    return str(home / "end.ckpt")


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


def test_onnx_runs_elsewhere_with_any_batch_and_says_what_its_images_and_classes_are(checkpoint: str, capsys) -> None:
    main(["export", "--ckpt", checkpoint, "--out", "out", "--format", "onnx", "--images", "Digits"])
    shown = capsys.readouterr().out
    found = re.search(r"by at most (\S+) of (\S+), and 100.0% of 260 images get the same class\.", shown)
    assert float(found[1]) <= 1e-4 * float(found[2])
    network = load_student("out")
    for batch in (1, 5):
        image = np.random.RandomState(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)
        logits, told = run_onnx("out/model.onnx", image)
        np.testing.assert_allclose(logits, network(torch.from_numpy(image)).logits.detach(), atol=1e-4)
    assert told["size"] == [16, 16]
    assert told["mean"] == told["std"] == [0.5] * 3
    assert told["class_names"] == network.class_names == list("abcde")


@pytest.mark.slow
def test_onnx_of_any_size_in_float16_and_int8(capsys) -> None:
    network = TimmStudent("deit_tiny_patch16_224", 5, img_size=32, model_args={"depth": 2}).eval()
    export_student(network, student_spec(network, network.image_format), "student")
    image = np.random.RandomState(0).standard_normal((2, 3, 64, 48)).astype(np.float32)
    resized = TimmStudent(**{**network.init_args, "model_args": {**network.init_args["model_args"], **ANY_SIZE}})
    resized.load_state_dict(network.state_dict())
    expected = resized.eval()(torch.from_numpy(image)).logits.detach().numpy()
    command = ["export", "--ckpt", "student", "--out", "out", "--format", "onnx", "--dynamic_size", "true"]
    sizes = []
    for precision, tolerance in (("float32", 1e-4), ("float16", 1e-2), ("int8", 0.2)):
        main([*command, "--precision", precision])
        assert f"out/model.onnx, {precision}, " in capsys.readouterr().out
        sizes.append(Path("out/model.onnx").stat().st_size)
        logits, _ = run_onnx("out/model.onnx", image)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=tolerance * np.abs(expected).max())
    assert sizes[1] < 0.6 * sizes[0]
    assert sizes[2] < 0.45 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("beit_base_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("vit_relpos_small_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("hiera_tiny_224", {"embed_dim": 32, "stages": (1, 1, 1, 1)}),
        ("twins_svt_small", {}),
        ("mobileone_s0", {}),  # logits of 1e14, which float32 rounds by 1e8
    ],
)
def test_onnx_of_networks_whose_fused_attention_has_no_onnx(arch: str, args: dict, tmp_path) -> None:
    network = TimmStudent(arch, 5, model_args=args)
    result = export_onnx(network, tmp_path / "model.onnx")
    assert result.largest <= 1e-4 * result.scale
    assert (tmp_path / "model.onnx").is_file()
    assert all(module.fused_attn for module in network.modules() if hasattr(module, "fused_attn"))


@pytest.mark.slow
def test_what_onnx_cannot_have_is_one_message_and_leaves_nothing_behind(capsys) -> None:
    network = TimmStudent("cait_xxs24_224", 5, img_size=32, model_args={"embed_dim": 32, "depth": 1, "num_heads": 2})
    spec = student_spec(network, network.image_format)
    export_student(network, spec, "fixed")
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    export_student(network, spec, "nan")
    for arguments, expected in (
        (["fixed", "--dynamic_size", "true"], "images of any size (leave out --dynamic_size): "),
        (["nan"], "logits differ from the original's by nan of nan"),
        (["nan", "--precision", "int8"], "logits differ from the original's by nan of nan"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["export", "--format", "onnx", "--out", "out", "--ckpt", *arguments])
        assert end.value.code == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert expected in message
        assert not Path("out").exists()
    with pytest.raises(SystemExit):
        main(["export", "--ckpt", "fixed", "--out", "out", "--precision", "int8"])
    assert "--precision, --dynamic_size and --images are for --format onnx." in capsys.readouterr().err


@pytest.mark.slow
def test_a_program_of_torch_export_runs_without_kdvit(checkpoint: str, capsys) -> None:
    main(["export", "--ckpt", checkpoint, "--out", "out", "--format", "torch-export"])
    assert "differ from PyTorch's by at most" in capsys.readouterr().out
    run = (
        "import sys, torch; program = torch.export.load('out/model.pt2').module(); "
        "assert program(torch.zeros(7, 3, 16, 16)).shape == (7, 5); assert 'kdvit' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", run], check=True)


def test_an_export_may_differ_by_a_ten_thousandth_of_the_largest_logit_or_feature(tmp_path) -> None:
    network, image = student(), torch.randn(2, 3, 16, 16)
    logits = network.eval()(image).logits.detach()
    largest = logits.abs().max()
    kept = agreement(network, [logits + 0.9e-4 * largest], [image])
    assert kept.largest == pytest.approx(0.9e-4 * kept.scale, rel=0.1)
    with pytest.raises(RuntimeError, match=r"logits differ from the original's by \S+ of \S+; at most 0\.0001 of the"):
        agreement(network, [logits + 1.1e-4 * largest], [image])
    without, image = student(num_classes=0).eval(), torch.randn(2, 3, 16, 16)
    features = without.deployed(image).detach()
    told = str(agreement(without, [features], [image]))
    assert re.fullmatch(r"its features differ from PyTorch's by at most 0 of \S+, on 2 images", told)
    with pytest.raises(RuntimeError, match=r"student's features differ from the original's by"):
        agreement(without, [features * 1.001], [image])
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="by nan of nan"):
        export_program(network, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


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
    head, ours, theirs = capsys.readouterr().out.splitlines()[:3]
    assert "latency (ms)  folded: parameters  folded: latency" in head
    assert ours.split()[-2] == f"{parameters:,}"
    assert f" {parameters:,} " in theirs


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
