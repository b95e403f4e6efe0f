"""The networks and data behind the names that a user types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentParser

from kdvit.cli.config_files import find_config, load_yaml
from kdvit.cli.trust import refuse_code
from kdvit.errors import UserError
from kdvit.models import Network, TimmStudent, TimmTeacher, load_student


class Experiment(NamedTuple):
    """What a config of `kdvit fit` builds, as far as it was asked for.

    Attributes:
        config: The config.
        student: Its student.
        teacher: Its teacher, if it has one.
        data: Its data.
    """

    config: dict[str, Any]
    student: Network | None
    teacher: Network | None
    data: pl.LightningDataModule | None


def read_experiment(
    name: str, parts: tuple[str, ...], changes: Mapping[str, Mapping[str, Any]] | None = None
) -> Experiment:
    """Builds parts of a config.

    Args:
        name: Path or short name of the config.
        parts: Of "student", "teacher" and "data", those to build.
        changes: Arguments to change, by part.

    Raises:
        UserError: If there is no such config, or a part cannot be built.
    """
    file = Path(find_config(name))
    try:
        config = load_yaml(file.read_text())
        model = config["model"]
        specs = {"student": model.get("student"), "teacher": model.get("teacher"), "data": config.get("data")}
    except OSError as error:
        raise UserError(f"There is no config {name!r} ({error}).") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(file)!r} is no config of `kdvit fit`: {error!r}.") from error
    built: dict[str, Any] = {}
    for part in parts:
        if specs[part]:
            spec = {**specs[part], "init_args": {**specs[part].get("init_args", {}), **(changes or {}).get(part, {})}}
            built[part] = build(part, spec)
    return Experiment(config, *(built.get(part) for part in ("student", "teacher", "data")))


def build(part: str, spec: Mapping[str, Any]) -> Any:
    """Builds a network or data module of its ``class_path`` and ``init_args``.

    Raises:
        UserError: If it cannot be built.
    """
    kind = pl.LightningDataModule if part == "data" else Network
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, part)
    config = parser.parse_object({part: dict(spec)})
    refuse_code(config)
    try:
        return parser.instantiate_classes(config)[part]
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"{part}: {error}") from error


def find_network(name: str, pretrained: bool, kind: type[TimmStudent] | type[TimmTeacher] = TimmStudent) -> Network:
    """Returns the network of a name.

    Args:
        name: A timm name, an exported folder, or a checkpoint.
        pretrained: Load timm's published weights where it is a timm name; else they are random.
        kind: What a timm name makes. A TimmTeacher keeps the classes of its weights.

    Raises:
        UserError: If there is nothing of that name.
    """
    try:
        return load_student(name) if Path(name).exists() else kind(name, pretrained=pretrained)
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        raise UserError(str(error)) from error
