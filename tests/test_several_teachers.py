"""Several teachers by name: who runs for whom, what they leave behind, and what is of one teacher alone."""

from __future__ import annotations

import copy
import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kdvit import DistillationModule, load_student
from kdvit.analysis import GeometryMonitor
from kdvit.callbacks import StudentEMA, TeacherScores
from kdvit.cli import main
from kdvit.cli.lookup import read_experiment
from kdvit.distillers import FeatureDistiller, LiftDistiller, LogitDistiller
from kdvit.models import FrozenTeacher, Network
from kdvit.structures import Batch
from tests.runs import QUIET, SHORT, assert_same_end, demo_fit, fit
from tests.several import together
from tests.tiny import FORMAT, WIDE, TinyData, student, teacher, trainer

BATCH = Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]), torch.arange(4))


def pair() -> dict[str, Network]:
    """Returns two teachers of different widths and weights."""
    return {"wide": teacher(model_args={**WIDE, "embed_dim": 36}), "narrow": teacher()}


def module(distillers: dict[str, Any], teachers: Any = None, **more: Any) -> DistillationModule:
    torch.manual_seed(0)
    given = {"teacher": teachers} if isinstance(teachers, Network) else {"teachers": teachers or pair()}
    return DistillationModule(student("lift"), **given, distillers=distillers, image_format=FORMAT, **more)


def test_each_teacher_runs_once_a_batch_for_its_own_distillers_alone(tmp_path) -> None:
    distillers = {
        "soft": LogitDistiller(0.5, teacher="wide"),
        "hard": LogitDistiller(0.25, hard=True, teacher="wide"),
        "lift": LiftDistiller(2.0, teacher_layer=1, teacher="narrow"),
    }
    built = module(distillers)
    built.trainer = trainer(tmp_path, log_every_n_steps=10**9)
    ran: list[Any] = []
    for name, each in built.teachers.items():
        each.network.register_forward_pre_hook(lambda _, given, name=name: ran.append((name, *given[1:])))
    blocks: list[int] = []
    for i, block in enumerate(built.teachers["narrow"].network.model.blocks):
        block.register_forward_hook(lambda *_, i=i: blocks.append(i))
    loss = built.training_step(BATCH, 0)
    assert ran == [("wide", (), True), ("narrow", (1,), False)]
    assert blocks == [0, 1]

    ours = built.student(BATCH.image, ["lift"])
    wide, narrow = built.teachers["wide"](BATCH.image).logits, built.teachers["narrow"](BATCH.image, [1]).features[0]
    divergence = F.kl_div(ours.logits.log_softmax(1), wide.softmax(1), reduction="batchmean")
    hard, task = (F.cross_entropy(ours.logits, target) for target in (wide.argmax(1), BATCH.target))
    expected = task + 0.5 * divergence + 0.25 * hard + 2.0 * F.mse_loss(ours.features[0], narrow)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_one_teacher_under_two_names_teaches_what_it_teaches_alone(tmp_path) -> None:
    network = teacher()
    ended: dict[int, dict[str, torch.Tensor]] = {}
    for given in (network, {"a": network, "b": network}):
        names = {"a": "a", "b": "b"} if isinstance(given, dict) else {"a": None, "b": None}
        distillers = {"logit": LogitDistiller(teacher=names["a"]), "lift": LiftDistiller(teacher=names["b"])}
        built = module(distillers, given)
        trainer(tmp_path, max_steps=4).fit(built, datamodule=TinyData())
        ended[len(ended)] = built.state_dict()
    assert all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())


def test_no_teacher_is_in_a_checkpoint_and_all_are_scored_measured_and_left_alone(tmp_path, caplog) -> None:
    projected = FeatureDistiller(projector="phi_s", calibration_images=16, teacher="wide")
    axes = FeatureDistiller(projector="phi_s", calibration_images=16, teacher="narrow")
    built = module({"map": projected, "axes": axes, "logit": LogitDistiller(teacher="narrow")})
    before = {
        name: {k: v.clone() for k, v in each.network.state_dict().items()} for name, each in built.teachers.items()
    }
    callbacks = [StudentEMA(0.9), TeacherScores(), GeometryMonitor(1, images=8)]
    run = trainer(tmp_path, max_epochs=1, callbacks=callbacks)
    with caplog.at_level("INFO"):
        run.fit(built, datamodule=TinyData())
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert [each.projectors[0].weight.shape for each in (projected, axes)] == [(16, 36), (16, 24)]
    assert "distillers.map: the teacher_wide's axes are measured on 16 training images" in caplog.text
    told = re.findall(r"Teacher_(\w+) on 40 validation images", caplog.text)
    assert told == ["wide", "narrow"]
    assert {"geometry/svd_rank_95", "geometry/teacher_wide_svd_rank_95", "geometry/teacher_narrow_svd_rank_95"} <= set(
        run.callback_metrics
    )
    for name, each in built.teachers.items():
        assert not each.network.training
        assert all(torch.equal(value, before[name][key]) for key, value in each.network.state_dict().items())
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert {key.partition(".")[0] for key in content["state_dict"]} == {"student", "distillers"}
    assert not [key for key in content["state_dict"] if key.startswith("distillers.") and "projectors" not in key]
    assert set(content["callbacks"]["StudentEMA"]["student"]) == set(built.student.state_dict())


