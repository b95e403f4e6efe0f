"""The frozen teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.errors import UserError
from kdvit.models.casting import cast_once
from kdvit.models.checkpoint import known_class_names
from kdvit.models.network import Network
from kdvit.models.talking_heads import use_fast_talking_heads
from kdvit.models.timm_model import create_timm_model
from kdvit.models.timm_network import TimmNetwork, as_network, image_format_of, stated_format
from kdvit.structures import ImageFormat, Layer, OutputShapes, ViTOutput


class TimmTeacher(TimmNetwork):
    """A teacher of timm's with its own head, pretrained unless told otherwise.

    Args:
        arch: timm's model name (a tag after a dot picks the weights), or ``local-dir:FOLDER`` for a network that kdvit
            or timm has exported.
        pretrained: Load timm's published weights. Ignored where `checkpoint` is given.
        checkpoint: Load a local file instead, of timm's, DeiT's, MAE's, DINO's, Lightning's or Hugging Face's (ViT,
            DINOv2, DINOv3). A line says what was loaded and what was left.
        img_size: Input size in pixels, a number or height and width; position embeddings are resized where timm can,
            and a size that the network cannot take is refused.
        model_args: More arguments of the timm model.
        num_classes: Number of classes of `checkpoint`, where it is not the architecture's; published weights come with
            their own head. 0 leaves the head away: the teacher then has features and no logits.
        fast_attention: Compute CaiT's talking heads as `kdvit.models.talking_heads` does: timm's numbers, weights and
            names in less time. Of no effect on other architectures.
        in_chans: Channels of the images; 1 for grey ones.
        mean: Mean of each channel that is subtracted, where it is not that of the published weights.
        std: Standard deviation of each channel that is divided by, likewise.

    Raises:
        ValueError: If the architecture or an argument is unknown, `num_classes` would replace a trained head, or the
            images are not fully stated.
        FileNotFoundError: If the checkpoint or the folder is not there.
    """

    def __init__(
        self,
        arch: str,
        pretrained: bool = True,
        checkpoint: str | None = None,
        img_size: int | tuple[int, int] | None = None,
        model_args: dict[str, Any] | None = None,
        fast_attention: bool = True,
        num_classes: int | None = None,
        in_chans: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        pretrained = pretrained and checkpoint is None
        classes = (model_args or {}).get("num_classes", num_classes)
        if pretrained and classes:
            raise ValueError(
                f"TimmTeacher: num_classes={classes} would replace the trained head of {arch} by a random one. Leave "
                "it out, for a teacher keeps its own classes, or set it to 0 for features without logits."
            )
        args: dict[str, Any] = {"arch": arch, "img_size": img_size, "model_args": model_args}
        args |= {} if num_classes is None else {"num_classes": num_classes}
        args |= {"in_chans": in_chans} if in_chans else {}
        model = create_timm_model(**args, pretrained=pretrained, checkpoint=checkpoint, new_head=False)
        if fast_attention:
            use_fast_talking_heads(model)
        if getattr(model, "in_chans", 3) != len(image_format_of(model).mean) and not (mean and std):
            raise ValueError(
                f"TimmTeacher: mean and std of {arch} are those of colour images, and its images are grey. Give mean "
                "and std that it was trained with, a list of one number each, such as mean: [0.5]."
            )
        super().__init__(model, stated_format(model, img_size, mean, std))
        self.init_args = args
        if names := _class_names(arch, model, pretrained, checkpoint):
            self.spec["class_names"] = names


def _class_names(arch: str, model: Any, pretrained: bool, checkpoint: str | None) -> list[str] | None:
    """Returns the names of a timm model's classes, where known."""
    names = None if checkpoint else model.pretrained_cfg.get("label_names")
    names = names or known_class_names(arch, pretrained, checkpoint)
    return list(names) if names and len(names) == model.num_classes else None


