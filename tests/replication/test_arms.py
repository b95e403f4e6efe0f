"""Every arm is a config that kdvit takes, and differs from the others in what it says."""

from __future__ import annotations

import pytest
import torch
import yaml

from kdvit.cli import main
from kdvit.structures import OutputShapes, SharedBasis
from tests.replication.arms import (
    ARMS,
    EPOCHS,
    FEATURE_WEIGHTS,
    LONGER,
    RATED,
    SEEDS,
    SELECTION_SEEDS,
    TUNED,
    rated_as,
    recipe_changes,
    weight_changes,
)
from tests.replication.random_basis import RandomBasis


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_parses_and_is_what_its_name_says(name: str, capsys) -> None:
    arm = ARMS[name]
    weight = weight_changes(arm, 2.5) if arm.objective else ()
    given = ["--config", f"replication/{arm.config}.yaml", *arm.changes, *recipe_changes(0.002), *weight]
    with pytest.raises(SystemExit) as end:
        main(["fit", *given, "--print_config"])
    assert end.value.code in (None, 0)
    config = yaml.safe_load(capsys.readouterr().out)
    model, data = config["model"], config["data"]["init_args"]
    assert config["trainer"]["max_epochs"] == (LONGER if name.endswith("_long") else 1) * EPOCHS
    assert (data["train_size"], data["holdout"], data["cache"]) == (1000, 5000, None)
    assert (model["optimizer"]["lr"], model["optimizer"]["weight_decay"]) == (0.002, 0.05)
    distillers = model["distillers"] or {}
    assert set(distillers) == ({"logit"} if arm.soft else set()) | ({arm.objective} if arm.objective else set())
    assert ("soft" in name) == arm.soft
    assert model["task_weight"] == (0.1 if "soft" in name else 1.0)
    student = model["student"]
    assert student["class_path"].split(".")[-1] == (
        "LiftViT" if name.startswith(("lift", "folded")) else "WideLastViT" if "wide_last" in name else "TimmStudent"
    )
    assert bool(student["init_args"].get("folded")) == name.startswith("folded")
    assert student["init_args"]["model_args"]["embed_dim"] == (52 if name.startswith("uniform") else 24)
    if arm.objective:
        options = distillers[arm.objective]["init_args"]
        assert options["weight"] == 2.5
        bridge = (arm.weight_of or "").removesuffix("_mse")
        assert options.get("projector") == (
            bridge if bridge in ("pool", "pca", "phi_s", "orthogonal", "linear") else None
        )


def test_the_seeds_that_choose_are_not_reported_and_all_weights_come_from_one_grid() -> None:
    assert len(SEEDS) >= 8
    assert len(SELECTION_SEEDS) >= 3
    assert not set(SEEDS) & set(SELECTION_SEEDS)
    assert len(FEATURE_WEIGHTS) == 3
    for name, arm in ARMS.items():
        if arm.weight_of:
            assert arm.weight_of in TUNED
            assert name.startswith(arm.weight_of.removesuffix("_mse")) or "phi_s" in name


def test_the_learning_rate_is_chosen_for_each_student_without_a_teacher() -> None:
    assert {rated_as(name) for name in ARMS} == set(RATED)
    assert rated_as("wide_last_soft_mse_fast") == "plain"
    for name, arm in ARMS.items():
        if name.endswith("_fast"):
            continue
        rated = ARMS[rated_as(name)]
        assert not rated.needs_teacher
        assert ("uniform" in name) == ("uniform" in rated_as(name))
        narrow = {"plain", "uniform_wide", "soft_kd", "feature"}
        assert arm.config == rated.config or {arm.config, rated.config} <= narrow


def test_a_random_basis_gives_targets_of_mean_variance_one_from_axes_that_are_no_leading_ones() -> None:
    tokens = torch.randn(500, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = tokens * torch.arange(1, 13) + 5
    mean = tokens.mean(0)
    values, axes = torch.linalg.eigh(torch.cov(tokens.T, correction=0))
    basis = SharedBasis(values.flip(0), axes.flip(1), mean)
    distiller = RandomBasis()
    distiller.build(OutputShapes(None, ((4, 1, 1),)), OutputShapes(None, ((12, 1, 1),)))
    distiller.calibrate([basis])
    target = distiller.target(0, tokens.float()[:, :, None, None])[:, :, 0, 0].double()
    assert target.mean(0).abs().max() < 1e-4
    assert target.var(0, correction=0).mean() == pytest.approx(1.0, abs=1e-4)
    assert distiller.describe_calibration([basis]) == []
    axes_kept = torch.linalg.qr(torch.linalg.lstsq(tokens - mean, target).solution).Q
    share = ((tokens - mean) @ axes_kept).square().sum() / (tokens - mean).square().sum()
    assert share < 0.9 * values.flip(0)[:4].sum() / values.sum()
