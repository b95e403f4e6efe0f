"""Images through networks, once, and every analysis of their layers on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.aggregation import CatMetric

from kdvit.analysis.geometry import LayerGeometry
from kdvit.analysis.layer_report import LayerReport, Options
from kdvit.analysis.report import NetworkReport, Report
from kdvit.analysis.tokens import as_tokens
from kdvit.models import FrozenTeacher, Network, as_network
from kdvit.models.checkpoint import weights_sha256
from kdvit.models.cost import forward_cost, parameter_count
from kdvit.models.network import network_name
from kdvit.structures import Batch, ImageFormat, Layer, as_batch

FEW_IMAGES = 100


class AnalysisProgress(TQDMProgressBar):
    """Lightning's progress bar, under the name of what goes on."""

    @property
    def test_description(self) -> str:
        """What the bar says."""
        return "Analysing"


def chosen_layers(
    network: Network, layers: Sequence[Layer] | str | None, compared: Layer | None = None
) -> tuple[Layer, ...]:
    """Returns the layers to analyse, in the order of the depth, each once.

    The last one and the map of a remedy are always among them: it is they that face another network.

    Args:
        network: The network.
        layers: More layers as a user names them; "all"; None for no more.
        compared: One more.

    Raises:
        ValueError: If a layer does not exist, or has one token an image.
    """
    more: Sequence[Layer] = range(network.depth) if layers == "all" else layers or ()
    if alone := [layer for layer in more if layer in network.token_layers()]:
        raise ValueError(
            f"The layer {alone[0]!r} has one token an image, whose rank is 1 whatever the network: an analysis would "
            "say nothing. Name blocks. (For the axes that such tokens of many images share: kdvit.analysis.DatasetPCA.)"
        )
    by_index: dict[int, Layer] = {}
    for layer in (*network.named_layers(), *more, -1, *([] if compared is None else [compared])):
        by_index.setdefault(network.resolve(layer), layer)
    return tuple(by_index[index] for index in sorted(by_index))


class Measured(NamedTuple):
    """A network and what is measured of it.

    Attributes:
        name: Its name.
        holder: The network, which gets images in its own size and normalisation.
        layers: The layers as they are asked for.
        face: Place in them of the one that a feature-map objective compares.
        geometries: One for each.
    """

    name: str
    holder: FrozenTeacher
    layers: tuple[Layer, ...]
    face: int
    geometries: list[LayerGeometry]


class AnalysisModule(pl.LightningModule):
    """Runs networks on images and measures their layers.

    Args:
        networks: The networks by name.
        image_format: How the images arrive; each network gets them in its own size and normalisation.
        layers: See `chosen_layers`. A name that only some of the networks have is one for those.
        options: What to measure.
        memory: See `analyze`.
        compared: See `analyze`.

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
        compared: Mapping[str, Layer],
    ) -> None:
        super().__init__()
        options.check()
        names = {name for network in networks.values() for name in network.named_layers()}
        self.measured: list[Measured] = []
        self.token_bytes = self.curve_bytes = 0  # an image
        for name, network in networks.items():
            others = names - set(network.named_layers())
            own = layers if isinstance(layers, str) or layers is None else [x for x in layers if x not in others]
            chosen = chosen_layers(network, own, compared.get(name))
            shapes = network.output_shapes(chosen, logits=False).features
            face = [network.resolve(x) for x in chosen].index(network.resolve(compared.get(name, chosen[-1])))
            geometries = [LayerGeometry(width, options, i == face) for i, (width, _, _) in enumerate(shapes)]
            self.measured.append(Measured(name, FrozenTeacher(network, image_format, name), chosen, face, geometries))
            for (width, height, across), geometry in zip(shapes, geometries, strict=True):
                self.token_bytes += 4 * width * height * across
                self.curve_bytes += geometry.curve_bytes(height * across)
        self.orders = [CatMetric(), CatMetric()]
        self.parts = nn.ModuleList([*self.orders, *(part for each in self.measured for part in each.geometries)])
        self.memory, self.options = memory, options
        self.keep = False
        self.passes = self.seen = 0
        self.reports: dict[str, list[LayerReport]] = {}

    def on_test_start(self) -> None:
        """Decides, for all ranks alike, whether the tokens can be kept."""
        self.passes += 1
        self.seen = 0
        if self.passes == 1:
            images, allowed = _images(self.trainer.test_dataloaders), self.memory * 1e9
            fits = (self.curve_bytes + self.token_bytes) * images <= allowed
            self.keep = self.trainer.strategy.reduce_boolean_decision(fits, all=True)
            if self.options.subspaces and not self.keep:
                raise ValueError(
                    f"subspaces needs the tokens of all images, and they do not fit into memory: {self.memory:g} GB a "
                    "process. Allow more, take fewer images, or leave out subspaces."
                )
            if isfinite(images) and self.curve_bytes * images > allowed > 0:
                rank_zero_warn(
                    f"The curves of {images:,.0f} images take {self.curve_bytes * images / 1e9:.2g} GB a process, and "
                    f"are kept in any case; memory is {self.memory:g}. Take fewer images or layers if that is too much."
                )

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measures one batch: a `Batch`, a tensor of images, a tuple that starts with one, or a mapping with one."""
        first = batch[0] if isinstance(batch, tuple | list) else batch
        image = first if isinstance(first, Tensor) else as_batch(batch).image
        counted = self.seen + torch.arange(len(image), device=self.device)
        numbers = batch.index if isinstance(batch, Batch) else counted * self.trainer.world_size + self.global_rank
        self.seen += len(image)
        for each in self.measured:
            features = each.holder(image, each.layers, logits=False).features
            with torch.autocast(self.device.type, enabled=False):
                for feature, geometry in zip(features, each.geometries, strict=True):
                    geometry.update(as_tokens(feature), self.keep, numbers)
        self.orders[self.passes - 1].update(numbers.double())

    def on_test_epoch_end(self) -> None:
        """Finds the shared axes at the end of the first pass, and reports at the end of the last."""
        if not self.orders[0].value:
            raise ValueError("There is no image to analyse.")
        if self.passes == 1:
            for geometry in (part for each in self.measured for part in each.geometries):
                geometry.find_axes()
        if self.keep or self.passes == 2:  # here, where the processes can still talk to each other
            first, *second = (self._order(i) for i in range(self.passes))
            for name, holder, layers, _, geometries in self.measured:
                self.reports[name] = []
                for layer, geometry in zip(layers, geometries, strict=True):
                    index = holder.network.resolve(layer)
                    label = layer if isinstance(layer, str) else str(index)
                    self.reports[name].append(geometry.report(label, index, first, *second))

    def _order(self, number: int) -> Tensor:
        return torch.as_tensor(self.orders[number].compute()).reshape(-1).cpu().argsort()