class FrozenTeacher:
    """Holds a network where neither training nor saving can reach it.

    It is no `nn.Module`, so the network is in no `state_dict`, no checkpoint and no `train()` call of the module that
    owns the holder; a deep copy (as EMA callbacks make) is the holder itself. The network is frozen and in eval from
    the start, and follows the device of its input; under autocast, a copy does (`kdvit.models.casting`). Images arrive
    as the student sees them, and are converted to the teacher's own size and normalisation by values fixed here.

    Args:
        network: The teacher.
        image_format: How the images arrive; None if they come as the teacher wants them.
        label: How logs and messages call it.
    """

    def __init__(self, network: Network, image_format: ImageFormat | None = None, label: str = "teacher") -> None:
        self.network, self.label = network.eval().requires_grad_(False), label
        self.image_format = image_format or network.image_format
        self._running, self._place = network, (torch.device("cpu"), torch.float32)
        self._compiling: dict[str, Any] | None = None
        self._shapes: dict[Layer, tuple[int, int, int]] = {}
        self._classes: list[int | None] = []
        theirs, ours = network.image_format, self.image_format
        if len(theirs.mean) < len(ours.mean):
            raise ValueError(
                f"The {label} takes grey images and the data gives colour ones. Take a network of three channels, or "
                "grey data (mean and std of one number)."
            )
        self.converts_size = theirs.size != ours.size
        self.converts_values = (theirs.mean, theirs.std) != (ours.mean, ours.std)
        mean, std = torch.tensor(ours.mean).view(-1, 1, 1), torch.tensor(ours.std).view(-1, 1, 1)
        own_mean, own_std = torch.tensor(theirs.mean).view(-1, 1, 1), torch.tensor(theirs.std).view(-1, 1, 1)
        self._scale, self._shift = std / own_std, (mean - own_mean) / own_std

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self

    @torch.no_grad()
    def __call__(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> ViTOutput:
        """Runs the teacher without gradient.

        Args:
            image: ``[B, C, H, W]`` in the `image_format` of the construction.
            layers: Layers whose output is wanted.
            logits: Whether logits are wanted; without them the teacher stops after the last layer needed.
        """
        output: ViTOutput = self._network_for(image.device)(self.convert(image), layers, logits)
        return output

    def compile(self, **options: Any) -> None:
        """Lets torch.compile translate what runs, with its options."""
        self._compiling = options
        for network in {self.network, self._running}:
            network.compile(**options)

    def convert(self, image: Tensor) -> Tensor:
        """Returns images ``[B, C, H, W]`` in the teacher's own size, values, channels and precision."""
        weight = next(self.network.parameters())
        image = image.to(weight.dtype)
        if self.converts_values:
            image = torch.addcmul(self._shift.to(weight.dtype), image, self._scale.to(weight.dtype))
        if self.converts_size:
            size = list(self.network.image_format.size)
            image = F.interpolate(image, size=size, mode="bicubic", align_corners=False, antialias=True)
        return image

    def class_names(self, ours: Sequence[str] | None) -> Sequence[str] | None:
        """Returns the names of the teacher's classes: its own, or the data's where it names none and has as many.

        Args:
            ours: Names of the data's classes, where known.
        """
        own = self.network.class_names
        return own or (ours if ours and len(ours) == self.output_shapes().classes else None)

    def conversions(self) -> list[str]:
        """Says in what the images are converted."""
        size = f"The {self.label}'s input is resized to {self.network.image_format.size}."
        values = f"The {self.label}'s input is converted to its own mean and standard deviation."
        return [size] * self.converts_size + [values] * self.converts_values

    def output_shapes(self, layers: Sequence[Layer] = (), logits: bool = True) -> OutputShapes:
        """Measures the shapes of the teacher's output, each once; see `Network.output_shapes`."""
        asked = tuple(map(self.network.canonical, layers))
        new = tuple(layer for layer in dict.fromkeys(asked) if layer not in self._shapes)
        if new or (logits and not self._classes):
            classes, shapes, _ = self.network.output_shapes(new, logits)
            self._shapes.update(zip(new, shapes, strict=True))
            self._classes = [classes] if logits else self._classes
        return OutputShapes(self._classes[0] if logits else None, tuple(self._shapes[layer] for layer in asked))

    def _network_for(self, device: torch.device) -> Network:
        """Returns the network on a device; under autocast, the copy whose weights are cast."""
        half = torch.is_autocast_enabled(device.type) and isinstance(self.network, TimmNetwork)
        place = device, torch.get_autocast_dtype(device.type) if half else torch.float32
        if place != self._place:
            self._scale, self._shift, self._place = self._scale.to(device), self._shift.to(device), place
            self._running = (cast_once(self.network, place[1]) if half else self.network).to(device)
            if half and self._compiling is not None:
                self._running.compile(**self._compiling)
        return self._running


def freeze_teachers(
    teacher: nn.Module | None, teachers: Mapping[str, nn.Module] | None, image_format: ImageFormat
) -> dict[str, FrozenTeacher]:
    """Returns the teachers of a run by name, none for a supervised run.

    Args:
        teacher: The only one, whose name is "teacher".
        teachers: Several by name, instead.
        image_format: How the images arrive.

    Raises:
        TypeError: If one is not a network.
        ValueError: If both are given.
    """
    if teacher is not None and teachers:
        raise ValueError(f"Give either teacher or teachers, got both: a teacher, and {', '.join(teachers)}.")
    named = teachers or ({} if teacher is None else {"teacher": teacher})
    labels = {name: "teacher" if len(named) == 1 else f"teacher_{name}" for name in named}
    return {name: FrozenTeacher(as_network(each), image_format, labels[name]) for name, each in named.items()}


def only_teacher(teachers: Mapping[str, FrozenTeacher]) -> FrozenTeacher | None:
    """Returns the teacher of a run that has but one, None for a supervised run.

    Raises:
        UserError: If there are several.
    """
    if len(teachers) > 1:
        raise UserError(
            f"A cache holds the outputs of one teacher, and this run has several: {', '.join(teachers)}. Leave the "
            "cache out, so that they run in training, or distil from one."
        )
    return next(iter(teachers.values()), None)
