"""Fixed targets: what they keep of the teacher, their scale, and that they are measured once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kdvit.analysis import DatasetPCA, as_tokens
from kdvit.cli import main
from kdvit.data import Digits
from kdvit.distillers import FeatureDistiller
from kdvit.distillers.bases import energies_kept, energy_kept, hadamard, phi_s_projection, pooling
from kdvit.models import TimmTeacher
from kdvit.structures import OutputShapes, SharedBasis, ViTOutput
from tests.runs import QUIET, SHORT, assert_same_end, demo_fit
from tests.several import together
from tests.tiny import STUDENT


def tokens() -> torch.Tensor:
    """Returns tokens ``[images, N, 12]`` whose channels differ in scale and mean, and are correlated."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator) * torch.linspace(3, 0.05, 12)[:, None]
    return torch.randn(40, 9, 12, generator=generator) @ mixing + 5 * torch.randn(12, generator=generator)


def basis() -> SharedBasis:
    metric = DatasetPCA(12, centred=True)
    metric.update(tokens())
    return metric.compute()


@pytest.mark.parametrize("projector", ["pca", "phi_s"])
def test_targets_are_the_leading_axes_with_a_mean_variance_of_one(projector: str) -> None:
    distiller = FeatureDistiller(projector=projector)
    distiller.build(OutputShapes(None, ((4, 3, 3),)), OutputShapes(None, ((12, 3, 3),)))
    assert not distiller.is_calibrated()
    distiller.calibrate([basis()])
    assert distiller.is_calibrated()
    feature = tokens().transpose(1, 2).reshape(40, 12, 3, 3)
    ours = torch.zeros(40, 4, 3, 3)
    ((_, target),) = distiller.aligned(ViTOutput(None, (ours,)), ViTOutput(None, (feature,)))
    flat = as_tokens(target).flatten(0, 1).double().numpy()
    x = tokens().flatten(0, 1).double().numpy()
    values, axes = np.linalg.eigh(np.cov(x.T, bias=True))
    expected = (x - x.mean(0)) @ axes[:, :-5:-1] / np.sqrt(values[:-5:-1].mean())
    variances = flat.var(0)
    assert flat.mean(0) == pytest.approx(np.zeros(4), abs=1e-4)
    assert variances.mean() == pytest.approx(1, rel=1e-4)
    if projector == "phi_s":
        assert variances == pytest.approx(np.ones(4), rel=1e-4)
        np.testing.assert_allclose(flat @ flat.T, expected @ expected.T, atol=1e-2)  # a rotation of the same
    else:
        np.testing.assert_allclose(np.abs(flat), np.abs(expected), atol=1e-3)
    kept = values[-4:].sum() / values.sum()
    assert energy_kept(basis(), basis().axes[:, :4]) == pytest.approx(kept)
    pooled, covariance = np.linalg.qr(pooling(12, 4).numpy())[0], np.cov(x.T)
    share = np.trace(pooled.T @ covariance @ pooled) / np.trace(covariance)
    assert energy_kept(basis(), pooling(12, 4)) == pytest.approx(share)


@pytest.mark.parametrize("projector", ["pca", "phi_s", "pool"])
@pytest.mark.parametrize(("ours", "theirs"), [(3, 3), (2, 6), (6, 3)])
def test_a_stored_target_gives_the_loss_of_the_map_whichever_grid_is_finer(
    projector: str, ours: int, theirs: int
) -> None:
    distiller = FeatureDistiller(projector=projector)
    shapes = ((4, ours, ours),), ((12, theirs, theirs),)
    distiller.build(*(OutputShapes(None, each) for each in shapes))
    if projector != "pool":
        distiller.calibrate([basis()])
    generator = torch.Generator().manual_seed(1)
    student, teacher = (ViTOutput(None, (torch.randn(5, *each[0], generator=generator),)) for each in shapes)
    target = distiller.target(0, teacher.features[0])
    (told,) = distiller.fixed_targets()
    assert told is not None
    assert told.width == 4
    assert target.shape == (5, 4, theirs, theirs)
    online = distiller(student, teacher, torch.zeros(5))
    for stored, tolerance in ((target, 1e-5), (target.half().float(), 1e-3)):
        cached = distiller(student, ViTOutput(None, (stored,)), torch.zeros(5))
        torch.testing.assert_close(cached, online, rtol=tolerance, atol=0)


