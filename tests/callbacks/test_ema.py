"""The average of the student's weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from kdvit import load_student
from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from kdvit.data import Digits
from tests.runs import QUIET, SHORT, fit, numbers
from tests.several import together


@pytest.mark.parametrize(
    ("precision", "kept"),
    [pytest.param("64-true", torch.float64, marks=pytest.mark.slow), ("bf16-true", torch.float32)],
)
def test_the_average_goes_with_weights_of_another_precision(precision: str, kept: torch.dtype) -> None:
    given = [*SHORT, "--trainer.precision", precision, "--ema.decay", "0.999"]
    fit("plain", "", *given)
    fit("plain", "", *given, "--trainer.max_epochs", "3")
    scores = numbers("run", "val/loss_ema")
    assert len(scores) == 3
    assert all(map(math.isfinite, scores))
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    raw = {name.removeprefix("student."): weight for name, weight in saved["state_dict"].items()}
    averages = saved["callbacks"]["StudentEMA"]["student"]
    assert {average.dtype for average in averages.values()} == {kept}
    moved = [name for name, average in averages.items() if not torch.equal(average, raw[name].to(kept))]
    assert len(moved) > len(averages) / 2
    for name, average in averages.items():
        torch.testing.assert_close(average, raw[name].to(kept), rtol=0.05, atol=0.05)


def test_a_student_without_an_average_gets_no_scores_of_one(capsys) -> None:
    fit("plain", "", *SHORT)
    with pytest.warns(UserWarning, match="no average of its weights, so ema.decay gives no scores"):
        main(["validate", "--config", "run/config.yaml", "--ema.decay", "0.9", *QUIET])
    told = capsys.readouterr().out
    assert told.startswith("Validation on 128 images: accuracy ")
    assert "average" not in told


def test_an_average_that_starts_late_starts_from_the_restored_weights() -> None:
    fit("plain", "", *SHORT)
    restored = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    fit("plain", "", *SHORT, "--trainer.max_epochs", "3", "--ema.decay", "0.99999999")
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    for name, average in saved["callbacks"]["StudentEMA"]["student"].items():
        torch.testing.assert_close(average, restored[f"student.{name}"], rtol=0, atol=1e-6)
    assert any(not torch.equal(weight, saved["state_dict"][name]) for name, weight in restored.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_several_processes_score_the_average_that_is_in_the_checkpoint() -> None:
    """Each has statistics of batch norm of its own, of its own images."""
    config = yaml.safe_load((packaged_configs() / "demo/plain.yaml").read_text())
    args = {"arch": "resnet10t", "num_classes": 10, "model_args": {"channels": [8, 8, 16, 16]}}
    config["model"]["student"] = {"class_path": "TimmStudent", "init_args": args}
    Path("bn.yaml").write_text(yaml.safe_dump(config))
    run = ["--config", "bn.yaml", *QUIET, "--trainer.default_root_dir", "run", "--ema.decay", "0.9"]
    epoch = ["--trainer.max_epochs", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    together(2, ["fit", *run, *epoch])
    logged = numbers("run", "val/loss_ema")[-1]
    average = load_student("run/checkpoints/last.ckpt", ema=True).eval()
    data = Digits(img_size=8, mean=average.image_format.mean, std=average.image_format.std)
    with torch.no_grad():
        losses = [F.cross_entropy(average(b.image).logits, b.target, reduction="sum") for b in data.val_dataloader()]
    assert logged == pytest.approx(float(sum(losses)) / 500, abs=2e-6)
