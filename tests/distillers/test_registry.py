"""Objectives of other papers, each against its formula written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdvit.distillers import (
    AttentionTransferDistiller,
    DISTDistiller,
    DKDDistiller,
    FeatureDistiller,
    LogitDistiller,
    RKDDistiller,
    TokenRelationDistiller,
)
from kdvit.structures import OutputShapes, ViTOutput


def drawn(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator), 2 * torch.randn(*shape, generator=generator)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum(-1).mean())


TARGET = torch.tensor([1, 0, 4, 4])


def value(distiller, student: Tensor, teacher: Tensor, target: Tensor = TARGET) -> float:
    logits = student.ndim == 2
    pair = (ViTOutput(x) if logits else ViTOutput(None, (x,)) for x in (student, teacher))
    return float(distiller(*pair, target).detach())


def test_dkd_weighs_the_target_class_apart() -> None:
    student, teacher = drawn(4, 5)
    s, t = (softmax(x.double().numpy() / 4) for x in (student, teacher))
    rows, target = np.arange(4), TARGET.numpy()
    binary = [np.stack([p[rows, target], 1 - p[rows, target]], 1) for p in (t, s)]
    others = [np.stack([np.delete(p[i], target[i]) / (1 - p[i, target[i]]) for i in rows]) for p in (t, s)]
    expected = 16 * (1 * kl(*binary) + 8 * kl(*others))
    assert value(DKDDistiller(), student, teacher) == pytest.approx(expected, rel=1e-5)
    assert value(DKDDistiller(), teacher, teacher) == pytest.approx(0, abs=1e-5)
    soft = torch.nn.functional.one_hot(TARGET, 5) * 0.6 + 0.08
    assert value(DKDDistiller(), student, teacher, soft) == pytest.approx(expected, rel=1e-5)
    # with the teacher's own weight of the other classes, the two parts are soft KD (equation 4 of the paper)
    one = student[:1], teacher[:1]
    beta = 1 - float(softmax(one[1].double().numpy())[0, 1])
    whole = value(LogitDistiller(), *one, TARGET[:1])
    assert value(DKDDistiller(beta=beta, temperature=1.0), *one, TARGET[:1]) == pytest.approx(whole, rel=1e-4)


def test_dist_correlates_rows_and_columns() -> None:
    student, teacher = drawn(4, 5)
    s, t = (softmax(x.double().numpy() / 2) for x in (student, teacher))
    rows = np.mean([1 - np.corrcoef(s[i], t[i])[0, 1] for i in range(4)])
    columns = np.mean([1 - np.corrcoef(s[:, k], t[:, k])[0, 1] for k in range(5)])
    distiller = DISTDistiller(beta=2.0, gamma=3.0, temperature=2.0)
    assert value(distiller, student, teacher) == pytest.approx(4 * (2 * rows + 3 * columns), rel=1e-5)


def test_standardised_logits_lose_their_range() -> None:
    student, teacher = drawn(4, 5)
    s, t = (x.double().numpy() for x in (student, teacher))
    s, t = (softmax((x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True) / 2) for x in (s, t))
    distiller = LogitDistiller(standardize=True, temperature=2.0)
    assert value(distiller, student, teacher) == pytest.approx(4 * kl(t, s), rel=1e-5)
    assert value(distiller, 3 * student + 1, teacher) == pytest.approx(value(distiller, student, teacher), rel=1e-4)


def huber(x: np.ndarray) -> float:
    return float(np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5).mean())


def test_rkd_compares_distances_and_angles_of_images() -> None:
    student, teacher = drawn(4, 3, 2, 2)[0], drawn(4, 6, 2, 2)[1]
    s, t = (x.double().numpy().mean((2, 3)) for x in (student, teacher))
    distances, angles = [], []
    for x in (s, t):
        d = np.linalg.norm(x[:, None] - x[None], axis=2)
        distances.append(d / d[d > 0].mean())
        cosines = np.zeros((4, 4, 4))
        for i in range(4):
            for j in range(4):
                for k in range(4):
                    if i not in (j, k):
                        e, f = x[j] - x[i], x[k] - x[i]
                        cosines[i, j, k] = e @ f / np.linalg.norm(e) / np.linalg.norm(f)
        angles.append(cosines)
    expected = 25 * huber(distances[0] - distances[1]) + 50 * huber(angles[0] - angles[1])
    assert value(RKDDistiller(), student, teacher) == pytest.approx(expected, rel=1e-4)


def test_relations_within_a_map_ask_for_no_equal_widths() -> None:
    student, teacher = drawn(4, 3, 2, 2)[0], drawn(4, 6, 2, 2)[1]
    maps, grams = [], []
    for x in (student, teacher):
        tokens = x.double().numpy().reshape(4, -1, 4).transpose(0, 2, 1)
        energy = (tokens**2).mean(2)
        maps.append(energy / np.linalg.norm(energy, axis=1, keepdims=True))
        unit = tokens / np.linalg.norm(tokens, axis=2, keepdims=True)
        grams.append(unit @ unit.transpose(0, 2, 1))
    assert value(AttentionTransferDistiller(), student, teacher) == pytest.approx(((maps[0] - maps[1]) ** 2).mean())
    expected = ((grams[0] - grams[1]) ** 2).mean()
    assert value(TokenRelationDistiller(), student, teacher) == pytest.approx(expected, rel=1e-5)


def test_cosine_losses_of_maps() -> None:
    student, teacher = drawn(4, 3, 2, 2)
    s, t = (x.double().numpy() for x in (student, teacher))
    cosine = 1 - ((s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)).mean()
    assert value(FeatureDistiller(loss="cosine"), student, teacher) == pytest.approx(cosine, rel=1e-5)
    expected = 0.5 * cosine + 0.5 * huber(s - t)
    assert value(FeatureDistiller(loss="cosine_smooth_l1"), student, teacher) == pytest.approx(expected, rel=1e-5)


def test_unit_norm_compares_directions_of_both_sides() -> None:
    student, teacher = drawn(4, 3, 2, 2)
    s, t = (x.double().numpy() for x in (student, teacher))
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    distiller = FeatureDistiller(normalize="unit_norm")
    assert value(distiller, student, teacher) == pytest.approx(((s - t) ** 2).mean(), rel=1e-5)
    cosine = value(FeatureDistiller(loss="cosine"), student, teacher)
    assert value(distiller, 7 * student, teacher) == pytest.approx(2 * cosine / 3, rel=1e-5)


def layer_norm(x: np.ndarray) -> np.ndarray:
    """Returns tokens ``[..., D]`` with mean 0 and variance 1."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_layer_norm_is_of_the_teachers_tokens_alone() -> None:
    student, teacher = drawn(4, 6, 2, 2)
    s, t = (x.double().numpy().transpose(0, 2, 3, 1) for x in (student, teacher))
    expected = ((s - layer_norm(t)) ** 2).mean()
    distiller = FeatureDistiller(normalize="layer_norm")
    assert value(distiller, student, teacher) == pytest.approx(expected, rel=1e-5)
    assert value(distiller, student, 9 * teacher + 3) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("grid", "layer"), [(2, -1), (1, "pooled")])
