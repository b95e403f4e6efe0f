"""Files from strangers: checkpoints, caches and arrays run no code. A config names classes, and is its user's own."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kdvit import load_student
from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from tests.runs import SHORT

DEMO = packaged_configs() / "demo"
RUN = {"class_path": "os.system", "init_args": {"command": "touch pwned"}}


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert not Path("pwned").exists()
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("kdvit: error: ")
    assert len(message) < 800
    return message


def config(change: dict[str, Any], name: str = "lift", **more: Any) -> list[str]:
    """Writes a config with values changed, and returns the arguments that name it."""
    tree = copy.deepcopy(yaml.safe_load((DEMO / f"{name}.yaml").read_text()))
    for path, value in change.items():
        *keys, last = path.split("/")
        place = tree
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = value
    Path("stranger.yaml").write_text(yaml.safe_dump(tree, **more))
    return ["--config", "stranger.yaml"]


OWN = """
from collections.abc import Callable
from pathlib import Path
import lightning.pytorch as pl
import torch

class Own(pl.Callback):
    def __init__(self, labels: str, loss: Callable, bound: Callable = torch.tanh):
        assert loss is torch.nn.functional.l1_loss and bound is torch.tanh
        self.labels = Path(labels).read_text()
"""


def test_a_config_is_its_users_own(monkeypatch, tmp_path) -> None:
    """Callbacks may take functions and files from anywhere, and loggers and checkpoints may write elsewhere."""
    Path("own_callback.py").write_text(OWN)
    monkeypatch.syspath_prepend(".")
    labels = tmp_path / "labels.txt"
    labels.write_text("a b")
    loss = "torch.nn.functional.l1_loss"
    own = {"class_path": "own_callback.Own", "init_args": {"labels": str(labels), "loss": loss}}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "scratch"}}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": ".", "name": "logs"}}
    change = {"trainer/callbacks": [own, checkpoint], "trainer/logger": logger, "trainer/default_root_dir": "run"}
    main(["fit", *config(change, "plain"), *SHORT])
    assert list(Path("scratch").glob("*.ckpt"))
    assert Path("logs/version_0/metrics.csv").is_file()
    main(["validate", "--config", "run/config.yaml"])


def test_where_any_value_goes_a_class_path_builds_nothing(capsys) -> None:
    given = config({"model/student/init_args/model_args": {"x": RUN}}, "plain")
    assert "does not take these arguments" in refused(["check", *given], capsys)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system"])
def test_yaml_is_plain_values(text: str, capsys) -> None:
    Path("stranger.yaml").write_text(f"model: {text}")
    for command in ("fit", "analyze"):
        message = refused([command, "--config", "stranger.yaml"], capsys)
        assert "could not determine a constructor for the tag" in message


def bombs() -> list[Path]:
    """Writes pickles that would run a program: as torch saves them, in a checkpoint's shape, and bare."""
    torch.save(Bomb(), "zip.pth")
    whole = {"state_dict": {}, "model": {}, "epoch": 0, "global_step": 1, "loops": {}, "optimizer_states": []}
    torch.save({**whole, "kdvit": Bomb(), "callbacks": {}}, "shaped.pth")
    Path("bare.pth").write_bytes(pickle.dumps({"model": Bomb()}, protocol=2))
    return [Path(name) for name in ("zip.pth", "shaped.pth", "bare.pth")]


