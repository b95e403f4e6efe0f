"""Images without labels: a fit, its cache, its best checkpoint, and what else a user does with them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdvit import OptimizerOptions, load_student
from kdvit.callbacks import PredictionWriter
from kdvit.cli import main
from kdvit.data import ImageFolder
from kdvit.distillers import DKDDistiller, FeatureDistiller
from kdvit.errors import UserError
from kdvit.models import TimmTeacher
from kdvit.training.module import DistillationModule
from tests import tiny
from tests.data.test_bad_images import command, last_line
from tests.data.test_data_modules import image_folder
from tests.several import together

TEACHER = {
    "arch": "deit_tiny_patch16_224",
    "checkpoint": "teacher.pth",
    "img_size": 16,
    "model_args": '{"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 2}',
}
DISTILLERS = {
    "logit": {"class_path": "LogitDistiller"},
    "feature": {"class_path": "FeatureDistiller", "init_args": {"projector": "pool", "weight": 0.5}},
}
ALONE = [
    *("--model.teacher", "TimmTeacher", *(f"--model.teacher.init_args.{key}={each}" for key, each in TEACHER.items())),
    *("--model.distillers", json.dumps(DISTILLERS), "--model.task_weight", "0", "--data.init_args.labels", "false"),
    *("--data.init_args.val_share", "0.25", "--model.schedule.warmup_epochs", "0"),
    *("--model.optimizer.lr_base_batch", "null", "--model.optimizer.lr", "0.003"),
]
PROBE = ["--probe.images", "labelled", "--probe.k", "3"]


@pytest.fixture
def _photographs() -> None:
    """Twenty-four images, some in the folder and some below it; a teacher; and twelve with labels."""
    for i in range(24):
        file = Path("images", f"{i % 3}" if i % 2 else "", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (20, 24, 3), dtype=np.uint8)).save(file)
    image_folder(Path("labelled"), train=4, val=3)
    model_args = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    torch.save(tiny.teacher(num_classes=2, model_args=model_args).model.state_dict(), "teacher.pth")


def rows(*names: str, root: str = "run") -> list[tuple[float, ...]]:
    """Returns the rows of a run's table that have all of these columns."""
    with Path(root, "metrics.csv").open() as stream:
        return [tuple(float(row[name]) for name in names) for row in csv.DictReader(stream) if all(map(row.get, names))]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def expected(checkpoint: str, ema: bool = False) -> dict[str, float]:
    """Computes in float64 what a validation logs of a checkpoint's student: means over batches of 4 and of 2 images."""
    student = load_student(checkpoint, ema)
    teacher = TimmTeacher(**{**TEACHER, "model_args": json.loads(TEACHER["model_args"])}).eval()
    sums = dict.fromkeys(("logit", "feature", "feature_cosine", "feature_explained_variance"), 0.0)
    data = ImageFolder("images", batch_size=4, num_workers=0, img_size=16, labels=False, val_share=0.25)
    for batch in data.val_dataloader():
        assert batch.target.tolist() == [-1] * len(batch.image)
        with torch.no_grad():
            ours, theirs = (network(batch.image, [-1]) for network in (student, teacher))
        p, q = (softmax(each.logits.double().numpy()) for each in (theirs, ours))
        s, t = (each.features[0].double().numpy() for each in (ours, theirs))
        t = t.reshape(len(t), 12, 2, 2, 2).mean(axis=2)
        cosine = (s * t).sum(1) / np.sqrt((s * s).sum(1) * (t * t).sum(1))
        errors, targets = ((x.transpose(0, 2, 3, 1).reshape(-1, 12)).var(axis=0) for x in (t - s, t))
        values = (
            (p * np.log(p / q)).sum(1).mean(),
            ((s - t) ** 2).mean(),
            cosine.mean(),
            1 - errors.sum() / targets.sum(),
        )
        for name, value in zip(sums, values, strict=True):
            sums[name] += value * len(batch.image) / 6
    return {**sums, "loss": sums["logit"] + 0.5 * sums["feature"]}


