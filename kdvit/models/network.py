"""A network as kdvit sees it: an image in, logits and chosen feature maps out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.transforms import Grayscale

from kdvit.models.freezing import frozen_modules
from kdvit.models.one_token import POOLED, WAYS_OUT
from kdvit.models.own import plain_arguments
from kdvit.structures import ImageFormat, Layer, OutputShapes, ViTOutput

if TYPE_CHECKING:
    from typing_extensions import Self


class Network(nn.Module):
    """What kdvit needs of a student or teacher. Subclass it to bring a network that timm does not have.

    `kdvit.testing.check_network` checks all that is promised here, in one call. Once trained, one is built again of its
    class path and the arguments of its constructor, which therefore are plain: numbers, text, lists, mappings, None.
    ``kdvit fit`` tries that before its first step. `kdvit.models.ModuleNetwork` wraps a plain `torch.nn.Module`.

    Attributes:
        depth: Number of layers whose output can be asked for.
        image_format: Input size and normalisation that the network was made for.
        init_args: The arguments of the constructor as plain values, None where they are not plain: what a trained one
            is built again from. A class that begins with a file of weights sets that argument to None here.
        spec: What a loaded network's file says of it, in plain types.

    Examples:
        A network of one's own, usable in YAML by its class path::

            class MyNet(Network):
                def __init__(self, width: int = 8) -> None:
                    super().__init__(depth=1, image_format=ImageFormat((32, 32), (0.5,) * 3, (0.5,) * 3))
                    self.stem, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 10)

                def forward(self, image, layers=(), logits=True):
                    feature = self.stem(image)
                    return ViTOutput(self.head(feature.mean((2, 3))) if logits else None, (feature,) * len(layers))
    """

    init_args: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keeps the arguments of the constructor."""
        network = super().__new__(cls)
        network.init_args = plain_arguments(cls, args, kwargs)
        return network

    def __init__(self, depth: int, image_format: ImageFormat) -> None:
        super().__init__()
        self.depth = depth
        self.image_format = image_format
        self.spec: dict[str, Any] = {}

    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> ViTOutput:
        """Runs the network.

        Args:
            image: ``[B, 3, H, W]``, or ``[B, 1, H, W]`` where the `image_format` is of grey images.
            layers: Layers whose output is wanted.
            logits: Whether logits are wanted.

        Returns:
            Logits ``[B, K]``, None where they are not wanted or the network has no head, and one map ``[B, C, H, W]``
            (patch tokens only, before any final norm) for each of `layers`, in their order; ``[B, C, 1, 1]`` for those
            of `token_layers`.
        """
        raise NotImplementedError(f"{type(self).__name__} must override forward(image, layers, logits).")

    def end_layer(self) -> Layer:
        """Returns the last layer that there is to ask of a network without a head: "pooled", or its last block."""
        return POOLED if POOLED in self.token_layers() else self.depth - 1

    def deployed(self, image: Tensor) -> Tensor:
        """Returns what the network is used for: its logits ``[B, K]``; without a head its pooled features ``[B, C]``.

        Raises:
            ValueError: If it has neither.
        """
        logits: Tensor | None = self(image).logits
        if logits is None:
            pooled: Tensor = self(image, (POOLED,), logits=False).features[0]
            return pooled.flatten(1)
        return logits

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides biases and norms."""
        return set()

    def named_layers(self) -> dict[str, int]:
        """Maps that have a name of their own, with their index: what a remedy is distilled at."""
        return {}

    def token_layers(self) -> dict[str, int]:
        """Layers of one token an image, with their index, which is beyond `depth`; see `kdvit.models.one_token`."""
        return {}

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the logits, where a loaded network's file has them."""
        return self.spec.get("class_names")

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The evaluation transform of `image_format`: makes a tensor ``[C, H, W]`` of an RGB or grey image."""
        return eval_transform(self.image_format)

    def blank_image(self) -> Tensor:
        """Returns one image ``[1, C, H, W]`` of the network's own size, on its device and in its precision."""
        weight = next(self.parameters())
        shape = 1, len(self.image_format.mean), *self.image_format.size
        return torch.zeros(shape, device=weight.device, dtype=weight.dtype)

    def train(self, mode: bool = True) -> Self:
        """Sets training or eval; what has only frozen parameters is always in eval (`kdvit.models.freezing`)."""
        super().train(mode)
        for module in frozen_modules(self) if mode else ():
            module.train(False)
        return self

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts every module in eval inside, and leaves each in the mode it was in."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    def resolve(self, layer: Layer) -> int:
        """Returns the index of a layer named by index, negative index, fraction of the depth, or name.

        Raises:
            ValueError: If there is no such layer.

        Examples:
            >>> network = Network(depth=12, image_format=None)
            >>> [network.resolve(layer) for layer in (0, -1, 0.5, 1.0)]
            [0, 11, 5, 11]
        """
        named = {**self.named_layers(), **self.token_layers()}
        if isinstance(layer, str):
            if layer in named:
                return named[layer]
            if layer in WAYS_OUT:
                raise ValueError(f"{type(self).__name__} has no layer {layer!r}: {WAYS_OUT[layer]}")
        elif isinstance(layer, float):
            if 0 < layer <= 1:
                return max(math.ceil(round(layer * self.depth, 6)) - 1, 0)
        elif -self.depth <= layer < self.depth:
            return layer % self.depth
        names = "".join(f", {name!r}" for name in named)
        raise ValueError(
            f"{type(self).__name__} has no layer {layer!r}. Its layers: 0 to {self.depth - 1} (or -{self.depth} to "
            f"-1), a fraction of the depth in (0, 1]{names}. (The layer 'lift' comes with LiftViT, "
            "unless it is folded, and 'wide_last' with WideLastViT.)"
        )

    def canonical(self, layer: Layer) -> Layer:
        """Returns the one name of a layer that tells it from all others: its index, or behind the blocks its name.

        Raises:
            ValueError: If there is no such layer.
        """
        index = self.resolve(layer)
        return index if index < self.depth else layer

    @torch.no_grad()
    def output_shapes(self, layers: Sequence[Layer] = (), logits: bool = True) -> OutputShapes:
        """Measures the shapes of `forward` on one blank image of the network's own size.

        Raises:
            ValueError: If a layer does not exist, or the network does not take images of that size.
        """
        for layer in layers:
            self.resolve(layer)
        try:
            with self.evaluating():
                output = self(self.blank_image(), layers, logits)
        except (RuntimeError, AssertionError) as error:
            shape = " x ".join(map(str, self.blank_image().shape[1:]))
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{network_name(self)} does not take images of {shape} (channels, height, width). Set img_size, or "
                f"in_chans, of the network or of the data so that they agree. ({said})"
            ) from error
        classes = None if output.logits is None else output.logits.shape[1]
        shapes = tuple((int(f.shape[1]), int(f.shape[2]), int(f.shape[3])) for f in output.features)
        return OutputShapes(classes, shapes)


