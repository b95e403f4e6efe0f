"""The whole driver, on a few made-up images and a few steps a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.data.test_data_modules import fashion_root
from tests.replication import demo, stages
from tests.replication.__main__ import main
from tests.replication.arms import ARMS
from tests.replication.test_report import PAGE

pytestmark = pytest.mark.slow
OVER = """
trainer: {max_epochs: 2, limit_train_batches: 2, log_every_n_steps: 1}
data: {init_args: {root: images, batch_size: 8, train_size: 30, holdout: 20}}
"""


def test_data_without_images_held_out_are_refused() -> None:
    Path("over.yaml").write_text("data: {class_path: Digits, init_args: {batch_size: 16, img_size: 28, holdout: 0}}")
    with pytest.raises(RuntimeError, match="hold no training images out, and choices would be made on the test images"):
        main(["recipe", "--over", "over.yaml", "--runs", "runs", "--results", "results", "--teacher", "teacher"])
    assert not Path("runs").exists()
    assert not Path("results").exists()


def test_a_replication_on_other_data_goes_on_where_it_was_stopped_and_fills_in_its_page(tmp_path, monkeypatch) -> None:
    few = {name: ARMS[name] for name in ("plain", "lift_none", "lift_mse", "lift_soft_mse")}
    for name in ("plain_long", "lift_soft_mse_long"):
        few[name] = ARMS[name]._replace(changes=(*ARMS[name].changes[:-1], "4"))  # epochs
    monkeypatch.setattr(stages, "ARMS", few)
    monkeypatch.setattr(stages, "TUNED", ["lift_mse"])
    monkeypatch.setattr(stages, "RATED", ["plain", "lift_none"])
    monkeypatch.setattr(stages, "FEATURE_WEIGHTS", (0.1, 0.5))
    monkeypatch.setattr(stages, "LEARNING_RATES", (1e-3,))
    monkeypatch.setattr(stages, "SELECTION_SEEDS", (100, 101))
    Path("over.yaml").write_text(OVER)
    fashion_root(Path("images"), packed=False)
    shutil.copy(PAGE, "page.md")
    folders = ["--runs", "runs", "--results", "results", "--teacher", "teacher", "--report", "page.md"]
    where = ["--over", "over.yaml", *folders, "--seeds", "0", "--arms", *few]
    main(["teacher", "recipe", "weights", *where])
    assert not list(Path("results").glob("*_seed_?.json"))
    tested = [file for file in Path("results").rglob("*.json") if "test/acc1" in file.read_text()]
    assert [file.name for file in tested] == ["teacher.json"]
    chosen = json.loads(Path("results/chosen_weights.json").read_text())["lift_mse"]
    assert {len(each["validation_acc1"]) for each in chosen["candidates"]} == {2}
    best_of_two = max(chosen["candidates"][:2], key=lambda each: each["mean"])["weight"]
    assert len(chosen["candidates"]) == (3 if best_of_two == 0.5 else 2)
    main(["arms", *where])
    kept, lost = (Path(f"results/{name}_seed_0.json") for name in ("lift_mse", "plain"))
    trained = kept.stat().st_mtime_ns
    lost.unlink()
    main(where)
    assert kept.stat().st_mtime_ns == trained
    results = {file.stem: json.loads(file.read_text()) for file in Path("results").glob("*_seed_?.json")}
    assert set(results) == {"cache_seed_0", "cache_long_seed_0", *(f"{name}_seed_0" for name in few)}
    plain, lift = results["plain_seed_0"], results["lift_mse_seed_0"]
    assert "test/acc1" in plain["scores"]
    assert lift["weight"] == chosen["chosen"]["weight"]
    assert [layer["width"] for layer in lift["geometry"]] == [24, 96]
    assert plain["geometry"][0]["images"] == 20
    assert not list(Path("runs").glob("cache_*_seed_*")) + list(Path("runs").rglob("*.ckpt"))
    assert "| `lift_soft_mse` | Lift + soft KD + MSE |" in Path("page.md").read_text()
    assert {file.name for file in Path().glob("*.png")} == {"arms.png", "claim.png", "ranks.png", "sep.png"}

    shutil.rmtree("runs")  # as in a fresh clone with results and the teacher
    main(where)
    kept.unlink()
    main(["arms", *where])
    assert json.loads(kept.read_text())["scores"] == lift["scores"]
    shutil.copytree("teacher", "runs/teacher/student", dirs_exist_ok=True)
    Path("runs/teacher/student/model.safetensors").write_bytes(b"others")
    with pytest.raises(RuntimeError, match=r"runs/teacher/student is another teacher than .*teacher, from which"):
        main(["teacher", *where])
    Path("over.yaml").write_text(OVER.replace("batch_size: 8", "batch_size: 4"))
    with pytest.raises(RuntimeError, match="is a result of other settings than the configs"):
        main(["recipe", *where])
    shutil.rmtree("teacher")
    with pytest.raises(RuntimeError, match=r"There is no teacher in .*teacher: run the stage"):
        main(["arms", *where])


def test_the_demo_trains_compares_and_draws(monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "METHODS", {"plain": "plain", "fixed_target": "phi_s"})
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    monkeypatch.setattr(demo, "QUIET", (*demo.QUIET, "--trainer.max_epochs=2", "--trainer.limit_train_batches=2"))
    demo.main()
    said = capsys.readouterr().out
    assert "fixed_target - plain      2" in said
    assert {"comparison.html", "demo.png", "teacher", "plain", "fixed_target"} <= {
        each.name for each in demo.FOLDER.iterdir()
    }
