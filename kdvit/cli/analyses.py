"""From the names on the command line to the report of an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import IterableDataset

from kdvit.analysis import Options, Report, advise, advised_model, analyze, distilled_layer, measure, read_features
from kdvit.analysis.published import PUBLISHED
from kdvit.analysis.report import NetworkReport
from kdvit.analysis.run import analysis_trainer
from kdvit.analysis.save import save
from kdvit.callbacks.epoch_lines import in_terminal
from kdvit.cli.commands.analyze import Processes
from kdvit.cli.config_files import find_config
from kdvit.cli.images import ChosenImages, Images, choose, find_images, images_of_config
from kdvit.cli.lookup import find_network, read_experiment, take_best
from kdvit.errors import UserError, shown
from kdvit.models import Network, TimmTeacher
from kdvit.models.own import class_path
from kdvit.runtime.processes import planned_processes, require_all_processes, require_all_tasks, require_whole_networks
from kdvit.structures import Layer

TEACHER, STUDENT = "teacher", "student"
FEATURES = (".npy", ".npz")
KEPT = ("seed_everything", "trainer", "ema", "data", "model")  # of a config; the rest belongs to its run
Advised = tuple[Report, dict[str, Any] | None]
"""A report, and a config that follows its advice; None where there is none to follow or nothing to train on."""


@dataclass
class Analysis:
    """What the user asks for, besides the networks; see `kdvit analyze --help`."""

    data: str | None
    pretrained: bool
    img_size: int | None
    images: int
    layers: list[Layer] | str | None
    options: Options
    batch_size: int
    num_workers: int
    memory: float
    processes: Processes

    def __post_init__(self) -> None:
        seed_everything(self.options.seed, verbose=False)

    def of_models(self, names: list[str]) -> Report:
        """Analyses networks one after the other, each on images in its own format; or features that others saved."""
        networks: list[NetworkReport] = []
        for name in names:
            label = _short(name, [network.name for network in networks])
            if name.endswith(FEATURES):
                networks.append(features_of(name, label, self.options))
            else:
                network = find_network(name, self.pretrained, TimmTeacher, self.img_size)
                images = find_images(self.data, network.image_format)
                networks += self._run({label: network}, images).networks
        return Report(networks, self.options)

    def of_pair(self, teacher: str, student: str) -> Advised:
        """Analyses a teacher and a student on the same images, and advises."""
        if Path(teacher).is_file():
            raise UserError(
                f"--teacher {teacher}: a config names a teacher by timm's name or an exported folder. Make one by "
                f"`kdvit export --ckpt {teacher} --out FOLDER`."
            )
        exported = Path(teacher).is_dir()
        arch, pretrained = (f"local-dir:{teacher}", True) if exported else (teacher, self.pretrained)
        networks = {  # the teacher as the config makes it: of a LiftViT it distils the last block
            TEACHER: find_network(arch, pretrained, TimmTeacher, self.img_size),
            STUDENT: find_network(student, self.pretrained, img_size=self.img_size),
        }
        images = find_images(self.data, networks[TEACHER].image_format)
        report = _advised(self._run(networks, images), networks)
        if images.spec is None:
            note = f"No config is written: {images.name} has no folders train and val of classes to train on."
            return report._replace(notes=(note,)), None
        named: dict[str, Any] = {"arch": arch, **({} if pretrained else {"pretrained": False})}
        named |= {} if self.img_size is None else {"img_size": self.img_size}
        return report, _config_of_pair(report, networks, named, images)

    def of_config(self, file: str) -> Advised:
        """Analyses teacher and student of a config on its validation images, and advises.

        The student is that of the run's best checkpoint where there is one, else untrained; the teacher is judged at
        the layer that the config distils (of a LiftViT, too, the last block where it names none).
        """
        if self.img_size is not None:
            raise UserError("With --config, sizes are the config's own: leave out --img_size, or set img_size in it.")
        root = ["--data.init_args.root", self.data] if self.data else []
        experiment = read_experiment(file, root, pretrained=self.pretrained, data=True)
        note = take_best(experiment)
        if len(experiment.teachers) > 1:
            raise UserError(
                f"--config {file}: an analysis is of one pair, and the config has {', '.join(experiment.teachers)}. "
                "Give the pair by --teacher NAME --student NAME, or all networks by --model."
            )
        networks = {**experiment.teachers, STUDENT: experiment.student}
        layer = distilled_layer(experiment.config["model"])
        blocks = -1 if layer is None or layer in networks.get(TEACHER, experiment.student).token_layers() else layer
        report = self._run(networks, images_of_config(experiment, file), {TEACHER: blocks})._replace(notes=(note,))
        if TEACHER not in networks:
            return report, None
        report = _advised(report, networks)
        assert report.advice is not None
        config = {key: value for key, value in experiment.config.items() if key in KEPT}
        trainer = {**config.get("trainer", {}), "default_root_dir": "runs/advised"}
        return report, {**config, "trainer": trainer, "model": advised_model(report.advice, config["model"])}

    def _run(
        self, networks: Mapping[str, Network], images: Images, compared: Mapping[str, Layer] | None = None
    ) -> Report:
        if isinstance(images.dataset, IterableDataset):
            first: Any = list(islice(images.dataset, self.images))
            images = images._replace(dataset=first)
        numbers = choose(images, self.images, self.options.seed)
        trainer = process_trainer(self.processes, fast_precision(self.processes.accelerator))
        rank_zero_info(f"{len(numbers)} images of {images.name}; {', '.join(networks)}.")
        with shown((ValueError, TypeError)):
            return analyze(
                networks,
                ChosenImages(images, numbers, self.batch_size, self.num_workers),
                self.layers,
                self.options,
                images.image_format,
                images.name,
                trainer,
                self.memory,
                compared,
            )


def fast_precision(accelerator: str | None) -> str:
    """Returns "bf16-mixed" where the accelerator computes in it and not by emulation, else "32-true"."""
    if accelerator != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return "bf16-mixed" if fast else "32-true"


def process_trainer(processes: Processes, precision: str = "32-true") -> pl.Trainer:
    """Returns the Trainer of a measurement, and refuses what would go wrong in its processes.

    Args:
        processes: What the user asks for.
        precision: If the user asks for none.
    """
    require_all_tasks(planned_processes(processes.devices, processes.num_nodes))
    given = {key: each for key, each in asdict(processes).items() if each is not None}
    silent = {} if in_terminal() else {"callbacks": [], "enable_progress_bar": False}
    with shown((MisconfigurationException, ValueError)):
        trainer = analysis_trainer(**{"precision": precision, **given}, **silent)
    require_whole_networks(trainer)
    require_all_processes(trainer)
    return trainer


def _config_of_pair(
    report: Report, networks: Mapping[str, Network], teacher: dict[str, Any], images: Images
) -> dict[str, Any]:
    """Returns the config of the published Lift run, with this pair and these images, changed as the advice says."""
    assert report.advice is not None
    assert images.spec is not None
    student = networks[STUDENT]
    classes = images.classes if images.classes is not None else student.output_shapes().classes
    args = {name: value for name, value in (student.init_args or {}).items() if value is not None}
    args |= {"num_classes": classes} if "num_classes" in args else {}
    base = yaml.safe_load(Path(find_config("lift.yaml")).read_text())
    for part, option in (("optimizer", "decay_embeddings"), ("schedule", "lag_epochs")):
        del base["model"][part][option]  # the authors' own, and not for other pairs
    same = classes is not None and classes == networks[TEACHER].output_shapes().classes
    model = {
        **base["model"],
        "student": {"class_path": class_path(type(student)), "init_args": args},
        "teacher": {"class_path": "TimmTeacher", "init_args": teacher},
        "distillers": {"logit": base["model"]["distillers"]["logit"]} if same else {},
        "task_weight": base["model"]["task_weight"] if same else 1.0,
    }
    size, mean, std = student.image_format[:3]
    recipe = base["data"]["init_args"] if images.spec["class_path"] == "ImageFolder" else {}
    img_size = size[0] if size[0] == size[1] else list(size)
    init_args = {**recipe, "img_size": img_size, "mean": list(mean), "std": list(std), **images.spec["init_args"]}
    return {
        **base,
        "trainer": {**base["trainer"], "default_root_dir": "runs/advised", "devices": "auto", "strategy": "auto"},
        "data": {**images.spec, "init_args": init_args},
        "model": advised_model(report.advice, model),
    }


def features_of(file: str, label: str, options: Options) -> NetworkReport:
    """Analyses features that others saved."""
    with shown(prefix=f"{file!r}: "):
        found = read_features(file).items()
        face = len(found) - 1
        layers = [measure(tokens, options, name, index, index == face) for index, (name, tokens) in enumerate(found)]
    return NetworkReport(label, "features in a file", 0, 0, "", None, len(layers), layers, file, 0)


def _advised(report: Report, networks: Mapping[str, Network]) -> Report:
    """Adds the advice on teacher and student."""
    teacher = next(each for each in report.networks if each.name == TEACHER)
    return report._replace(advice=advise(teacher.face, networks[STUDENT]))


def _short(name: str, taken: list[str]) -> str:
    """Returns a name for pictures and files: of a path the part that tells most, with a number if it is taken."""
    path = Path(name).absolute()
    file = path.with_suffix("") if path.is_file() else path
    parts = file.parts if path.exists() else (name.removeprefix("local-dir:"),)
    told = [part for part in parts if part not in ("student", "checkpoints", "best", "last")][-1]
    return told if told not in taken else f"{told}_{1 + sum(each.startswith(told) for each in taken)}"


@rank_zero_only
def write(report: Report, config: dict[str, Any] | None, out: str, against: str | None = None) -> None:
    """Writes the report, prints its table, and says where everything is."""
    files = save(report, out, against is not None)
    advised = Path(out) / "advised.yaml"
    advised.unlink(missing_ok=True)
    print(f"\n{report.table()}\n")
    if any(network.passes > 1 for network in report.networks):
        print("The images went through the networks twice: their tokens did not fit into --memory.\n")
    if report.advice is not None:
        print(f"{report.advice}\n")
    for note in report.notes:
        print(note)
    if against and not any(network.published for network in report.networks):
        print(f"--against {against}: the paper's figures are of {', '.join(PUBLISHED)}.")
    if config is not None and report.advice is not None:
        head = f"# kdvit fit --config {advised}\n# What `kdvit analyze` advises: "
        logits = "# (Logits are distilled where the numbers of classes agree: see that they are the same classes.)\n"
        weight = (
            "# (Choose the weight of a map's term on held out images, 0 among others: it was 0.004 to 12.5 so far.)\n"
        )
        text = f"{head}{report.advice.why}\n{weight}{logits}{yaml.safe_dump(config, sort_keys=False)}"
        advised.write_text(text)
        print(f"To follow it: kdvit check --config {advised}")
    print(f"To read: {files[0]}. Numbers: {files[1]}.")
