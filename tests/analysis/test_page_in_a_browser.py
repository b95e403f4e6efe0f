"""The report's page in Chromium: its pictures show, its console is silent, and it asks the network for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kdvit.analysis import Options, advise, analyze
from kdvit.analysis.save import save
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


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.filterwarnings("ignore:.*images are few:UserWarning")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_shows_its_pictures_and_asks_for_nothing(width: int, tmp_path: Path) -> None:
    pair = {"vit_base_patch16_clip_224.openai": teacher(), "student": student()}
    report = analyze(pair, TinyData().val_dataloader(), "all", Options(permutations=2))
    advice = advise(report.networks[0].face, pair["student"])
    save(report._replace(advice=advice), tmp_path)
    page = tmp_path / "report.html"
    large = page.read_text().replace(">16 x 24<", ">196 x 1024<").replace("<details>", "<details open>")
    figures = re.sub(r"<td>\d+ / \d+ / \d+ / \d+</td>", "<td>255 / 498 / 694 / 1020</td>", large)
    page.write_text(figures.replace("</body>", f"{PROBE}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    logged = ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *flags, *logged, f"--window-size={width},2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found is not None
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert len(seen["pictures"]) == 4
    assert all(own > 500 and 0.8 * width - 100 < shown <= width for own, shown in seen["pictures"])
    assert seen["wide"] <= width
    assert seen["cut"] == 0 or width < 1200
    assert seen["asked"] == []
