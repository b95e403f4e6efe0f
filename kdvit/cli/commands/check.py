"""What a run will do, as a table, before it does it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from kdvit.analysis import DatasetPCA, as_tokens
from kdvit.cli.machine import beside_machine, network_costs
from kdvit.cli.plan import Rows, describe_plan, free_disk
from kdvit.data import ImageDataModule
from kdvit.distillers import FeatureDistiller
from kdvit.distillers.bases import energies_kept
from kdvit.models import Network
from kdvit.models.cost import ForwardCost, parameter_count
from kdvit.models.network import network_name
from kdvit.runtime.checkpoints import StepCheckpoint
from kdvit.structures import ImageFormat, Layer, as_batch
from kdvit.tables import text_table
from kdvit.training.module import DistillationModule

LOADED_IMAGES = 32
TEACHER_BATCH = 8


def describe(
    module: DistillationModule,
    datamodule: pl.LightningDataModule,
    trainer: Any,
    saved: Sequence[StepCheckpoint],
    workers: int,
    images_per_second: float | None = None,
    measure: bool = True,
) -> str:
    """Describes a run.

    Args:
        module: The module to train.
        datamodule: Its data.
        trainer: Options of the Trainer that will train.
        saved: What writes checkpoints.
        workers: Processes that will load images, for each training process.
        images_per_second: Rate of a process's steps, if the workers that it needs are to be told.
        measure: Also what takes images, how fast they load and the energy that narrow targets keep, and the free disk.

    Returns:
        A table of two columns, one fact a line.
    """
    loader = datamodule.train_dataloader()
    image, rate = _load(loader) if measure else (None, 0.0)
    plan, warnings = describe_plan(module, loader, trainer, saved)
    images = datamodule.summary() if isinstance(datamodule, ImageDataModule) else ""
    costs = network_costs(module)
    told, of_machine = beside_machine(module, costs, loader.batch_size, workers, trainer)
    rows = [
        ("student", _network(module.student, costs[module.student])),
        *_teachers(module, costs),
        ("classes", str(module.num_classes or "none: the student has no head")),
        ("images", _images(module.image_format)),
        *([("data", images)] if images else []),
        ("task", _task(module)),
        *_distillers(module),
        *([] if image is None else _energies(module, image)),
        *plan,
        *([("free disk", free_disk(Path(trainer.default_root_dir)))] if measure else []),
        *([] if image is None else _loading(rate, workers, images_per_second)),
        *_counts(module),
        ("this machine", told),
        *(("warning", each) for each in (*of_machine, *warnings)),
    ]
    return text_table((), rows, left=2)


def _network(network: Network, cost: ForwardCost) -> str:
    return (
        f"{network_name(network)}: {parameter_count(network):,} parameters, "
        f"{cost.flops / 1e9:.3g} GFLOP an image, {network.depth} layers"
    )


def _task(module: DistillationModule) -> str:
    if not module.supervised:
        return f"none: {'the images have no labels' if module.num_classes else 'the student has no head'}"
    return f"cross-entropy x {module.task_weight:g}, label smoothing {module.label_smoothing:g}"


def _images(images: ImageFormat) -> str:
    mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (images.mean, images.std))
    return f"{images.size[0]} x {images.size[1]}, mean ({mean}), std ({std})"


def _teachers(module: DistillationModule, costs: Mapping[Network, ForwardCost]) -> Rows:
    rows = []
    for each in module.teachers.values():
        own = f"{_images(each.network.image_format)} (converted from the images)"
        fed = own if each.converts_size or each.converts_values else "the same images"
        rows += [(each.label, _network(each.network, costs[each.network])), (f"{each.label}'s input", fed)]
    return rows or [("teacher", "none: a supervised run")]


def _distillers(module: DistillationModule) -> Rows:
    rows = []
    for name, distiller in module.distillers.items():
        teacher = module.teachers[module.distillers.teacher_of[name]]
        ours = module.student.output_shapes(distiller.student_layers).features
        theirs = teacher.output_shapes(distiller.teacher_layers, logits=False).features
        parts = [f"{type(distiller).__name__} x {distiller.weight:g}"]
        layers, others = distiller.student_layers, distiller.teacher_layers
        for layer, shape, other, target in zip_longest(layers, ours, others, theirs):
            of_student = f"student {_layer(module.student, layer)} {_shape(shape)}" if shape else ""
            of_teacher = f"{teacher.label} {_layer(teacher.network, other)} {_shape(target)}" if target else ""
            resized = ", finer map resized" if shape and target and shape[1:] != target[1:] else ""
            parts.append(" <- ".join(filter(None, (of_student, of_teacher))) + resized)
        rows.append((f"distiller {name}", "; ".join([*parts, *distiller.conversions()])))
    return rows


def _energies(module: DistillationModule, image: Tensor) -> Rows:
    """Measures how much of the teacher's energy about its mean token the channels of a narrow target can keep."""
    rows = []
    for name, distiller in module.distillers.items():
        if not isinstance(distiller, FeatureDistiller) or distiller.projector in (None, "linear"):
            continue
        if all(ours >= theirs for ours, theirs in distiller.widths):
            continue
        teacher = module.teachers[module.distillers.teacher_of[name]]
        metrics = [DatasetPCA(theirs, centred=True) for _, theirs in distiller.widths]
        for part in torch.split(image, TEACHER_BATCH):
            features = teacher(part, distiller.teacher_layers, logits=False).features
            for metric, feature in zip(metrics, features, strict=True):
                metric.update(as_tokens(feature))
        for layer, (ours, theirs), metric in zip(distiller.teacher_layers, distiller.widths, metrics, strict=True):
            if ours < theirs:
                kept = ", ".join(f"{way} {share:.1%}" for way, share in energies_kept(metric.compute(), ours).items())
                where = f"{ours} of {theirs} channels of {teacher.label} {_layer(teacher.network, layer)}"
                told = f"in {where}, of the centred energy of {len(image)} training images: {kept}"
                rows.append((f"energy kept by {name}", told))
    return rows


