"""The tuples that cross rooms: what the data yields, what a network is fed and what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Layer = int | float | str
"""A layer as a user names it: a block index (``-1`` is the last), a fraction of the depth (``0.5``), or a name."""


def at_least_float32(x: Tensor, beside: torch.dtype = torch.float32) -> Tensor:
    """Returns half precision as float32 and anything better as it is; as float64, if `beside` is that."""
    return x.to(torch.promote_types(torch.promote_types(x.dtype, torch.float32), beside))


def subclasses(cls: type[T]) -> dict[str, type[T]]:
    """Returns the imported subclasses of a class that can be built, at any depth, by name."""
    found: dict[str, type[T]] = {}
    for each in cls.__subclasses__():
        found |= {**({} if inspect.isabstract(each) else {each.__name__: each}), **subclasses(each)}
    return found


class View(NamedTuple):
    """One augmented view of one image.

    Attributes:
        image: Position of the image in its data set.
        epoch: The epoch that asks for it; with a cache, the cached view.
        repeat: Which of the epoch's repeats it is.
    """

    image: int
    epoch: int = 0
    repeat: int = 0

    @classmethod
    def of(cls, index: View | int) -> View:
        """Returns a view as it is, and for a number the first view of that image, for samplers that are not ours."""
        return index if isinstance(index, View) else cls(index)


class ViTOutput(NamedTuple):
    """What a network returns.

    Attributes:
        logits: ``[B, K]``, or None where nobody asked for them, or the network has no head.
        features: One map ``[B, C, H, W]`` for each layer asked for, in the order of the asking. (A tuple and not a
            dict: as keys ``1`` and ``1.0`` are the same, and ``-1`` and ``11`` are one block under two names.)
    """

    logits: Tensor | None
    features: tuple[Tensor, ...] = ()

    def at_least_float32(self, beside: torch.dtype = torch.float32) -> ViTOutput:
        """Returns the output in float32, in which losses are computed, or better; in float64, if `beside` is that."""
        logits = None if self.logits is None else at_least_float32(self.logits, beside)
        return ViTOutput(logits, tuple(at_least_float32(feature, beside) for feature in self.features))


class Rectangle(NamedTuple):
    """A rectangle of an image that random erasing has filled.

    Attributes:
        image: Which of the batch.
        top: Its first row.
        left: Its first column.
        height: Its rows.
        width: Its columns.
        values: How many values fill it: one a channel, or one a channel and pixel.
    """

    image: int
    top: int
    left: int
    height: int
    width: int
    values: int


class Pixels(NamedTuple):
    """What makes normalised images of uint8 pixels ``[B, H, W, C]``: all draws are made, and arithmetic is left.

    Attributes:
        mean: ``[C]``, float32.
        std: ``[C]``, float32.
        erased: The rectangles that are filled after normalisation.
        values: With what, one after another, ``[n]``, float32.
    """

    mean: Tensor
    std: Tensor
    erased: tuple[Rectangle, ...]
    values: Tensor

    @classmethod
    def of_batch(cls, images: Sequence[Pixels]) -> Pixels:
        """Returns what makes a batch of what makes each image."""
        erased = [each._replace(image=i) for i, image in enumerate(images) for each in image.erased]
        return cls(*images[0][:2], tuple(erased), torch.cat([image.values for image in images]))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Returns images ``[B, C, H, W]``, by the operations of torchvision's ToTensor and Normalize in their order.

        They are computed in float32 and have the type of the mean, which a true precision such as bf16-true has cast.
        """
        mean, std = (each.to(torch.float32).view(-1, 1, 1) for each in self[:2])
        image = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        image.div_(torch.full_like(mean, 255))  # by a number, CUDA would multiply with its reciprocal
        image.sub_(mean).div_(std)
        filled = torch.split(self.values.to(torch.float32), [each.values for each in self.erased])
        for (number, top, left, height, width, _), values in zip(self.erased, filled, strict=True):
            one = len(values) == image.shape[1]
            shape = (-1, 1, 1) if one else (-1, height, width)
            image[number, :, top : top + height, left : left + width] = values.view(shape)
        return image.to(self.mean.dtype)


class Batch(NamedTuple):
    """What every data module yields.

    Attributes:
        image: Normalised images, ``[B, C, H, W]`` with the channels of the `ImageFormat`, float32; uint8 pixels
            ``[B, H, W, C]`` on their way to a GPU.
        target: Class indices ``[B]``, int64, -1 where the images have no labels; class probabilities ``[B, K]`` once
            Mixup or CutMix has run.
        index: Position of each image in its data set, ``[B]``, int64.
        teacher: What the distillers want of the teacher, where a cache has it; else None.
        bad: Of each image that could not be read and in whose place another came, what is wrong with it.
        pixels: How pixels become images, which `as_batch` does; None where they are.
    """

    image: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is of no use here
    teacher: ViTOutput | None = None
    bad: tuple[str, ...] = ()
    pixels: Pixels | None = None