@pytest.mark.parametrize(
    ("distillers", "text"),
    [
        (
            {"logit": LogitDistiller()},
            "distillers.logit: there are several teachers. Set its teacher to one of: wide, narr",
        ),
        (
            {"logit": LogitDistiller(teacher="wid")},
            "logit: there is no teacher 'wid'. Set its teacher to one of: wide, nar",
        ),
        ({"logit": LogitDistiller(teacher="wide")}, "A teacher_narrow is given, but nothing is distilled from it"),
        ({}, "A teacher_wide is given, but nothing is distilled from it"),
    ],
)
def test_a_teacher_that_is_not_said_not_known_or_idle_is_refused(distillers: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        module(distillers)


def test_a_name_is_not_needed_for_one_teacher_and_a_wrong_one_is_refused() -> None:
    assert module({"logit": LogitDistiller()}, {"only": teacher()}).teacher.label == "teacher"
    with pytest.raises(ValueError, match=r"there is no teacher 'a'\. Set its teacher to one of: teacher"):
        module({"logit": LogitDistiller(teacher="a")}, teacher())
    with pytest.raises(ValueError, match="Give either teacher or teachers, got both: a teacher, and wide, narrow"):
        module({"logit": LogitDistiller(teacher="wide")}, teacher=teacher())


# By the command line


def two(demo_teacher: str) -> list[str]:
    """Returns options that give the demo two teachers, of which the second is untrained."""
    arch = {
        "img_size": 8,
        "model_args": {"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10},
    }
    trained = {"class_path": "TimmTeacher", "init_args": {"arch": demo_teacher}}
    other = {"class_path": "TimmTeacher", "init_args": {"arch": "deit_tiny_patch16_224", "pretrained": False, **arch}}
    named = ["--model.distillers.logit.teacher", "trained", "--model.distillers.lift.teacher", "other"]
    return ["--model.teacher", "null", "--model.teachers", json.dumps({"trained": trained, "other": other}), *named]


@pytest.mark.slow
def test_a_run_with_two_teachers_goes_on_to_the_same_end_and_logs_both(demo_teacher: str, capsys) -> None:
    more = [*SHORT, *two(demo_teacher), "--ema.decay=0.9", "--last_checkpoint.every_n_train_steps=4"]
    main(["check", *demo_fit("lift", demo_teacher, *more)[1:]])
    shown = capsys.readouterr().out
    for row in (
        r"teacher_trained +TimmTeacher local-dir:.*: 202,698 parameters",
        r"teacher_other +TimmTeacher deit_tiny_patch16_224: .*2 layers",
        r"teacher_other's input .*converted from the images",
        r"distiller lift +LiftDistiller x 0.2; student lift \[64, 4, 4\] <- teacher_other layer 1 \[64, 4, 4\]",
    ):
        assert re.search(row, shown), row
    fit("lift", demo_teacher, *more, "--trainer.default_root_dir=whole")
    fit("lift", demo_teacher, *more, "--trainer.max_steps=4")
    fit("lift", demo_teacher, *more)
    assert_same_end("whole", "run")
    with Path("whole/metrics.csv").open() as stream:
        names = {name for row in csv.DictReader(stream) for name, value in row.items() if value}
    assert {"teacher_trained/acc1", "teacher_other/acc1"} <= names
    main(["validate", "--config", "run/config.yaml", *QUIET])


def test_what_is_of_one_teacher_is_refused_in_one_line(demo_teacher: str, capsys, monkeypatch) -> None:
    given = demo_fit("lift", demo_teacher, *SHORT, *two(demo_teacher))[1:]
    monkeypatch.setattr(DistillationModule, "training_step", lambda *_: pytest.fail("a step is taken"))
    several = "A cache holds the outputs of one teacher, and this run has several: trained, other. Leave the cache out"
    Path("two.yaml").touch()
    with pytest.raises(SystemExit):
        main(["fit", *given, "--print_config"])
    Path("two.yaml").write_text(capsys.readouterr().out)
    for args, text in (
        (["cache", *given, "--out", "cache"], several),
        (["fit", *given, "--data.init_args.cache", "cache"], several),
        (
            ["analyze", "--config", "two.yaml"],
            "the config has teacher_trained, teacher_other. Give the pair by --teacher",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 2
        assert text in capsys.readouterr().err.splitlines()[-1]
    found = read_experiment("two.yaml", pretrained=False)
    assert list(found.teachers) == ["teacher_trained", "teacher_other"]


def test_a_mistake_within_a_named_teacher_is_one_clear_message(capsys) -> None:
    for init_args, text in (
        ({"arhc": "x"}, "Option 'arhc' is not accepted. Did you mean arch?"),
        ({"arch": "x", "img_size": "big"}, "img_size: expected int or tuple (got 'big')"),
        (None, "model.teachers: there is no class 'TimTeacher'. Did you mean TimmTeacher?"),
    ):
        named = {"a": {"class_path": "TimmTeacher", "init_args": init_args} if init_args else "TimTeacher"}
        with pytest.raises(SystemExit):
            main(["fit", "--config", "demo/plain.yaml", "--model.teachers", json.dumps(named)])
        assert text in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(demo_teacher: str) -> None:
    for processes in (1, 2):
        ranks = ["--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto"]
        sgd = ["--model.optimizer.name", "sgd", "--model.optimizer.lr_base_batch", "48", "--model.optimizer.lr", "0.02"]
        sizes = ["--data.init_args.batch_size", str(96 // processes), "--model.schedule.warmup_epochs=0"]
        more = [*two(demo_teacher), *ranks, *sgd, *sizes, *SHORT]
        command = demo_fit("lift", demo_teacher, *more, f"--trainer.default_root_dir={processes}")
        together(processes, command)
    ours, theirs = (load_student(f"{processes}/student").state_dict() for processes in (1, 2))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_a_teacher_is_its_own_deep_copy() -> None:
    teachers = module({"a": LogitDistiller(teacher="wide"), "b": LogitDistiller(teacher="narrow")}).teachers
    assert all(
        isinstance(each, FrozenTeacher) and copy.deepcopy(teachers)[name] is each for name, each in teachers.items()
    )
