"""`kdvit analyze`: from names on the command line to a report in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from kdvit.analysis import Options, Report, advise, advised_model, analyze, measure, read_features
from kdvit.analysis.report import NetworkReport
from kdvit.analysis.run import analysis_trainer
from kdvit.cli.config_files import find_config
from kdvit.cli.images import ChosenImages, Images, choose, find_images, images_of_config, required
from kdvit.cli.lookup import Experiment, find_network, read_experiment
from kdvit.data import ImageDataModule
from kdvit.errors import UserError
from kdvit.models import Network, TimmTeacher, load_student
from kdvit.runtime.processes import (
    planned_processes,
    require_all_processes,
    require_all_tasks,
    require_whole_networks,
)
from kdvit.structures import Layer, subclasses

TEACHER, STUDENT = "teacher", "student"
FEATURES = (".npy", ".npz")
KEPT = ("seed_everything", "trainer", "ema", "data", "model")  # of a config; the rest belongs to its run


class Choice(NamedTuple):
    """What the user asks for, besides networks and data; see `kdvit analyze --help`."""

    images: int
    layers: list[Layer] | str | None
    options: Options
    batch_size: int
    num_workers: int
    memory: float
    trainer: dict[str, Any]


def run_analysis(given: Namespace) -> None:
    """Runs `kdvit analyze` with the options of its command line.

    Raises:
        UserError: If they contradict each other, or name what is not there.
    """
    ways = [bool(given.model), bool(given.teacher or given.student), bool(given.config)]
    if sum(ways) != 1 or bool(given.teacher) != bool(given.student):
        raise UserError("Say what to analyse by one of: --model NAMES; --teacher NAME --student NAME; --config FILE.")
    seed_everything(given.seed, verbose=False)
    energies = tuple(sorted(given.energies))
    trainer = {name: value for name, value in given.trainer.as_dict().items() if value is not None}
    choice = Choice(
        given.images,
        _layers(given.layers),
        Options(energies, given.centred, given.permutations, given.seed),
        given.batch_size,
        given.num_workers,
        given.memory,
        trainer,
    )
    try:
        choice.options.check()
    except ValueError as error:
        raise UserError(str(error)) from error
    config = None
    _make_folder(given.out)
    if given.model:
        report = analyze_models(given.model, given.data, given.pretrained, choice)
    elif given.config:
        report, config = analyze_config(given.config, given.data, given.pretrained, choice)
    else:
        report, config = analyze_pair(given.teacher, given.student, given.data, given.pretrained, choice)
    write(report, config, given.out)


@rank_zero_only
def _make_folder(out: str) -> None:
    """Makes the folder of the report before anything is computed.

    Raises:
        UserError: If it cannot be made or written to.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        probe = Path(out) / ".kdvit"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out!r}: cannot write there ({error}).") from error


def _layers(given: list[str] | None) -> list[Layer] | str | None:
    """Reads layers: indices, fractions, names, or "all"."""
    if given is None or given == ["all"]:
        return None if given is None else "all"
    layers: list[Layer] = []
    for text in given:
        try:
            layers.append(int(text))
        except ValueError:
            try:
                layers.append(float(text))
            except ValueError:
                layers.append(text)
    return layers


def analyze_models(names: list[str], data: str | None, pretrained: bool, choice: Choice) -> Report:
    """Analyses networks one after the other, each on the images in its own format; or features that others saved."""
    networks: list[NetworkReport] = []
    for name in names:
        label = _short(name, [network.name for network in networks])
        if name.endswith(FEATURES):
            networks.append(features_of(name, label, choice.options))
        else:
            network = find_network(name, pretrained, TimmTeacher)
            networks += _run({label: network}, find_images(required(data), network.image_format), choice).networks
    return Report(networks, choice.options)


