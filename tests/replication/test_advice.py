"""How the advice is judged, on pairs whose answer is known."""

from __future__ import annotations

from tests.replication import advice
from tests.replication.report import judged


def pair(teacher: str, width: int, need: int, remedy: str, **gains: float) -> dict:
    scores = {"soft_kd": [80.0, 81.0], **{name: [80.0 + gain, 81.0 + gain] for name, gain in gains.items()}}
    about = {"remedy": remedy, "decided": True, "need": need, "rank": 5, "held": 1 - need / width / 20}
    return {"teacher": teacher, "width": width, "advice": about, "scores": scores}


PAIRS = [
    pair("a", 8, 40, "Lift", none=0.0, phi_s=1.0, Lift=2.0, WideLast=5.0),
    pair("a", 16, 40, "WideLast", none=0.0, phi_s=1.5, Lift=1.0, WideLast=4.0),
    pair("b", 8, 16, "none", none=3.0, phi_s=1.0, Lift=0.0, WideLast=2.0),
    pair("b", 16, 16, "none", none=0.0, phi_s=2.0, Lift=-1.0, WideLast=1.0),
]


def test_the_record_of_a_rule_is_its_mean_gain_and_how_often_it_names_the_best() -> None:
    record = {name: told for name, *told in advice.record(PAIRS)}
    assert record["the advice"] == ["+2.25", "2 of 4"]
    assert record["always WideLast"] == ["+3.00", "2 of 4"]
    assert record["the best of each pair, known afterwards"] == ["+3.50", "4 of 4"]


def test_a_prediction_is_compared_by_rank_also_without_each_teacher() -> None:
    found = {(name, method): told for name, method, told in advice.correlations(PAIRS)}
    assert found["shared axes over channels", "WideLast"] == "+1.00 (+1.00 to +1.00)"
    assert found["shared axes over channels", "phi_s"].startswith("-0.63 (")


def test_every_pair_is_a_row_of_the_page() -> None:
    text = judged(PAIRS)
    assert "| a | 8 | 40 | 5 | 75 | Lift | +0.0 | +1.0 | +2.0 | +5.0 | WideLast |" in text
    assert text.startswith("4 of 24 pairs have been tried.\n")
    assert judged([]) == "No pair has been tried yet."
