"""The first day of somebody who has images, a teacher and an empty folder: every command as it is typed."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from kdvit import load_student
from tests.wheel import build_wheel, install

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEACHER: dict[str, Any] = {
    "trainer": {"default_root_dir": "runs/teacher", "max_epochs": 3},
    "data": {
        "class_path": "ImageFolder",
        "init_args": {"root": "photographs", "img_size": 16, "batch_size": 32, "num_workers": 0},
    },
    "model": {
        "student": {
            "class_path": "TimmStudent",
            "init_args": {
                "arch": "vit_tiny_patch16_224",
                "num_classes": 10,
                "img_size": 16,
                "model_args": {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3},
            },
        },
        "optimizer": {"lr": 3e-3, "lr_base_batch": None},
        "schedule": {"warmup_epochs": 0},
    },
}
MY_NET = """
from torch import nn

from kdvit.models import Network
from kdvit.structures import ImageFormat, ViTOutput


class MyNet(Network):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(depth=1, image_format=ImageFormat((16, 16), (0.5,) * 3, (0.5,) * 3))
        self.stem, self.head = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, num_classes)

    def forward(self, image, layers=(), logits=True):
        found = self.stem(image).relu()
        return ViTOutput(self.head(found.mean((2, 3))) if logits else None, (found,) * len(layers))
"""
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--data.init_args.num_workers", "0"]


def write_images(folder: Path, labelled: bool) -> None:
    """Writes 200 digits, a folder a class or all in one."""
    data = load_digits()
    for number in range(200):
        place = folder / NAMES[data.target[number]] if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray((data.images[number] * 15.9).astype("uint8")).resize((20, 20)).convert("RGB")
        pixels.save(place / f"{number}.png")


@pytest.mark.slow
def test_a_first_day(tmp_path: Path) -> None:
    site, day = tmp_path / "site", tmp_path / "day"
    environment = install(build_wheel(tmp_path), site)
    day.mkdir()

    def kdvit(*words: str) -> str:
        command = [sys.executable, str(site / "bin" / "kdvit"), *words]
        done = subprocess.run(command, cwd=day, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr[-3000:])
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    write_images(day / "photographs", labelled=True)
    write_images(day / "flat", labelled=False)
    (day / "teacher.yaml").write_text(yaml.safe_dump(TEACHER))
    assert "runs/teacher/student holds the last" in kdvit("fit", "--config", "teacher.yaml")

    assert "The teacher's classes are the student's." in kdvit(
        *("init", "--images", "photographs", "--teacher", "runs/teacher")
    )
    assert "This config is ready for `kdvit fit`." in kdvit("check", "--config", "kdvit.yaml")
    assert "Best val/acc1" in kdvit("fit", "--config", "kdvit.yaml", *SHORT)
    assert "Test on 20 images: accuracy " in kdvit("test", "--config", "runs/kdvit/config.yaml")
    kdvit("predict", "--config", "runs/kdvit/config.yaml")
    with (day / "runs/kdvit/predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["label"] for row in rows} <= {*NAMES}
    assert all(row["path"].startswith(row["label"]) for row in rows)

    pair = ["--teacher", "runs/teacher/student", "--student", "runs/kdvit/student", "--data", "photographs"]
    kdvit("analyze", *pair, "--images", "40", "--out", "runs/pair")
    assert (day / "runs/pair/report.html").is_file()
    cached = ["--data.init_args.cache", "cache", "--trainer.default_root_dir", "runs/cached"]
    kdvit("cache", "--config", "kdvit.yaml", "--out", "cache", "--views", "1")
    assert "runs/cached/student holds the last" in kdvit("fit", "--config", "kdvit.yaml", *SHORT, *cached)

    exported = ["--ckpt", "runs/kdvit/student", "--out", "leaves", "--format", "onnx", "--images", "photographs"]
    assert "images get the same class" in kdvit("export", *exported)
    student, by_timm = (
        load_student(day / "runs/kdvit/student"),
        timm.create_model(f"local-dir:{day}/leaves", True).eval(),
    )
    images = torch.stack([student.transform(Image.open(day / "photographs" / row["path"])) for row in rows])
    with torch.no_grad():
        logits = student(images).logits.numpy()
        np.testing.assert_allclose(by_timm(images).numpy(), logits, atol=1e-5)
    told, by_onnx = read_onnx(day / "leaves/model.onnx", images.numpy())
    np.testing.assert_allclose(by_onnx, logits, atol=1e-4)
    assert [told["class_names"][i] for i in by_onnx.argmax(1)] == [row["class"] for row in rows]
    assert (told["size"], told["mean"], told["std"]) == tuple(map(list, student.image_format[:3]))

    (day / "my_net.py").write_text(MY_NET)
    config = yaml.safe_load((day / "kdvit.yaml").read_text())
    config["model"] |= {"student": {"class_path": "my_net.MyNet"}, "distillers": {"logit": "LogitDistiller"}}
    config["trainer"]["default_root_dir"] = "runs/mine"
    (day / "mine.yaml").write_text(yaml.safe_dump(config))
    assert "load_student('runs/mine/student', imports=['my_net'])" in kdvit("fit", "--config", "mine.yaml", *SHORT)

    kdvit("init", "--images", "flat", "--teacher", "runs/teacher", "--out", "flat.yaml")
    told = kdvit("fit", "--config", "flat.yaml", *SHORT, "--probe.images", "photographs")
    assert "Best val/loss" in told
    assert "val/knn_acc1" in (day / "runs/flat/metrics.csv").read_text().splitlines()[0]

    compared = kdvit("compare", "--import", "my_net", "runs/kdvit", "runs/mine", "--out", "runs")
    assert "mine" in compared
    assert (day / "runs/comparison.html").is_file()
    assert "runs/teacher/student" in kdvit("probe", "runs/teacher/student", "--data", "photographs")


def read_onnx(file: Path, images: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Returns what the metadata of an ONNX file tell, and its logits of images, one after the other."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    told = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    return told, np.concatenate([session.run(["logits"], {"image": each[None]})[0] for each in images])
