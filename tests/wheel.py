"""The project as a user installs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of the checkout below a folder."""
    source, wheels = folder / "source", folder / "wheels"
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(".venv", "runs", ".git", "*.egg-info", "build"))
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("kdvit-*.whl")
    return wheel


def install(wheel: Path, site: Path) -> dict[str, str]:
    """Installs a wheel into a folder, and returns the environment that finds it there, and nothing of the checkout."""
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    return {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(site.parent), "OMP_NUM_THREADS": "2"}
