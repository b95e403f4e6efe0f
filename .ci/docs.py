"""Lays the pages of the site into build/pages for .ci/mkdocs.yml: those of the repository, and those of the API."""

import re
import shutil
from pathlib import Path

PAGES = Path("build/pages")
WRITTEN = ("README.md", "kdvit/*/*.md", "configs/**/*.md", "tests/bench/*.md", ".github/C*.md")
ROOMS = ("analysis", "cache", "callbacks", "cli", "data", "distillers", "models", "structures", "testing", "training")
HIDDEN = {"kdvit.distillers": ("dist", "dkd")}  # functions behind modules of the same name


def place(file: Path) -> Path:
    """Returns where a file of the repository stands in the site: as in the repository, in no hidden folder."""
    return PAGES / str(file).replace(".github", "github")


shutil.rmtree(PAGES, ignore_errors=True)
for page in (page for pattern in WRITTEN for page in Path().glob(pattern)):
    place(page).parent.mkdir(parents=True, exist_ok=True)
    place(page).write_text(re.sub(r"(\]\([./]*)\.github/", r"\1github/", page.read_text()))
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        file = (page.parent / target).resolve().relative_to(Path.cwd())
        if file.suffix != ".md":  # a picture, a config, or a file of code
            place(file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place(file))
(PAGES / "api").mkdir()
for name in ("kdvit", *(f"kdvit.{room}" for room in ROOMS)):
    hidden = HIDDEN.get(name, ())
    text = "\n".join([f"# {name}\n", f"::: {name}", *(f"## {each}\n\n::: {name}.{each}.{each}" for each in hidden)])
    (PAGES / "api" / f"{name}.md").write_text(text)
shutil.copy(".ci/site.css", PAGES)
