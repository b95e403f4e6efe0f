"""What a cache holds and what it was made of, so that no student learns from outputs of something else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdvit.errors import WorkerError
from kdvit.files import write_whole
from kdvit.models import FrozenTeacher, ModuleNetwork
from kdvit.models.checkpoint import weights_sha256
from kdvit.structures import FixedTarget, Layer, TeacherMap, View

FILE = "manifest.json"
FORMAT = 2
"""Layout of the records; since 2 they hold the number of the image that was shown."""
PACKAGES = ("kdvit", "torch", "torchvision", "timm", "Pillow", "numpy")


class CacheError(WorkerError, ValueError):
    """A cache that cannot be written, or does not belong to a run. The command line shows the message alone."""


@dataclass(frozen=True)
class Manifest:
    """The contents and the origin of a cache.

    Attributes:
        images: Number of training images.
        views: Views of an image; epoch e of a training uses view ``e % views``.
        repeats: Repeats of an image in an epoch (repeated augmentation), each a view of its own.
        layers: Teacher layers of which something is stored: blocks by index, those behind them by name.
        shapes: ``(C, H, W)`` of what is stored of each of them.
        classes: Number of classes K, or None where no logits are stored.
        topk: Number of the most probable classes that are stored; None for the logits of all.
        precision: The Trainer's precision at the time of writing.
        origin: What the outputs follow from: teacher, data and library versions, in plain types.
        targets: Of each of `layers`, the name of the `FixedTarget` that is stored; empty where it is the map itself.
    """

    images: int
    views: int
    repeats: int
    layers: tuple[Layer, ...]
    shapes: tuple[tuple[int, int, int], ...]
    classes: int | None
    topk: int | None
    precision: str
    origin: dict[str, Any]
    targets: tuple[str, ...] = ()

    @property
    def maps(self) -> tuple[TeacherMap, ...]:
        """What is stored of the layers."""
        names = self.targets or ("",) * len(self.layers)
        each = zip(self.layers, names, self.shapes, strict=True)
        return tuple(TeacherMap(layer, FixedTarget(name, c) if name else None) for layer, name, (c, _, _) in each)

    @property
    def settings(self) -> dict[str, Any]:
        """All, the origin's items beside the others."""
        settings = asdict(self)
        del settings["origin"]
        return settings | self.origin

    @property
    def rows(self) -> int:
        """Number of records."""
        return self.views * self.images * self.repeats

    def row(self, view: View) -> int:
        """Returns the record of a view; those of one epoch lie together."""
        return (view.epoch * self.images + view.image) * self.repeats + view.repeat

    def view(self, row: int) -> View:
        """Returns the view of a record."""
        rest, repeat = divmod(row, self.repeats)
        epoch, image = divmod(rest, self.images)
        return View(image, epoch, repeat)

    def save(self, folder: Path) -> None:
        """Writes the manifest in one piece: a kill leaves the old one or the new one."""
        write_whole(folder / FILE, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads the manifest of a cache.

        Raises:
            CacheError: If there is none.
        """
        try:
            plain = json.loads((folder / FILE).read_text())
            shapes = tuple((c, h, w) for c, h, w in plain["shapes"])
            lists = {name: tuple(plain[name]) for name in ("layers", "targets") if name in plain}
            return cls(**{**plain, **lists, "shapes": shapes})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"There is no cache of teacher outputs in {str(folder)!r} ({type(error).__name__}: {error}). Make it "
                f"by `kdvit cache --config ... --out {folder}`."
            ) from error


def describe_origin(teacher: FrozenTeacher, data: dict[str, Any]) -> dict[str, Any]:
    """Returns all that the stored outputs follow from, by names of one level.

    Args:
        teacher: The teacher.
        data: The fingerprint of the training data.
    """
    network = teacher.network
    own = network.image_format
    facts: dict[str, Any] = {
        "teacher.class": type(network).__name__,
        "teacher.weights": weights_sha256(network),
        "teacher.input": [own.size, own.mean, own.std],
        **({"teacher.init_args": network.init_args} if isinstance(network, ModuleNetwork) else {}),
        **{f"data.{name}": value for name, value in data.items()},
        **{f"version.{name}": version(name) for name in PACKAGES},
        "version.records": FORMAT,
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names every item in which a run differs from a cache, with both values."""
    return [
        f"{name} is {ours.get(name)!r} and was {theirs.get(name)!r}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
