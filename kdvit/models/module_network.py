"""Any `torch.nn.Module` as a network: torchvision's, Hugging Face's, or one's own, named by its import path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.errors import nearest, own_errors
from kdvit.models.layouts import read_weights, under_prefix
from kdvit.models.network import Network
from kdvit.models.own import built, class_path
from kdvit.models.timm_model import WEIGHTS
from kdvit.structures import ImageFormat, Layer, ViTOutput

OUTPUT, POOLED = "output", "pooled"


class ModuleNetwork(Network):
    """A network of any other package, wrapped by what a config says of it.

    `module` is built from `args`; what the modules in `layers` return are its feature maps, read by forward hooks:
    maps ``[B, C, H, W]`` as they are, tokens ``[B, N, C]`` without their prefix as a grid of the image's shape.

    Args:
        module: Import path of a class of `torch.nn.Module`, or of a function that returns one, such as
            torchvision.models.resnet18, or transformers.AutoModelForImageClassification.from_pretrained.
        input_size: Input size in pixels, a number or height and width. Of a student, this and the next are the data's.
        mean: Mean of each channel that it expects to be subtracted, for pixels in 0..1.
        std: Standard deviation of each channel that it expects to be divided by, for pixels in 0..1.
        args: Arguments of `module`. A mapping of `class_path` and `init_args` among them is built, such as
            transformers.ViTConfig.
        weights: A file of weights (safetensors or torch's), or an exported folder.
        layers: Paths of modules inside it, from the first to the last; ``blocks.*`` names all blocks in their order.
            Distillers take an index of this list, a fraction of its length, or a path.
        prefix_tokens: Tokens before the patch tokens, such as 1 for a class token, 5 with four registers.
        channels_last: Whether its maps are ``[B, H, W, C]``, as those of torchvision's Swin.
        logits: Where they are in what it returns: "output" is that itself, a name an attribute or key (Hugging Face's
            "logits"), a number a place in a tuple; null for a network without any.
        head: Path of its last linear layer, whose input is offered as the layer "pooled".
        new_head: Whether `head` stays as it was made where `weights` are of other classes.

    Raises:
        UserError: If the module cannot be built or run; its own error is shown.
        ValueError: If a layer is not there or gives no map, weights do not fit, or logits are not where they should be.
        TypeError: If `module` makes no `torch.nn.Module`.
    """

    def __init__(
        self,
        module: str,
        input_size: int | list[int],
        mean: list[float],
        std: list[float],
        args: dict[str, Any] | None = None,
        weights: str | None = None,
        layers: Sequence[str] = (),
        prefix_tokens: int = 0,
        channels_last: bool = False,
        logits: str | int | None = OUTPUT,
        head: str | None = None,
        new_head: bool = False,
    ) -> None:
        size = [input_size] * 2 if isinstance(input_size, int) else input_size
        if (len(size), len(mean), len(std)) != (2, 3, 3):
            raise ValueError(f"{module}: expected a height and width, 3 means and 3 stds, got {size}, {mean}, {std}.")
        model = built({"class_path": module, "init_args": args or {}})
        if not isinstance(model, nn.Module):
            raise TypeError(f"{module} makes a {type(model).__name__}; expected a torch.nn.Module.")
        self.paths = [path for pattern in layers for path in _matching(model, pattern)]
        super().__init__(len(self.paths), ImageFormat((size[0], size[1]), tuple(mean), tuple(std)))
        self.model, self.name, self.where = model, module, logits
        self.head = _matching(model, head)[0] if head else None
        self.prefix_tokens, self.channels_last = prefix_tokens, channels_last
        self.init_args = {**self.init_args, "weights": None, **_source(model, args or {})}
        if weights:
            _load(model, weights, self.head if new_head else None)
        self._require_maps()

    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> ViTOutput:
        """Runs the module once, whole."""
        output, found = self._run(image, [self.resolve(layer) for layer in layers])
        maps = tuple(self._as_map(self.resolve(layer), found, image) for layer in layers)
        return ViTOutput(self._logits(output) if logits and self.where is not None else None, maps)

    def resolve(self, layer: Layer) -> int:
        """Returns the index of a layer in `layers`; that of "pooled" is behind them.

        Raises:
            ValueError: If there is no such layer.
        """
        if layer == POOLED and not self.head:
            raise ValueError(f"{self.name} has no layer {POOLED!r}: name its last linear layer as `head`.")
        if not self.paths and layer not in self.token_layers():
            children = ", ".join(name for name, _ in self.model.named_children())
            raise ValueError(f"{self.name} has no layer {layer!r}: name paths in `layers`. Its modules: {children}.")
        return super().resolve(layer)

    def named_layers(self) -> dict[str, int]:
        """The layers by their paths."""
        return {path: index for index, path in enumerate(self.paths)}

    def token_layers(self) -> dict[str, int]:
        """What the head reads, where `head` is named."""
        return {POOLED: self.depth} if self.head else {}

    def canonical(self, layer: Layer) -> Layer:
        """Returns the path of a layer, as an index may be another layer's with other `layers`."""
        index = self.resolve(layer)
        return self.paths[index] if index < self.depth else POOLED

    def no_weight_decay(self) -> set[str]:
        """What the module says itself, and what has the shape ``[1, N, C]`` of tokens and position embeddings."""
        named: Any = getattr(self.model, "no_weight_decay", set)()
        shaped = [name for name, each in self.model.named_parameters() if each.ndim == 3 and len(each) == 1]
        return {f"model.{name}" for name in (*named, *shaped)}

    def _run(
        self, image: Tensor, indices: Sequence[int], versions: dict[int, int] | None = None
    ) -> tuple[Any, dict[int, Any]]:
        """Returns the module's output, and what the layers returned; of the head what went in."""
        found: dict[int, Any] = {}

        def take(index: int, module: nn.Module, given: tuple[Any, ...], output: Any = None) -> None:
            found[index] = _first(given if index == self.depth else output)
            if versions is not None:
                versions[index] = found[index]._version

        with ExitStack() as hooks:
            for index in {*indices}:
                part = self.model.get_submodule(self.paths[index] if index < self.depth else str(self.head))
                register = part.register_forward_hook if index < self.depth else part.register_forward_pre_hook
                hooks.enter_context(register(partial(take, index)))
            return self.model(image), found

    def _as_map(self, index: int, found: dict[int, Any], image: Tensor) -> Tensor:
        """Returns the map ``[B, C, H, W]`` of what a layer has returned."""
        path = self.paths[index] if index < self.depth else f"the input of {self.head}"
        if index not in found:
            raise ValueError(f"{self.name}: {path} does not run when an image goes through. Name another module.")
        value: Tensor = found[index]
        if index == self.depth and value.ndim == 2:
            return value[:, :, None, None]
        if value.ndim == 4:
            return value.movedim(-1, 1) if self.channels_last else value
        if value.ndim == 3 and index < self.depth:
            tokens, (height, width) = value[:, self.prefix_tokens :].transpose(1, 2), image.shape[-2:]
            count: int = tokens.shape[2]
            grid = [round((count * one / other) ** 0.5) for one, other in ((height, width), (width, height))]
            if grid[0] * grid[1] == count > 0:
                return tokens.reshape(*tokens.shape[:2], *grid)
        raise ValueError(
            f"{self.name}: {path} gives {list(value.shape)}, and {self.prefix_tokens} prefix_tokens: expected maps "
            f"[B, C, H, W], or tokens [B, N, C] that behind their prefix are a grid of images {list(image.shape[2:])}."
        )

    def _logits(self, output: Any) -> Tensor:
        where = self.where
        try:
            value = output if where == OUTPUT else output[where] if isinstance(where, int) else _named(output, where)
        except (IndexError, KeyError, AttributeError, TypeError):
            value = None
        if isinstance(value, Tensor) and value.ndim == 2:
            return value
        has = list(value.shape) if isinstance(value, Tensor) else _contents(output)
        raise ValueError(
            f"{self.name}: logits is {where!r}, and there is no [B, K] there but {has}. Say where they are: 'output', "
            "a name, or a place; null if it has none."
        )

    def _require_maps(self) -> None:
        """Raises ValueError unless a blank image gives all layers, which later modules leave alone, and the logits."""
        indices, image = [*range(self.depth), *self.token_layers().values()], self.blank_image()
        versions: dict[int, int] = {}
        with torch.no_grad(), self.evaluating(), own_errors(self.name):
            output, found = self._run(image, indices, versions)
        for index in indices:
            self._as_map(index, found, image)
            if found[index]._version != versions[index]:
                raise ValueError(
                    f"{self.name}: what {[*self.paths, self.head][index]} returns is changed in place by what comes "
                    "behind it. Name that module instead."
                )
        if self.where is not None:
            self._logits(output)


def _source(model: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Returns the `module` and `args` by which a trained network is built again, without folders and downloads.

    Of Hugging Face these are its class and its config; of torchvision, all but `weights`.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):
        described = {"class_path": class_path(type(config)), "init_args": config.to_diff_dict()}
        return {"module": class_path(type(model)), "args": {"config": described}}
    of_torchvision = type(model).__module__.startswith("torchvision.")
    return {"args": {name: value for name, value in args.items() if name != "weights" or not of_torchvision}}


def _matching(model: nn.Module, pattern: str) -> list[str]:
    """Returns the paths of a model's modules that a pattern names, in their order; ``*`` is one step of a path."""
    names = [name for name, _ in model.named_modules()][1:]
    found = [name for name in names if fnmatchcase(name, pattern) and name.count(".") == pattern.count(".")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module {pattern!r}.{nearest(pattern, names)}")
    return found


def _first(value: Any) -> Any:
    """Returns the first of several outputs."""
    while not isinstance(value, Tensor) and isinstance(value, (tuple, list, Mapping)) and value:
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value


def _load(model: nn.Module, file: str, new_head: str | None) -> None:
    path = Path(file) / WEIGHTS if Path(file).is_dir() else Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of weights {str(path.absolute())!r}.")
    own = model.state_dict()
    try:
        weights = under_prefix(read_weights(path), own)[1]
        heads = [name for name in own if new_head and name.startswith(f"{new_head}.")]
        other = {name: own[name] for name in heads if name not in weights or weights[name].shape != own[name].shape}
        model.load_state_dict({**weights, **other})
    except Exception as error:  # damaged bytes can lead a reader anywhere
        raise ValueError(f"{file!r} does not fit {type(model).__name__}: {error}") from error


def _named(output: Any, name: Any) -> Any:
    return output[name] if isinstance(output, Mapping) else getattr(output, name)


def _contents(output: Any) -> str:
    """Says what a module's output has, by names or places."""
    parts = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, tuple) else ()
    shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in parts if isinstance(each, Tensor))
    return f"{type(output).__name__} of {shapes}" if shapes else type(output).__name__
