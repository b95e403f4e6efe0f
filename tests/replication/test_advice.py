"""How the advice is judged, on pairs whose answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kdvit.analysis.costs import Cost
from kdvit.analysis.rule import HOLDS, PHI_S_AHEAD, judge
from kdvit.data import Digits
from tests.replication import advice, pairs
from tests.replication.arms import SELECTION_SEEDS
from tests.replication.report import advice_weights, judged
from tests.replication.runs import Job, Place

RESULTS = Path(__file__).parents[2] / "configs" / "replication" / "results" / "advice"


def pair(teacher: str, width: int, need: int, rank: int, **gains: float) -> dict:
    scores = {"soft_kd": [80.0, 81.0], **{name: [80.0 + gain, 81.0 + gain] for name, gain in gains.items()}}
    about = {"decided": True, "need": need, "rank": rank, "held": 1 - need / width / 20}
    return {"teacher": teacher, "width": width, "advice": about, "scores": scores}


PAIRS = [
    pair("a", 8, 40, 5, none=0.0, phi_s=1.0, Lift=2.0, WideLast=5.0),
    pair("a", 16, 40, 20, none=0.0, phi_s=1.5, Lift=1.0, WideLast=4.0),
    pair("b", 8, 8, 5, none=3.0, phi_s=1.0, Lift=0.0, WideLast=2.0),
    pair("b", 16, 8, 5, none=0.0, phi_s=2.0, Lift=-1.0, WideLast=1.0),
]


def test_the_record_of_a_rule_is_its_mean_gain_and_how_often_it_names_the_best() -> None:
    record = {name: told for name, *told in advice.record(pairs.FASHION, PAIRS)}
    assert record["the rule before"] == ["+2.25", "", "2 of 4"]
    assert record["the rule now"] == ["+2.00", "-0.25 [-3.43, +2.93]", "2 of 4"]
    assert record["always WideLast"] == ["+3.00", "+0.75 [-8.78, +10.28]", "2 of 4"]  # of 1.5 and 0, t of 1 is 12.706
    assert record["the best of each pair, known afterwards"] == ["+3.50", "+1.25 [-1.93, +4.43]", "4 of 4"]


def test_the_rule_now_is_that_of_the_analysis_where_wide_last_costs_too_much() -> None:
    costs = [Cost("none", 8, 1, 1), Cost("Lift", 64, 1, 1), Cost("WideLast", 64, 9, 9)]
    pairs_found = [json.loads(file.read_text()) for file in RESULTS.glob("*_*.json")]
    for found in [*PAIRS, *pairs_found]:
        need, rank, held = (found["advice"][key] for key in ("need", "rank", "held"))
        assert advice.rule_now(found) == judge(found["width"], need, rank, held, 1000, costs)[0]
    assert len(pairs_found) >= 32


def test_what_the_advice_says_of_phi_s_is_what_the_pairs_say() -> None:
    told = []
    for study in (pairs.DIGITS, pairs.FASHION):
        found = [json.loads(file.read_text()) for file in RESULTS.glob("*_*.json")]
        asked = [each for each in found if each["teacher"] in study.teachers and each["width"] < each["advice"]["need"]]
        kept = [each for each in asked if each["advice"]["held"] >= HOLDS]
        ahead = sum(advice.gain(each, "phi_s") > advice.gain(each, "Lift") for each in kept)
        told.append(f"{ahead} of {len(kept)}")
    assert f"{told[0]} small pairs of digits and in {told[1]} of Fashion-MNIST" == PHI_S_AHEAD


def test_a_prediction_is_compared_by_rank_also_without_each_teacher() -> None:
    found = {(name, method): told for name, method, *told in advice.correlations(PAIRS)}
    assert found["shared axes over channels", "WideLast"] == ["+1.00 (+1.00 to +1.00)", "8: +1.00; 16: +1.00"]
    assert found["shared axes over channels", "phi_s"][0].startswith("-0.63 (")
    assert found["1 / channels", "WideLast"] == ["+0.45 (+1.00 to +1.00)", ""]


def test_every_pair_is_a_row_of_the_page() -> None:
    study = pairs.DIGITS._replace(teachers={"a": (), "b": (), "c": ()})
    text = judged(study, {f"advice/{pair['teacher']}_{pair['width']}": pair for pair in PAIRS})
    assert "| a | 8 | 40 | 5 | 75 | Lift | phi_s | +0.0 | +1.0 | +2.0 | +5.0 | WideLast |" in text
    assert text.startswith("4 of 9 pairs have been tried.\n")
    assert judged(study, {}) == "No pair has been tried yet."


def test_weights_are_the_best_of_a_grid_and_of_one_more_beyond_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "runs", tmp_path / "results", tmp_path / "runs")
    trained: list[Path] = []
    at = {"none": 2.5, "phi_s": 0.02, "Lift": 0.004, "WideLast": 62.5}  # the lower, the further from it

    def jobs(logs: Path, wanted: list[Job], at_once: int) -> None:
        trained.extend(job.args[6] for job in wanted if job.function is pairs.fit)

    def accuracy(run: Path) -> float:
        method, weight, _ = run.name.rsplit("_", 2)
        return 0.9 - 0.01 * abs(math.log(float(weight) / at[method]))

    monkeypatch.setattr(pairs, "in_processes", jobs)
    monkeypatch.setattr(pairs, "last_accuracy", accuracy)
    monkeypatch.chdir(Path(__file__).parents[2])
    assert pairs.choose(place) == at
    beyond = ["phi_s_0.004", "Lift_0.004", "WideLast_62.5"]
    assert [run.name for run in trained[60:]] == [f"{each}_{seed}" for each in beyond for seed in SELECTION_SEEDS]
    assert pairs.choose(place) == at
    assert len(trained) == 60 + 9
    told = advice_weights(place.read(pairs.WEIGHTS))
    assert "| phi_s | 88.4 | 90.0 | 88.4 | 86.8 | 85.2 | 83.6 |  | **0.02** |" in told


def test_held_out_digits_are_training_images_that_are_not_trained_on() -> None:
    whole, held = Digits(), Digits(holdout=300)
    assert (len(held.dataset("train")), len(held.dataset("val"))) == (997, 300)
    parts = held.numbers["train"].tolist(), held.numbers["val"].tolist()
    assert sorted(parts[0] + parts[1]) == sorted(whole.numbers["train"].tolist())
    with pytest.raises(ValueError, match="Digits has 1297 training images: holdout must be less, got 1297"):
        Digits(holdout=1297)