def test_vkd_is_an_orthogonal_projector_a_normed_teacher_and_smooth_l1(grid: int, layer: int | str) -> None:
    student, teacher = drawn(4, 3, grid, grid)[0], drawn(4, 6, grid, grid)[1]
    given = {"student_layers": [layer], "teacher_layers": [layer], "projector": "orthogonal", "loss": "smooth_l1"}
    distiller = FeatureDistiller(**given, normalize="layer_norm")
    distiller.build(OutputShapes(None, ((3, grid, grid),)), OutputShapes(None, ((6, grid, grid),)))
    weight = distiller.projectors[0].weight.detach().double().numpy()
    assert weight.T @ weight == pytest.approx(np.eye(3), abs=1e-5)
    s, t = (x.double().numpy().transpose(0, 2, 3, 1) for x in (student, teacher))
    expected = huber(s @ weight.T - layer_norm(t))
    assert value(distiller, student, teacher) == pytest.approx(expected, rel=1e-5)
    bare = FeatureDistiller(**given)  # the projector brings the norm
    bare.projectors = distiller.projectors
    assert value(bare, student, teacher) == value(distiller, student, teacher)


def test_out_of_range() -> None:
    for make, text in (
        (lambda: DKDDistiller(beta=-1), "alpha and beta must be 0 or more"),
        (lambda: DISTDistiller(gamma=-1), "beta and gamma must be 0 or more"),
        (lambda: RKDDistiller(angle=-1), "distance and angle must be 0 or more"),
        (lambda: DISTDistiller(temperature=0), "DISTDistiller: temperature must be greater than 0"),
        (lambda: LogitDistiller(hard=True, standardize=True), "hard labels have no temperature and no range"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