def network_name(network: Network) -> str:
    """Returns a network's class, and its architecture where it has one."""
    arch = (network.init_args or {}).get("arch") or type(getattr(network, "model", network)).__name__
    return f"{type(network).__name__} {arch}"


def eval_transform(images: ImageFormat) -> Callable[[Image.Image], Tensor]:
    """Returns resize of the shorter side to ``size / crop_pct``, centre crop and normalisation.

    Of grey images it takes colour images, too, and makes them grey.
    """
    size, mean, std, crop_pct, interpolation = images
    transform: Any = create_transform(
        (len(mean), *size), is_training=False, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation
    )
    if len(mean) == 1:
        transform.transforms.insert(0, Grayscale())
    return transform  # type: ignore[no-any-return]


def fit_to_data(network: Network, image_format: ImageFormat, class_names: Sequence[str] | None = None) -> int:
    """Sets the images that a network will see, and returns its number of classes, 0 without a head.

    Args:
        network: The network.
        image_format: The images of the data.
        class_names: The classes of the data, where known.

    Raises:
        ValueError: If the network takes other images only, or its classes are not those of the data, or fewer than two.
    """
    model: Any = getattr(network, "model", network)
    fixed = getattr(getattr(model, "patch_embed", None), "strict_img_size", False)
    if fixed and network.image_format.size != image_format.size:
        raise ValueError(
            f"The student takes images of {network.image_format.size} pixels and the data gives {image_format.size}. "
            "Set img_size of the student, or of the data, so that they agree."
        )
    ours, theirs = network.image_format[1:3], image_format[1:3]
    if getattr(network, "states_values", False) and ours != theirs:
        raise ValueError(
            f"The student states mean and std {ours}, and the data gives {theirs}. Leave them out of the student: it "
            "learns of the images as the data gives them."
        )
    network.image_format = image_format
    classes = network.output_shapes().classes
    if classes is None:
        return 0
    known = classes if class_names is None else len(class_names)
    if min(classes, known) < 2:
        raise ValueError(f"Expected 2 classes or more, got {classes} of the student and {known} of the data.")
    if known != classes:
        raise ValueError(
            f"The student has {classes} classes and the data {known}. Set num_classes of the student to {known}."
        )
    return classes
