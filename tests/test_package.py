"""What is installed: a wheel that works outside the checkout, with the configs inside."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from tests.wheel import build_wheel, install

pytestmark = pytest.mark.slow


def test_an_installed_wheel_works_outside_the_checkout(tmp_path) -> None:
    wheel = build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "kdvit/configs/lift.yaml",
        "kdvit/configs/demo/lift.yaml",
        "kdvit/py.typed",
        "kdvit/analysis/page.html.jinja",
        "kdvit/base.html.jinja",
        "kdvit/cli/comparison.html.jinja",
        "kdvit/cli/start.yaml.jinja",
    } <= set(names)
    assert not [name for name in names if name.startswith("tests")]

    site = tmp_path / "site"
    environment = install(wheel, site)
    outside = tmp_path / "outside"
    outside.mkdir()
    where = "import kdvit, sys; print(kdvit.__file__)"
    check = "from kdvit.cli import main; main(['check', '--config', 'demo/plain.yaml'])"
    for code, expected in ((where, str(site)), (check, "ready for `kdvit fit`")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=outside, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert expected in done.stdout
