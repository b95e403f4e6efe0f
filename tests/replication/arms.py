"""What is compared: the arms, the seeds, and the grids from which is chosen. Written down before any result."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

SEEDS = (0, 1, 2, 3, 4)
SELECTION_SEED = 100  # none of the seeds that are reported
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
WEIGHT_DECAYS = (0.05, 0.3)
FEATURE_WEIGHTS = (0.02, 0.1, 0.5, 2.5)
LOGIT_WEIGHT = 0.9  # the paper's, with 0.1 for the labels and temperature 1
TEACHER = "teacher"


class Arm(NamedTuple):
    """One way to train the student.

    Attributes:
        title: For tables.
        config: Of configs/replication, without suffix.
        changes: Options of `kdvit fit` that make the config this arm.
        objective: Name of the feature term, if it has one.
        weight_of: The arm for which the weight of the feature term is chosen, this one or another.
        geometry: Whether the student's features are analysed.
    """

    title: str
    config: str
    changes: tuple[str, ...] = ()
    objective: str | None = None
    weight_of: str | None = None
    geometry: bool = False

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from the teacher."""
        return self.objective is not None or self.config == "soft_kd"


ALONE = ("--model.teacher", "null", "--model.distillers", "null")


def _width(width: int) -> tuple[str, ...]:
    return (*ALONE, "--model.student.init_args.width", str(width))


def _with_soft_kd(name: str, class_path: str, loss: str) -> tuple[str, ...]:
    distillers: dict[str, Any] = {
        "logit": {"class_path": "LogitDistiller", "init_args": {"weight": LOGIT_WEIGHT}},
        name: {"class_path": class_path, "init_args": {"loss": loss}},
    }
    return ("--model.task_weight", f"{1 - LOGIT_WEIGHT:g}", "--model.distillers", json.dumps(distillers))


def _remedy(title: str, name: str, class_path: str) -> dict[str, Arm]:
    mse, spectral = f"{name}_mse", f"{name}_spectral"
    by_spectral = (f"--model.distillers.{name}.loss", "spectral")
    soft = {loss: _with_soft_kd(name, class_path, loss) for loss in ("mse", "spectral")}
    return {
        mse: Arm(f"{title} + MSE", name, (), name, mse, geometry=True),
        spectral: Arm(f"{title} + SpectralKD", name, by_spectral, name, spectral),
        f"{name}_soft_mse": Arm(f"{title} + soft KD + MSE", name, soft["mse"], name, mse),
        f"{name}_soft_spectral": Arm(f"{title} + soft KD + SpectralKD", name, soft["spectral"], name, spectral),
    }


UNIFORM_26 = ("--model.student.init_args.model_args.embed_dim=26", "--model.student.init_args.model_args.num_heads=2")

ARMS: dict[str, Arm] = {
    "plain": Arm("plain", "plain", geometry=True),
    "uniform_lift": Arm("uniformly 26 wide (parameters of Lift)", "uniform_wide", UNIFORM_26),
    "uniform_wide_last": Arm("uniformly 52 wide (parameters of WideLast)", "uniform_wide"),
    "lift_half": Arm("Lift to 48 (half the teacher)", "lift", _width(48)),
    "lift_none": Arm("Lift to 96 (the teacher)", "lift", ALONE, geometry=True),
    "lift_wider": Arm("Lift to 120 (1.25 times the teacher)", "lift", _width(120)),
    "wide_last_none": Arm("WideLast", "wide_last", ALONE, geometry=True),
    "soft_kd": Arm("soft KD", "soft_kd"),
    "naive": Arm("naive feature KD (pooled channels, MSE)", "feature", (), "feature", "naive", geometry=True),
    "projector": Arm(
        "feature KD, train-only projector",
        "feature",
        ("--model.distillers.feature.projector", "linear"),
        "feature",
        "projector",
        geometry=True,
    ),
    **_remedy("Lift", "lift", "LiftDistiller"),
    **_remedy("WideLast", "wide_last", "WideLastDistiller"),
}

TUNED = [name for name, arm in ARMS.items() if arm.weight_of == name]


def recipe_changes(learning_rate: float, weight_decay: float) -> tuple[str, ...]:
    """Returns the options that set the recipe, which is the same in all arms."""
    return ("--model.optimizer.lr", str(learning_rate), "--model.optimizer.weight_decay", str(weight_decay))


def weight_changes(arm: Arm, weight: float) -> tuple[str, ...]:
    """Returns the options that set the weight of the arm's feature term."""
    return (f"--model.distillers.{arm.objective}.weight", str(weight))
