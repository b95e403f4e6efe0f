"""The report of made-up results: every number in it is one of theirs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.replication.arms import ARMS, FEATURE_WEIGHTS, LEARNING_RATES, RATED, TUNED
from tests.replication.report import blocks, read_results, write_report
from tests.replication.test_claims import layer

PAGE = Path(__file__).parent.parent.parent / "configs" / "replication" / "README.md"
MACHINE = {"cpu": "a CPU", "cores": 2, "torch": "2", "timm": "1", "lightning": "2"}
COST = {"seconds": 1800.0, "cpu_seconds": 900.0, "machine": MACHINE}


def made_up(folder: Path, seeds: int = 8) -> Path:
    """Writes results in which the n-th arm has 70 + n % and one per mille more with each seed, and some noise."""
    folder.mkdir()
    analysed = {"geometry": [{"layer": "3", **geometry(8, 12)}, {"layer": "lift", **geometry(8, 14)}]}
    for n, (name, arm) in enumerate(ARMS.items()):
        for seed in range(seeds):
            scores = {"test/acc1": 0.70 + n / 100 + seed / 1000 + (seed * n) % 3 / 10_000}
            about = {"arm": name, "seed": seed, "weight": 0.5 if arm.objective else None, "parameters": 31594 + n}
            content = {**about, "scores": scores, **COST, **(analysed if arm.geometry else {})}
            (folder / f"{name}_seed_{seed}.json").write_text(json.dumps(content))
    teacher = {"arm": "teacher", "seed": 0, "parameters": 681802, "scores": {"test/acc1": 0.915}, **COST}
    (folder / "teacher.json").write_text(json.dumps({**teacher, "geometry": [{"layer": "5", **geometry(16, 48)}]}))
    (folder / "cache_seed_0.json").write_text(json.dumps({"seed": 0, **COST}))
    rates = [{"rate": rate, "validation_acc1": [0.8, 0.81, 0.82], "mean": 0.81} for rate in LEARNING_RATES]
    weights = [{"weight": weight, "validation_acc1": [weight / 10] * 3} for weight in FEATURE_WEIGHTS]
    recipe = {arm: {"chosen": rates[1], "candidates": rates} for arm in RATED}
    recipe["plain"]["curves"] = [{"50": 0.7, "100": 0.75}] * 3
    (folder / "chosen_recipe.json").write_text(json.dumps(recipe))
    chosen = {arm: {"chosen": weights[-1], "candidates": weights} for arm in TUNED}
    (folder / "chosen_weights.json").write_text(json.dumps(chosen))
    (folder / "glyphs").mkdir()
    for name in ("plain", "pool"):
        for seed in range(3):
            (folder / "glyphs" / f"{name}_seed_{seed}.json").write_text(
                (folder / f"{name}_seed_{seed}.json").read_text()
            )
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
    assert "| `wide_last_none` | WideLast | 31,598 |  | 8 | 74.36 ± 0.25 | +4.01 [+4.00, +4.02] |" in text
    assert "**(b) Does a fixed basis repair feature distillation at no cost at inference?** (8 seeds)" in text
    row = "| pooled channels | `pool` - `plain` | +6.00 [+6.00, +6.00] | < 0.001 | **more** |"
    assert f"{row} +6.00 [+6.00, +6.00] | 3 of 3 |\n" in text
    assert "| `teacher` | last block | 96 | 16.0 | 48.0 |" in text
    assert "| `lift_none` | lift | 96 | 8.0 | 14.0 |" in text
    assert "16 [15, 17] of 96 | **holds** |" in text
    assert "| `uniform_none` | 81.00 ± 1.00 | 81.00 ± 1.00 | 81.00 ± 1.00 | **0.004** |" in text
    assert "mean of 3 seeds: 50: 70.0; 100: 75.0. 400 epochs in place of 100 give +24.0" in text
    assert "| `pool` | 5.00 ± 0.00 | 25.00 ± 0.00 | 125.00 ± 0.00 | **12.5** |" in text
    jobs = len(ARMS) * 8 + 8
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
    with pytest.raises(RuntimeError, match="has no part <!-- questions -->"):
        write_report(results, tmp_path / "page.md")


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    results = PAGE.parent / "results"
    if not (results / "plain_seed_0.json").is_file():
        pytest.skip("no results are committed yet")
    parts = blocks(read_results(results))
    assert all(f"<!-- {name} -->\n{block}\n<!-- end -->" in PAGE.read_text() for name, block in parts.items())
