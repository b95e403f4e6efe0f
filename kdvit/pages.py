"""Texts by templates, and pages that need no other file and no network: styles and pictures in one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of the figures, told apart by the colour-blind, too (Okabe and Ito)."""


def render(template: Path, pictures: Mapping[str, Path], **values: Any) -> str:
    """Returns the page of a template that extends ``base.html.jinja``, which stands beside this file.

    Args:
        template: Its file.
        pictures: PNG files by the name of the figure; they are written into the page.
        values: What it shows besides.
    """
    content = {name: base64.b64encode(file.read_bytes()).decode() for name, file in pictures.items()}
    return filled(template, pictures=content, version=version("kdvit"), **values)


def filled(template: Path, **values: Any) -> str:
    """Returns the text of a template, in which all values are escaped if it is one of HTML."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=template.name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)
