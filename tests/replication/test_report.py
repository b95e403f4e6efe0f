"""The report of made-up results: every number in it is one of theirs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.replication.arms import ARMS, FEATURE_WEIGHTS, LEARNING_RATES, TUNED, WEIGHT_DECAYS
from tests.replication.report import blocks, read_results, write_report
from tests.replication.test_claims import layer

PAGE = Path(__file__).parent.parent.parent / "configs" / "replication" / "README.md"
MACHINE = {"cpu": "a CPU", "cores": 2, "torch": "2", "timm": "1", "lightning": "2"}
COST = {"seconds": 1800.0, "cpu_seconds": 900.0, "machine": MACHINE}


def made_up(folder: Path, seeds: int = 5) -> Path:
    """Writes results in which the n-th arm has 80 + n / 2 % and one per mille more with each seed."""
    folder.mkdir()
    analysed = {"geometry": [{"layer": "3", **geometry(8, 12)}, {"layer": "lift", **geometry(8, 14)}]}
    for n, (name, arm) in enumerate(ARMS.items()):
        for seed in range(seeds):
            scores = {"test/acc1": 0.80 + n / 200 + seed / 1000, "val/acc1": 0.7}
            about = {"arm": name, "seed": seed, "weight": 0.5 if arm.objective else None, "parameters": 31594 + n}
            content = {**about, "scores": scores, **COST, **(analysed if arm.geometry else {})}
            (folder / f"{name}_seed_{seed}.json").write_text(json.dumps(content))
    teacher = {"arm": "teacher", "seed": 0, "parameters": 681802, "scores": {"test/acc1": 0.915}, **COST}
    (folder / "teacher.json").write_text(json.dumps({**teacher, "geometry": [{"layer": "5", **geometry(16, 48)}]}))
    (folder / "cache_seed_0.json").write_text(json.dumps({"seed": 0, **COST}))
    rates = [
        {"learning_rate": rate, "weight_decay": decay, "validation_acc1": 0.8}
        for rate in LEARNING_RATES
        for decay in WEIGHT_DECAYS
    ]
    weights = [{"weight": weight, "validation_acc1": weight / 10} for weight in FEATURE_WEIGHTS]
    (folder / "chosen_recipe.json").write_text(json.dumps({"chosen": rates[3], "candidates": rates}))
    chosen = {arm: {"chosen": weights[-1], "candidates": weights} for arm in TUNED}
    (folder / "chosen_weights.json").write_text(json.dumps(chosen))
    return folder


def geometry(svd: float, pca: float) -> dict:
    made = layer(svd, pca)
    return {
        **made,
        "sep": {at: {**v, "tokens": float(at), "permuted_mean": float(at)} for at, v in made["sep"].items()},
    }


def test_the_page_tells_the_results_and_nothing_else_changes(tmp_path) -> None:
    results, page = made_up(tmp_path / "results"), tmp_path / "README.md"
    shutil.copy(PAGE, page)
    write_report(results, page)
    text = page.read_text()
    assert (
        "| `lift_half` | Lift to 48 (half the teacher) | 31,597 |  | 5 | 81.70 ± 0.16 | +1.50 [+1.50, +1.50] |" in text
    )
    assert (
        "| Wider than the teacher does not help | `lift_wider` - `lift_none`: difference of at most 0.5 points |"
        in text
    )
    assert "above 0 in 5 of 5 seeds | **holds** |" in text
    assert "| `teacher` | last block | 96 | 16.0 | 48.0 |" in text
    assert "| `lift_none` | lift | 96 | 8.0 | 14.0 |" in text
    assert "16 [15, 17] of 96 | **holds** |" in text
    assert "Chosen, for all arms: **0.002 and 0.3**" in text
    assert "| `naive` | 0.20 | 1.00 | 5.00 | 25.00 | **2.5** |" in text
    jobs = len(ARMS) * 5 + 2
    assert f"{jobs} trainings and caches, {jobs / 4:.1f} hours of two cores" in text
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("arms.png", "claim.png"))
    write_report(results, page)
    assert page.read_text() == text
    ours, theirs = (
        re.sub(r"(<!-- \w+ -->\n).*?<!-- end", r"\1", each, flags=re.DOTALL) for each in (text, PAGE.read_text())
    )
    assert ours == theirs
    assert len(ours) < len(text) - 1000


def test_a_page_without_a_marked_part_is_refused(tmp_path) -> None:
    results = made_up(tmp_path / "results")
    (tmp_path / "page.md").write_text("<!-- arms -->\n<!-- end -->\n")
    with pytest.raises(RuntimeError, match="has no part <!-- claims -->"):
        write_report(results, tmp_path / "page.md")


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    results = PAGE.parent / "results"
    if not (results / "plain_seed_0.json").is_file():
        pytest.skip("no results are committed yet")
    parts = blocks(read_results(results))
    assert all(f"<!-- {name} -->\n{block}\n<!-- end -->" in PAGE.read_text() for name, block in parts.items())
