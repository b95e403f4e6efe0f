"""Networks without a head, grey and non-square images: whole runs, and what says that it needs logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from kdvit import load_student
from kdvit.cli import main
from kdvit.models import TimmTeacher
from kdvit.training.heads import leave_unreached
from tests.runs import QUIET, column
from tests.several import together
from tests.tiny import student as tiny_student

TINY = {"patch_size": 4, "embed_dim": 10, "depth": 2, "num_heads": 2}
TEACHER = {"arch": "vit_small_patch14_dinov2", "img_size": [16, 8], "num_classes": 0, "model_args": TINY}
IMAGES = {"batch_size": 32, "img_size": [16, 8], "mean": [0.3], "std": [0.4]}
STUDENT = {"arch": "deit_tiny_patch16_224", "img_size": [16, 8], "in_chans": 1, "num_classes": 10}
STUDENT |= {"model_args": {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}}
SHORT = [*QUIET, "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"]


@pytest.fixture
def _teacher() -> None:
    """The weights of a network as wide as the digits have classes, in the file of a DINO training."""
    model = TimmTeacher(**{**TEACHER, "img_size": (16, 8)}, pretrained=False).model
    torch.save({"teacher": {f"backbone.{name}": each for name, each in model.state_dict().items()}}, "dino.pth")


def config(student: str, distillers: dict[str, Any], task_weight: float, **change: Any) -> list[str]:
    """Writes a config, and returns the arguments that name it."""
    model = {
        "student": {"class_path": student, "init_args": {**STUDENT, **change}},
        "teacher": {"class_path": "TimmTeacher", "init_args": {**TEACHER, "checkpoint": "dino.pth"}},
        "distillers": distillers,
        "task_weight": task_weight,
        "optimizer": {"lr": 0.003, "lr_base_batch": None, "args": {"layer_decay": 0.8}},
        "schedule": {"warmup_epochs": 0},
    }
    trainer = {"default_root_dir": "run", "max_epochs": 2, "accelerator": "cpu", "devices": 1}
    data = {"class_path": "Digits", "init_args": IMAGES}
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": trainer, "data": data, "model": model}))
    return ["--config", "run.yaml"]


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("_teacher")
def test_a_teacher_without_a_head_teaches_a_student_of_grey_images_that_are_no_square(capsys) -> None:
    named = config("LiftViT", {"lift": {"class_path": "LiftDistiller"}}, 1.0, width=10)
    main(["check", *named, *QUIET])
    told = capsys.readouterr()
    assert "16 x 8, mean (0.300), std (0.400)" in told.out
    assert "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225) (converted from the images)" in told.out
    assert "dino.pth: 34 of 34 tensors loaded into vit_small_patch14_dinov2; new: nothing; left: nothing." in told.err
    main(["fit", *named, *SHORT])
    assert len(column("run", ("epoch", "val/acc1"))) >= 2
    main(["predict", *named, *SHORT])
    main(["export", "--ckpt", "run/checkpoints/best.ckpt", "--out", "out", "--format", "onnx"])
    loaded, image = load_student("out"), torch.randn(2, 1, 16, 8)
    assert loaded.image_format[:3] == ((16, 8), (0.3,), (0.4,))
    assert torch.equal(timm.create_model("local-dir:out", pretrained=True).eval()(image), loaded(image).logits)
    assert json.loads(Path("out/config.json").read_text())["pretrained_cfg"]["input_size"] == [1, 16, 8]
    main(["analyze", *named, "--images", "100", "--num_workers", "0", "--out", "analysis"])
    main(["benchmark", "out", "run.yaml", "--batch_size", "2"])


@pytest.mark.slow
@pytest.mark.usefixtures("_teacher")
def test_a_student_without_a_head_goes_the_whole_way_by_its_distillers_alone(capsys, caplog) -> None:
    feature = {"feature": {"class_path": "FeatureDistiller", "init_args": {"projector": "linear"}}}
    named = config("TimmStudent", feature, 0.0, num_classes=0)
    main(["check", *named, *QUIET])
    assert "No objective reaches model.norm.weight, model.norm.bias of the student" in caplog.text
    main(["cache", *named, *QUIET, "--out", "cached", "--views", "2"])
    cached = ["--data.init_args.cache", "cached"]
    main(["fit", *named, *SHORT, *cached, "--trainer.default_root_dir", "whole"])
    together(2, ["fit", *named, *SHORT, "--trainer.devices", "2", "--trainer.strategy", "ddp"])
    main(["fit", *named, *SHORT, *cached, "--trainer.default_root_dir", "parts", "--trainer.max_steps", "2"])
    main(["fit", *named, *SHORT, *cached, "--trainer.default_root_dir", "parts", "--trainer.max_steps", "-1"])
    assert column("whole", ("step", "val/loss"))[-1] == column("parts", ("step", "val/loss"))[-1]
    for file in ("run/student", "run/checkpoints/best.ckpt"):
        loaded, image = load_student(file), torch.randn(3, 1, 16, 8)
        assert loaded(image).logits is None
        assert loaded.deployed(image).shape == (3, 8)
    capsys.readouterr()
    main(["export", "--ckpt", "run/checkpoints/best.ckpt", "--out", "out", "--format", "onnx"])
    onnx = pytest.importorskip("onnxruntime").InferenceSession("out/model.onnx")
    assert [each.name for each in onnx.get_outputs()] == ["features"]
    features = timm.create_model("local-dir:out", pretrained=True).eval()(image)
    torch.testing.assert_close(features, load_student("out").deployed(image))
    main(["compare", "run", "out", "whole"])
    told = capsys.readouterr().out
    assert "no parameters" not in told
    main(["analyze", *named, "--images", "100", "--num_workers", "0", "--out", "analysis"])
    main(["test", *named, *SHORT])
    assert "it predicts no class" in refused(["predict", *named, *SHORT], capsys)


@pytest.mark.usefixtures("_teacher")
def test_what_needs_logits_says_so_where_there_are_none(capsys) -> None:
    logit = {"logit": {"class_path": "LogitDistiller"}}
    message = refused(["fit", *config("TimmStudent", logit, 1.0), *SHORT], capsys)  # the teacher is 10 wide
    assert "distillers.logit: it reads logits, and the teacher has no head (num_classes: 0). Distil features" in message
    feature = {"feature": {"class_path": "FeatureDistiller", "init_args": {"projector": "linear"}}}
    headless = config("TimmStudent", feature, 1.0, num_classes=0)
    message = refused(["fit", *headless, *SHORT], capsys)
    assert "The student has no head, and model.task_weight is 1. Set it to 0: the distillers alone train." in message
    headless = config("TimmStudent", feature, 0.0, num_classes=0)
    message = refused(["cache", *headless, *QUIET, "--out", "cached", "--store", "both"], capsys)
    assert "--store both: the teacher has no head (num_classes: 0), and so no logits. Store features." in message


def test_what_no_objective_reaches_is_frozen_and_named() -> None:
    student = tiny_student(num_classes=0)
    said = leave_unreached(student, (1,), logits=False)
    left = [name for name, each in student.named_parameters() if not each.requires_grad]
    assert left
    assert all(name.startswith(("model.blocks.2.", "model.norm.")) for name in left)
    assert said == [
        f"No objective reaches {', '.join(left[:4])} and {len(left) - 4} more of the student: they stay as they are."
    ]
    assert leave_unreached(tiny_student(), (-1,), logits=True) == []
    assert leave_unreached(tiny_student(num_classes=0), ("pooled",), logits=False) == []
