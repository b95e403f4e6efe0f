"""A first config, written for one's own images and networks, which runs as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from kdvit import load_student
from kdvit.cli import main, starting
from kdvit.models import export_student
from kdvit.models.checkpoint import student_spec
from kdvit.structures import ImageFormat
from tests.runs import QUIET
from tests.tiny import student, teacher

IMAGES = 120


@pytest.fixture
def digits(tmp_path: Path) -> str:
    """Writes digits as files, a folder a class, and returns the folder."""
    data = load_digits()
    for number, (image, target) in enumerate(zip(data.images[:IMAGES], data.target, strict=False)):
        folder = tmp_path / "digits" / str(target)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).save(folder / f"{number}.png")
    return str(tmp_path / "digits")


def runs_as_it_is(config: str) -> None:
    """Asserts that a config passes `check` and trains."""
    main(["check", "--config", config])
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--data.init_args.num_workers", "0"]
    main(["fit", "--config", config, *QUIET, *short])


def test_a_gpu_gets_a_batch_that_it_has_room_for_and_is_timed_by_it(
    digits: str, demo_teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def seconds(student: Any, teacher: Any, gpu: bool, images: int) -> float:
        tried.append((gpu, images))
        if images > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0.01

    monkeypatch.setattr(starting.Machine, "here", lambda: starting.Machine(1, True, "bf16-mixed", 2))
    monkeypatch.setattr(starting, "_image_seconds", seconds)
    main(["init", "--images", digits, "--teacher", demo_teacher.removeprefix("local-dir:"), "--out", "gpu.yaml"])
    assert tried == [(True, 8), (True, 4)]
    text = Path("gpu.yaml").read_text()
    assert "batch_size: 4 " in text
    assert "# compile: both " in text


def test_a_teacher_without_a_head_takes_its_time_too() -> None:
    network, ran = teacher(num_classes=0), []
    network.model.blocks[-1].register_forward_hook(lambda *_: ran.append(True))
    assert starting._image_seconds(student(), network, gpu=False, images=2) > 0
    assert len(ran) == 2


def test_labelled_images_and_a_remedy_are_a_config_with_comments_that_runs(
    digits: str, demo_teacher: str, capsys
) -> None:
    teacher = demo_teacher.removeprefix("local-dir:")
    main(["init", "--images", digits, "--teacher", teacher, "--out", "lift.yaml"])
    told = capsys.readouterr().out
    assert "The student has 192 channels and the teacher 64: lift is for wider teachers, so compare with --rem" in told
    assert "Images: train: 110 images of 10 classes" in told
    assert "They are typically 8 x 8 pixels, and scaled to 8 x 8 for the student.\n" in told
    assert "Next: kdvit check --config lift.yaml\n      kdvit fit --config lift.yaml" in told
    text = Path("lift.yaml").read_text()
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 120
    assert text.startswith("# kdvit fit --config lift.yaml\n# Images: train: 110 images of 10 classes")
    config = yaml.safe_load(text)
    assert config["model"]["student"]["class_path"] == "LiftViT"
    expected = {"num_classes": 10, "img_size": 8, "model_args": {"patch_size": 2}, "width": 64}
    assert config["model"]["student"]["init_args"] == {"arch": "deit_tiny_patch16_224", **expected}
    assert list(config["model"]["distillers"]) == ["logit", "lift"]
    assert config["data"]["init_args"]["batch_size"] == 8  # of 110 images, ten steps or more an epoch
    runs_as_it_is("lift.yaml")
    assert load_student("runs/lift/student").class_names == [str(digit) for digit in range(10)]
    with pytest.raises(SystemExit):
        main(["init", "--images", digits, "--teacher", teacher, "--out", "lift.yaml"])
    assert "'lift.yaml' is there already: name another with --out, or remove it." in capsys.readouterr().err


@pytest.mark.slow
def test_images_without_labels_and_no_remedy_are_a_config_that_runs(digits: str, demo_teacher: str) -> None:
    teacher = demo_teacher.removeprefix("local-dir:")
    main(["init", "--images", f"{digits}/0", "--teacher", teacher, "--remedy", "none", "--out", "plain.yaml"])
    config = yaml.safe_load(Path("plain.yaml").read_text())
    assert config["data"]["init_args"]["labels"] is False
    assert config["model"]["task_weight"] == 0
    assert list(config["model"]["distillers"]) == ["logit"]
    runs_as_it_is("plain.yaml")


def test_classes_decide_what_is_distilled(digits: str, demo_teacher: str, capsys) -> None:
    for digit in (5, 6, 7, 8, 9):
        Path(digits, str(digit)).rename(Path(digits, f"other{digit}"))
    command = ["init", "--images", digits, "--remedy", "none"]
    main([*command, "--teacher", demo_teacher.removeprefix("local-dir:"), "--out", "shared.yaml"])
    assert "5 classes of the teacher have the names of the student's" in capsys.readouterr().out
    assert "classes: by_name" in Path("shared.yaml").read_text()
    main([*command, "--teacher", "vit_tiny_patch16_224", "--out", "others.yaml"])
    assert "The teacher's 1000 classes are others than the student's, so its maps alone" in capsys.readouterr().out
    others = yaml.safe_load(Path("others.yaml").read_text())
    assert list(others["model"]["distillers"]) == ["feature"]
    assert others["trainer"]["log_every_n_steps"] == 13
    told = " ".join(Path("others.yaml").read_text().replace("\n#", "").split())
    assert "They are typically 8 x 8 pixels, and scaled to 224 x 224 for the student." in told


def test_a_student_wider_than_a_teacher_of_other_classes_learns_its_maps(digits: str, demo_teacher: str) -> None:
    for digit in range(10):
        Path(digits, str(digit)).rename(Path(digits, f"other{digit}"))
    teacher = demo_teacher.removeprefix("local-dir:")
    main(["init", "--images", digits, "--teacher", teacher, "--remedy", "none", "--out", "wider.yaml"])
    distillers = yaml.safe_load(Path("wider.yaml").read_text())["model"]["distillers"]
    assert distillers["feature"]["init_args"]["projector"] == "linear"
    main(["check", "--config", "wider.yaml"])


def test_a_checkpoint_of_a_run_is_a_teacher(digits: str, demo_teacher: str) -> None:
    run = Path(demo_teacher.removeprefix("local-dir:")).parent
    main(["init", "--images", digits, "--teacher", str(run / "checkpoints/last.ckpt"), "--out", "own.yaml"])
    assert yaml.safe_load(Path("own.yaml").read_text())["model"]["teacher"]["init_args"]["arch"] == (
        f"local-dir:{Path('own_teacher').absolute()}"
    )
    main(["init", "--images", digits, "--teacher", str(run), "--out", "run.yaml"])
    assert f'arch: "local-dir:{run}/student"' in Path("run.yaml").read_text()


def test_what_is_not_there_is_one_message(digits: str, capsys) -> None:
    for arguments, expected in (
        (["--images", "nothing", "--teacher", "vit_tiny_patch16_224"], "--images: there is no folder "),
        (["--images", digits, "--teacher", "vit_tiny_patch16_22"], "Did you mean vit_tiny_patch16_224?"),
        (["--images", digits, "--teacher", "no/folder"], "/no/folder', nor a network of that name in timm."),
        (["--images", digits, "--teacher", digits], "is neither an exported folder nor a run with a folder student."),
        (["--images", digits, "--teacher", "vit_tiny_patch16_224", "--student", "resnet18"], "LiftViT is for timm's"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["init", *arguments])
        assert end.value.code == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert expected in message
        assert not Path("kdvit.yaml").exists()


def test_a_grey_teacher_gets_a_grey_student(digits: str) -> None:
    grey = teacher(num_classes=0, in_chans=1)
    images = ImageFormat((16, 16), (0.3,), (0.4,))
    export_student(grey, student_spec(grey, images), "grey")
    main(["init", "--images", digits, "--teacher", "grey", "--out", "grey.yaml"])
    runs_as_it_is("grey.yaml")
