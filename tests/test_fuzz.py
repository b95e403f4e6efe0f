"""Configs that have come to harm: each is checked, or refused in one clear line, in seconds and without a trace."""

from __future__ import annotations

import copy
import math
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from kdvit.cli.fit import KdvitCLI
from tests.data.test_data_modules import fashion_root, image_folder

CONFIGS = packaged_configs()
NAMES = sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml"))
QUICK, ALL = 1, -(-500 // len(NAMES))
SECONDS = 20
NUMBERS = [-1, 0, 1, 2, 3, 7, 1000, -0.5, 0.5, math.nan]
TEXTS = [
    "",
    " ",
    "x",
    "ü\u202e\U0001f600",
    "../../x",
    "/etc/passwd",
    "~",
    "{epoch}/../../x",
    "1e5",
    "null",
    "*",
    "\x00",
    "-",
]
NESTED = [[], {}, [[]], [1, 2], {"x": 1}, [None], ["a", "b"]]
CLASSES = [{"class_path": "os.system", "init_args": {"command": "touch x"}}, {"class_path": "LiftDistiller"}]
VALUES: list[Any] = [*NUMBERS, True, False, None, *TEXTS, *NESTED, *CLASSES]


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
    how = draw.choice(["cut", "tab", "byte", "twice", "indent", "alias"])
    if how == "tab":
        lines[i] = f"\t{lines[i]}"
    elif how == "twice":
        lines.insert(i, lines[i])
    elif how == "indent":
        lines[i] = " " * draw.randrange(1, 5) + lines[i]
    elif how == "alias":
        lines[i] = lines[i].rstrip("\n") + draw.choice(
            [" *x\n", " &x [*x]\n", " !!python/name:os.system\n", " !!binary x\n"]
        )
    text = "".join(lines).encode()
    at = draw.randrange(len(text))
    if how == "cut":
        return text[:at]
    return text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :] if how == "byte" else text


@pytest.fixture(autouse=True)
def _bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Bounds memory, works some folders deep, and builds the parser of one command alone, to save time."""
    deep = tmp_path / "some" / "folders" / "deep"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    monkeypatch.setattr(KdvitCLI, "subcommands", staticmethod(lambda: {"check": {"model", "datamodule"}}))
    image_folder(Path("imagenet"), train=4, val=2)
    fashion_root(Path("fashion"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + 3 * 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


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


def check_mutations(name: str, numbers: range, top: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(name)
    assert run(yaml.safe_dump(config).encode(), capsys) == ""
    before, folder = set(top.rglob("*")), Path.cwd()
    failures = {}
    for number in numbers:
        draw = random.Random(f"{name} {number}")
        content = mutated_text(config, draw) if number % 5 == 4 else mutated_tree(config, draw).encode()
        try:
            message = run(content, capsys)
        except BaseException as error:
            failures[number] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        if message and not (message.startswith("kdvit: error: ") and 20 < len(message) < 800):
            failures[number] = message
    created = set(top.rglob("*")) - before
    assert [file for file in created if not file.is_relative_to(folder / "run")] == []
    assert Path.cwd() == folder
    assert failures == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_config_ends_in_one_clear_line(name: str, tmp_path, capsys) -> None:
    check_mutations(name, range(QUICK), tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_configs_end_in_one_clear_line(name: str, tmp_path, capsys) -> None:
    check_mutations(name, range(QUICK, ALL), tmp_path, capsys)
