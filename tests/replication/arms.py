"""What is compared: the arms, the seeds, and the grids from which is chosen. (What came when: the page's "History".)"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

SEEDS = tuple(range(8))
SELECTION_SEEDS = (100, 101, 102)  # none of the seeds that are reported
LEARNING_RATES, FEATURE_WEIGHTS = (2e-3, 4e-3, 8e-3), (0.5, 2.5, 12.5)  # one grid for all
BEYOND = {"rate": (1e-3, 1.6e-2), "weight": (0.1, 62.5)}  # what is tried where an end of it was best
LOGIT_WEIGHT = 0.9  # the paper's, with 0.1 for the labels and temperature 1
EPOCHS, LONGER = 100, 4  # a long arm has so many times the epochs
TEACHER = "teacher"


class Arm(NamedTuple):
    """One way to train the student.

    Attributes:
        title: For tables.
        config: Of configs/replication, without suffix.
        changes: Options of `kdvit fit` that make the config this arm.
        objective: Name of the feature term, if it has one.
        weight_of: The arm for which the weight of the feature term is chosen, this one or another.
        soft: Whether it learns from the teacher's logits.
        geometry: Whether the student's features are analysed.
        long: Whether it is trained LONGER.
        rate_of: The arm whose learning rate it takes, where its config does not tell.
    """

    title: str
    config: str
    changes: tuple[str, ...] = ()
    objective: str | None = None
    weight_of: str | None = None
    soft: bool = False
    geometry: bool = False
    long: bool = False
    rate_of: str | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from the teacher."""
        return self.soft or self.objective is not None


def _student(**options: Any) -> tuple[str, ...]:
    return tuple(f"--model.student.init_args.{name.replace('__', '.')}={value}" for name, value in options.items())


def _distillers(feature: dict[str, Any] | None, name: str = "feature") -> tuple[str, ...]:
    """Returns the options for soft KD, alone or beside a feature term."""
    distillers: dict[str, Any] = {"logit": {"class_path": "LogitDistiller", "init_args": {"weight": LOGIT_WEIGHT}}}
    if feature is not None:
        distillers[name] = feature
    return ("--model.task_weight", f"{1 - LOGIT_WEIGHT:g}", "--model.distillers", json.dumps(distillers))


def _bridge(projector: str, **options: Any) -> dict[str, Any]:
    return {"class_path": "FeatureDistiller", "init_args": {"projector": projector, **options}}


def _only(feature: dict[str, Any]) -> tuple[str, ...]:
    return ("--model.distillers", json.dumps({"feature": feature}))


ALONE = ("--model.teacher", "null", "--model.distillers", "null")
SOFT = _distillers(None)
MEAN = _student(model_args__global_pool="avg", model_args__fc_norm="false")
FOLDED = _student(folded="true")
WIDE = _student(model_args__embed_dim=52, model_args__num_heads=4)  # about the parameters of WideLast
RANDOM = {"class_path": "tests.replication.random_basis.RandomBasis"}
LIFT, WIDE_LAST = {"class_path": "LiftDistiller"}, {"class_path": "WideLastDistiller"}


def _soft(title: str, config: str = "soft_kd", changes: tuple[str, ...] = ()) -> Arm:
    return Arm(f"{title} + soft KD", config, (*changes, *SOFT), soft=True)


def _fixed(title: str, feature: dict[str, Any], own: str, geometry: bool = False) -> Arm:
    return Arm(title, "feature", _only(feature), "feature", own, geometry=geometry)


