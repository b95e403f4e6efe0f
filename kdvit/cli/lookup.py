"""The networks and data behind the names that a user types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from inspect import isclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from timm import is_model

from kdvit.cli.config_files import ENDINGS, find_configs
from kdvit.cli.parsed import ReadFit
from kdvit.errors import UserError, own_errors, shown
from kdvit.models import ModuleNetwork, Network, TimmStudent, TimmTeacher, fit_to_data, load_student
from kdvit.models.own import find_object
from kdvit.structures import ImageFormat


class Experiment(NamedTuple):
    """Parts of a config of `kdvit fit`.

    Attributes:
        config: What it says beyond the defaults.
        root: Its run directory.
        student: Its student.
        teachers: Its teachers, "teacher" where there is one, else "teacher_NAME".
        data: Its data, where they are.
    """

    config: dict[str, Any]
    root: Path
    student: Network
    teachers: dict[str, Network]
    data: pl.LightningDataModule | None


def read_experiment(
    name: str, changes: Sequence[str] = (), *, pretrained: bool = True, data: bool = False
) -> Experiment:
    """Builds parts of a config, which is read as `kdvit fit` reads it; the student sees images as in the run.

    Args:
        name: Path or short name of the config.
        changes: More options of `kdvit fit`.
        pretrained: Whether student and teachers load published weights; those of a folder are loaded anyway.
        data: Whether the data are needed. Without them the student keeps the size, mean and std of its own name, and
            a line says so.

    Raises:
        UserError: If it is no such config, or a part cannot be built.
    """
    read = ReadFit("fit", find_configs(["--config", name, *changes]))
    config = read.config["fit"]
    named = config.model.teachers or ({"teacher": config.model.teacher} if config.model.teacher else {})
    teachers = {"teacher" if len(named) == 1 else f"teacher_{name}": each for name, each in named.items()}
    for spec in () if pretrained else (config.model.student, *teachers.values()):
        if "pretrained" in (given := spec.get("init_args", {})) and not str(given.get("arch")).startswith("local-dir:"):
            spec["init_args"]["pretrained"] = False
    student = build("student", Network, config.model.student)
    built = {label: build(label, Network, spec) for label, spec in teachers.items()}
    images = None
    try:
        images = build("data", pl.LightningDataModule, config.data)
    except UserError as error:
        if data:
            raise
        rank_zero_info(f"Of {name} there are no images, so its student sees those of its own name: {error}")
    given = getattr(images, "image_format", None)
    if isinstance(given, ImageFormat):
        with shown((ValueError,)):
            fit_to_data(student, given)
    return Experiment(read.plain(), Path(config.trainer.default_root_dir), student, built, images)


def build(part: str, kind: type, spec: Mapping[str, Any]) -> Any:
    """Builds a network or data module of its ``class_path`` and ``init_args``.

    Raises:
        UserError: If it cannot be built.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, part)
    config = parser.parse_object({part: spec})
    with shown((ValueError, TypeError, OSError, ImportError, RuntimeError), prefix=f"{part}: "):
        return parser.instantiate(config)[part]


def find_network(
    name: str,
    pretrained: bool,
    kind: type[TimmStudent] | type[TimmTeacher] = TimmStudent,
    img_size: int | None = None,
) -> Network:
    """Returns the network of a name.

    Args:
        name: A timm name, an exported folder, a checkpoint, or the import path of a class of networks.
        pretrained: Load timm's published weights where it is a timm name; else they are random.
        kind: What a timm name makes. A TimmTeacher keeps the classes of its weights.
        img_size: Input size in pixels of a timm name's network, where it differs from its own.

    Raises:
        UserError: If there is nothing of that name, or what there is has a size of its own.
    """
    exists = Path(name).exists()
    if exists and img_size is not None:
        raise UserError(f"--img_size {img_size} is for names of timm; the network in {name!r} has a size of its own.")
    package, dot, _ = name.partition(".")
    with shown((ValueError, OSError, TypeError, RuntimeError)):
        if exists:
            return load_student(name)
        if not dot or not package.isidentifier() or is_model(package) or find_spec(package) is None:
            return kind(name, pretrained=pretrained, img_size=img_size)
        with own_errors(name):
            found: Any = find_object(name)
            if isclass(found) and issubclass(found, Network):
                network: Network = cast("Any", found)()
                return network
        return ModuleNetwork(name, img_size or 224, [0.5] * 3, [0.5] * 3)


def take_best(experiment: Experiment) -> str:
    """Loads the best checkpoint of a config's run into its student, and says in a note what the student is."""
    best = experiment.root / "checkpoints" / "best.ckpt"
    note = f"The student is untrained, as there is no {best}: its ranks say nothing yet, its width does."
    if best.is_file():
        with shown((ValueError, RuntimeError), prefix=f"{str(best)!r} is of another student than the config's: "):
            trained = load_student(best)
            experiment.student.load_state_dict(trained.state_dict())
            experiment.student.image_format = trained.image_format
        note = f"The student is that of {best}."
    rank_zero_info(note)
    return note


def find_networks(name: str, *, pretrained: bool = False, trained: bool = False) -> list[tuple[str, Network]]:
    """Returns the networks behind a name by their names in a table.

    Args:
        name: As the user types it; of a config, student and teachers are meant.
        pretrained: Load timm's published weights where it is a timm name; else they are random.
        trained: Whether a config's student is that of its run's best checkpoint, if there is one.

    Raises:
        UserError: If there is nothing of that name.
    """
    if not name.endswith(ENDINGS):
        return [(name, find_network(name, pretrained, TimmTeacher))]
    found = read_experiment(name, pretrained=pretrained)
    if trained:
        take_best(found)
    label = str(Path(name).with_suffix("")).removesuffix("/config")
    return [(f"{label}: {role}", each) for role, each in {"student": found.student, **found.teachers}.items()]
