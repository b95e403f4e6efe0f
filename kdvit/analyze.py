"""`kdvit analyze`: from names on the command line to a report in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import yaml
from jsonargparse import Namespace
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader, Dataset, Subset

from kdvit.analysis import Options, Report, advise, advised_model, analyze, measure, read_features
from kdvit.analysis.report import NetworkReport
from kdvit.analysis.run import analysis_trainer
from kdvit.config_files import find_config
from kdvit.data import ImageDataModule
from kdvit.data.cached import collate
from kdvit.data.image_folder import LAYOUT, FolderImages, list_images
from kdvit.lookup import Experiment, build, find_network, read_experiment
from kdvit.messages import UserError
from kdvit.models import Network, TimmTeacher, load_student
from kdvit.structures import ImageFormat, Layer, subclasses

TEACHER, STUDENT = "teacher", "student"
FEATURES = (".npy", ".npz")
KEPT = ("seed_everything", "trainer", "ema", "data", "model")  # of a config; the rest belongs to its run


class Images(NamedTuple):
    """Where images come from.

    Attributes:
        dataset: Of labelled images.
        targets: Their classes, if known.
        image_format: How they arrive.
        collate: Makes a batch of samples.
        name: For the report.
        spec: What a config says of them; None where a config could not train on them.
        classes: Number of classes, if known.
    """

    dataset: Dataset[Any]
    targets: list[int] | None
    image_format: ImageFormat
    collate: Any
    name: str
    spec: dict[str, Any] | None
    classes: int | None


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
    if given.model:
        report = analyze_models(given.model, given.data, given.pretrained, choice)
    elif given.config:
        report, config = analyze_config(given.config, given.data, choice)
    else:
        report, config = analyze_pair(given.teacher, given.student, given.data, given.pretrained, choice)
    write(report, config, given.out)


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
    last: Report | None = None
    for name in names:
        if name.endswith(FEATURES):
            networks += features_of(name, choice.options)
            continue
        network = find_network(name, pretrained, TimmTeacher)
        last = _run({_short(name): network}, find_images(_required(data), network.image_format), choice)
        networks += last.networks
    images = networks[0].layers[0].images
    if last is None:
        return Report(networks, images, ", ".join(names), choice.options, 1)
    return last._replace(networks=networks)


def features_of(file: str, options: Options) -> list[NetworkReport]:
    """Analyses features that others saved."""
    try:
        layers = [measure(tokens, options, name) for name, tokens in read_features(file).items()]
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{file!r}: {error}") from error
    return [NetworkReport(_short(file), "features in a file", 0, 0, "", None, len(layers), layers)]


def analyze_pair(teacher: str, student: str, data: str | None, pretrained: bool, choice: Choice) -> tuple[Report, str]:
    """Analyses a teacher and a student on the same images, and advises.

    Returns:
        The report, and a config that follows the advice.
    """
    if Path(teacher).is_file():
        raise UserError(
            f"--teacher {teacher}: a config names a teacher by timm's name or an exported folder. Make one by "
            f"`kdvit export --ckpt {teacher} --out FOLDER`."
        )
    networks = {TEACHER: find_network(teacher, pretrained, TimmTeacher), STUDENT: find_network(student, pretrained)}
    images = find_images(_required(data), networks[TEACHER].image_format)
    arch = f"local-dir:{teacher}" if Path(teacher).is_dir() else teacher
    spec = {"class_path": "TimmTeacher", "init_args": {"arch": arch}}
    report = _advised(_run(networks, images, choice), networks)
    base = yaml.safe_load(Path(find_config("lift.yaml")).read_text())
    base["trainer"] |= {"default_root_dir": "runs/advised", "devices": "auto", "strategy": "auto"}
    own = networks[STUDENT].image_format
    init_args = {**base["data"]["init_args"], "img_size": own.size[0], "mean": list(own.mean), "std": list(own.std)}
    base["data"] = {"class_path": "ImageFolder", "init_args": init_args}
    if images.spec:
        kept = (
            init_args
            if images.spec["class_path"] == "ImageFolder"
            else {k: init_args[k] for k in ("img_size", "mean", "std")}
        )
        base["data"] = {**images.spec, "init_args": {**kept, **images.spec["init_args"]}}
    return report, _advised_config(base, report, networks, spec, images.classes)


def analyze_config(file: str, data: str | None, choice: Choice) -> tuple[Report, str | None]:
    """Analyses teacher and student of a config on its validation images, and advises.

    The student is that of the run's best checkpoint where there is one, else untrained.

    Returns:
        The report, and a config that follows the advice; None where the config has no teacher.
    """
    changes = {"data": {"root": data}} if data else {}
    experiment = read_experiment(file, (STUDENT, TEACHER, "data"), changes)
    networks, notes = _networks(experiment)
    images = _images_of_config(experiment, file)
    report = _run(networks, images, choice)._replace(notes=notes)
    if TEACHER not in networks:
        return report, None
    report = _advised(report, networks)
    base = {key: value for key, value in experiment.config.items() if key in KEPT}
    base["data"] = dict(base["data"])
    base["data"]["init_args"] = {**base["data"].get("init_args", {}), **changes.get("data", {})}
    base["trainer"] = {**base.get("trainer", {}), "default_root_dir": "runs/advised"}
    return report, _advised_config(base, report, networks, base["model"]["teacher"], images.classes)


def _networks(experiment: Experiment) -> tuple[dict[str, Network], tuple[str, ...]]:
    networks = {TEACHER: experiment.teacher} if experiment.teacher is not None else {}
    student = experiment.student
    if student is None:
        raise UserError("The config has no student.")
    root = Path(experiment.config.get("trainer", {}).get("default_root_dir", "runs/default"))
    best = root / "checkpoints" / "best.ckpt"
    if best.is_file():
        student.load_state_dict(load_student(best).state_dict())
        note = f"The student is that of {best}."
    else:
        note = f"The student is untrained, as there is no {best}: its ranks say nothing yet, its width does."
    rank_zero_info(note)
    return {**networks, STUDENT: student}, (note,)


def _run(networks: Mapping[str, Network], images: Images, choice: Choice) -> Report:
    trainer = analysis_trainer(**choice.trainer)
    chosen = ChosenImages(images, choice)
    rank_zero_info(f"{len(chosen.numbers)} images of {images.name}; {', '.join(networks)}.")
    try:
        return analyze(
            networks, chosen, choice.layers, choice.options, images.image_format, images.name, trainer, choice.memory
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


class ChosenImages(pl.LightningDataModule):
    """The images that were chosen, each on one rank."""

    def __init__(self, images: Images, choice: Choice) -> None:
        super().__init__()
        self.images, self.choice = images, choice
        self.numbers = choose(images, choice.images, choice.options.seed)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns this rank's share."""
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if len(self.numbers) < ranks:
            raise ValueError(f"{ranks} processes cannot share {len(self.numbers)} image(s): give more --images.")
        share = Subset(self.images.dataset, self.numbers[rank::ranks])
        size, workers = self.choice.batch_size, self.choice.num_workers
        return DataLoader(share, size, num_workers=workers, collate_fn=self.images.collate)


