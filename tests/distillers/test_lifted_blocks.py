"""Earlier blocks that are lifted too, against the authors' description, computed in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdvit import DistillationModule
from kdvit.distillers import FeatureDistiller, LiftDistiller
from kdvit.distillers.lift import grown_widths
from kdvit.structures import OutputShapes, ViTOutput
from kdvit.testing import check_distiller
from tests.tiny import student, teacher

GRID = (4, 5)


def _pooled(x: np.ndarray, width: int) -> np.ndarray:
    """Averages over windows of neighbouring channels, which overlap where the widths do not divide."""
    count = x.shape[1]
    edges = [(i * count // width, -(-(i + 1) * count // width)) for i in range(width)]
    return np.stack([x[:, low:high].mean(1) for low, high in edges], axis=1)


def _spectral(ours: np.ndarray, theirs: np.ndarray) -> float:
    difference = np.fft.rfft2(ours, norm="ortho") - np.fft.rfft2(theirs, norm="ortho")
    return float(np.stack([difference.real, difference.imag]).__pow__(2).mean())


def _mse(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(((ours - theirs) ** 2).mean())


LOSSES = {"mse": _mse, "spectral": _spectral}


@pytest.mark.parametrize(
    ("start", "growth", "widths"),
    [
        (11, "linear", [384]),
        (9, "linear", [256, 320, 384]),
        (9, "exponential", [241, 304, 384]),  # 192 * 2 ** (i / 3), rounded down
        (7, "linear", [230, 268, 307, 345, 384]),
    ],
)
def test_widths_are_those_of_the_authors_start_layer(start: int, growth: Any, widths: list[int]) -> None:
    assert grown_widths(192, 384, 12 - start, growth) == widths


@pytest.mark.parametrize(("narrow", "target"), [(176, 480), (192, 384)])
def test_the_last_block_is_as_wide_as_the_teacher_whatever_the_rounding(narrow: int, target: int) -> None:
    for growth in ("linear", "exponential"):
        assert grown_widths(narrow, target, 2, growth)[-1] == target


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("growth", ["linear", "exponential"])
def test_earlier_blocks_are_lifted_each_by_its_own_projector(growth: Any, loss: Any) -> None:
    distiller = LiftDistiller(loss=loss, lifted_blocks=3, growth=growth, teacher_layer=[1, 4, -1]).double()
    assert (distiller.student_layers, distiller.teacher_layers) == ((-3, -2, "lift"), (1, 4, -1))
    narrow, wide = (6, *GRID), (13, *GRID)
    distiller.build(OutputShapes(None, (narrow, narrow, wide)), OutputShapes(None, (wide, wide, wide)))
    distiller.double()
    widths = {"linear": [8, 10], "exponential": [7, 10]}[growth]
    shapes = [[tuple(each.shape) for each in lift.parameters()] for lift in distiller.projectors]
    assert shapes == [[(width, 6), (width,), (width,)] for width in widths]
    generator = torch.Generator().manual_seed(0)
    for each in distiller.parameters():
        torch.nn.init.normal_(each, generator=generator)
    ours = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in (narrow, narrow, wide)]
    theirs = [torch.randn(2, *wide, generator=generator, dtype=torch.float64) for _ in range(3)]
    expected = []
    for i, (x, target) in enumerate(zip(ours, theirs, strict=True)):
        lifted = x.numpy()
        if i < 2:
            matrix, gain, shift = (each.detach().numpy() for each in distiller.projectors[i].parameters())
            lifted = np.einsum("wc,bchv->bwhv", matrix, lifted)
            lifted -= lifted.mean(1, keepdims=True)
            lifted /= np.sqrt(lifted.var(1, keepdims=True) + 1e-5)
            lifted = lifted * gain[:, None, None] + shift[:, None, None]
        expected.append(LOSSES[loss](lifted, _pooled(target.numpy(), lifted.shape[1])))
    found = distiller(ViTOutput(None, tuple(ours)), ViTOutput(None, tuple(theirs)), torch.zeros(2))
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_the_naive_baseline_pools_to_a_width_that_does_not_divide_the_teachers() -> None:
    narrow, wide = (219, *GRID), (384, *GRID)  # the authors' uniformly wide control under SpectralKD
    distiller = FeatureDistiller(loss="spectral", projector="pool")
    distiller.build(OutputShapes(None, (narrow,)), OutputShapes(None, (wide,)))
    ours, theirs = torch.randn(2, *narrow), torch.randn(2, *wide)
    found = distiller(ViTOutput(None, (ours,)), ViTOutput(None, (theirs,)), torch.zeros(2))
    assert found.item() == pytest.approx(_spectral(ours.numpy(), _pooled(theirs.double().numpy(), 219)), rel=1e-5)


def test_lifted_blocks_are_trained_and_not_deployed() -> None:
    module = DistillationModule(
        student("lift"), teacher(), {"lift": LiftDistiller(lifted_blocks=2)}, image_format=student().image_format
    )
    assert sum(p.numel() for p in module.student.parameters()) == sum(p.numel() for p in student("lift").parameters())
    assert {tuple(p.shape) for p in module.distillers.parameters()} == {(20, 16), (20,)}
    check_distiller(LiftDistiller(lifted_blocks=2), ((16, 4, 4), (24, 4, 4)), ((24, 4, 4),) * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lifted_blocks": 0}, "lifted_blocks must be 1 or more, and growth linear or exponential, got 0 and 'linear'"),
        ({"growth": "step"}, "got 1 and 'step'"),
        ({"lifted_blocks": 3, "teacher_layer": 5}, r"3 lifted_blocks need as many layers of the teacher, got \[5\]"),
    ],
)
def test_options_that_make_no_lifted_blocks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiftDistiller(**options)


def test_a_lift_of_another_width_is_refused_with_the_way_out() -> None:
    distiller = LiftDistiller(lifted_blocks=2)
    with pytest.raises(ValueError, match=r"layer 'lift' is 8 channels wide and .* Set the width of LiftViT to 9"):
        distiller.build(OutputShapes(None, ((4, 2, 2), (8, 2, 2))), OutputShapes(None, ((9, 2, 2), (9, 2, 2))))
