"""What a command starts from: a checkpoint of its run, or none."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from kdvit.cli.run_config import changes, differing
from kdvit.data import ImageDataModule
from kdvit.distillers.classes import first_difference, numbers_by_name
from kdvit.errors import UserError, shown, some
from kdvit.models.checkpoint import known_class_names
from kdvit.models.layouts import read_spec, read_weights_only
from kdvit.runtime.saved import newest_checkpoint, progress, require_whole
from kdvit.training.module import DistillationModule


class Start(NamedTuple):
    """Where a command starts.

    Attributes:
        checkpoint: What it starts from; None for the student as the config builds it.
        changes: What of a run's settings is new, a text each.
        is_done: Whether nothing is left to train.
        class_names: Names of the classes that a student to be scored was trained on, where known.
    """

    checkpoint: str | None = None
    changes: tuple[str, ...] = ()
    is_done: bool = False
    class_names: list[str] | None = None


def find_start(command: str, config: Any, parser: LightningArgumentParser) -> Start:
    """Finds the checkpoint that a command starts from.

    `best` and `last` are the run's own. By default a fit goes on from the newest whole one of its run directory, and
    other commands read the best, or the newest where no best is there.

    Args:
        command: fit, validate, test or predict.
        config: Its config.
        parser: Its parser, which reads the config of the run to go on with.

    Raises:
        UserError: If the checkpoint is missing or damaged, holds more than tensors and plain values, or is of another
            run, or there is no trained student to read.
    """
    folder = Path(config.last_checkpoint.dirpath)
    if config.ckpt_path is not None:
        named = _named(config.ckpt_path, folder)
        own = command == "fit" and named.resolve().parent == folder.resolve()
        foreign = folder.parent.resolve() not in named.resolve().parents
        if command == "fit" and foreign and any(folder.glob("*.ckpt")):
            raise UserError(
                f"{str(folder.parent)!r} holds a run, which one that goes on from {str(named)!r} would overwrite: "
                "choose another --trainer.default_root_dir."
            )
        if command != "fit":
            rank_zero_info(f"The student is that of {named}.")
            return Start(str(named), class_names=read_spec(named).get("class_names"))
        return _go_on(named, config, parser if own else None)
    if command != "fit":
        return _to_read(folder, config)
    file = newest_checkpoint(folder)
    if file is not None:
        return _go_on(file, config, parser)
    if any(folder.glob("*.ckpt")):
        raise UserError(
            f"Training can go on from none of the checkpoints in {str(folder)!r} (the lines above say why), and a run "
            "from the start would overwrite them. Restore one, remove them, or choose another "
            "--trainer.default_root_dir."
        )
    return Start()


def _to_read(folder: Path, config: Any) -> Start:
    """Returns the checkpoint of a run that is scored; none for a student that starts from weights of its own."""
    best = folder / "best.ckpt"
    file = best if best.is_file() else newest_checkpoint(folder)
    if file is not None:
        spec = require_plain(file)
        rank_zero_info(f"The student is that of {file}.")
        return Start(str(file), class_names=spec.get("class_names"))
    given = config.model.student.get("init_args") or {}
    own = any(given.get(name) for name in ("checkpoint", "pretrained", "weights", "path"))
    own = own or bool((given.get("args") or {}).get("weights"))  # of torchvision
    with shown((RuntimeError,)):
        names = known_class_names(given.get("arch", ""), bool(given.get("pretrained")), given.get("checkpoint"))
    new_head = names is not None and given.get("num_classes", len(names)) != len(names)
    if not own or new_head or (given.get("width") and not _is_trained(config.model.student)):
        raise UserError(
            f"There is no checkpoint in {str(folder)!r}, and an untrained student has no score. Train first, say where "
            "the run is by --trainer.default_root_dir, or give --ckpt_path."
        )
    rank_zero_info(f"There is no checkpoint in {folder}: the student has the weights that the config names.")
    return Start(class_names=names)


def _is_trained(student: Any) -> bool:
    """Returns whether a student with a remedy starts from one like it, of as many classes; else its head is new."""
    given = student.init_args
    there = read_spec(given.checkpoint) if given.get("checkpoint") else {}
    kinds, args = (student.class_path, student.class_path.rpartition(".")[2]), there.get("init_args") or {}
    return there.get("class") in kinds and args.get("num_classes") == given.num_classes


def match_classes(known: list[str] | None, datamodule: Any) -> None:
    """Lets a student be scored on data that have a part of its classes, or have them in another order.

    Args:
        known: Names of the classes that it was trained on, where known.
        datamodule: The data.

    Raises:
        UserError: If the student does not know a class of the data.
    """
    names = getattr(datamodule, "class_names", None)
    if not known or not names or (len(names) == len(known) and first_difference(names, known) is None):
        return
    numbers = numbers_by_name(names, known)
    if numbers is None:
        unknown, ours = (some(map(repr, each)) for each in ([n for n in names if n not in known], known))
        raise UserError(
            f"The student was trained on other classes than those of the data: {unknown}. It knows {ours}. Give images "
            "of these, in folders of these names."
        )
    if not isinstance(datamodule, ImageDataModule):
        raise UserError(
            f"{type(datamodule).__name__} has other classes than the student, or has them in another order, and only "
            "data modules of kdvit can be matched by name."
        )
    datamodule.number_classes(numbers)
    rank_zero_info(
        f"The data has {len(names)} of the {len(known)} classes of the student, matched by name. Any of the "
        f"{len(known)} may be its answer."
    )


def require_plain(file: Path) -> dict[str, Any]:
    """Returns the `student_spec` in a checkpoint, empty where it has none.

    Raises:
        UserError: If it is damaged, holds more than tensors and plain values, or changes the config.
    """
    with shown((ValueError,)):
        content = read_weights_only(file)
        require_whole(file)
    if "hyper_parameters" in content:
        raise UserError(
            f"{str(file)!r} is no checkpoint of `kdvit fit`: it would change the config by its hyper_parameters."
        )
    return content.get("kdvit") or {}


def require_same_student(file: str, module: DistillationModule) -> None:
    """Raises UserError if a checkpoint is of another student than a module's, or of other classes than its data's.

    Where the data have no labels, the module takes over the names of the classes that the student was trained on.
    """
    content = read_weights_only(Path(file))
    spec = content.get("kdvit") or {}
    names, own = spec.get("class_names"), module.class_names
    if names and own and names != own:
        first, ours = next(pair for pair in zip_longest(names, own) if pair[0] != pair[1])
        raise UserError(
            f"The student of {file!r} was trained on other classes, or on these in another order: where it has "
            f"{first!r}, the data has {ours!r}. Give the data that it was trained on."
        )
    if "state_dict" not in content:
        raise UserError(
            f"{file!r} is no checkpoint of `kdvit fit`. Weights of other programs go into "
            "model.student.init_args.checkpoint."
        )
    theirs = {name: value.shape for name, value in content["state_dict"].items() if name.startswith("student.")}
    built = {f"student.{name}": value.shape for name, value in module.student.state_dict().items()}
    if theirs != built:
        args = differing(getattr(module.student, "init_args", None), spec.get("init_args"), "student")
        weights = differing(built, theirs, "")
        said = [
            f"{key.lstrip('.')} is {here!r} in the config and {there!r} there" for key, here, there in (*args, *weights)
        ]
        raise UserError(f"{file!r} holds another student than the config builds: {'; '.join(said[:3])}.")
    module.class_names = own or names


def _named(name: str, folder: Path) -> Path:
    own = name in ("best", "last")
    file = folder / f"{name}.ckpt" if own else Path(name)
    if not file.is_file():
        raise UserError(
            f"There is no file {str(file)!r}: train first, or give --ckpt_path one, as RUN/checkpoints/best.ckpt."
        )
    if own:  # another was read when the config was parsed
        require_plain(file)
    return file


def _go_on(file: Path, config: Any, parser: LightningArgumentParser | None) -> Start:
    """Compares the run in a folder with the config, and says what is new.

    Args:
        file: The checkpoint to go on from.
        config: The config.
        parser: Reads the config of the run in the folder; None where the checkpoint is of another folder.

    Raises:
        UserError: If it is another run, or has come further than the config goes.
    """
    root, trainer = config.trainer.default_root_dir, config.trainer
    changed = changes(Path(root), config, parser) if parser else ()
    with shown((ValueError,)):
        step, epochs, amid, validates = progress(file)
    elsewhere = "choose another --trainer.default_root_dir"
    if trainer.fast_dev_run and parser:
        raise UserError(f"{root!r} holds a run, which fast_dev_run would overwrite: {elsewhere}, or take kdvit check.")
    if (fewer := 0 < (trainer.max_epochs or -1) < epochs) or 0 < trainer.max_steps < step:
        limit = f"max_epochs {trainer.max_epochs}" if fewer else f"max_steps {trainer.max_steps}"
        raise UserError(
            f"{str(root if parser else file)!r} holds a run of {epochs} epochs and {step} steps, and {limit} asks for "
            f"fewer. Raise it, or {elsewhere}."
        )
    if amid and any(change.startswith("trainer.accumulate_grad_batches") for change in changed):
        raise UserError(
            f"{file} was saved amid an epoch, whose accumulated batches cannot change: "
            f"{'; '.join(changed)}. Change them at the end of an epoch, or {elsewhere}."
        )
    is_done = not validates and (epochs == trainer.max_epochs or step == trainer.max_steps)
    if is_done:
        rank_zero_info(f"{file} has {epochs} epochs and {step} steps: nothing is left to train. (Raise max_epochs.)")
    else:
        rank_zero_info(f"Going on from {file}, step {step}. (To start anew, {elsewhere}.)")
    if changed:
        rank_zero_info(f"New since the last start: {'; '.join(changed)}.")
    return Start(str(file), changed, is_done)
