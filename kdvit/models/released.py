"""Checkpoints that the authors' code wrote (arXiv:2511.15572), as students of kdvit."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch import Tensor

from kdvit.errors import some
from kdvit.models.layouts import read_weights_only
from kdvit.models.lift import LiftViT
from kdvit.models.timm_network import TimmNetwork
from kdvit.models.wide_last import WideLastViT
from kdvit.structures import ImageFormat

HEAD_DIM = 64  # of DeiT, and of the wide blocks where 64 divides their width
SCHEDULES = {
    "heads_linear": ([256, 320, 384], None),
    "fixed_linear": ([240, 312, 384], 3),
    "heads_step": ([384], None),
    "fixed_step": ([384], 3),
}
"""Widths of the wide blocks, and heads (None: of 64 channels), by `arch_schedule` of the authors' training script."""
DEAD = ("base_model.norm.", "base_model.head.")


class Released(NamedTuple):
    """A student read from an authors' checkpoint.

    Attributes:
        student: The student, in eval.
        dropped: Keys of parameters that no output depends on, and that kdvit's network does not have.
    """

    student: TimmNetwork
    dropped: list[str]


def load_released(path: str | Path, ema: bool = False, num_heads: int | None = None) -> Released:
    """Reads a Lift or WideLast checkpoint of the authors, whichever its keys show it to be.

    Width, depth, patch size, image size and number of classes follow from the shapes. The number of heads does not:
    it is that of the schedule which the file's own `args` name. Where they name none, it is 64 channels a head, or 3
    heads where 64 does not divide the widths.

    Args:
        path: The .pth file.
        ema: Take the averaged weights instead of the raw ones, which are what the paper reports.
        num_heads: Heads of the wide blocks, for a file that does not say them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, holds something else than tensors and plain options, or is another network; if
            its options and its weights, or `num_heads`, contradict each other.
    """
    content, key = read_weights_only(Path(path)), "model_ema" if ema else "model"
    if not isinstance(content.get(key), dict) or not content[key]:
        raise ValueError(f"{str(path)!r} has no weights by name under {key!r}; it has {some(map(repr, content))}.")
    weights = {name.removeprefix("module."): value for name, value in content[key].items()}
    args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    try:
        if any(name.startswith("projections.") for name in weights):
            student, mapped = _lift(weights, args)
        elif any(re.fullmatch(r"blocks\.\d+\.proj_in\.weight", name) for name in weights):
            student, mapped = _wide_last(weights, args, num_heads)
        else:
            raise ValueError(
                "neither a Lift nor a WideLast checkpoint of the authors: expected keys such as projections.11.weight "
                f"or blocks.11.proj_in.weight, found {some(map(repr, weights))}."
            )
        student.model.load_state_dict(mapped)
    except KeyError as error:
        raise ValueError(f"{str(path)!r}: it lacks {error}.") from error
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{str(path)!r}: {' '.join(str(error).split())}") from error
    student.image_format = ImageFormat(student.image_format.size, IMAGENET_MEAN, IMAGENET_STD, crop_pct=0.875)
    return Released(student.eval(), sorted(name for name in weights if _is_dead(name, student.depth - 1)))


def _lift(weights: dict[str, Tensor], args: dict[str, Any]) -> tuple[TimmNetwork, dict[str, Tensor]]:
    base = "base_model."
    narrow = _narrow_args({key.removeprefix(base): value for key, value in weights.items() if key.startswith(base)})
    last = narrow["model_args"]["depth"] - 1
    width, classes = len(weights[f"projections.{last}.weight"]), len(weights["head.weight"])
    _require_same(args, expansion_target_dim=width, nb_classes=classes, input_size=narrow["img_size"])
    student = LiftViT(**narrow, width=width, num_classes=classes)
    places = {f"projections.{last}.": "norm.0.", f"layer_norms.{last}.": "norm.1.", base: ""}
    mapped = {}
    for key, value in weights.items():
        if not _is_dead(key, last):
            prefix = next((each for each in places if key.startswith(each)), "")
            mapped[f"{places.get(prefix, '')}{key.removeprefix(prefix)}"] = value
    return student, mapped


def _is_dead(name: str, last: int) -> bool:
    """Whether no logit depends on a parameter: unused norm and head, and lifts of blocks before the last."""
    lift = re.match(r"(?:projections|layer_norms)\.(\d+)\.", name)
    return name.startswith(DEAD) or (lift is not None and int(lift[1]) < last)


def _wide_last(
    weights: dict[str, Tensor], args: dict[str, Any], num_heads: int | None
) -> tuple[TimmNetwork, dict[str, Tensor]]:
    narrow = _narrow_args(weights)
    depth, classes = narrow["model_args"]["depth"], len(weights["head.weight"])
    wide = [i for i in range(depth) if f"blocks.{i}.proj_in.weight" in weights]
    widths = [len(weights[f"blocks.{i}.proj_in.weight"]) for i in wide]
    _require_same(args, nb_classes=classes, input_size=narrow["img_size"])
    heads = _heads(args.get("arch_schedule"), widths, num_heads)
    student = WideLastViT(**narrow, width=widths, num_heads=heads, num_classes=classes)

    def place(match: re.Match[str]) -> str:
        inner = {"proj_in.": "0.", "proj_norm.": "1.", "": "2."}[match[3]]
        return f"{match[1]}{inner}" if int(match[2]) in wide else match[0]

    return student, {re.sub(r"^(blocks\.(\d+)\.)(proj_in\.|proj_norm\.|)", place, k): v for k, v in weights.items()}


def _heads(schedule: str | None, widths: list[int], num_heads: int | None) -> int | None:
    """Returns the heads of the wide blocks; None leaves them at 64 channels each."""
    if schedule is None:
        return 3 if num_heads is None and any(width % HEAD_DIM for width in widths) else num_heads
    if schedule not in SCHEDULES:
        raise ValueError(f"its args name the arch_schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}.")
    expected, heads = SCHEDULES[schedule]
    if widths != expected:
        raise ValueError(
            f"its args name the arch_schedule {schedule!r}, with wide blocks of {expected}, but its weights have "
            f"{widths}: weights and args are of two networks. Take the file as it was written."
        )
    known = [heads or width // HEAD_DIM for width in widths]
    if num_heads is not None and {num_heads} != {*known}:
        raise ValueError(f"its arch_schedule {schedule!r} has {known} heads; leave out num_heads, got {num_heads}.")
    return heads


def _require_same(args: dict[str, Any], **shown: int) -> None:
    """Raises ValueError if a file's options, where it has them, are not what its weights show."""
    for name, value in shown.items():
        if args.get(name) not in (None, value):
            raise ValueError(
                f"its args say {name} {args[name]}, but its weights {value}: they are of two networks. Take the file "
                "as it was written."
            )


def _narrow_args(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the constructor's arguments of the narrow part, all of which its shapes show."""
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    tokens = weights["pos_embed"].shape[1]
    depth = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("blocks.")), default=0)
    model_args = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": max(width // HEAD_DIM, 1)}
    size = patch * round((tokens - 1) ** 0.5)
    return {"arch": "deit_tiny_patch16_224", "img_size": size, "model_args": model_args}
