"""A package of another project brings a distiller."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdvit.cli import main
from tests.runs import SHORT, fit


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory):
    """Installs the plug-in as a user would, into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    source = shutil.copytree(Path(__file__).parent / "plugin", tmp_path_factory.mktemp("source") / "plugin")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, str(source)], check=True)
    sys.path.insert(0, str(target))
    yield
    sys.path.remove(str(target))


@pytest.mark.parametrize("name", ["RelationalDistiller", "kdvit_plugin.RelationalDistiller"])
def test_an_outside_distiller_is_found_and_trained(name: str, plugin, demo_teacher: str, capsys) -> None:
    distillers = json.dumps({"relations": {"class_path": name, "init_args": {"weight": 0.5}}})
    fit("lift", demo_teacher, *SHORT, "--model.distillers", distillers, "--trainer.log_every_n_steps=1")
    with Path("run/metrics.csv").open() as stream:
        assert "train/relations_weighted" in next(csv.reader(stream))
    main(["distillers"])
    assert re.search("RelationalDistiller +Relations between images", capsys.readouterr().out)


def test_an_outside_distiller_keeps_the_contract(plugin) -> None:
    from kdvit_plugin import RelationalDistiller

    from kdvit.testing import check_distiller

    check_distiller(RelationalDistiller(weight=0.5))


BROKEN = {
    "missing": ("not_installed:Missing", "ModuleNotFoundError: No module named 'not_installed'"),
    "no_such_name": ("json:Missing", "AttributeError: module 'json' has no attribute 'Missing'"),
    "no_distiller": ("json:JSONDecoder", "TypeError: expected a subclass of Distiller, got <class 'json.decoder.JSON"),
    "failing": ("failing_plugin:Any", "RuntimeError: its data are not there"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_warned_of_in_one_line_and_every_command_works(
    name: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    place, error = BROKEN[name]
    package = tmp_path / "broken_package-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-package\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(f"[kdvit.distillers]\n{name} = {place}\n")
    (tmp_path / "failing_plugin.py").write_text("raise RuntimeError('its data are\\nnot there')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    main(["distillers"])
    shown = capsys.readouterr()
    assert "LogitDistiller" in shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith(f"kdvit: warning: skipped the distiller {name!r} of broken-package ({place}): {error}")
