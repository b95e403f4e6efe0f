"""A package of another project brings a distiller."""

from __future__ import annotations

import csv
import json
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
    assert "RelationalDistiller  Relations between images" in capsys.readouterr().out


def test_an_outside_distiller_keeps_the_contract(plugin) -> None:
    from kdvit_plugin import RelationalDistiller

    from kdvit.testing import check_distiller

    check_distiller(RelationalDistiller(weight=0.5))
