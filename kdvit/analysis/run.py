"""Images through networks, once, and every analysis of their layers on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric

from kdvit.analysis.geometry import LayerGeometry, LayerReport, Options
from kdvit.analysis.report import NetworkReport, Report
from kdvit.analysis.tokens import as_tokens
from kdvit.models import FrozenTeacher, Network, as_network
from kdvit.models.checkpoint import weights_sha256
from kdvit.models.cost import forward_flops, parameter_count
from kdvit.structures import Batch, ImageFormat, Layer

FEW_IMAGES = 100


class AnalysisProgress(TQDMProgressBar):
    """Lightning's progress bar, under the name of what goes on."""

    @property
    def test_description(self) -> str:
        """What the bar says."""
        return "Analysing"


def chosen_layers(network: Network, layers: Sequence[Layer] | str | None) -> tuple[Layer, ...]:
    """Returns the layers to analyse, in the order of the depth, each once.

    Args:
        network: The network.
        layers: Layers as a user names them; "all"; None for the last one, and the map of a remedy.

    Raises:
        ValueError: If a layer does not exist.
    """
    if layers is None:
        layers = (-1, *network.named_layers())
    elif layers == "all":
        layers = (*range(network.depth), *network.named_layers())
    by_index = {network.resolve(layer): layer for layer in layers}
    return tuple(by_index[index] for index in sorted(by_index))


class AnalysisModule(pl.LightningModule):
    """Runs networks on images and measures their layers.

    Args:
        networks: The networks by name.
        image_format: How the images arrive; each network gets them in its own size and normalisation.
        layers: See `chosen_layers`.
        options: What to measure.
        memory: Gigabytes that a process may keep of tokens, so that one pass is enough.

    Raises:
        ValueError: If a layer or an option does not exist.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        image_format: ImageFormat,
        layers: Sequence[Layer] | str | None,
        options: Options,
        memory: float,
    ) -> None:
        super().__init__()
        options.check()
        self.networks = {name: FrozenTeacher(network, image_format) for name, network in networks.items()}
        self.layers = {name: chosen_layers(network, layers) for name, network in networks.items()}
        self.geometries: dict[str, list[LayerGeometry]] = {}
        self.bytes_an_image = 0
        for name, network in networks.items():
            shapes = network.output_shapes(self.layers[name], logits=False).features
            self.geometries[name] = [LayerGeometry(width, options) for width, _, _ in shapes]
            self.bytes_an_image += sum(4 * width * height * across for width, height, across in shapes)
        self.order = CatMetric()
        self.parts = nn.ModuleList([self.order, *(part for parts in self.geometries.values() for part in parts)])
        self.memory = memory
        self.keep = False
        self.passes = 0

    def on_test_start(self) -> None:
        """Decides, for all ranks alike, whether the tokens can be kept."""
        self.passes += 1
        if self.passes == 1:
            fits = self.bytes_an_image * _images(self.trainer.test_dataloaders) <= self.memory * 1e9
            self.keep = self.trainer.strategy.reduce_boolean_decision(fits, all=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measures one batch: a `Batch`, a tensor of images, or a tuple that starts with one."""
        image = batch if isinstance(batch, Tensor) else batch[0]
        for name, network in self.networks.items():
            features = network(image, self.layers[name], logits=False).features
            with torch.autocast(self.device.type, enabled=False):
                for feature, geometry in zip(features, self.geometries[name], strict=True):
                    geometry.update(as_tokens(feature), self.keep)
        if self.passes == 1:
            rank = 1e6 * batch_idx + 1e3 * self.global_rank
            numbers = batch.index if isinstance(batch, Batch) else rank + torch.arange(len(image), device=self.device)
            self.order.update(numbers.double())

    def on_test_epoch_end(self) -> None:
        """Finds the shared axes at the end of the first pass."""
        if self.passes == 1:
            for geometry in (part for parts in self.geometries.values() for part in parts):
                geometry.find_axes()

    def reports(self) -> list[NetworkReport]:
        """Returns what was measured; on every rank the same."""
        order = torch.as_tensor(self.order.compute()).reshape(-1).cpu().argsort()
        reports = []
        for name, teacher in self.networks.items():
            network, parts = teacher.network, zip(self.layers[name], self.geometries[name], strict=True)
            named = [(str(layer) if isinstance(layer, str) else None, network.resolve(layer), g) for layer, g in parts]
            layers = [geometry.report(label or str(index), index, order) for label, index, geometry in named]
            reports.append(describe_network(name, network, layers))
        return reports


