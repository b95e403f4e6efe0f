"""The authors' checkpoints, made from their key lists, whole and damaged."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest
import torch

from kdvit import load_student
from kdvit.cli import main
from kdvit.data import ImageFolder
from kdvit.models import LiftViT, WideLastViT, load_released
from tests.data.test_data_modules import image_folder
from tests.reference import ARRAYS, reference_image, reference_weights


def _save(file: Path, weights: dict, **more) -> str:
    """Saves as the authors' code does: optimizer, averages and an argparse Namespace beside the weights."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="deit_tiny_patch16_224", lr=5e-4, output_dir="out")
    averaged = {key: value + 1 for key, value in weights.items()}
    state = {"model": weights, "model_ema": averaged, "optimizer": optimizer.state_dict(), "epoch": 299, "args": args}
    torch.save({**state, "lr_scheduler": {"last_epoch": 3}, "scaler": {"scale": 65536.0}, **more}, file)
    return str(file)


@pytest.mark.parametrize(("name", "cls", "dead"), [("lift", LiftViT, 4), ("widelast", WideLastViT, 0)])
def test_a_released_checkpoint_becomes_the_same_student(name: str, cls: type, dead: int, tmp_path, capsys) -> None:
    file = _save(tmp_path / "reference.pth", reference_weights(name))
    main(["import", file, "--out", "student"])
    shown = capsys.readouterr().out
    assert f"{cls.__name__}, " in shown
    assert shown.count("base_model.") == dead
    student = load_student("student")
    assert type(student) is cls
    assert student.image_format.mean == (0.485, 0.456, 0.406)
    with torch.no_grad():
        torch.testing.assert_close(
            student(reference_image(name)).logits, ARRAYS[f"{name}_logits"], atol=1e-5, rtol=1e-5
        )
    assert torch.equal(load_student(file).model.pos_embed, student.model.pos_embed)
    assert student.image_format.crop_pct == 0.875
    averaged = load_released(file, ema=True).student
    assert torch.equal(averaged.model.pos_embed, student.model.pos_embed + 1)


def test_lifts_of_earlier_blocks_are_left_out_as_no_logit_depends_on_them(tmp_path, capsys) -> None:
    weights = reference_weights("lift")
    early = {"projections.9.weight": torch.ones(256, 192), "layer_norms.9.weight": torch.ones(256)}
    file = _save(tmp_path / "reference.pth", {**weights, **early})
    student, dropped = load_released(file)
    assert {*early} < {*dropped}
    assert torch.equal(student.model.head.weight, weights["head.weight"])
    main(["import", file, "--out", "student"])
    assert "projections.9.weight" in capsys.readouterr().out


def test_an_imported_student_is_validated_by_the_command_line(tmp_path, capsys) -> None:
    source = LiftViT("deit_tiny_patch16_224", 384, num_classes=2)
    weights = {}
    for key, value in source.model.state_dict().items():
        key = key.replace("norm.0.", "projections.11.") if key.startswith("norm.0") else key
        key = key.replace("norm.1.", "layer_norms.11.") if key.startswith("norm.1.") else key
        own = key.startswith(("projections", "layer_norms", "head"))
        weights[key if own else f"base_model.{key}"] = value
    main(["import", _save(tmp_path / "lift.pth", weights), "--out", "student"])
    image_folder(tmp_path / "imagenet", val=5)
    data = [
        "--data.init_args.root",
        "imagenet",
        "--data.init_args.num_workers",
        "0",
        "--data.init_args.batch_size",
        "4",
    ]
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.precision", "32-true"]
    imported = ["--model.student.init_args.arch", "local-dir:student", "--model.student.init_args.pretrained", "true"]
    two = ["--model.student.init_args.num_classes", "2", "--ema.decay", "null"]
    capsys.readouterr()
    main(["validate", "--config", "supervised.yaml", *data, *one, *imported, *two])
    told = capsys.readouterr().out
    batches = list(ImageFolder("imagenet", batch_size=4, num_workers=0).val_dataloader())
    with torch.no_grad():
        logits = torch.cat([load_student("student")(batch.image).logits for batch in batches])
    targets = torch.cat([batch.target for batch in batches])
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    right = (logits.argmax(1) == targets).float().mean().item()
    assert told == f"Validation on {len(targets)} images: accuracy {right:.2%}, loss {expected:.4g}.\n"


SCHEDULES = [
    ([384], None, [6]),
    pytest.param([384], 3, [3], marks=pytest.mark.slow),
    pytest.param([256, 320, 384], None, [4, 5, 6], marks=pytest.mark.slow),
    ([240, 312, 384], None, [3, 3, 3]),
]


