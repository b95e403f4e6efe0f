"""Projected maps in a cache: what a student trained from them gets, and which students are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdvit.cache import Manifest
from kdvit.cache.plan import plan
from kdvit.cache.store import record_type
from kdvit.cache.writer import CacheWriting
from kdvit.cli import main
from kdvit.distillers import FeatureDistiller, feature
from kdvit.models import FrozenTeacher, TimmStudent, TimmTeacher
from kdvit.training.objectives import Objectives
from tests.cache.test_cache import cache, cached, contents, refusal, weights
from tests.runs import QUIET, SHORT, fit
from tests.several import together

FEATURE = "--model.distillers.feature"
EPOCHS = [*QUIET, "--trainer.max_epochs", "2"]


def by(projector: str, images: int = 200, weight: float = 0.1) -> list[str]:
    options = {"projector": projector, "weight": weight, "calibration_images": images}
    return [f"{FEATURE}.{name}={value}" for name, value in options.items()]


def beside(projector: str) -> list[str]:
    """A second distiller of the same layer."""
    other = f"{{class_path: FeatureDistiller, init_args: {{projector: {projector}, calibration_images: 200}}}}"
    return [f"--model.distillers.other={other}"]


def stored(out: str = "cache") -> list[str]:
    return list(np.load(f"{out}/000000.npy", mmap_mode="r").dtype.names)[1:]


@pytest.mark.parametrize("projector", ["phi_s", pytest.param("pool", marks=pytest.mark.slow)])
def test_a_run_from_stored_targets_ends_where_the_online_run_on_rounded_targets_ends(
    projector: str, demo_teacher: str, monkeypatch, caplog
) -> None:
    cache(demo_teacher, "--views", "2", *by(projector), method="feature")
    caplog.clear()
    fit("feature", demo_teacher, *SHORT, *by(projector), *cached(), "--trainer.default_root_dir", "cached")
    assert "measured" not in caplog.text
    target, same_width = FeatureDistiller.target, feature.same_width
    monkeypatch.setattr(FeatureDistiller, "target", lambda *args: target(*args).half().float())

    def rounded(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        ours, theirs = same_width(ours, theirs)
        return ours, theirs.half().float()

    monkeypatch.setattr(feature, "same_width", rounded)
    fit("feature", demo_teacher, *SHORT, *by(projector), "--trainer.default_root_dir", "online")
    online = weights("online")
    for name, value in weights("cached").items():
        assert torch.equal(value, online[name]), (name, (value - online[name]).abs().max())
    ours, theirs = (
        torch.load(f"{root}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for root in ("cached", "online")
    )
    assert ours.keys() == theirs.keys()
    for name in ours:  # the axes, too
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.slow
def test_a_run_from_targets_stopped_in_mid_epoch_ends_where_an_uninterrupted_one_ends(
    demo_teacher: str, capsys
) -> None:
    cache(demo_teacher, *by("phi_s"), method="feature")
    more = [*EPOCHS, *by("phi_s"), *cached(), "--last_checkpoint.every_n_train_steps=33"]
    fit("feature", demo_teacher, *more, "--trainer.default_root_dir=whole")
    fit("feature", demo_teacher, *more, "--trainer.max_steps=33")
    other = {name: value + ("axes" in name) for name, value in load_file("cache/bases.safetensors").items()}
    shutil.copytree("cache", "other")
    save_file(other, "other/bases.safetensors")
    assert "trained on other axes of the teacher than those by which the cache was made. Go on with the cache" in (
        refusal(capsys, "feature", demo_teacher, *more, *cached("other"))
    )
    shutil.move("cache", "elsewhere")
    fit("feature", demo_teacher, *more, *cached("elsewhere"))
    one, other = weights("whole"), weights("run")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_cache_of_targets_killed_in_the_middle_goes_on_by_the_same_axes(demo_teacher: str, monkeypatch) -> None:
    more = ["--views", "2", *by("phi_s")]
    cache(demo_teacher, *more, method="feature", out="whole")
    take = CacheWriting.take

    def killed(run: CacheWriting, rows: Any, *args: Any) -> None:
        if rows[0] > 1500:
            raise KeyboardInterrupt("killed")
        take(run, rows, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriting, "take", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            cache(demo_teacher, *more, method="feature")
    monkeypatch.setattr("kdvit.training.calibration._measure", None)  # nothing is measured again
    cache(demo_teacher, *more, method="feature")
    assert contents("cache") == contents("whole")


def test_what_does_not_go_with_the_targets_of_a_cache_is_refused_with_a_way_out(demo_teacher: str, capsys) -> None:
    cache(demo_teacher, *by("phi_s"), method="feature")
    assert stored() == ["layer3 (phi_s to 16 channels, axes of 200 images)"]
    width = ["--model.student.init_args.model_args.embed_dim=32"]
    for given, wanted in (
        ([*by("phi_s"), *width], "layer 3 (phi_s to 32 channels, axes of 200 images)"),
        (by("pca"), "layer 3 (pca to 16 channels, axes of 200 images)"),
        (by("phi_s", images=100), "layer 3 (phi_s to 16 channels, axes of 100 images)"),
        (by("pool"), "layer 3 (pool to 16 channels)"),
        (by("linear"), "layer 3"),
    ):
        message = refusal(capsys, "feature", demo_teacher, *EPOCHS, *given, *cached())
        assert (
            f"The distillers want {wanted} of the teacher, which the cache 'cache' does not hold. (It holds " in message
        )
        assert "(phi_s to 16 channels, axes of 200 images).) Make one with the config of this run; --store b" in message
    message = refusal(capsys, demo_teacher, "--check", "cache", run=_check)
    assert "holds layer 3 (phi_s to 16 channels, axes of 200 images), which no distiller of this config" in message
    message = refusal(capsys, demo_teacher, *by("pca"), method="feature", run=cache)
    assert "targets is ('pca to 16 channels, axes of 200 images',) and was ('phi_s to 16 " in message


def _check(teacher: str, *more: str) -> None:
    main(["cache", "--config", "demo/feature.yaml", "--model.teacher.init_args.arch", teacher, *QUIET, *more])


@pytest.mark.slow
def test_whole_maps_serve_students_of_any_width_and_a_layer_may_have_several_targets(
    demo_teacher: str, caplog, capsys
) -> None:
    cache(demo_teacher, "--store", "both", *by("phi_s"), method="feature", out="whole")
    cache(demo_teacher, *by("phi_s"), *beside("linear"), method="feature", out="beside")
    assert (stored("whole"), stored("beside")) == (["logits", "layer3"], ["layer3"])
    for out in ("whole", "beside"):
        caplog.clear()
        fit("feature", demo_teacher, *EPOCHS, *by("phi_s"), *cached(out), f"--trainer.default_root_dir={out}_run")
        assert "measured on 200 training images" in caplog.text
    both = [*by("phi_s"), *beside("pool")]
    cache(demo_teacher, *both, method="feature")
    assert stored() == ["layer3 (phi_s to 16 channels, axes of 200 images)", "layer3 (pool to 16 channels)"]
    fit("feature", demo_teacher, *EPOCHS, *both, *cached())
    capsys.readouterr()
    _check(demo_teacher, *both, "--check", "cache")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("features of layer 3 (")]
    assert len(lines) == 2
    for line in lines:
        error, largest = (float(part.split()[-1]) for part in line.split(": ")[1].split(","))
        assert 0 < error < largest * 2**-10


@pytest.mark.slow
def test_two_processes_project_all_shards_by_the_same_axes_and_train_from_them(demo_teacher: str, capsys) -> None:
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    demo = ["--config", "demo/feature.yaml", "--model.teacher.init_args.arch", demo_teacher, *by("phi_s"), *QUIET]
    said = together(
        2,
        ["cache", *demo, *ranks, "--out", "cache", "--views", "2"],
        ["fit", *demo, *ranks, *cached(), "--trainer.max_epochs=1", "--trainer.default_root_dir=run"],
    )
    assert "measured on 200 training images" in said[0]
    assert "axes are those of the cache" in said[0]
    cache(demo_teacher, "--views", "2", *by("phi_s"), method="feature", out="alone")
    ours, theirs = (load_file(f"{out}/bases.safetensors") for out in ("cache", "alone"))
    for name, value in ours.items():
        if not name.endswith("axes"):
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    main(["cache", *demo, "--check", "cache", "--samples", "2594"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("features of layer 3 ("))
    error, largest = (float(part.split()[-1]) for part in line.split(": ")[1].split(","))
    assert 0 < error < largest * 2**-10


def test_targets_of_cait_s24_for_deit_tiny_take_half_the_bytes_of_its_maps() -> None:
    student = TimmStudent("deit_tiny_patch16_224")
    teacher = FrozenTeacher(TimmTeacher("cait_s24_224", pretrained=False, model_args={"depth": 1}))
    objectives = Objectives({"map": FeatureDistiller(projector="phi_s")}, student, {"teacher": teacher})
    data = {"images": 10, "repeats": 1}
    options: dict[str, Any] = {"views": 1, "topk": None, "precision": "32-true"}
    whole, projected = (
        record_type(plan(teacher, (objectives.only_request().maps, True), data, store=store, **options)).itemsize
        for store in ("both", "auto")
    )
    assert (whole, projected) == (4 + 2 * (1000 + 384 * 196), 4 + 2 * (1000 + 192 * 196))
    assert whole / projected > 1.9


def test_a_cache_without_targets_is_read_as_it_was_written() -> None:
    manifest = Manifest(4, 1, 1, (2,), ((3, 2, 2),), None, None, "32-true", {})
    assert record_type(manifest).names == ("image", "layer2")
    manifest.save(Path())
    text = Path("manifest.json").read_text().replace(',\n "targets": []', "")
    Path("manifest.json").write_text(text)
    assert "targets" not in text
    assert Manifest.load(Path()) == manifest
