"""The README's Python runs, its commands parse, and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import kdvit.data
import kdvit.distillers
from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from tests.data.test_data_modules import image_folder
from tests.runs import SHORT

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FITS = sorted(set(re.findall(r"`(kdvit fit --config [^`]*)`", README)))


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 250


@pytest.mark.filterwarnings("ignore")
def test_its_python_runs(capsys) -> None:
    main(["fit", "--config", "demo/teacher.yaml", *SHORT])
    main(["fit", "--config", "demo/wide_last.yaml", *SHORT])
    Image.new("L", (30, 20), 128).save("photograph.jpg")
    assert len(PYTHON) == 3
    for code in PYTHON:
        exec(code, {"__name__": "readme"})


@pytest.mark.parametrize("what", ["class AttentionTransfer", "DistillationModule("])
def test_a_distiller_of_ones_own_and_a_run_in_python_take_15_lines(what: str) -> None:
    code = next(code for code in PYTHON if what in code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("command", FITS)
def test_its_commands_parse(command: str, capsys) -> None:
    _, *args = shlex.split(command)
    with pytest.raises(SystemExit) as end:
        main([*args, "--print_config"])
    assert end.value.code in (None, 0)
    assert "model" in yaml.safe_load(capsys.readouterr().out)


def test_every_published_config_is_in_its_table() -> None:
    named = {Path(shlex.split(command)[3]).name for command in FITS}
    assert {file.name for file in packaged_configs().glob("*.yaml")} == named


def test_the_table_of_objectives_names_each_and_its_demo() -> None:
    page = (Path(kdvit.distillers.__file__).parent / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `") and "Distiller` |" in line]
    named = {re.findall(r"`(\w+)`", row)[0]: row for row in rows}
    assert set(named) == {name for name in kdvit.distillers.__all__ if name.endswith("Distiller")} - {"Distiller"}
    demos = {demo: name for name, row in named.items() for demo in re.findall(r"`(\w+)`", row.rsplit("|", 2)[1])}
    files = {file.stem: yaml.safe_load(file.read_text())["model"] for file in (packaged_configs() / "demo").iterdir()}
    assert set(demos) == set(files) - {"teacher", "plain"}
    for demo, name in demos.items():
        assert name in {each["class_path"] for each in files[demo]["distillers"].values()}


TINY = {"embed_dim": 12, "depth": 2, "num_heads": 2, "patch_size": 8}


def tiny_networks(given: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with networks and images that take no time, its networks otherwise as they are."""
    for name in ("student", "teacher"):
        args = given["model"][name]["init_args"]
        args |= {"img_size": 16, "model_args": TINY} | ({"pretrained": False} if name == "teacher" else {})
    given["data"]["init_args"] |= {"img_size": 16, "batch_size": 4, "num_workers": 0}
    return given


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_of_images_runs() -> None:
    page = (Path(kdvit.data.__file__).parent / "README.md").read_text()
    image_folder(Path("labelled"))
    image_folder(Path("photographs"))
    run = [*SHORT, "--trainer.accelerator", "cpu"]
    for kind, block in re.findall(r"```(yaml|bash|python)\n(.*?)```", page, re.DOTALL):
        if kind == "yaml":
            Path(block.split()[1]).write_text(yaml.safe_dump(tiny_networks(yaml.safe_load(block))))
        elif kind == "python":
            exec(block, {"__name__": "images"})
        for command in block.splitlines() if kind == "bash" else ():
            _, *args = shlex.split(command)
            of_a_trainer = args[0] in ("fit", "test", "predict")
            main([*args, *(run if of_a_trainer else ["--pretrained", "false", "--num_workers", "0", "--k", "3"])])


def test_the_recipe_for_contributors_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = (Path(__file__).parent.parent / ".github" / "CONTRIBUTING.md").read_text()
    distiller, tests = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
    Path("cosine.py").write_text(distiller)
    monkeypatch.setattr(kdvit.distillers, "__path__", [*kdvit.distillers.__path__, "."])
    names: dict[str, Any] = {}
    exec(tests, names)
    for name in re.findall(r"def (test_\w+)", tests):
        names[name]()
