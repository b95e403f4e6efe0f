"""The geometry of a student while it trains."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdvit import DistillationModule
from kdvit.analysis import GeometryMonitor, as_tokens, measure, p99
from kdvit.cli import main
from kdvit.data import Digits
from kdvit.distillers import LogitDistiller
from kdvit.models import load_student
from tests.runs import SHORT, fit
from tests.tiny import FORMAT, TinyData, student, teacher, trainer


def _rows() -> list[dict[str, str]]:
    with Path("run/metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_it_is_off_by_default_and_changes_no_weight_when_on(demo_teacher: str) -> None:
    fit("lift", demo_teacher, *SHORT)
    assert not [name for name in _rows()[0] if name.startswith("geometry/")]
    weights = load_student("run/student").state_dict()
    on = ["--trainer.default_root_dir", "on", "--geometry.every_n_epochs", "1", "--geometry.images", "10"]
    fit("lift", demo_teacher, *SHORT, *on)
    torch.testing.assert_close(load_student("on/student").state_dict(), weights, rtol=0, atol=0)


def test_scalars_of_student_and_teacher_and_figures_are_logged_every_k_epochs_of_a_run_that_goes_on(
    demo_teacher: str,
) -> None:
    on = ["--geometry.every_n_epochs", "2", "--geometry.images", "12", "--trainer.val_check_interval", "1"]
    fit("lift", demo_teacher, *SHORT, *on, "--trainer.max_epochs", "3")
    fit("lift", demo_teacher, *SHORT, *on, "--trainer.max_epochs", "4")
    logged = [row for row in _rows() if row["geometry/svd_rank_95"]]
    assert [float(row["epoch"]) for row in logged] == [1, 3]
    ranks = {"svd_rank_95", "pca_dimension_95", "rotation", "participation"}
    names = ranks | {"sep_90", "sep_90_permuted_minus_own", "dc_share"}
    expected = {f"geometry/{who}{name}" for who in ("", "teacher_") for name in names}
    assert {name for name in logged[0] if name.startswith("geometry/")} == expected
    assert logged[0]["geometry/teacher_rotation"] == logged[1]["geometry/teacher_rotation"]
    events = EventAccumulator(str(next(Path("run").glob("events*")).parent)).Reload()
    assert {"5_geometry/ranks", "5_geometry/energy", "5_geometry/sep"} <= set(events.Tags()["images"])


@pytest.mark.slow
def test_what_is_logged_is_the_measure_of_the_validation_images(demo_teacher: str) -> None:
    fit("lift", demo_teacher, *SHORT, "--geometry.every_n_epochs", "1", "--geometry.images", "500")
    student = load_student("run/checkpoints/last.ckpt")
    images = student.image_format
    (batch,) = Digits(batch_size=500, mean=images.mean, std=images.std).val_dataloader()
    with torch.no_grad():
        tokens = as_tokens(student(batch.image, ("lift",)).features[0])
    last = [row for row in _rows() if row["geometry/svd_rank_95"]][-1]
    report = measure(tokens)
    assert float(last["geometry/svd_rank_95"]) == pytest.approx(p99(report.svd_rank(0.95)))
    assert float(last["geometry/participation"]) == pytest.approx(report.participation.mean(), rel=1e-4)


def test_numbers_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be 0 or more"):
        GeometryMonitor(every_n_epochs=-1)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "demo/plain.yaml", "--geometry.images", "0"])
    assert "images and batch_size 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_it_works_with_any_data_module_and_precision(precision: str) -> None:
    monitor = GeometryMonitor(every_n_epochs=1, images=7)
    run = trainer(".", callbacks=[monitor], precision=precision)
    module = DistillationModule(student(), teacher(), {"logit": LogitDistiller()}, image_format=FORMAT)
    run.fit(module, datamodule=TinyData())
    assert next(module.student.parameters()).dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
    assert run.callback_metrics["geometry/svd_rank_95"] >= 1
    assert run.callback_metrics["geometry/teacher_svd_rank_95"] >= 1
