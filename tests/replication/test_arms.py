"""Every arm is a config that kdvit takes, and differs from the others in what it says."""

from __future__ import annotations

import pytest
import yaml

from kdvit.cli import main
from tests.replication.arms import ARMS, SEEDS, SELECTION_SEED, TUNED, recipe_changes, weight_changes


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_parses_and_is_what_its_name_says(name: str, capsys) -> None:
    arm = ARMS[name]
    weight = weight_changes(arm, 2.5) if arm.objective else ()
    given = ["--config", f"replication/{arm.config}.yaml", *arm.changes, *recipe_changes(0.002, 0.3), *weight]
    with pytest.raises(SystemExit) as end:
        main(["fit", *given, "--print_config"])
    assert end.value.code in (None, 0)
    config = yaml.safe_load(capsys.readouterr().out)
    model, data = config["model"], config["data"]["init_args"]
    assert (data["train_size"], data["holdout"], data["cache"]) == (10000, 5000, None)
    assert (model["optimizer"]["lr"], model["optimizer"]["weight_decay"]) == (0.002, 0.3)
    assert bool(model["teacher"]) == bool(model["distillers"]) == arm.needs_teacher
    distillers = model["distillers"] or {}
    assert ("logit" in distillers) == ("soft" in name)
    assert model["task_weight"] == (0.1 if "soft" in name else 1.0)
    if arm.objective:
        options = distillers[arm.objective]["init_args"]
        assert options["weight"] == 2.5
        assert options["loss"] == ("spectral" if "spectral" in name else "mse")


def test_the_seed_that_chooses_is_not_reported_and_every_weight_is_chosen_for_its_own_loss() -> None:
    assert len(SEEDS) >= 5
    assert SELECTION_SEED not in SEEDS
    for name, arm in ARMS.items():
        if arm.weight_of:
            assert arm.weight_of in TUNED
            assert name.split("_")[-1] == arm.weight_of.split("_")[-1]