@pytest.mark.parametrize(("widths", "num_heads", "expected"), SCHEDULES)
def test_the_four_widening_schedules_are_recognised(widths, num_heads, expected, tmp_path) -> None:
    source = WideLastViT("deit_tiny_patch16_224", widths, num_heads or (3 if 240 in widths else None), num_classes=7)
    weights = {}
    for key, value in source.model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= 12 - len(widths):
            parts[2:3] = {"0": ["proj_in"], "1": ["proj_norm"], "2": []}[parts[2]]
        weights[".".join(parts)] = value
    student = load_released(_save(tmp_path / "wide.pth", weights), num_heads=num_heads).student
    assert [block[2].attn.num_heads for block in student.model.blocks[-len(widths) :]] == expected
    image = torch.randn(1, 3, 224, 224)
    assert torch.equal(student(image).logits, source.eval()(image).logits)


def _options(**more) -> argparse.Namespace:
    options = {"custom_arch": True, "input_size": 224, "nb_classes": 1000, "expansion_target_dim": None}
    return argparse.Namespace(model="deit_tiny_patch16_224", **{**options, **more})


def test_a_file_has_the_heads_that_its_own_options_name(tmp_path) -> None:
    weights = reference_weights("widelast")
    file = _save(tmp_path / "wide.pth", weights, args=_options(arch_schedule="fixed_step"))
    main(["import", file, "--out", "student"])
    source = load_released(_save(tmp_path / "silent.pth", weights), num_heads=3).student
    image = reference_image("widelast")[:1]
    for student in (load_student("student"), load_released(file, num_heads=3).student):
        assert student.model.blocks[-1][2].attn.num_heads == 3
        with torch.no_grad():
            assert torch.equal(student(image).logits, source(image).logits)


@pytest.mark.parametrize(
    ("name", "options", "more", "text"),
    [
        (
            "widelast",
            {"arch_schedule": "heads_linear"},
            [],
            r"arch_schedule 'heads_linear', with wide blocks of \[256, 320, 384\], but its weights have \[384\]",
        ),
        ("widelast", {"arch_schedule": "heads_leap"}, [], "'heads_leap'; expected one of heads_linear, fixed_linear"),
        ("widelast", {"arch_schedule": "fixed_step"}, ["--num_heads", "6"], r"has \[3\] heads; leave out .*, got 6"),
        ("widelast", {"arch_schedule": "heads_step", "nb_classes": 100}, [], "nb_classes 100, but its weights 1000"),
        ("widelast", {"arch_schedule": "heads_step", "input_size": 384}, [], "input_size 384, but its weights 224"),
        ("lift", {"expansion_target_dim": 320}, [], "expansion_target_dim 320, but its weights 384: .* two networks"),
        ("lift", {"nb_classes": 100}, [], "nb_classes 100, but its weights 1000"),
    ],
)
def test_options_that_contradict_the_weights_are_refused(
    name: str, options: dict, more: list[str], text: str, tmp_path, capsys
) -> None:
    file = _save(tmp_path / "reference.pth", reference_weights(name), args=_options(**options))
    with pytest.raises(SystemExit):
        main(["import", file, "--out", "student", *more])
    (message,) = capsys.readouterr().err.splitlines()
    assert re.search(text, message), message
    assert not Path("student").exists()


class _Foreign:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def _without(name: str, key: str) -> dict:
    weights = reference_weights(name)
    del weights[key]
    return weights


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda file: _save(file, _without("lift", "head.bias")), r"reference.pth': .*Missing key\(s\).*\"head.bias\""),
        (lambda file: _save(file, _without("lift", "projections.11.weight")), "neither a Lift nor a WideLast"),
        (lambda file: _save(file, _without("widelast", "pos_embed")), "it lacks 'pos_embed'"),
        (
            lambda file: _save(file, {**reference_weights("lift"), "extra": torch.zeros(1)}),
            r"Unexpected key\(s\) .*\"extra\"",
        ),
        (
            lambda file: _save(file, {**reference_weights("widelast"), "norm.bias": torch.zeros(5)}),
            "size mismatch for norm.bias",
        ),
        (lambda file: _save(file, {"a.weight": torch.zeros(1)}), "neither a Lift nor a WideLast.*found 'a.weight'"),
        (lambda file: torch.save({"state_dict": {}}, file), "no weights by name under 'model'; it has 'state_dict'"),
        (
            lambda file: _save(file, {**reference_weights("lift"), "projections.11.weight": torch.ones(())}),
            "reference.pth': len",
        ),
        (
            lambda file: _save(file, {**reference_weights("widelast"), "pos_embed": 3}),
            "reference.pth': 'int' object has",
        ),
        (lambda file: torch.save([1, 2], file), "holds a list; expected a dictionary"),
        (lambda file: _save(file, reference_weights("lift"), args=_Foreign()), "damaged, or holds more than tensors"),
        (lambda file: file.write_bytes(Path(_save(file, reference_weights("lift"))).read_bytes()[:9999]), "is damaged"),
        (lambda file: None, "no checkpoint file"),
    ],
)
def test_anything_else_is_refused_in_one_message_and_runs_no_code(damage, text: str, tmp_path, capsys) -> None:
    file = tmp_path / "reference.pth"
    damage(file)
    with pytest.raises(SystemExit) as end:
        main(["import", str(file), "--out", "student"])
    assert end.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert re.search(text, message), message
    assert not Path("student").exists()
    assert not Path("executed").exists()
