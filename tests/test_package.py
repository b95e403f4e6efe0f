"""What is installed: a wheel that works outside the checkout, with the configs inside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def test_an_installed_wheel_works_outside_the_checkout(tmp_path) -> None:
    source = tmp_path / "source"
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".venv", "runs", ".git", "*.egg-info", "build"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = tmp_path / "wheels"
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("kdvit-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "kdvit/configs/lift.yaml",
        "kdvit/configs/demo/lift.yaml",
        "kdvit/py.typed",
        "kdvit/analysis/page.html.jinja",
        "kdvit/base.html.jinja",
        "kdvit/cli/comparison.html.jinja",
    } <= set(names)
    assert not [name for name in names if name.startswith("tests")]

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    where = "import kdvit, sys; print(kdvit.__file__)"
    check = "from kdvit.cli import main; main(['check', '--config', 'demo/plain.yaml'])"
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    for code, expected in ((where, str(site)), (check, "ready for `kdvit fit`")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=outside, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert expected in done.stdout