def _layer(network: Network, layer: Layer) -> str:
    return layer if isinstance(layer, str) else f"layer {network.resolve(layer)}"


def _shape(shape: tuple[int, int, int]) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def _load(loader: Any) -> tuple[Tensor, float]:
    """Returns some training images ``[B, 3, H, W]``, and how many of them this process loads in a second."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        start = time.perf_counter()
        image = as_batch(next(iter(loader))).image[:LOADED_IMAGES]
        return image, len(image) / (time.perf_counter() - start)
    numbers = np.linspace(0, len(dataset) - 1, LOADED_IMAGES).astype(int).tolist()
    load_all = getattr(dataset, "__getitems__", None) or (lambda each: [dataset[i] for i in each])
    load_all(numbers[:1])
    start = time.perf_counter()
    samples = load_all(numbers)
    rate = LOADED_IMAGES / (time.perf_counter() - start)
    return as_batch(loader.collate_fn(samples)).image, rate


def _loading(rate: float, workers: int, wanted: float | None) -> Rows:
    feeds = f"{workers} workers a process feed at most {workers * rate:,.0f}" if workers else "no workers"
    needs = "" if wanted is None else f"; {wanted:,.0f} a process need {math.ceil(wanted / rate)} workers"
    return [("loading", f"{rate:,.0f} training images/s a worker, on this machine; {feeds}{needs}")]


def _counts(module: DistillationModule) -> Rows:
    student = parameter_count(module.student, trainable=True)
    distillers = parameter_count(module.distillers)
    frozen = sum(parameter_count(each.network) for each in module.teachers.values())
    frozen += parameter_count(module.student) - student
    return [
        ("trainable", f"{student + distillers:,} parameters: student {student:,}, distillers {distillers:,}"),
        ("frozen", f"{frozen:,} parameters"),
    ]
