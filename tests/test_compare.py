"""`kdvit compare`: several seeds as mean and interval, what differs, and a page that needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from kdvit.cli import main
from kdvit.cli.seeds import students_t

CURVES = {  # last and best of each seed
    "plain": {0: [0.5, 0.7, 0.69], 1: [0.4, 0.6, 0.62], 2: [0.5, 0.65, 0.66]},
    "lift_384": {0: [0.5, 0.73, 0.74], 2: [0.55, 0.7, 0.69], 1: [0.5, 0.64, 0.65]},
    "other": {7: [0.1, 0.3, 0.2]},
}


def write_runs() -> list[str]:
    """Writes run directories of two settings with three seeds, and of one with another seed."""
    folders = []
    for name, seeds in CURVES.items():
        for seed, curve in seeds.items():
            run = Path("runs", name, f"seed_{seed}")
            run.mkdir(parents=True)
            lines = [f"{epoch},{acc1},{1 - acc1},{9 + 10 * epoch}\n" for epoch, acc1 in enumerate(curve)]
            (run / "metrics.csv").write_text("".join(["epoch,val/acc1,val/loss,step\n", *lines]))
            config = {
                "seed_everything": seed,
                "trainer": {"max_epochs": 3, "default_root_dir": str(run), "enable_progress_bar": seed > 0},
                "model": {
                    "teacher": None if name == "plain" else {"class_path": "TimmTeacher"},
                    "optimizer": {"lr": 0.01 if name == "other" else 0.004, "betas": None},
                },
            }
            (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            folders.append(str(run))
    return folders


def test_seeds_of_a_setting_are_shown_as_mean_and_interval_paired_by_seed(capsys) -> None:
    main(["compare", *write_runs(), "--out", "compared"])
    shown = capsys.readouterr().out
    cells = {line.split("  ")[0]: line.split() for line in shown.splitlines()}
    assert cells["plain/seed_0"][1:4] == ["70.00", "2", "69.00"]  # best, after epochs, last
    assert cells["lift_384/seed_0"][1:4] == ["74.00", "3", "74.00"]
    for name in ("plain", "lift_384"):
        for place, pick in ((2, max), (5, lambda curve: curve[-1])):
            values = [100 * pick(curve) for curve in CURVES[name].values()]
            low, high = stats.ttest_1samp(values, 0).confidence_interval()
            assert cells[name][place : place + 3] == [f"{np.mean(values):.2f}", "±", f"{(high - low) / 2:.2f}"]
    assert cells["other/seed_7"][-3:] == ["1", "30.00", "20.00"]
    pairs = [(100 * CURVES["lift_384"][seed][-1], 100 * CURVES["plain"][seed][-1]) for seed in range(3)]
    low, high = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval()
    expected = ["3", f"{(low + high) / 2:+.2f}", "±", f"{(high - low) / 2:.2f}"]
    difference = cells["lift_384 - plain"][3:]
    assert [difference[0], *difference[4:]] == expected
    assert "other/seed_7 - plain" not in cells

    markdown, page = (Path("compared", f"comparison.{kind}").read_text() for kind in ("md", "html"))
    assert re.findall(r"^\| (model\S+|trainer\S+|seed\S+) \|.*$", markdown, re.MULTILINE) == [
        "model.optimizer.lr",
        "model.teacher.class_path",
    ]
    assert "| model.optimizer.lr | 0.004 | 0.004 | 0.01 |" in markdown
    assert "| model.teacher.class_path |  | TimmTeacher | TimmTeacher |" in markdown
    for text in (markdown, page):
        assert cells["plain"][2] + " ± " + cells["plain"][4] in text
        assert "plain/seed_2: no parameters, latency and seconds: There is no exported" in text
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count('src="data:image/png;base64,') == 1
    numbers = json.loads(Path("compared/comparison.json").read_text())
    assert [run["setting"] for run in numbers] == 3 * ["plain"] + 3 * ["lift_384"] + ["other/seed_7"]
    assert numbers[6]["curves"]["val/acc1"] == [[0, 0.1], [1, 0.3], [2, 0.2]]


@pytest.mark.parametrize(("freedom", "share"), [(1, 0.95), (2, 0.9), (7, 0.99), (40, 0.95)])
def test_the_quantile_of_students_t(freedom: int, share: float) -> None:
    assert students_t(freedom, share) == pytest.approx(stats.t.ppf((1 + share) / 2, freedom), rel=1e-9)


def test_one_run_twice_is_no_second_seed(capsys) -> None:
    run = write_runs()[0]
    main(["compare", run, run, "--out", "compared"])
    shown = capsys.readouterr().out
    assert shown.count("plain/seed_0     70.00") == 2
    assert "±" not in shown
    assert "Settings that differ" not in Path("compared/comparison.md").read_text()
