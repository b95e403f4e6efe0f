"""Imports go down only, so that each room can be read, tested and used without those above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kdvit

FLOORS = """
structures errors files seeding tables pages
models distillers runtime
cache analysis
training data
callbacks
cli
testing __main__
"""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS.strip().splitlines()) for room in rooms.split()}
HOME = Path(kdvit.__file__).parent
FILES = [file for file in sorted(HOME.rglob("*.py")) if file != HOME / "__init__.py"]


def _room(file: Path) -> str:
    return file.relative_to(HOME).parts[0].removesuffix(".py")


def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_a_room_imports_only_rooms_below_it() -> None:
    upward = {}
    for file in FILES:
        room = _room(file)
        imported = {name.split(".")[1] for name in _imports(file) if name.startswith("kdvit.")} - {room}
        upward[file] = [name for name in imported if FLOOR[name] >= FLOOR[room]]
    assert len(upward) > 100
    assert {file: names for file, names in upward.items() if names} == {}


def test_networks_and_objectives_work_in_anyones_loop() -> None:
    files = [file for file in FILES if _room(file) in ("models", "distillers")]
    assert len(files) > 20
    assert [
        file for file in files if any(n.startswith(("lightning", "pytorch_lightning")) for n in _imports(file))
    ] == []


LIGHT = """
import sys
from kdvit.cli import main
for args in (["--help"], ["--version"], ["analize"], ["fit", "--config", "no.yaml"], ["compare", "no"],
             ["export", "--ckpt", "no", "--out", "x"], ["import", "no", "--out", "x"], ["benchmark", "no.yaml"],
             ["analyze", "--config", "no.yaml"], *([name, "--help"] for name in ("analyze", "benchmark", "compare",
             "distillers", "export", "import", "probe", "slurm"))):
    try:
        main(args)
    except SystemExit as end:
        assert end.code in (0, 2), args
    loaded = [name for name in ("torch", "lightning", "timm", "matplotlib") if name in sys.modules]
    assert not loaded, (args, loaded)
"""


@pytest.mark.parametrize(
    "code",
    ["import sys, kdvit; assert not {'torch', 'lightning', 'timm'} & set(sys.modules)", LIGHT],
    ids=["import", "help"],
)
def test_importing_kdvit_and_answering_a_mistake_is_light(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.slow
def test_comparing_runs_takes_networks_and_no_lightning(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,val/acc1\n0,9,0.5\n")
    code = "import sys; from kdvit.cli import main; main(['compare', '.']); assert 'timm' in sys.modules"
    code += "; assert not {'lightning', 'torchmetrics', 'scipy', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