@pytest.mark.usefixtures("_photographs")
def test_a_run_without_labels_is_validated_by_its_objectives_and_keeps_the_best_by_their_loss(caplog, capsys) -> None:
    main(command("fit", *ALONE, *PROBE, "--ema.decay", "0.5", "--trainer.max_epochs", "4"))
    assert "Without labels there is no val/acc1: best.ckpt is that of the least val/loss." in caplog.messages
    said = "Images: train: 18 images without labels; val: 6 images without labels; test: those of val; val is 25% "
    assert f"{said}of train, by seed 0." in caplog.messages
    for suffix, ema in (("", False), ("_ema", True)):
        found = expected("run/checkpoints/last.ckpt", ema)
        logged = rows(*(f"val/{name}{suffix}" for name in found))
        assert len(logged) == 4
        assert logged[-1] == pytest.approx(tuple(found.values()), rel=1e-4, abs=1e-6)
    losses = [loss for (loss,) in rows("val/loss")]
    assert len(set(losses)) == 4
    saved = torch.load("run/checkpoints/best.ckpt", weights_only=True)["callbacks"].values()
    (best,) = (each for each in saved if each.get("monitor"))
    assert best["monitor"] == "val/loss"
    assert float(best["best_model_score"]) == pytest.approx(min(losses))
    assert expected("run/checkpoints/best.ckpt")["loss"] == pytest.approx(min(losses), rel=1e-4)
    header = Path("run/metrics.csv").read_text().splitlines()[0]
    assert not re.search("acc1(?<!(knn|ear)_acc1)|task", header)
    scores = rows("val/knn_acc1", "val/linear_acc1")
    assert len(scores) == 4
    assert all(0 < score <= 1 for pair in scores for score in pair)
    assert len(rows("teacher/knn_acc1", "teacher/linear_acc1")) == 1
    probe = "k-NN accuracy {:.2%}, linear accuracy {:.2%}".format(*scores[-1])
    assert f"run/student holds the last ({probe} at the last probe): kdvit.load" in caplog.messages[-1]

    capsys.readouterr()
    main(["probe", "run/checkpoints/last.ckpt", "--data", "labelled", "--k", "3", "--num_workers", "0"])
    assert [f"{score:.2%}" for score in scores[-1]] == capsys.readouterr().out.split()[-2:]
    main(command("validate", *ALONE, *PROBE, "--probe.every_n_epochs", "3", "--ckpt_path", "last"))
    assert capsys.readouterr().out.endswith(f", {probe}.\n")
    main(command("test", *ALONE, "--ckpt_path", "last"))
    assert f"Test on 6 images: loss {losses[-1]:.4g}, " in capsys.readouterr().out
    main(["compare", "run"])
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert head.split()[-4:] == ["k-NN", "(%)", "linear", "(%)"]
    assert row.split()[-2:] == [f"{100 * score:.2f}" for score in scores[-1]]
    main(command("predict", *ALONE, "--data.init_args.test", "."))
    with Path("run/predictions.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == 24
    assert {row["class"] for row in table} <= {"0", "1"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_photographs")
def test_a_cache_a_resume_and_several_processes_work_without_labels(caplog, capsys) -> None:
    objectives = ("val/loss", "val/logit", "val/feature", "val/feature_cosine", "val/knn_acc1", "val/linear_acc1")
    run = command("fit", *ALONE, *PROBE, "--trainer.enable_progress_bar", "true")
    main(run)
    alone = rows(*objectives)
    (line,) = (each for each in caplog.messages if each.startswith("Epoch 1 "))
    assert "val k-NN accuracy {:.2%}, val linear accuracy {:.2%}, ".format(*alone[-1][-2:]) in line
    main([*run, "--trainer.default_root_dir", "cut", "--trainer.max_steps", "3"])
    main([*run, "--trainer.default_root_dir", "cut"])
    assert rows(*objectives, root="cut") == alone
    ends = [load_student(f"{root}/checkpoints/last.ckpt").state_dict() for root in ("run", "cut")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())

    main(command("cache", *ALONE, "--out", "cache", "--views", "2"))
    cached = [*run, "--trainer.default_root_dir", "cached", "--data.init_args.cache", "cache"]
    caplog.clear()
    main([*cached, "--probe.every_n_epochs", "2"])
    assert ["val k-NN" in each for each in caplog.messages if each.startswith("Epoch ")] == [False, True]
    assert len(rows("val/knn_acc1", root="cached")) == 1
    np.testing.assert_allclose(rows(*objectives[:4], root="cached"), [row[:4] for row in alone], rtol=2e-3)
    main(["analyze", "--model", "run/student", "--data", "images", "--images", "8", "--num_workers", "0"])
    assert "8 images of" in "".join(caplog.messages)

    shared = ["--trainer.devices", "2", "--data.init_args.batch_size", "2", "--trainer.default_root_dir", "both"]
    probe = ["probe", "run/student", "--data", "labelled", "--k", "3", "--num_workers", "0"]
    capsys.readouterr()
    main(probe)
    told = capsys.readouterr().out.split()[-2:]
    said = together(2, [*run, "--trainer.accelerator", "cpu", *shared], [*probe, "--trainer.devices", "2"])
    np.testing.assert_allclose(rows(*objectives, root="both"), alone, rtol=2e-3)
    assert said[0].split()[-2:] == told


def module(**more: Any) -> DistillationModule:
    given = {"distillers": {"feature": FeatureDistiller(projector="pool")}, "task_weight": 0.0, **more}
    master = tiny.teacher() if given["distillers"] else None
    return DistillationModule(tiny.student(), master, image_format=tiny.FORMAT, class_names=[], **given)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"task_weight": 0.5}, r"model.task_weight is 0.5. Set it to 0: the distillers alone train"),
        ({"distillers": {"dkd": DKDDistiller()}}, r"model.distillers.dkd cannot do without. Leave it out"),
        ({"distillers": {}}, r"there are no distillers. Give a teacher, and distillers to learn from it by"),
    ],
)
def test_what_needs_labels_is_refused_before_the_first_step(more: dict, text: str) -> None:
    with pytest.raises(UserError, match=f"The images have no labels, and {text}"):
        module(**more).setup("fit")
    module(**more).setup("predict")