def choose(images: Images, count: int, seed: int) -> list[int]:
    """Chooses images at random: one of each class first, then a second of each, and so on; in the data set's order."""
    if count < 1:
        raise UserError(f"--images must be 1 or more, got {count}.")
    size = len(images.dataset)  # type: ignore[arg-type]
    order = np.random.default_rng(seed).permutation(size)
    if images.targets is not None:
        seen: dict[int, int] = {}
        turn = np.empty(size, dtype=np.int64)
        for position, index in enumerate(order):
            target = int(images.targets[index])
            turn[position] = seen[target] = seen.get(target, -1) + 1
        order = order[np.argsort(turn, kind="stable")]
    return sorted(order[:count].tolist())


def find_images(name: str, image_format: ImageFormat) -> Images:
    """Finds the images of a folder, or of a data module by its class name, in a network's own format.

    Raises:
        UserError: If there are none.
    """
    modules = subclasses(ImageDataModule)
    if name in modules:
        formatted = {"img_size": image_format.size[0], "mean": list(image_format.mean), "std": list(image_format.std)}
        spec = {"class_path": name, "init_args": {}}
        module: ImageDataModule = build("data", {"class_path": name, "init_args": formatted})
        return _of_module(module, name, spec)
    root = Path(name)
    splits = (root / "val").is_dir()
    if not root.is_dir():
        raise UserError(f"--data {name!r} is neither a folder nor one of {', '.join(sorted(modules))}. {LAYOUT}")
    try:
        samples = list_images(root / "val" if splits else root)
    except FileNotFoundError as error:
        raise UserError(f"{error} (Or folders of classes alone: ROOT/CLASS/image.jpg.)") from error
    holder = Network(1, image_format)
    targets = [target for _, target in samples]
    folder = {"class_path": "ImageFolder", "init_args": {"root": str(root.absolute())}} if splits else None
    dataset = FolderImages(samples, holder.transform, None)
    return Images(dataset, targets, image_format, collate, str(root.absolute()), folder, len(set(targets)))


