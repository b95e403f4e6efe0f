"""timm's models as networks: any that has `forward_intermediates`, and the students made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import resolve_model_data_config
from torch import Tensor, nn

from kdvit.models.network import Network
from kdvit.models.one_token import DISTILLATION_LOGITS, NAMES, has_head, offered, one_token_map
from kdvit.models.timm_model import create_timm_model, without_folder
from kdvit.structures import ImageFormat, Layer, OutputShapes, ViTOutput


class TimmNetwork(Network):
    """Any timm model that has `forward_intermediates`.

    Args:
        model: The timm model.
        image_format: Input size and normalisation; by default what the model's own configuration says.

    Raises:
        TypeError: If the model has no `forward_intermediates`.
    """

    def __init__(self, model: nn.Module, image_format: ImageFormat | None = None) -> None:
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "forward_head"):
            raise TypeError(
                f"{type(model).__name__} has no forward_intermediates() and forward_head(), by which kdvit reads "
                "feature maps and logits. Use another timm model, or wrap yours in a subclass of kdvit.models.Network."
            )
        info: Any = model.feature_info
        super().__init__(len(info), image_format or image_format_of(model))
        self.model = model

    def output_shapes(self, layers: Sequence[Layer] = (), logits: bool = True) -> OutputShapes:
        """Measures the shapes of `forward` on one blank image of the network's own size.

        Raises:
            ValueError: If a layer does not exist, or has no whole map in training.
        """
        dropped: float = getattr(getattr(self.model, "patch_drop", None), "prob", 0.0)
        if layers and dropped > 0:
            raise ValueError("patch_drop_rate leaves no whole map of a layer in training: set it to 0.")
        return super().output_shapes(layers, logits)

    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> ViTOutput:
        """Runs the model once; without `logits` only up to the last block that is needed.

        A model without a head (`num_classes: 0`) has none: its features are never taken for them.
        A student with two heads predicts by the mean of both. In training, where "distillation_logits" are asked for,
        its `logits` are those of the class head alone, so that each head learns from its own labels (as timm's
        `distilled_training`).
        """
        wanted = [self.resolve(layer) for layer in layers]
        blocks = sorted({index for index in wanted if index < self.depth})
        model: Any = self.model
        logits = logits and has_head(model)
        needs_end = logits or any(index >= self.depth for index in wanted)
        maps: list[Tensor] = []
        end: Any = None
        if not blocks and needs_end:
            end = model.forward_features(image)
        elif needs_end:
            end, maps = model.forward_intermediates(image, indices=blocks)
        elif blocks:
            maps = model.forward_intermediates(image, indices=blocks, stop_early=True, intermediates_only=True)
        found = dict(zip(blocks, maps, strict=True))
        features = tuple(found[i] if i < self.depth else self._behind_blocks(i, image, end) for i in wanted)
        if not logits:
            return ViTOutput(None, features)
        apart = self.training and self.token_layers().get(DISTILLATION_LOGITS) in wanted
        return ViTOutput(model.head(model.head_drop(end[:, 0])) if apart else model.forward_head(end), features)

    def token_layers(self) -> dict[str, int]:
        """What the model has of "pooled", "class_token" and "distillation_logits"."""
        return {name: self.depth + 1 + NAMES.index(name) for name in offered(self.model)}

    def _behind_blocks(self, index: int, image: Tensor, end: Tensor | None) -> Tensor:
        if index == self.depth:
            return self.end_map(image, end)
        return one_token_map(NAMES[index - self.depth - 1], self.model, end)

    def end_map(self, image: Tensor, end: Tensor | None) -> Tensor:
        """Returns the map ``[B, C, H, W]`` behind the layer with index `depth`, which only some remedies have."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """The names that timm gives for this model."""
        names: Any = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}


class TimmStudent(TimmNetwork):
    """A student of timm's, trained from scratch unless told otherwise.

    Args:
        arch: timm's model name, as in `timm.list_models()`.
        num_classes: Number of classes; 0 for a network without a head, which is trained by distillers alone.
        pretrained: Start from timm's published weights.
        checkpoint: Start from a file of timm's, DeiT's or `kdvit fit`'s, of MAE, DINO, Lightning or Hugging Face (ViT,
            DINOv2, DINOv3), or from an exported folder. A line says what was loaded, what is new and what was left.
        img_size: Input size in pixels, where it differs from the architecture's: a number, or height and width.
            Position embeddings of weights are resized where timm can.
        drop_path_rate: Stochastic depth.
        model_args: More arguments of the timm model, such as `embed_dim`, `depth`, `patch_size`.
        in_chans: Channels of the images; 1 for grey ones.
        mean: Mean of each channel that is subtracted, where the data do not say it.
        std: Standard deviation of each channel that is divided by, where the data do not say it.
        grad_checkpointing: In training, keep the input of each block alone, and compute the rest again in backward. No
            file of a trained student has it.

    Raises:
        ValueError: If timm does not know the architecture or an argument, or cannot compute activations again.
        FileNotFoundError: If the checkpoint is not there.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int = 1000,
        pretrained: bool = False,
        checkpoint: str | None = None,
        img_size: int | tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
        model_args: dict[str, Any] | None = None,
        in_chans: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        grad_checkpointing: bool = False,
    ) -> None:
        sizes: dict[str, Any] = {"num_classes": num_classes, "img_size": img_size, "drop_path_rate": drop_path_rate}
        args = {"arch": arch, **sizes, "model_args": model_args, **({"in_chans": in_chans} if in_chans else {})}
        model = create_timm_model(**args, pretrained=pretrained, checkpoint=checkpoint)
        super().__init__(model, stated_format(model, img_size, mean, std))
        self.init_args = args | without_folder(arch, self.model, model_args)
        self.states_values = bool(mean or std)
        if grad_checkpointing:
            _checkpoint_gradients(model, arch)