def features_of(file: str, label: str, options: Options) -> NetworkReport:
    """Analyses features that others saved."""
    try:
        found = read_features(file).items()
        layers = [measure(tokens, options, name, index) for index, (name, tokens) in enumerate(found)]
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{file!r}: {error}") from error
    return NetworkReport(label, "features in a file", 0, 0, "", None, len(layers), layers, file, 0)


def analyze_pair(
    teacher: str, student: str, data: str | None, pretrained: bool, choice: Choice
) -> tuple[Report, dict[str, Any] | None]:
    """Analyses a teacher and a student on the same images, and advises.

    Returns:
        The report, and a config that follows the advice; None where the images are none to train on.
    """
    if Path(teacher).is_file():
        raise UserError(
            f"--teacher {teacher}: a config names a teacher by timm's name or an exported folder. Make one by "
            f"`kdvit export --ckpt {teacher} --out FOLDER`."
        )
    networks = {TEACHER: find_network(teacher, pretrained, TimmTeacher), STUDENT: find_network(student, pretrained)}
    images = find_images(required(data), networks[TEACHER].image_format)
    report = _advised(_run(networks, images, choice), networks)
    if images.spec is None:
        note = f"No config is written: {images.name} has no folders train and val to train on."
        return report._replace(notes=(note,)), None
    theirs = f"local-dir:{teacher}" if Path(teacher).is_dir() else teacher
    named: dict[str, Any] = {"arch": theirs} if pretrained else {"arch": theirs, "pretrained": False}
    own = networks[STUDENT]
    classes = images.classes if images.classes is not None else _classes(own)
    args = {name: value for name, value in getattr(own, "init_args", {}).items() if value is not None}
    base = yaml.safe_load(Path(find_config("lift.yaml")).read_text())
    same = classes == _classes(networks[TEACHER])
    model = {
        **base["model"],
        "student": {"class_path": _class_path(own), "init_args": {**args, "num_classes": classes}},
        "teacher": {"class_path": "TimmTeacher", "init_args": named},
        "distillers": {"logit": base["model"]["distillers"]["logit"]} if same else {},
        "task_weight": base["model"]["task_weight"] if same else 1.0,
    }
    assert report.advice is not None
    trainer = {**base["trainer"], "default_root_dir": "runs/advised", "devices": "auto", "strategy": "auto"}
    size = {
        "img_size": own.image_format.size[0],
        "mean": list(own.image_format.mean),
        "std": list(own.image_format.std),
    }
    recipe = base["data"]["init_args"] if images.spec["class_path"] == "ImageFolder" else {}
    data_spec = {**images.spec, "init_args": {**recipe, **size, **images.spec["init_args"]}}
    return report, {**base, "trainer": trainer, "data": data_spec, "model": advised_model(report.advice, model)}


def analyze_config(
    file: str, data: str | None, pretrained: bool, choice: Choice
) -> tuple[Report, dict[str, Any] | None]:
    """Analyses teacher and student of a config on its validation images, and advises.

    The student is that of the run's best checkpoint where there is one, else untrained.

    Returns:
        The report, and a config that follows the advice; None where the config has no teacher.
    """
    if data in subclasses(ImageDataModule):
        raise UserError(f"With --config, --data is the root of the config's own data, got {data!r}. Name a folder.")
    changes: dict[str, dict[str, Any]] = {"data": {"root": data}} if data else {}
    changes |= {} if pretrained else {TEACHER: {"pretrained": False}}
    experiment = read_experiment(file, (STUDENT, TEACHER, "data"), changes)
    networks, note = _networks(experiment)
    report = _run(networks, images_of_config(experiment, file), choice)._replace(notes=(note,))
    if TEACHER not in networks:
        return report, None
    report = _advised(report, networks)
    assert report.advice is not None
    config = {key: value for key, value in experiment.config.items() if key in KEPT}
    model = {**config["model"], TEACHER: _changed(config["model"][TEACHER], changes.get(TEACHER, {}))}
    return report, {
        **config,
        "trainer": {**config.get("trainer", {}), "default_root_dir": "runs/advised"},
        "data": _changed(config["data"], changes.get("data", {})),
        "model": advised_model(report.advice, model),
    }