def _images_of_config(experiment: Experiment, file: str) -> Images:
    data = experiment.data
    if data is None:
        raise UserError(f"{file!r} has no data. Add it to the config.")
    spec = experiment.config["data"]
    if isinstance(data, ImageDataModule):
        return _of_module(data, f"the validation images of {file}", spec)
    data.prepare_data()
    data.setup("validate")
    loader = data.val_dataloader()
    image_format = getattr(data, "image_format", None) or experiment.student.image_format  # type: ignore[union-attr]
    names = getattr(data, "class_names", None)
    return Images(
        loader.dataset,
        None,
        image_format,
        loader.collate_fn,
        f"the validation images of {file}",
        spec,
        names and len(names),
    )


def _of_module(module: ImageDataModule, name: str, spec: dict[str, Any]) -> Images:
    dataset: Any = module.dataset("val")
    targets = [int(target) for target in dataset.targets]
    return Images(dataset, targets, module.image_format, collate, name, spec, module.num_classes)


def _advised(report: Report, networks: Mapping[str, Network]) -> Report:
    """Adds the advice on teacher and student."""
    teacher, student = report.networks
    return report._replace(advice=advise(teacher.face, networks[STUDENT], student.face.width))


def _advised_config(
    base: dict[str, Any],
    report: Report,
    networks: Mapping[str, Network],
    teacher: Mapping[str, Any],
    classes: int | None,
) -> str:
    advice = report.advice
    assert advice is not None
    theirs = networks[TEACHER].output_shapes().classes
    ours = networks[STUDENT].output_shapes().classes if classes is None else classes
    assert ours is not None
    model = advised_model(advice, networks[STUDENT], teacher, theirs == ours, ours)
    config = {**base, "model": {**base["model"], **model}}
    head = f"# kdvit fit --config advised.yaml\n# What `kdvit analyze` advises: {advice.why}\n"
    return head + str(yaml.safe_dump(config, sort_keys=False))


def _short(name: str) -> str:
    """Returns a name for pictures and files: the last parts of a path."""
    if not Path(name).exists():
        return name.removeprefix("local-dir:")
    parts = [
        part
        for part in Path(name).absolute().with_suffix("").parts
        if part not in ("student", "checkpoints", "best", "last")
    ]
    return parts[-1]


def _required(data: str | None) -> str:
    if data is None:
        raise UserError(
            f"Give --data: a folder of images, or one of {', '.join(sorted(subclasses(ImageDataModule)))}. {LAYOUT}"
        )
    return data


@rank_zero_only
def write(report: Report, config: str | None, out: str) -> None:
    """Writes the report, prints its table, and says where everything is."""
    files = report.save(out)
    print(f"\n{report.table()}\n")
    if report.passes > 1:
        print("The images went through the networks twice: their tokens did not fit into --memory.\n")
    if report.advice is not None:
        print(f"{report.advice}\n")
    if config is not None:
        file = Path(out) / "advised.yaml"
        file.write_text(config)
        print(f"To follow it: kdvit check --config {os.fspath(file)}")
    print(f"To read: {files[0]}. Numbers: {files[1]}.")