def _checkpoint_gradients(model: Any, arch: str) -> None:
    try:
        model.set_grad_checkpointing()
    except (AttributeError, AssertionError) as error:
        raise ValueError(f"grad_checkpointing: timm cannot compute the activations of {arch} again.") from error


def stated_format(
    model: nn.Module,
    img_size: int | tuple[int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> ImageFormat:
    """Returns the images that a timm model is made for, as far as is stated; the rest is of its own configuration.

    Raises:
        ValueError: If sizes or channels do not fit together.
    """
    images = image_format_of(model)
    channels = getattr(model, "in_chans", None) or len(mean or images.mean)
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(size) != 2:
            raise ValueError(f"img_size must be a number, or height and width, got {img_size}.")
        images = images._replace(size=(size[0], size[1]))
    values = tuple(mean or images.mean), tuple(std or images.std)
    if channels == 1 and not mean and not std:  # of a student, which takes those of the data
        values = ((sum(values[0]) / len(values[0]),), (sum(values[1]) / len(values[1]),))
    if [len(each) for each in values] != [channels] * 2:
        raise ValueError(
            f"The network takes images of {channels} channel(s), and mean and std have {len(values[0])} and "
            f"{len(values[1])}: give both, a number for each channel."
        )
    return images._replace(mean=values[0], std=values[1])


def as_network(module: nn.Module) -> Network:
    """Returns a Network as it is, and wraps a model that has timm's `forward_intermediates`.

    Raises:
        TypeError: If the module is neither.
    """
    return module if isinstance(module, Network) else TimmNetwork(module)


def image_format_of(model: nn.Module) -> ImageFormat:
    """Returns the images of a timm model's own configuration."""
    config: Any = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    patches = getattr(model, "patch_embed", None)
    exported = getattr(model, "pretrained_cfg", {}).get("source") == "local-dir"
    stated = exported and not getattr(patches, "strict_img_size", True)  # takes any size, was trained at one
    size = (None if stated else getattr(patches, "img_size", None)) or config["input_size"][1:]
    crop = config["crop_pct"], config["interpolation"]
    return ImageFormat(tuple(size), tuple(config["mean"]), tuple(config["std"]), *crop)
