"""The pages of analyze and compare in Chromium: pictures show, the console is silent, nothing is asked of the net."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kdvit.analysis import Options, advise, analyze
from kdvit.analysis.save import save
from kdvit.cli import main
from tests.test_compare import write_runs
from tests.tiny import TinyData, student, teacher

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const seen = [...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]);
  const tables = [...document.querySelectorAll(".scroll")];
  document.body.dataset.seen = JSON.stringify({
    pictures: seen, wide: document.documentElement.scrollWidth,
    cut: tables.filter(each => each.scrollWidth > each.clientWidth).length,
    asked: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
  });
});</script>"""


def _report(folder: Path) -> Path:
    pair = {"vit_base_patch16_clip_224.openai": teacher(), "student": student()}
    report = analyze(pair, TinyData().val_dataloader(), "all", Options(permutations=2))
    advice = advise(report.networks[0].face, pair["student"])
    save(report._replace(advice=advice), folder)
    page = folder / "report.html"
    large = page.read_text().replace(">16 x 24<", ">196 x 1024<").replace("<details>", "<details open>")
    page.write_text(re.sub(r"<td>\d+ / \d+ / \d+ / \d+</td>", "<td>255 / 498 / 694 / 1020</td>", large))
    return page


def _comparison(folder: Path) -> Path:
    main(["compare", *write_runs(), "--out", str(folder)])
    return folder / "comparison.html"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.filterwarnings("ignore:.*images are few:UserWarning")
@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize(("write", "pictures"), [(_report, 4), (_comparison, 1)], ids=["analyze", "compare"])
def test_a_page_shows_its_pictures_and_asks_for_nothing(write: Any, pictures: int, width: int, tmp_path: Path) -> None:
    page = write(tmp_path)
    page.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    logged = ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *flags, *logged, f"--window-size={width},2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found is not None
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert len(seen["pictures"]) == pictures
    assert all(own > 500 and 0.8 * width - 100 < shown <= width for own, shown in seen["pictures"])
    assert seen["wide"] <= width
    assert seen["cut"] == 0 or width < 1200
    assert seen["asked"] == []