@pytest.mark.slow
@pytest.mark.usefixtures("plain_run")
def test_no_checkpoint_runs_code(capsys, caplog) -> None:
    plain = ["--config", "demo/plain.yaml", *SHORT]
    lift = ["--config", "demo/lift.yaml", *SHORT]
    for file in bombs():
        own = ["--trainer.default_root_dir", "new"]
        for command in ("fit", "validate", "test", "predict"):
            assert str(file) in refused([command, *plain, *own, "--ckpt_path", str(file)], capsys), command
        given = [
            ["fit", *plain, "--model.student.init_args.checkpoint", str(file)],
            [
                "fit",
                *lift,
                "--model.teacher.init_args.arch=vit_tiny_patch16_224",
                "--model.teacher.init_args.checkpoint",
                str(file),
            ],
            ["import", str(file), "--out", "imported"],
            ["export", "--ckpt", str(file), "--out", "exported"],
            ["analyze", "--model", str(file), "--data", "Digits"],
            ["benchmark", str(file)],
        ]
        for args in given:
            assert str(file) in refused(args, capsys), args
        with pytest.raises(ValueError, match=str(file)):
            load_student(file)
        Path("run/checkpoints/last.ckpt").write_bytes(file.read_bytes())
        Path("run/checkpoints/best.ckpt").write_bytes(file.read_bytes())
        assert "best.ckpt" in refused(["validate", *plain, "--trainer.default_root_dir", "run"], capsys)
        caplog.clear()
        again = ["fit", *plain, "--trainer.default_root_dir", "run"]
        assert "Training can go on from none of the checkpoints in 'run/checkpoints'" in refused(again, capsys)
        assert "last.ckpt is no whole checkpoint" in caplog.text
        assert not Path("pwned").exists()


def test_a_config_cannot_ask_for_unsafe_checkpoints(capsys) -> None:
    torch.save(Bomb(), "zip.pth")
    given = config({"weights_only": False, "ckpt_path": "zip.pth"}, "plain")
    for command in ("fit", "validate"):
        assert "zip.pth" in refused([command, *given], capsys)


def test_a_checkpoint_does_not_change_the_config(capsys) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"student": RUN}}, "changing.ckpt")
    message = refused(["validate", "--config", "demo/plain.yaml", "--ckpt_path", "changing.ckpt"], capsys)
    assert "'changing.ckpt' is no checkpoint of `kdvit fit`: it would change the config" in message


def test_the_switch_of_torch_does_not_open_checkpoints(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Bomb(), "zip.pth")
    for args in (
        ["import", "zip.pth", "--out", "x"],
        ["validate", "--config", "demo/plain.yaml", "--ckpt_path", "zip.pth"],
    ):
        refused(args, capsys)


def test_features_and_exported_folders_run_no_code(capsys) -> None:
    np.save("objects.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez("objects.npz", x=np.array([Bomb()], dtype=object))
    Path("raw.npy").write_bytes(pickle.dumps(Bomb()))
    for file in ("objects.npy", "objects.npz", "raw.npy"):
        assert file in refused(["analyze", "--model", file], capsys)
    folder = Path("folder")
    folder.mkdir()
    description = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "pretrained_cfg": {"num_classes": 10}}
    (folder / "config.json").write_text(json.dumps(description))
    torch.save(Bomb(), folder / "pytorch_model.bin")
    given = config({"model/teacher/init_args/arch": "local-dir:folder"})
    refused(["fit", *given], capsys)


def test_a_config_does_not_choose_another_folder_for_checkpoints(tmp_path) -> None:
    folders = {key: {"dirpath": str(tmp_path / "elsewhere")} for key in ("checkpoint", "last_checkpoint")}
    main(["fit", *config(folders, "plain"), *SHORT, "--trainer.default_root_dir", "run"])
    assert not Path("elsewhere").exists()
    assert {file.name for file in Path("run/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.filterwarnings("ignore:.*images are few:UserWarning")
def test_names_in_a_report_are_text_and_name_no_file() -> None:
    name = """../../x<script>alert("1")</script>' onerror='y"""
    tokens = np.random.default_rng(0).standard_normal((4, 9, 6)).astype(np.float32)
    folder = Path("<script>")
    folder.mkdir()
    np.savez(folder / "features.npz", **{name: tokens})
    main(["analyze", "--model", str(folder / "features.npz"), "--permutations", "2", "--out", "deep/er/out"])
    page = Path("deep/er/out/report.html").read_text()
    assert "<script" not in page.lower()
    assert "' onerror='" not in page
    assert "../../x&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;&#39; onerror=&#39;y" in page
    written = {file.parent for file in Path().rglob("*") if file.is_file()}
    assert written == {folder, Path("deep/er/out")}
