"""Configs as people mistype them: each is checked, or refused in one clear line, in seconds and without a trace."""

from __future__ import annotations

import copy
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from tests.data.test_data_modules import fashion_root, image_folder

CONFIGS = packaged_configs()
NAMES = sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml"))
QUICK = ["demo/lift.yaml", "fashion_mnist/feature.yaml", "replication/wide_last.yaml", "lift.yaml"]
SECONDS = 20
VALUES: list[Any] = [
    *[-1, 0, 1, 2, 3, 7, -0.5, 0.5, 100, True, False, None],
    *["", " ", "x", "no/where", "1e5", "null", "*", "-", "ü"],
    *[[], {}, [1, 2], {"x": 1}, [None], ["a", "b"], {"class_path": "LiftDistiller"}],
]


class TooLong(BaseException):
    """Not an Exception, so that nobody takes it for a mistake in a config."""


def small(name: str) -> dict[str, Any]:
    """Returns a config with stand-ins for data and networks."""
    config = yaml.safe_load((CONFIGS / name).read_text())
    config["trainer"] |= {"default_root_dir": "run", "devices": 1, "accelerator": "cpu"}
    data, student = config["data"], config["model"]["student"]["init_args"]
    images = {"ImageFolder": {"root": "imagenet", "img_size": 16}, "FashionMNIST": {"root": "fashion"}, "Digits": {}}
    data["init_args"] |= images[data["class_path"]] | {"batch_size": 4, "num_workers": 0}
    if "holdout" in data["init_args"]:
        data["init_args"] |= {"train_size": 30, "holdout": 10}
    if data["class_path"] == "ImageFolder":
        sizes = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
        student |= {"img_size": 16, "num_classes": 2, "model_args": {**student.get("model_args", {}), **sizes}}
        student |= {"width": 48} if "width" in student else {}
    if "teacher" in config["model"]:
        size = student["img_size"]
        sizes = {"patch_size": size // 2, "embed_dim": student.get("width", 48), "depth": 3, "num_heads": 2}
        network = {"arch": "deit_tiny_patch16_224", "pretrained": False, "img_size": size}
        sizes["num_classes"] = student["num_classes"]
        config["model"]["teacher"]["init_args"] = {**network, "model_args": sizes}
    return config


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Returns every place of a value in a tree, as what holds it and its key."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]


def mutated_tree(config: dict[str, Any], draw: random.Random) -> str:
    tree = copy.deepcopy(config)
    holder, key = draw.choice(places(tree))
    how = draw.choice(["delete", "misspell", "swap", "value", "value", "value", "value"])
    if how == "delete":
        del holder[key]
    elif how == "misspell" and isinstance(holder, dict):
        holder[f"{key[:-1]}{draw.choice('xqz')}"] = copy.deepcopy(holder[key])
    elif how == "swap":
        other, place = draw.choice(places(tree))
        ours, theirs = copy.deepcopy((holder[key], other[place]))
        holder[key] = theirs
        if place in (other if isinstance(other, dict) else range(len(other))):
            other[place] = ours
    else:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    return yaml.safe_dump(tree, allow_unicode=True)


def mutated_text(config: dict[str, Any], draw: random.Random) -> bytes:
    lines = yaml.safe_dump(config).splitlines(keepends=True)
    i = draw.randrange(len(lines))
    how = draw.choice(["cut", "tab", "twice", "indent"])
    if how == "tab":
        lines[i] = f"\t{lines[i]}"
    elif how == "twice":
        lines.insert(i, lines[i])
    elif how == "indent":
        lines[i] = " " * draw.randrange(1, 5) + lines[i]
    text = "".join(lines).encode()
    return text[: draw.randrange(len(text))] if how == "cut" else text


@pytest.fixture(autouse=True)
def _images() -> None:
    image_folder(Path("imagenet"), train=4, val=2)
    fashion_root(Path("fashion"))


def run(content: bytes, capsys: pytest.CaptureFixture[str]) -> str:
    """Checks a config, and returns the last line of what is refused."""

    def too_long(*_: Any) -> None:
        raise TooLong

    Path("config.yaml").write_bytes(content)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        main(["check", "--config", "config.yaml"])
        return ""
    except SystemExit as end:
        return f"exit {end.code}" if end.code != 2 else (capsys.readouterr().err.splitlines() or [""])[-1]
    finally:
        signal.alarm(0)
        capsys.readouterr()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "mutations"),
    [(name, 1) for name in QUICK] + [pytest.param(name, 7, marks=pytest.mark.slow) for name in NAMES],
)
def test_a_damaged_config_ends_in_one_clear_line(name: str, mutations: int, tmp_path: Path, capsys) -> None:
    config = small(name)
    assert run(yaml.safe_dump(config).encode(), capsys) == ""
    before = set(tmp_path.rglob("*"))
    failures = {}
    for number in range(mutations):
        draw = random.Random(f"{name} {number}")
        content = mutated_text(config, draw) if number % 5 == 4 else mutated_tree(config, draw).encode()
        try:
            message = run(content, capsys)
        except BaseException as error:
            failures[number] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        if message and not (message.startswith("kdvit: error: ") and 20 < len(message) < 800):
            failures[number] = message
    created = set(tmp_path.rglob("*")) - before
    assert [file for file in created if not file.is_relative_to(tmp_path / "run")] == []
    assert failures == {}