@pytest.mark.parametrize("projector", ["pca", "phi_s", "pool"])
def test_a_target_as_wide_as_the_map_is_made_in_training(projector: str) -> None:
    distiller = FeatureDistiller(projector=projector)
    distiller.build(OutputShapes(None, ((12, 3, 3),)), OutputShapes(None, ((12, 3, 3),)))
    assert distiller.fixed_targets() == (None,)


def test_the_energy_kept_is_that_of_the_tokens_in_the_span_of_the_projection() -> None:
    x = tokens().flatten(0, 1).double().numpy()
    x -= x.mean(0)
    axes = np.linalg.eigh(x.T @ x)[1]
    drawn = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    pooled = np.stack([np.eye(12)[:, 12 * i // 5 : -(-12 * (i + 1) // 5)].mean(1) for i in range(5)], axis=1)
    expected = []
    for projection in (axes[:, -5:], drawn, pooled):
        inside = x @ projection @ np.linalg.pinv(projection)
        expected.append(np.square(inside).sum() / np.square(x).sum())
    assert list(energies_kept(basis(), 5).values()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("projector", ["pool", pytest.param("orthogonal", marks=pytest.mark.slow)])
def test_check_shows_the_energy_that_each_way_to_the_students_width_keeps(
    projector: str, demo_teacher: str, capsys
) -> None:
    (_, *given) = demo_fit("feature", demo_teacher, *QUIET, "--model.distillers.feature.projector", projector)
    main(["check", *given])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("energy kept by feature"))
    assert "in 16 of 64 channels of teacher layer 3, of the centred energy of 32 training images: " in line
    assert re.findall(r"[a-z(), _]+(?= [\d.]+%)", line.split(": ")[1]) == [
        "the leading axes (pca, phi_s)",
        ", random orthogonal axes",
        ", pooled channels (pool)",
    ]
    data = Digits(seed=0, mean=(0.305,) * 3, std=(0.376,) * 3)
    numbers = np.linspace(0, 1296, 32).astype(int).tolist()
    with torch.no_grad():
        image = torch.stack([data.dataset("train")[number][0] for number in numbers])
        x = as_tokens(TimmTeacher(demo_teacher)(image, (-1,)).features[0]).flatten(0, 1).double().numpy()
    covariance = np.cov(x.T)
    pooled = np.linalg.qr(np.repeat(np.eye(16), 4, axis=0))[0]
    first, *_, last = (float(share) for share in re.findall(r"([\d.]+)%", line))
    assert first == pytest.approx(100 * np.linalg.eigvalsh(covariance)[-16:].sum() / np.trace(covariance), abs=0.06)
    assert last == pytest.approx(100 * np.trace(pooled.T @ covariance @ pooled) / np.trace(covariance), abs=0.06)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 48, 192, 384, 7, 10])
def test_a_rotation_is_orthonormal(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


def test_every_channel_of_phi_s_has_the_same_variance_in_the_papers_width() -> None:
    spectrum = torch.logspace(2, -2, 384, dtype=torch.float64)
    projection = phi_s_projection(SharedBasis(spectrum, torch.eye(384).double(), torch.zeros(384).double()), 192)
    variances = (projection.square() * spectrum[:, None]).sum(0)
    torch.testing.assert_close(variances, torch.ones(192, dtype=torch.float64))


def test_a_target_that_is_not_measured_is_refused() -> None:
    distiller = FeatureDistiller(projector="phi_s")
    distiller.build(OutputShapes(None, ((4, 3, 3),)), OutputShapes(None, ((12, 3, 3),)))
    maps = torch.zeros(2, 4, 3, 3), torch.zeros(2, 12, 3, 3)
    with pytest.raises(RuntimeError, match="axes are not measured yet: call the distiller's calibrate"):
        distiller(ViTOutput(None, maps[:1]), ViTOutput(None, maps[1:]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"cannot keep 12 of the teacher's 4 axes\..*projector: linear"):
        distiller.build(OutputShapes(None, ((12, 3, 3),)), OutputShapes(None, ((4, 3, 3),)))
    with pytest.raises(ValueError, match="calibration_images must be 2 or more, got 1"):
        FeatureDistiller(projector="pca", calibration_images=1)


PHI_S = ["--model.distillers.feature.projector", "phi_s", "--model.distillers.feature.weight", "0.1"]


def test_a_run_measures_once_and_a_resumed_one_ends_at_the_same_weights(demo_teacher: str, caplog) -> None:
    options = [*QUIET, *PHI_S, "--trainer.max_epochs=2", "--ema.decay=0.9", "--trainer.limit_val_batches=2"]
    options += ["--model.distillers.feature.calibration_images", "200"]
    main([*demo_fit("feature", demo_teacher, *options), "--trainer.default_root_dir", "whole"])
    (line,) = (line for line in caplog.text.splitlines() if "axes are measured" in line)
    assert "the teacher's axes are measured on 200 training images. The target of layer -1 keeps " in line
    assert "of their centred energy in 16 of 64 channels (pooled channels would keep " in line
    main([*demo_fit("feature", demo_teacher, *options), "--trainer.max_steps=20"])
    caplog.clear()
    main(demo_fit("feature", demo_teacher, *options))
    assert "axes are measured" not in caplog.text
    assert_same_end("whole", "run")

    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    teacher = TimmTeacher(demo_teacher)
    data = Digits(batch_size=200, seed=0, mean=(0.305,) * 3, std=(0.376,) * 3)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        feature = teacher(batch.image, (-1,), logits=False).features[0]
    mean = as_tokens(feature).flatten(0, 1).mean(0)
    torch.testing.assert_close(saved["distillers.feature.projectors.0.mean"], mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projector", ["phi_s", "orthogonal"])
def test_every_new_bridge_trains_and_is_gone_at_inference(projector: str, demo_teacher: str) -> None:
    name = "--model.distillers.feature.projector"
    main([*demo_fit("feature", demo_teacher, *SHORT), name, projector, "--trainer.log_every_n_steps", "1"])
    assert "train/feature_explained_variance" in Path("run/metrics.csv").read_text()
    weights = torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert any(key.startswith("distillers.feature") for key in weights)
    from safetensors.torch import load_file

    assert not [key for key in load_file("run/student/model.safetensors") if "distillers" in key]


@pytest.mark.slow
def test_several_processes_measure_the_axes_of_one_with_any_data_module() -> None:
    sizes = {"patch_size": 4, "depth": 2, "num_heads": 2}
    given = {
        "data": "tests.tiny.TinyData",
        "model.student": "TimmStudent",
        "model.student.init_args.num_classes": 5,
        "model.student.init_args.model_args": {**sizes, "embed_dim": 8},
        "model.teacher": "TimmTeacher",
        "model.teacher.init_args.pretrained": "false",
        "model.teacher.init_args.model_args": {**sizes, "embed_dim": 16},
        "model.distillers.feature": "FeatureDistiller",
        "model.distillers.feature.init_args.projector": "pca",
        "model.distillers.feature.init_args.calibration_images": 80,
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
    }
    for network in ("student", "teacher"):
        given |= {f"model.{network}.init_args.{name}": STUDENT[name] for name in ("arch", "img_size")}
    options = [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in given.items()]
    bases = []
    for processes in (1, 2):
        run = ["--trainer.devices", str(processes), "--trainer.default_root_dir", str(processes), *QUIET]
        together(processes, ["fit", *options, *run, "--trainer.strategy", "ddp" if processes > 1 else "auto"])
        state = torch.load(f"{processes}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        bases.append([state[f"distillers.feature.projectors.0.{name}"] for name in ("mean", "weight")])
    for one, two in zip(*bases, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
