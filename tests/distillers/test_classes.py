"""Classes of a teacher that are not those of the student: which are compared, what is told, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from kdvit import DistillationModule, load_student
from kdvit.callbacks import TeacherScores
from kdvit.cli import main
from kdvit.distillers import (
    DISTDistiller,
    DistillationTokenDistiller,
    DKDDistiller,
    FeatureDistiller,
    LogitDistiller,
    hard_kd,
    soft_kd,
)
from kdvit.models import TimmTeacher
from kdvit.structures import OutputShapes, ViTOutput
from kdvit.testing import check_distiller
from tests.runs import SHORT, demo_fit, fit
from tests.tiny import FORMAT, WIDE, TinyData, student, teacher, trainer

CAT, DOG = OutputShapes(3, class_names=("cat", "dog", "ox")), OutputShapes(4, class_names=("ox", "cow", "dog", "cat"))
TARGET = torch.tensor([0, 2, 1, 2, 0])


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, generator=generator), 2 * torch.randn(5, 4, generator=generator)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [{2: 1, "cat": 0}, {"dog": "dog", "cat": "cat"}, {3: "cat", 2: 1}])
def test_the_softmax_is_over_the_mapped_classes_alone(classes: dict) -> None:
    ours, theirs = logits()
    distiller = LogitDistiller(temperature=2.0, classes=classes)
    distiller.build(CAT, DOG)
    q, p = softmax(ours.double().numpy()[:, [0, 1]] / 2), softmax(theirs.double().numpy()[:, [3, 2]] / 2)
    expected = 4 * (p * np.log(p / q)).sum(1).mean()
    assert float(distiller(ViTOutput(ours), ViTOutput(theirs), TARGET)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LogitDistiller, {"hard": True}),
        (LogitDistiller, {"standardize": True, "temperature": 2.0}),
        (DKDDistiller, {}),
        (DISTDistiller, {}),
    ],
)
def test_every_logit_objective_is_that_of_the_logits_cut_by_hand(kind: type, options: dict) -> None:
    ours, theirs = logits()
    distiller = kind(**options, classes="by_name")
    distiller.build(CAT, DOG)
    cut = kind(**options)(ViTOutput(ours), ViTOutput(theirs[:, [3, 2, 0]]), TARGET)
    assert torch.equal(distiller(ViTOutput(ours), ViTOutput(theirs), TARGET), cut)
    assert distiller.conversions() == ["softmax over 3 of the student's 3 and the teacher's 4 classes"]
    assert distiller.state_dict() == {}


def test_a_second_head_is_cut_to_the_same_classes() -> None:
    ours, theirs = logits()
    for mode in ("hard", "soft"):
        distiller = DistillationTokenDistiller(mode=mode, classes={3: 1, "dog": 0})
        distiller.build(CAT, DOG)
        plain = {"hard": hard_kd, "soft": soft_kd}[mode](ours[:, [0, 1]], theirs[:, [2, 3]])
        given = ViTOutput(torch.randn(5, 3), (ours[:, :, None, None],))
        assert torch.equal(distiller(given, ViTOutput(theirs), TARGET), plain)


def test_the_contract_is_kept_with_classes() -> None:
    check_distiller(LogitDistiller(classes={0: 1, 3: 2}))
    check_distiller(DKDDistiller(classes={index: 9 - index for index in range(10)}))


UNNAMED = OutputShapes(3)


@pytest.mark.parametrize(
    ("distiller", "ours", "theirs", "text"),
    [
        (
            LogitDistiller(),
            CAT,
            DOG,
            "LogitDistiller: .*student has 3 classes and the teacher 4. Set classes: by_name, or",
        ),
        (
            LogitDistiller(),
            CAT,
            OutputShapes(3, class_names=("cat", "ox", "dog")),
            "in another order: class 1 is 'dog' for the student and 'ox' for the teacher. Set classes: by_name",
        ),
        (DISTDistiller(classes="by_name"), CAT, UNNAMED, "DISTDistiller: .*the teacher's are not known. Give indices"),
        (
            LogitDistiller(classes="by_name"),
            UNNAMED,
            DOG,
            "names of both sides' classes, and the student's are not known",
        ),
        (
            LogitDistiller(classes="by_name"),
            CAT,
            OutputShapes(2, class_names=("n01440764", "n01443537")),
            "finds no common name: the student's are 'cat', 'dog', 'ox', the teacher's 'n01440764', 'n01443537'. Give",
        ),
        (
            LogitDistiller(classes={"cat": 1}),
            CAT,
            UNNAMED,
            "'cat' is a name, and those of the teacher's classes are not",
        ),
        (LogitDistiller(classes={"cut": 1}), CAT, DOG, "teacher has no class 'cut'. Did you mean cat"),
        (
            LogitDistiller(classes={0: "bird"}),
            CAT,
            DOG,
            "student has no class 'bird'. Its classes are 'cat', 'dog', 'ox'",
        ),
        (LogitDistiller(classes={4: 0}), CAT, DOG, "teacher has no class 4; its classes are 0 to 3"),
        (LogitDistiller(classes={0: 1, 2: "dog"}), CAT, DOG, "class 1 of the student is given twice"),
        (LogitDistiller(classes={0: 1, "ox": 2}), CAT, DOG, "class 0 of the teacher is given twice"),
        (
            LogitDistiller(classes={0: 1}),
            CAT,
            DOG,
            "1 of the student's 3 and the teacher's 4 are shared, and a softmax",
        ),
        (DKDDistiller(classes={0: 0, 1: 2}), CAT, DOG, "classes has 2 of the student's 3 classes, and an image's own"),
    ],
)
def test_classes_that_do_not_go_together_are_refused(distiller, ours, theirs, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        distiller.build(ours, theirs)


def test_names_of_two_vocabularies_are_not_compared() -> None:
    LogitDistiller().build(CAT, OutputShapes(3, class_names=("n00000001", "n00000002", "n00000003")))
    LogitDistiller().build(CAT, UNNAMED)
    FeatureDistiller().build(CAT._replace(features=((8, 2, 2),)), DOG._replace(features=((8, 2, 2),)))


@pytest.mark.parametrize("classes", ["byname", {}, [0, 1]])
def test_classes_are_by_name_or_a_mapping(classes: Any) -> None:
    with pytest.raises(ValueError, match="classes must be by_name or a mapping from the teacher's to the student's"):
        LogitDistiller(classes=classes)


# Where the names come from


def renamed(demo_teacher: str, order: list[int]) -> str:
    """Returns a copy of a teacher's folder whose classes stand in another order, with the same names."""
    folder = Path(demo_teacher.removeprefix("local-dir:"))
    shutil.copytree(folder, "turned")
    config = json.loads(Path("turned/config.json").read_text())
    names = config["pretrained_cfg"]["label_names"]
    config["pretrained_cfg"]["label_names"] = [names[index] for index in order]
    Path("turned/config.json").write_text(json.dumps(config))
    weights = load_file("turned/model.safetensors")
    turned = {name: value[order] if name.startswith("head.") else value for name, value in weights.items()}
    save_file(turned, "turned/model.safetensors", metadata={"format": "pt"})
    return "local-dir:turned"


