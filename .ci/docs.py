"""Writes the pages of the API into a folder: each public import path, from its docstrings. A warning of pdoc fails."""

import sys
import typing
import warnings
from importlib import import_module
from pathlib import Path

import pdoc

import kdvit

ROOMS = ("analysis", "cache", "callbacks", "cli", "data", "distillers", "models", "structures", "testing", "training")
MODULES = ["kdvit", *(f"kdvit.{room}" for room in ROOMS)]

vars(kdvit).update({name: getattr(kdvit, name) for name in kdvit.__all__})  # lazy names, which pdoc does not ask for
for module in map(import_module, MODULES):
    for cls in vars(module).values():
        if hasattr(cls, "_fields"):  # pdoc does not know in which module the fields of a NamedTuple are written
            cls.__new__.__annotations__ = typing.get_type_hints(cls)
pdoc.render.configure(docformat="google", footer_text=f"kdvit {kdvit.__version__}")
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    pdoc.pdoc(*MODULES, output_directory=Path(sys.argv[1]))