def describe_network(name: str, network: Network, layers: list[LayerReport]) -> NetworkReport:
    """Returns a network's report: which it was, what it costs, and what was measured."""
    arch = getattr(network, "init_args", {}).get("arch") or type(getattr(network, "model", network)).__name__
    return NetworkReport(
        name,
        f"{type(network).__name__} {arch}",
        parameter_count(network),
        forward_flops(network),
        weights_sha256(network),
        network.image_format,
        network.depth,
        layers,
    )


def analyze(
    networks: nn.Module | Mapping[str, nn.Module],
    images: Iterable[Any] | pl.LightningDataModule,
    layers: Sequence[Layer] | str | None = None,
    options: Options | None = None,
    image_format: ImageFormat | None = None,
    data: str = "",
    trainer: pl.Trainer | None = None,
    memory: float = 4.0,
) -> Report:
    """Measures per-image rank, shared axes, channel spectra and participation of networks on the same images.

    Args:
        networks: A network, or several by name, such as ``{"teacher": ..., "student": ...}``; timm models are wrapped.
        images: Batches: `Batch`, tensors of images ``[B, 3, H, W]``, or tuples that start with one; or a data module
            with such a test loader. Under several processes, each rank's own share.
        layers: Indices, fractions of the depth, or names; "all"; by default the last layer, and the map of a remedy.
        options: What to measure.
        image_format: How the images arrive; by default as the first network wants them.
        data: A name for the images, for the report.
        trainer: Where to run: devices, precision. By default one process, on the GPU if there is one.
        memory: Gigabytes that a process may keep of tokens. The energy in the axes that all images share needs all
            images again once the axes are known; with less, they pass through the networks a second time.

    Raises:
        ValueError: If a layer or an option does not exist, there is no image, or tokens are not finite or zero.
        TypeError: If a network is none.
    """
    options = options or Options()
    named = networks if isinstance(networks, Mapping) else {type(networks).__name__: networks}
    wrapped = {name: as_network(network) for name, network in named.items()}
    image_format = image_format or next(iter(wrapped.values())).image_format
    module = AnalysisModule(wrapped, image_format, layers, options, memory)
    trainer = trainer or analysis_trainer()
    datamodule = images if isinstance(images, pl.LightningDataModule) else None
    loader = images if datamodule is None else None
    trainer.test(module, loader, verbose=False, datamodule=datamodule)
    if not module.keep:
        trainer.test(module, loader, verbose=False, datamodule=datamodule)
    if not module.order.value:
        raise ValueError("There is no image to analyse.")
    reports = module.reports()
    count = reports[0].layers[0].images
    if count < FEW_IMAGES:
        rank_zero_warn(
            f"{count} images are few: the shared axes of so few hold less than those of the data set, and the 99th "
            f"percentile is nearly the maximum. The paper has 1,000."
        )
    return Report(reports, count, data, options, module.passes)


def analysis_trainer(**given: Any) -> pl.Trainer:
    """Returns a Trainer that logs and saves nothing; on the GPU if there is one (Apple's has no float64)."""
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    defaults = {"accelerator": accelerator, "devices": 1, "callbacks": [AnalysisProgress()]}
    return pl.Trainer(**{**defaults, **given, **quiet, "use_distributed_sampler": False})


def _images(dataloader: Any) -> float:
    """Returns how many images a loader has; infinitely many if it does not say."""
    try:
        return float(len(dataloader.dataset))
    except (AttributeError, TypeError):
        return float("inf")