def test_a_teacher_with_its_classes_in_another_order_is_refused_and_teaches_the_same_by_name(
    demo_teacher: str, capsys, caplog
) -> None:
    turned = renamed(demo_teacher, [3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    with pytest.raises(SystemExit):
        fit("soft_kd", turned, *SHORT)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "distillers.logit: LogitDistiller: the teacher has other classes, or has them in another order" in message
    assert "class 0 is '0' for the student and '3' for the teacher. Set classes: by_name" in message
    by_name = ["--model.distillers.logit.classes", "by_name"]
    with caplog.at_level("INFO"):
        main(["check", *demo_fit("soft_kd", turned, *by_name)[1:]])
    assert re.search(r"distiller logit .*; softmax over 10 of the student's 10 and", capsys.readouterr().out)
    assert re.search(r"Teacher on \d+ validation images: [\d.]+% top-1\.", caplog.text)  # by its names, too
    fit("soft_kd", turned, *SHORT, *by_name)
    fit("soft_kd", demo_teacher, *SHORT, "--trainer.default_root_dir", "straight")
    image = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    students = [load_student(f"{root}/student") for root in ("run", "straight")]
    ours, theirs = (each(image).logits for each in students)  # of biases without effect, Adam makes steps of rounding
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    by_place = ["--model.distillers.logit.classes", str({number: number for number in range(10)})]
    fit("soft_kd", turned, *SHORT, *by_place, "--trainer.default_root_dir", "by_place")
    assert (load_student("by_place/student")(image).logits - theirs).abs().max() > 1e-3


def test_names_reach_the_distillers_from_the_module_and_the_teacher(tmp_path) -> None:
    network = teacher(num_classes=7)
    network.spec["class_names"] = list("xedcbay")
    distillers = {"logit": LogitDistiller(classes="by_name")}
    module = DistillationModule(student(), network, distillers, image_format=FORMAT, class_names=list("abcde"))
    assert distillers["logit"].teacher_classes.tolist() == [5, 4, 3, 2, 1]
    assert module.distillers.conversions[-1].startswith("distillers.logit: softmax over 5 of the student's 5 and the")
    run = trainer(tmp_path, max_epochs=2, callbacks=[TeacherScores()])
    run.fit(module, datamodule=TinyData())
    run.save_checkpoint(tmp_path / "end.ckpt")
    keys = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in keys if not key.startswith("student.")]


def test_a_timm_teacher_knows_the_names_of_its_folder_and_of_published_weights(demo_teacher: str, monkeypatch) -> None:
    assert TimmTeacher(demo_teacher).spec["class_names"] == [str(digit) for digit in range(10)]
    small: dict[str, Any] = {"img_size": 16, **WIDE}
    arch = "deit_tiny_patch16_224"
    assert TimmTeacher(arch, pretrained=False, img_size=16, model_args=WIDE).spec == {}

    def published(arch: str, **_: Any) -> torch.nn.Module:
        return timm.create_model(arch, **small)

    monkeypatch.setattr("kdvit.models.teacher.create_timm_model", published)
    names = TimmTeacher(arch).spec["class_names"]
    assert (len(names), names[0], names[999]) == (1000, "n01440764", "n15075141")
    assert TimmTeacher(arch, checkpoint="any.pth").spec == {}
