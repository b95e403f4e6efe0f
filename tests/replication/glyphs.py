"""A second data set that can be made anywhere: signs of three scripts in the free fonts that are installed.

``python -m tests.replication.glyphs OUT`` writes ``OUT/teacher/*.npy``, ``OUT/student/*.npy`` (of which the student
learns: few images of each class) and ``OUT/fonts.md``, the fonts with their licences. A design is in one split only.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FONTS = Path("/usr/share/fonts")
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφχψω"  # without those that are Latin letters to the eye
CYRILLIC = "БДЖЗИЙЛЦЧШЩЪЫЬЭЮЯбвгджзийклмнптцчшщъыьэюя"
SIGNS = "!?&%@#$€£+=*()[]{}<>/~^§"
CHARACTERS = LATIN + GREEK + CYRILLIC + SIGNS
DERIVED = {  # families that are redrawn, renamed or extended ones
    "Arimo": "Liberation",
    "Tinos": "Liberation",
    "Cousine": "Liberation",
    "Carlito": "Lato",
    "GentiumAlt": "Gentium",
    "STIXGeneral": "STIX",
    "Hack": "DejaVu",
}
SIZE, EM = 28, 20  # pixels of the image, and of the font
PER_CLASS = 10  # images from which the student learns
FACES = 4  # of a family, at most


def main(out: Path) -> None:
    """Renders all faces that have all characters."""
    families = find_families(FONTS)
    parts = split(sorted(families))
    for split_name, names in parts.items():
        faces = [face for i in range(FACES) for name in names for face in families[name][i : i + 1]]
        images = np.stack([render(face) for face in faces])  # [faces, characters, H, W]
        labels = np.broadcast_to(np.arange(len(CHARACTERS)), images.shape[:2])
        for folder in ("teacher", "student"):
            (out / folder).mkdir(parents=True, exist_ok=True)
            some = slice(PER_CLASS) if (folder, split_name) == ("student", "train") else slice(None)
            np.save(out / folder / f"{split_name}_images.npy", images[some].reshape(-1, SIZE, SIZE))
            np.save(out / folder / f"{split_name}_labels.npy", labels[some].reshape(-1))
        print(f"{split_name}: {len(names)} families, {len(faces)} faces, {images[:, :, 0, 0].size:,} images")
    rows = [f"| {name} | {part} | {licences(families[name][0])} |" for part, names in parts.items() for name in names]
    (out / "fonts.md").write_text("\n".join(["| family | split | licence |", "| --- | --- | --- |", *rows, ""]))


def find_families(folder: Path) -> dict[str, list[Path]]:
    """Returns the files of each family that have all characters, the first FACES of each."""
    families: dict[str, list[Path]] = {}
    for file in sorted([*folder.rglob("*.ttf"), *folder.rglob("*.otf")]):
        font = TTFont(file, lazy=True)
        if set(map(ord, CHARACTERS)) <= set(font.getBestCmap() or ()):
            family = str(font["name"].getBestFamilyName()).split(",")[0]
            faces = families.setdefault(family, [])
            if len(faces) < FACES:
                faces.append(file)
    return families


def split(families: Sequence[str]) -> dict[str, list[str]]:
    """Returns the families of train, val and test: by a hash of the design, so that more fonts move none."""
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in families:
        first = name.split()[0]
        share = int(hashlib.sha256(DERIVED.get(first, first).encode()).hexdigest()[:8], 16) / 2**32
        parts["test" if share < 0.25 else "val" if share < 0.4 else "train"].append(name)
    return parts


def render(face: Path) -> NDArray[np.uint8]:
    """Returns all characters of a face, white on black, on one baseline, ``[characters, SIZE, SIZE]``."""
    font = ImageFont.truetype(str(face), EM)
    images = []
    for character in CHARACTERS:
        image = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(image).text((SIZE / 2, SIZE * 0.75), character, fill=255, font=font, anchor="ms")
        images.append(np.asarray(image))
    return np.stack(images)


def licences(file: Path) -> str:
    """Returns the licences of the package that a font comes from, as Debian's copyright file names them."""
    owner = subprocess.run(["dpkg", "-S", str(file)], capture_output=True, text=True, check=True).stdout
    package = owner.split(":")[0]
    text = Path(f"/usr/share/doc/{package}/copyright").read_text(errors="replace")
    found = sorted(set(re.findall(r"^License:\s*(\S.*)$", text, flags=re.MULTILINE)))
    return f"{', '.join(found) or 'see its copyright file'} ({package})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
