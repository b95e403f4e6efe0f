"""Ranks, shared axes and channel spectra of trained networks, with intervals over the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kdvit import load_student
from kdvit.analysis import Report, analyze
from kdvit.analysis.layer_report import LayerReport, bandwidths
from kdvit.analysis.plots import figures
from kdvit.analysis.run import analysis_trainer
from kdvit.analysis.variants import LEVEL, p99
from kdvit.cli.images import ChosenImages, Images, choose
from kdvit.cli.lookup import build
from kdvit.cli.parsed import parse_fit
from kdvit.data import ImageDataModule
from kdvit.data.cached import collate

IMAGES = 1000
RESAMPLES = 1000
FIGURES = ("ranks", "sep")


def analysed(networks: dict[str, Any], data: Any) -> Report:
    """Analyses networks on 1,000 test images of a data module, as many of each class."""
    dataset = data.dataset("test")
    targets = [int(target) for target in dataset.targets]
    images = Images(dataset, targets, data.image_format, collate, "test images", None, data.num_classes)
    chosen = ChosenImages(images, choose(images, IMAGES, seed=0), batch_size=100, num_workers=0)
    trainer = analysis_trainer(accelerator="cpu", callbacks=[], enable_progress_bar=False)
    return analyze(networks, chosen, image_format=data.image_format, data="test images", trainer=trainer)


def draw(networks: dict[str, str], config: str, folder: Path) -> None:
    """Draws ranks and SEP of exported students, on the test images of a run's config."""
    students = {name: load_student(path) for name, path in networks.items()}
    data = build("data", ImageDataModule, parse_fit(["--config", config]).data)
    report = analysed(students, data)
    for name, figure in figures(report).items():
        if name in FIGURES:
            figure.savefig(folder / f"{name}.png", dpi=130)


def measured_layers(networks: dict[str, Any], data: Any) -> list[dict[str, Any]]:
    """Returns the numbers of the last layer, and of Lift's map behind it, in plain types."""
    (network,) = analysed(networks, data).networks
    return [_numbers(layer) for layer in network.layers]


def _numbers(layer: LayerReport) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "tokens": layer.tokens,
        "width": layer.width,
        "images": layer.images,
        "svd_rank": _percentile(layer.svd_rank(LEVEL)),
        "pca_dimension": _percentile(layer.pca_dimension(LEVEL)),
        "sep": bandwidths(layer),
        "sep_intervals": {
            level: [float(ours.low), float(ours.high)]
            for level, (ours, _) in zip(bandwidths(layer), layer.bandwidths, strict=False)
        },
    }


def _percentile(values: np.ndarray[Any, Any]) -> dict[str, float]:
    """Returns the 99th percentile over images, and its bootstrap 95 % interval."""
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.percentile(values[draws], 99, axis=1), (2.5, 97.5))
    return {"p99": p99(values), "low": float(low), "high": float(high)}