def test_a_student_without_a_head_predicts_nothing_and_learns_no_labels() -> None:
    with pytest.raises(UserError, match=r"The student has no head, so it predicts no class. What its features tell"):
        PredictionWriter().setup(None, SimpleNamespace(num_classes=0), "predict")
    with pytest.raises(UserError, match=r"The student has no head, and model.task_weight is 1"):
        module().distillers.require_labels(1.0, classes=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("alone", "base"), [(False, 512), (True, 512), (True, None)])
def test_targets_that_are_measured_are_measured_before_the_first_validation(alone: bool, base: int | None) -> None:
    """Also where nothing has asked for the training images yet, as the learning rate does that follows the batch."""
    objective = {"feature": FeatureDistiller(projector="phi_s", calibration_images=20)}
    measured = module(distillers=objective, optimizer=OptimizerOptions(lr_base_batch=base))
    data = tiny.TinyData()
    loaders = {"train_dataloaders": data.train_dataloader(), "val_dataloaders": data.val_dataloader()}
    runner = tiny.trainer("run", max_epochs=1, limit_train_batches=2)
    runner.fit(measured, **(loaders if alone else {"datamodule": data}))
    assert 0 < float(runner.callback_metrics["val/feature"]) < 10
    assert measured.distillers["feature"].is_calibrated()


def test_a_student_of_labelled_images_predicts_others_by_its_classes() -> None:
    image_folder(Path("images"))
    main(command("fit"))
    image_folder(Path("others"), train=2, val=1)
    others = ["--data.init_args.root", "others", "--data.init_args.labels", "false", "--data.init_args.test", "."]
    main(["predict", "--config", "run/config.yaml", *others])
    with Path("run/predictions.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == 6
    assert {row["class"] for row in table} <= {"cat", "dog"}


def test_a_supervised_config_and_a_probe_of_no_classes_are_refused_in_one_line(capfd) -> None:
    image_folder(Path("images"))
    line = last_line(command("fit", "--data.init_args.labels", "false"), capfd)
    assert "and model.task_weight is 1. Set it to 0" in line
    line = last_line(command("fit", "--probe.images", "images/train/cat"), capfd)
    assert "probe.images: " in line