ONE_CLASS = (
    "kdvit trains classifiers of one class an image: several labels an image (multi-hot) and numbers to regress have "
    "no loss here. Give the index of one class. (Images without labels: labels: false, or class_names of ().)"
)


class BatchError(TypeError):
    """A batch that is none."""


IMAGES, TARGETS = ("image", "img", "pixel_values"), ("target", "label", "labels")
"""What others call image and target in a mapping."""


def image_and_target(item: Any) -> tuple[Any, Any] | None:
    """Returns the parts of a pair (what stands behind is left out), or of a mapping, whose target may lack.

    Examples:
        >>> image_and_target({"image": 1, "label": 2}), image_and_target([1, 2, 3]), image_and_target(1)
        ((1, 2), (1, 2), None)
    """
    if isinstance(item, Mapping):
        image, target = (next((item[key] for key in keys if key in item), None) for keys in (IMAGES, TARGETS))
        return None if image is None else (image, target)
    return (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else None


def as_batch(batch: Any) -> Batch:
    """Returns a batch of any data module as a Batch of images, its target or index -1 where it has none.

    Raises:
        BatchError: If it is neither a Batch nor a pair or mapping of images and targets.
    """
    if isinstance(batch, Batch):
        return batch if batch.pixels is None else batch._replace(image=batch.pixels.normalise(batch.image), pixels=None)
    image, target = image_and_target(batch) or (None, None)
    if not (isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 4):
        parts = (
            batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, list | tuple) else ()
        )
        told = ", ".join(
            f"{key}: {getattr(each, 'dtype', type(each).__name__)} {list(getattr(each, 'shape', ()))}"
            for key, each in parts
        )
        raise BatchError(
            f"Expected a kdvit.Batch, a pair (image, target) or a mapping of these, with normalised float images "
            f"[B, C, H, W]; got {type(batch).__name__} ({told})."
        )
    unknown = torch.full((len(image),), -1, device=image.device)
    return Batch(image, unknown if target is None else torch.as_tensor(target, device=image.device), unknown)


class OutputShapes(NamedTuple):
    """The shapes behind a `ViTOutput`, known before training.

    Attributes:
        classes: Number of classes K, or None where no logits were asked for, or the network has no head.
        features: ``(C, H, W)`` for each layer asked for.
        class_names: Names of the classes in the order of the logits, where known.
    """

    classes: int | None
    features: tuple[tuple[int, int, int], ...] = ()
    class_names: tuple[str, ...] | None = None


class FixedTarget(NamedTuple):
    """What a distiller makes of a teacher's map, always the same and whatever the student gives: a narrower map.

    Attributes:
        name: All that it follows from besides the teacher and the images, in words; caches are compared by it.
        width: Its channels.
    """

    name: str
    width: int


class TeacherMap(NamedTuple):
    """A map of the teacher as a run wants it, and as a cache stores it.

    Attributes:
        layer: A block by its index, a layer behind the blocks by its name.
        target: What is made of its output; None where that itself is wanted.
    """

    layer: Layer
    target: FixedTarget | None = None

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.target is None else f"layer {self.layer} ({self.target.name})"


class SharedBasis(NamedTuple):
    """The principal axes of all tokens of a data set.

    Attributes:
        spectrum: Eigenvalues of the tokens' second moment, descending, ``[D]``.
        axes: The eigenvectors as columns, ``[D, D]``.
        mean: What is subtracted of a token before, ``[D]``: zero, or the mean token where the analysis is centred.
    """

    spectrum: Tensor
    axes: Tensor
    mean: Tensor


class ImageFormat(NamedTuple):
    """How images reach a network.

    Attributes:
        size: Height and width in pixels.
        mean: Mean of each channel that was subtracted, for pixel values in 0..1; one of grey images, else three.
        std: Standard deviation of each channel that was divided by, for pixel values in 0..1.
        crop_pct: The centre crop of the evaluation, as a share of the resized shorter side.
        interpolation: Of the resizing.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"

    def to_json(self) -> dict[str, Any]:
        """Returns plain types, of which `from_json` makes the same again."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> ImageFormat:
        """Returns the format that `to_json` wrote."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        return cls(**fields)