ARMS: dict[str, Arm] = {
    "plain": Arm("plain", "plain", geometry=True),
    "plain_mean": Arm("plain, mean pooling", "plain", MEAN),
    "folded_none": Arm("Lift folded from the start", "lift", (*ALONE, *FOLDED)),
    "lift_none": Arm("Lift", "lift", ALONE, geometry=True),
    "wide_last_none": Arm("WideLast", "wide_last", ALONE, geometry=True),
    "uniform_none": Arm("uniformly 52 wide", "uniform_wide"),
    "pool": _fixed("feature KD, pooled channels", _bridge("pool"), "pool", geometry=True),
    "random": _fixed("feature KD, random orthogonal basis", RANDOM, "random"),
    "pca": _fixed("feature KD, pca", _bridge("pca"), "pca"),
    "phi_s": _fixed("feature KD, phi_s", _bridge("phi_s"), "phi_s", geometry=True),
    "orthogonal": _fixed(
        "feature KD, train-only orthogonal projector (VkD)", _bridge("orthogonal", loss="smooth_l1"), "orthogonal"
    ),
    "linear": _fixed("feature KD, train-only linear projector", _bridge("linear"), "linear"),
    "lift_mse": Arm("Lift + MSE", "lift", (), "lift", "lift_mse", geometry=True),
    "wide_last_mse": Arm("WideLast + MSE", "wide_last", (), "wide_last", "wide_last_mse", geometry=True),
    "soft_kd": Arm("soft KD", "soft_kd", soft=True),
    "folded_soft": _soft("Lift folded from the start", "lift", FOLDED),
    "lift_soft": _soft("Lift", "lift"),
    "wide_last_soft": _soft("WideLast", "wide_last"),
    "uniform_soft": _soft("uniformly 52 wide", changes=WIDE)._replace(rate_of="uniform_none"),
    "pool_soft": Arm("soft KD + pooled channels", "feature", _distillers(_bridge("pool")), "feature", "pool", True),
    "phi_s_soft": Arm("soft KD + phi_s", "feature", _distillers(_bridge("phi_s")), "feature", "phi_s", True),
    "lift_soft_mse": Arm("Lift + soft KD + MSE", "lift", _distillers(LIFT, "lift"), "lift", "lift_mse", True),
    "wide_last_soft_mse": Arm(
        "WideLast + soft KD + MSE",
        "wide_last",
        _distillers(WIDE_LAST, "wide_last"),
        "wide_last",
        "wide_last_mse",
        True,
    ),
    "uniform_soft_phi_s": Arm(
        "uniformly 52 wide + soft KD + phi_s",
        "feature",
        (*WIDE, *_distillers(_bridge("phi_s"))),
        "feature",
        "phi_s",
        True,
        rate_of="uniform_none",
    ),
}
for _name in ("plain", "soft_kd", "phi_s_soft", "lift_soft_mse", "wide_last_soft_mse", "uniform_soft"):
    _arm = ARMS[_name]
    ARMS[f"{_name}_long"] = _arm._replace(
        title=f"{_arm.title}, {LONGER} x as long",
        changes=(*_arm.changes, "--trainer.max_epochs", str(LONGER * EPOCHS)),
        geometry=False,
        long=True,
    )

ARMS["wide_last_soft_mse_fast"] = ARMS["wide_last_soft_mse"]._replace(  # added when all others had been tested
    title="WideLast + soft KD + MSE, at the others' rate", rate_of="plain"
)

RATED = ("plain", "lift_none", "wide_last_none", "uniform_none")  # each student without a teacher
TUNED = [name for name, arm in ARMS.items() if arm.weight_of == name]


def rated_as(name: str) -> str:
    """Returns the arm for which an arm's learning rate is chosen: that of its student untaught, or `rate_of`."""
    by_student = {"lift": "lift_none", "wide_last": "wide_last_none", "uniform_wide": "uniform_none"}
    return ARMS[name].rate_of or by_student.get(ARMS[name].config, "plain")


def recipe_changes(learning_rate: float) -> tuple[str, ...]:
    """Returns the options that set the recipe, which is the same in all arms of a student."""
    return ("--model.optimizer.lr", str(learning_rate))


def weight_changes(arm: Arm, weight: float) -> tuple[str, ...]:
    """Returns the options that set the weight of the arm's feature term."""
    return (f"--model.distillers.{arm.objective}.weight", str(weight))