def _changed(spec: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    return {**spec, "init_args": {**spec.get("init_args", {}), **args}}


def _networks(experiment: Experiment) -> tuple[dict[str, Network], str]:
    if experiment.student is None:
        raise UserError("The config has no student.")
    student = experiment.student
    root = Path(experiment.config.get("trainer", {}).get("default_root_dir", "runs/default"))
    best = root / "checkpoints" / "best.ckpt"
    note = f"The student is untrained, as there is no {best}: its ranks say nothing yet, its width does."
    if best.is_file():
        try:
            student.load_state_dict(load_student(best).state_dict())
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{str(best)!r} is of another student than the config's: {error}") from error
        note = f"The student is that of {best}."
    rank_zero_info(note)
    networks = {} if experiment.teacher is None else {TEACHER: experiment.teacher}
    return {**networks, STUDENT: student}, note


def _run(networks: Mapping[str, Network], images: Images, choice: Choice) -> Report:
    numbers = choose(images, choice.images, choice.options.seed)
    chosen = ChosenImages(images, numbers, choice.batch_size, choice.num_workers)
    require_all_tasks(planned_processes(choice.trainer["devices"], choice.trainer["num_nodes"]))
    trainer = analysis_trainer(**choice.trainer)
    require_whole_networks(trainer)
    require_all_processes(trainer)
    rank_zero_info(f"{len(numbers)} images of {images.name}; {', '.join(networks)}.")
    try:
        return analyze(
            networks,
            chosen,
            choice.layers,
            choice.options,
            images.image_format,
            images.name,
            trainer,
            choice.memory,
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _advised(report: Report, networks: Mapping[str, Network]) -> Report:
    """Adds the advice on teacher and student."""
    teacher = next(each for each in report.networks if each.name == TEACHER)
    return report._replace(advice=advise(teacher.face, networks[STUDENT]))


def _classes(network: Network) -> int | None:
    """Returns the number of classes; None for a network without a head."""
    return getattr(getattr(network, "model", None), "num_classes", 0) or None


def _class_path(network: Network) -> str:
    kind = type(network)
    return kind.__name__ if kind.__module__.startswith("kdvit.") else f"{kind.__module__}.{kind.__qualname__}"


def _short(name: str, taken: list[str]) -> str:
    """Returns a name for pictures and files: of a path the part that tells most, with a number if it is taken."""
    parts = Path(name).absolute().with_suffix("").parts if Path(name).exists() else (name.removeprefix("local-dir:"),)
    told = [part for part in parts if part not in ("student", "checkpoints", "best", "last")][-1]
    return told if told not in taken else f"{told}_{1 + sum(each.startswith(told) for each in taken)}"


@rank_zero_only
def write(report: Report, config: dict[str, Any] | None, out: str) -> None:
    """Writes the report, prints its table, and says where everything is."""
    files = report.save(out)
    advised = Path(out) / "advised.yaml"
    advised.unlink(missing_ok=True)
    print(f"\n{report.table()}\n")
    if any(network.passes > 1 for network in report.networks):
        print("The images went through the networks twice: their tokens did not fit into --memory.\n")
    if report.advice is not None:
        print(f"{report.advice}\n")
    for note in report.notes:
        print(note)
    if config is not None and report.advice is not None:
        head = "# kdvit fit --config advised.yaml\n# What `kdvit analyze` advises: "
        logits = "# (Logits are distilled where the numbers of classes agree: see that they are the same classes.)\n"
        advised.write_text(f"{head}{report.advice.why}\n{logits}{yaml.safe_dump(config, sort_keys=False)}")
        print(f"To follow it: kdvit check --config {advised}")
    print(f"To read: {files[0]}. Numbers: {files[1]}.")
