"""Each loss against the authors' numbers, an independent formula, and its properties."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kdvit.distillers import (
    AttentionTransferDistiller,
    DISTDistiller,
    DistillationTokenDistiller,
    Distiller,
    DKDDistiller,
    FeatureDistiller,
    LiftDistiller,
    LogitDistiller,
    RKDDistiller,
    TokenRelationDistiller,
    ViTKDDistiller,
    WideLastDistiller,
    attention_transfer,
    dist,
    dkd,
    feature_mse,
    hard_kd,
    soft_kd,
    spectral_mse,
    token_relations,
)
from kdvit.distillers.feature import same_grid
from kdvit.distillers.plugins import known_distillers
from kdvit.distillers.rkd import angle_loss
from kdvit.structures import OutputShapes, ViTOutput
from kdvit.testing import check_distiller
from tests.reference import ARRAYS, NUMBERS

CASES = {entry["case"]: entry for entry in NUMBERS["losses"]}
MAPS = [case for case in CASES if case.startswith("map")]
LOGITS = [case for case in CASES if case.startswith("logits")]
TARGET = torch.tensor([0, 1])


def _pair(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    return ARRAYS[f"{case}_student"], ARRAYS[f"{case}_teacher"]


@pytest.mark.parametrize("case", MAPS)
@pytest.mark.parametrize(("loss", "key"), [("mse", "feature_mse"), ("spectral", "spectral")])
def test_naive_feature_distillation_equals_the_reference(case: str, loss: str, key: str) -> None:
    student, teacher = (ViTOutput(None, (feature,)) for feature in _pair(case))
    distiller = FeatureDistiller(loss=loss, projector="pool")
    assert distiller(student, teacher, TARGET).item() == pytest.approx(CASES[case][key], rel=1e-6)


@pytest.mark.parametrize("case", LOGITS)
def test_logit_distillation_equals_the_reference(case: str) -> None:
    student, teacher = _pair(case)
    expected = CASES[case]
    assert soft_kd(student, teacher, expected["temperature"]).item() == pytest.approx(expected["soft"], rel=1e-6)
    assert hard_kd(student, teacher).item() == pytest.approx(expected["hard"], rel=1e-6)


def test_soft_kd_is_the_mean_divergence_of_a_batch_in_float64() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert soft_kd(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-12)


def test_spectral_loss_is_parseval_of_the_difference() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    spectrum = torch.fft.fft2(student - teacher, norm="ortho")[..., :4]  # half of width 6, and the middle
    assert spectral_mse(student, teacher).item() == pytest.approx((spectrum.abs() ** 2).mean().item() / 2, rel=1e-6)


@pytest.mark.parametrize("loss", [soft_kd, feature_mse, spectral_mse])
def test_losses_are_zero_only_when_equal(loss) -> None:
    torch.manual_seed(0)
    one, other = (torch.randn(2, 5), torch.randn(2, 5)) if loss is soft_kd else torch.randn(2, 2, 5, 4, 4)
    assert loss(one, one).item() == pytest.approx(0, abs=1e-7)
    assert loss(one, other) > 0.1


@pytest.mark.parametrize(
    "loss", [soft_kd, hard_kd, dkd, dist, feature_mse, spectral_mse, attention_transfer, token_relations]
)
def test_losses_of_half_precision_are_computed_in_float32(loss) -> None:
    torch.manual_seed(0)
    target = (torch.tensor([0, 1, 2, 3]),) if loss is dkd else ()
    pair = torch.randn(2, 4, 5, *(() if loss in (soft_kd, hard_kd, dkd, dist) else (3, 3))).bfloat16()
    assert torch.equal(loss(*pair, *target), loss(*pair.float(), *target))


def _fresh() -> list[tuple[Distiller, dict]]:
    narrow = {"student": ((8, 4, 4),), "teacher": ((12, 4, 4),)}
    pooled = {"student": ((8, 1, 1),), "teacher": ((12, 1, 1),)}
    two_heads = {"student": ((10, 1, 1),)}
    coarse = {"student": ((8, 4, 4),) * 2, "teacher": ((12, 7, 7), (8, 2, 2))}
    return [
        (LogitDistiller(), {}),
        (LogitDistiller(temperature=4.0), {}),
        (LogitDistiller(hard=True), {}),
        (FeatureDistiller(), {}),
        (FeatureDistiller(loss="spectral", projector="pool"), narrow),
        (FeatureDistiller(projector="linear"), narrow),
        (FeatureDistiller(projector="pca"), narrow),
        (FeatureDistiller(projector="phi_s", loss="smooth_l1"), narrow),
        (FeatureDistiller(projector="orthogonal", loss="smooth_l1"), narrow),
        (FeatureDistiller(student_layers=(0, -1), teacher_layers=(0.5, 1.0), projector="linear"), coarse),
        (FeatureDistiller(loss="cosine", projector="linear"), narrow),
        (FeatureDistiller(loss="cosine_smooth_l1", projector="pca"), narrow),
        (LogitDistiller(standardize=True, temperature=2.0), {}),
        (DKDDistiller(), {}),
        (DISTDistiller(), {}),
        (RKDDistiller(), narrow),
        (AttentionTransferDistiller(), {"student": ((8, 4, 4),), "teacher": ((12, 7, 7),)}),
        (TokenRelationDistiller(), {"student": ((8, 4, 4),), "teacher": ((12, 7, 7),)}),
        (FeatureDistiller(projector="orthogonal", normalize="layer_norm", loss="smooth_l1"), pooled),
        (FeatureDistiller(projector="phi_s", loss="spectral"), pooled),
        (FeatureDistiller(normalize="unit_norm"), {}),
        (RKDDistiller(), pooled),
        (DistillationTokenDistiller(), two_heads),
        (DistillationTokenDistiller(mode="soft", temperature=3.0), two_heads),
        (ViTKDDistiller(), {}),
        (ViTKDDistiller(), {"student": ((8, 4, 4),) * 3, "teacher": ((12, 4, 4), (12, 4, 4), (12, 7, 7))}),
        (LiftDistiller(loss="spectral"), {}),
        (WideLastDistiller(teacher_layer=-2), {}),
    ]


@pytest.mark.parametrize(("distiller", "shapes"), _fresh(), ids=lambda value: type(value).__name__)
def test_every_distiller_keeps_the_contract(distiller: Distiller, shapes: dict) -> None:
    check_distiller(distiller, **shapes)


def test_the_finer_map_is_resized_to_the_coarser() -> None:
    fine, coarse = torch.rand(1, 2, 8, 8), torch.rand(1, 3, 4, 4)
    for pair in (same_grid(fine, coarse), same_grid(coarse, fine)[::-1]):
        assert pair[0].shape == (1, 2, 4, 4)
        assert torch.equal(pair[1], coarse)
        expected = F.interpolate(fine, size=(4, 4), mode="bilinear", antialias=True)
        assert torch.equal(pair[0], expected)


def test_several_pairs_are_averaged() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 3, 3) for _ in range(4)]
    both = FeatureDistiller(student_layers=[0, 1], teacher_layers=[0, 1])
    loss = both(ViTOutput(None, (maps[0], maps[1])), ViTOutput(None, (maps[2], maps[3])), TARGET)
    expected = (F.mse_loss(maps[0], maps[2]) + F.mse_loss(maps[1], maps[3])) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LogitDistiller(weight=-1), "weight must be 0 or more, got -1"),
        (lambda: LogitDistiller(temperature=0), "temperature must be greater than 0, got 0"),
        (lambda: LogitDistiller(hard=True, temperature=2.0), "hard labels have no temperature"),
        (lambda: FeatureDistiller(student_layers=[0, 1]), r"lists of one length, got 2 \(\[0, 1\]\) and 1 \(\[-1\]\)"),
        (lambda: FeatureDistiller(loss="mae"), "loss must be one of .*'mse', 'smooth_l1', 'spectral'.*, got 'mae'"),
        (
            lambda: FeatureDistiller(projector="mlp"),
            "projector must be one of pool, linear, orthogonal, pca, phi_s or null, got 'mlp'",
        ),
        (
            lambda: FeatureDistiller(normalize="batch_norm"),
            "normalize must be layer_norm, unit_norm or null, got 'batch_norm'",
        ),
        (lambda: DistillationTokenDistiller(mode="mean"), "mode must be hard or soft, got 'mean'"),
        (
            lambda: DistillationTokenDistiller(temperature=2.0),
            "hard labels have no temperature; got mode 'hard' and 2.0",
        ),
        (lambda: DistillationTokenDistiller(mode="soft", temperature=0), "temperature must be greater than 0, got 0"),
        (lambda: ViTKDDistiller(student_layers=[-1]), r"lists of one length of 2 or more; got \[-1\] and \[0, 1, -1\]"),
        (lambda: ViTKDDistiller(masked=1.0), "masked between 0 and 1; got 3e-05, 3e-06 and 1.0"),
    ],
)
def test_bad_options_say_what_was_expected(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("distiller", "student", "teacher", "text"),
    [
        (LogitDistiller(), OutputShapes(10), OutputShapes(1000), "student has 10 classes and the teacher 1000"),
        (
            FeatureDistiller(),
            OutputShapes(10, ((192, 14, 14),)),
            OutputShapes(None, ((384, 14, 14),)),
            "192 channels wide and the teacher's layer -1 384.*projector: phi_s.*pool.*linear",
        ),
        (
            TokenRelationDistiller(student_layer="pooled"),
            OutputShapes(10, ((192, 1, 1),)),
            OutputShapes(None, ((384, 14, 14),)),
            "student's layer 'pooled' has one token an image, which has no other to relate to.*RKDDistiller",
        ),
        (
            AttentionTransferDistiller(teacher_layer="class_token"),
            OutputShapes(10, ((192, 14, 14),)),
            OutputShapes(None, ((384, 1, 1),)),
            "AttentionTransferDistiller: the teacher's layer 'class_token' has one token",
        ),
        (
            LiftDistiller(),
            OutputShapes(10, ((256, 14, 14),)),
            OutputShapes(None, ((384, 14, 14),)),
            "Set the width of LiftViT to 384",
        ),
        (
            WideLastDistiller(),
            OutputShapes(10, ((256, 14, 14),)),
            OutputShapes(None, ((384, 14, 14),)),
            "Set the width of WideLastViT to 384",
        ),
    ],
)
def test_contradictions_are_refused_at_build(distiller: Distiller, student, teacher, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        distiller.build(student, teacher)


class _Broken(Distiller):
    def forward(self, student: ViTOutput, teacher: ViTOutput, target: torch.Tensor) -> torch.Tensor:
        return self.weight * F.mse_loss(student.logits, teacher.logits)


class _Unseeded(Distiller):
    generator = torch.Generator()

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: torch.Tensor) -> torch.Tensor:
        return torch.rand((), generator=self.generator) * F.mse_loss(student.logits, teacher.logits)


def test_the_contract_check_can_fail() -> None:
    with pytest.raises(AssertionError, match="the same inputs and the same global seed must give the same loss"):
        check_distiller(_Unseeded())
    with pytest.raises(AssertionError, match="must not apply the weight"):
        check_distiller(_Broken(weight=0.5))


def test_distillers_are_listed_with_their_first_line() -> None:
    known = known_distillers()
    assert {"FeatureDistiller", "LiftDistiller", "LogitDistiller", "WideLastDistiller"} <= set(known)
    assert known["LogitDistiller"] == "Logit distillation: the student's class probabilities follow the teacher's."


def test_two_equal_images_have_no_angle_whose_gradient_would_be_of_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(6, 8, generator=generator), torch.randn(6, 12, generator=generator)
    student[1], teacher[1] = student[0], teacher[0]
    found = []
    for noise in (0.0, 4e-8):  # what the teacher of a cache saw in batches of two sizes
        given = student.clone().requires_grad_()
        beside = teacher + noise * torch.randn(6, 12, generator=generator)
        angle_loss(given, beside).backward()
        found.append(given.grad)
    torch.testing.assert_close(found[1], found[0])
    assert 0 < found[0].norm() < 1