@contextmanager
def left_as_they_were(networks: Iterable[Network]) -> Iterator[None]:
    """Gives networks back in the mode, with the gradients and on the device that they had."""
    before = [
        (network, network.blank_image().device, [p.requires_grad for p in network.parameters()]) for network in networks
    ]
    with ExitStack() as modes:
        for network, _, _ in before:
            modes.enter_context(network.evaluating())
        try:
            yield
        finally:
            for network, device, gradients in before:
                network.to(device)
                for parameter, needed in zip(network.parameters(), gradients, strict=True):
                    parameter.requires_grad_(needed)


class _Batches(IterableDataset[Any]):
    """Batches of any iterable, as one data set. (Lightning takes a list for several loaders.)"""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _loader(images: Iterable[Any]) -> DataLoader[Any]:
    if isinstance(images, DataLoader):
        return images
    if isinstance(images, Iterator):
        raise TypeError(
            f"Expected batches that can be read twice, such as a DataLoader or a list, got a {type(images).__name__}."
        )
    return DataLoader(_Batches(images), batch_size=None)


def analyze(
    networks: nn.Module | Mapping[str, nn.Module],
    images: Iterable[Any] | pl.LightningDataModule,
    layers: Sequence[Layer] | str | None = None,
    options: Options | None = None,
    image_format: ImageFormat | None = None,
    data: str = "",
    trainer: pl.Trainer | None = None,
    memory: float = 4.0,
    compared: Mapping[str, Layer] | None = None,
) -> Report:
    """Measures per-image rank, shared axes, channel spectra and participation of networks on the same images.

    Args:
        networks: A network, or several by name, such as ``{"teacher": ..., "student": ...}``; timm models are wrapped.
            They come back in the mode and on the device that they had.
        images: Batches: `Batch`, tensors of images ``[B, 3, H, W]``, or tuples that start with one; or a data module
            with such a test loader. Under several processes, each rank's own share. Images are told by the index of
            `Batch`, and in other batches by their place: if two passes are needed and the loader shuffles, the batches
            must be of `Batch`.
        layers: Indices, fractions of the depth, or names; "all". The last layer, and the map of a remedy, always are.
        options: What to measure.
        image_format: How the images arrive; by default as the first network wants them.
        data: A name for the images, for the report.
        trainer: Where to run: devices, precision. By default one process, on the GPU if there is one.
        memory: Gigabytes that a process may keep of the images. The energy in the axes that all of them share needs all
            tokens again once the axes are known; if they do not fit, the images pass through the networks a second
            time. The curves of each image and layer, min(N, D) + 1.5 D numbers of 8 bytes, for the compared layer five
            times min(N, D) + D and 0.5 D, are counted, and kept in any case.
        compared: By the name of a network, the layer that a feature-map objective compares, which is measured best and
            advised upon; by default the last one, or the map of a remedy.

    Raises:
        ValueError: If a layer or an option does not exist, a layer has one token an image, there is no image, or
            tokens are not finite or zero, or do not fit into the memory that `Options.subspaces` needs.
        TypeError: If a network is none, or the images can be read only once.
    """
    options = options or Options()
    named = networks if isinstance(networks, Mapping) else {type(networks).__name__: networks}
    wrapped = {name: as_network(network) for name, network in named.items()}
    image_format = image_format or next(iter(wrapped.values())).image_format
    datamodule = images if isinstance(images, pl.LightningDataModule) else None
    loader = None if isinstance(images, pl.LightningDataModule) else _loader(images)
    with left_as_they_were(wrapped.values()):
        module = AnalysisModule(wrapped, image_format, layers, options, memory, compared or {})
        trainer = trainer or analysis_trainer()
        trainer.test(module, loader, verbose=False, datamodule=datamodule)
        if not module.keep:
            trainer.test(module, loader, verbose=False, datamodule=datamodule)
    if not module.reports:
        raise ValueError("There is no image to analyse.")
    reports = [
        NetworkReport(
            name=each.name,
            kind=network_name(wrapped[each.name]),
            parameters=parameter_count(wrapped[each.name]),
            flops=forward_cost(wrapped[each.name]).flops,
            weights_sha256=weights_sha256(wrapped[each.name]),
            image_format=wrapped[each.name].image_format,
            depth=wrapped[each.name].depth,
            layers=module.reports[each.name],
            compared=each.face,
            data=data,
            passes=module.passes,
            precision=str(trainer.precision),
        )
        for each in module.measured
    ]
    count = reports[0].face.images
    if count < FEW_IMAGES:
        rank_zero_warn(
            f"{count} images are few: the shared axes of so few hold less than those of the data set, and the 99th "
            f"percentile is nearly the maximum. The paper has 1,000."
        )
    return Report(reports, options)


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
