"""What a user's mistakes are answered with: one clear message, before the first batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from tests.data.test_data_modules import image_folder
from tests.runs import SHORT

CONFIGS = packaged_configs()
LIFT = "demo/lift.yaml"
WRONG: dict[str, tuple[Any, str]] = {
    "class name": (
        {"model/distillers/lift/class_path": "LiftDistler"},
        "no class 'LiftDistler'. Did you mean LiftDistiller? Known: AttentionTransferDistiller, ",
    ),
    "student class": ({"model/student/class_path": "LiftVit"}, "no class 'LiftVit'. Did you mean LiftViT?"),
    "data class": ({"data/class_path": "Digit"}, "no class 'Digit'. Did you mean Digits?"),
    "foreign class": ({"data/class_path": "no_package.Data"}, "No module named 'no_package'"),
    "key": (
        {"model/student/init_args/widht": 64},
        "Option 'widht' is not accepted. Did you mean width? It takes: arch",
    ),
    "model key": ({"model/task_wight": 1}, "no option 'model.task_wight'. Did you mean task_weight?"),
    "trainer key": ({"trainer/max_epoch": 1}, "no option 'trainer.max_epoch'. Did you mean max_epochs?"),
    "type": ({"model/student/init_args/width": "wide"}, "width: expected int, got 'wide'."),
    "distiller type": (
        {"model/distillers/lift/init_args/weight": "heavy"},
        "weight: expected a number, or a schedule of start, end, epochs and shape (got 'heavy')",
    ),
    "optional type": ({"trainer/max_epochs": "ten"}, "trainer.max_epochs: expected int (got 'ten')"),
    "layer out of range": (
        {"model/distillers/lift/init_args/teacher_layer": 9},
        "distillers.lift: TimmTeacher has no layer 9. Its layers: 0 to 3",
    ),
    "width mismatch": ({"model/student/init_args/width": 32}, "Set the width of LiftViT to 64."),
    "missing teacher": ({"model/teacher/init_args/arch": "local-dir:nowhere"}, "no exported network in '"),
    "missing checkpoint": ({"model/student/init_args/checkpoint": "no.pth"}, "no checkpoint file '"),
    "unknown data root": (
        {"data": {"class_path": "ImageFolder", "init_args": {"root": "nowhere"}}},
        "Expected layout: ROOT/train/CLASS/image.jpg and ROOT/val/CLASS/image.jpg. In '",
    ),
    "negative weight": ({"model/distillers/lift/init_args/weight": -1}, "weight must be 0 or more, got -1.0"),
    "class count": (
        {"model/student/init_args/num_classes": 12},
        "The student has 12 classes and the data 10. Set num_classes",
    ),
    "one class": ({"model/student/init_args/num_classes": 1}, "Expected 2 classes or more, got 1 of the student and"),
    "unequal layer lists": (
        {"model/distillers/lift": {"class_path": "FeatureDistiller", "init_args": {"teacher_layers": [0, 1]}}},
        "lists of one length, got 1 ([-1]) and 2 ([0, 1])",
    ),
    "image size": (
        {"model/student/init_args/img_size": 16},
        "takes images of (16, 16) pixels and the data gives (8, 8)",
    ),
    "optimizer": ({"model/optimizer/name": "adamww"}, "optimizer.name: timm has no 'adamww'. Did you mean adamw?"),
    "no learning rate": ({"model/optimizer/lr": None}, "optimizer: lr and weight_decay must be numbers, got None"),
    "schedule": ({"model/schedule/name": "cosin"}, "schedule.name must be one of constant, cosine"),
    "architecture": ({"model/student/init_args/arch": "deit_tny_patch16_224"}, "Did you mean deit_tiny_patch16_224"),
    "no such device": ({"trainer/accelerator": "gpu"}, "No supported gpu backend found"),
    "optimizer argument": ({"model/optimizer/args": {"foo": 1}}, "optimizer.args: adamw does not take {'foo': 1}"),
    "momentum of AdamW": ({"model/optimizer/args": {"momentum": 0.9}}, "optimizer.args: adamw has no momentum."),
    "no mapping": ({"data": 0.5}, "data: expected `class_path`, the name of a class"),
    "padding": ({"data/init_args/padding": -1}, "padding: must be 0 or more, got -1."),
    "decay": ({"ema/decay": 1}, "ema.decay: expected a number >0 and v<1 (got '1')"),
    "batch size": ({"data/init_args/batch_size": 0}, "batch_size: must be above 0, got 0."),
    "option of all data": (
        {"data/init_args/mixupp": 1},
        "Option 'mixupp' is not accepted. Did you mean mixup? It takes: batch_size",
    ),
    "precision": ({"trainer/precision": "bf17"}, "trainer.precision: "),
    "no epochs": ({"trainer/max_epochs": -1}, "set trainer.max_epochs"),
    "broken YAML": (
        "model: [",
        "is no YAML: while parsing a flow node expected the node content, but found '<stream end>' in \"broken.yaml\"",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_typing_error_gives_one_clear_message(mistake: str, demo_teacher: str, capsys) -> None:
    change, text = WRONG[mistake]
    if isinstance(change, str):
        Path("broken.yaml").write_text(change)
    else:
        config = yaml.safe_load((CONFIGS / LIFT).read_text())
        config["model"]["teacher"]["init_args"]["arch"] = demo_teacher
        for path, value in change.items():
            *keys, last = path.split("/")
            place = config
            for key in keys:
                place = place.setdefault(key, {})
            place[last] = value
        Path("broken.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "broken.yaml", *SHORT[:4]])
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("kdvit: error: ")
    assert text in message
    assert len(message) < 500
    assert not Path("runs").exists()


def test_what_is_not_there_is_named(capsys) -> None:
    for args, text in (
        (["fit", "--config", "nothing.yaml"], "nothing.yaml"),
        (["validate", "--config", "demo/plain.yaml", "--ckpt_path", "best"], "best.ckpt': train first"),
        (["compare", "nothing"], "nothing' holds no run: expected metrics.csv or student/"),
        (["validate", "--config", "demo/plain.yaml", "--ckpt_path", "no.ckpt"], "There is no file 'no.ckpt'"),
        (["fit"], "model.student"),
        (["check", "--config", LIFT, "--model.distillers.lfit.weight", "2"], "one of them has no class_path"),
    ):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 2
        assert text in capsys.readouterr().err.splitlines()[-1]


def test_a_check_names_a_broken_image(capsys) -> None:
    image_folder(Path("images"))
    for file in Path("images/val").rglob("*.jpg"):
        file.write_bytes(b"no image")
    data = ["--data", "ImageFolder", "--data.root", "images", "--data.batch_size", "2", "--data.num_workers", "0"]
    student = ["--model.student", "TimmStudent", "--model.student.arch", "resnet18", "--model.student.num_classes", "2"]
    with pytest.raises(SystemExit):
        main(["check", *data, *student, "--trainer.max_epochs", "1"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "Cannot read the image" in message
    assert "images/val/cat/0.jpg" in message


def test_training_without_training_images_is_refused_before_training(capsys) -> None:
    image_folder(Path("images"))
    shutil.rmtree("images/train")
    student = ["--model.student", "TimmStudent", "--model.student.arch", "resnet18", "--model.student.num_classes", "2"]
    with pytest.raises(SystemExit):
        main(["fit", "--data", "ImageFolder", "--data.root", "images", *student, "--trainer.max_epochs", "1"])
    assert "There is no folder '" in capsys.readouterr().err.splitlines()[-1]
