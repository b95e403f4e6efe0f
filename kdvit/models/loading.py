"""Weights into a timm model: heads of other classes, positions of other sizes, and what was loaded in one line."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from kdvit.errors import some
from kdvit.models.layouts import from_hugging_face, read_weights, under_prefix

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Variables of which one is above 0 in every process but the first."""


def load_checkpoint(model: nn.Module, arch: str, path: Path, new_head: bool) -> None:
    """Loads a file into a timm model, and says in a line what was loaded, what was new and what was left.

    Args:
        model: The model.
        arch: Its name.
        path: The file.
        new_head: Whether a head of other classes, or none, may leave the model with an untrained one.

    Raises:
        ValueError: If it is damaged, or the weights are of another network.
    """
    weights = read_weights(path)
    prefix, inner = under_prefix(from_hugging_face(weights), model.state_dict())
    outer = [name for name in weights if prefix and not name.startswith(prefix)]
    said = load_weights(model, arch, inner, new_head, outer)
    if not any(int(os.environ.get(name) or 0) for name in RANKS):
        print(f"{path}: {said}", file=sys.stderr)


def load_weights(
    model: nn.Module, arch: str, weights: Mapping[str, Tensor], new_head: bool, outer: Sequence[str] = ()
) -> str:
    """Loads weights under timm's names, or under those of the original code where timm has a converter.

    Position embeddings of another size are resized, and a first convolution of colours is summed up for grey images.

    Args:
        model: The model.
        arch: Its name.
        weights: The weights.
        new_head: Whether the head may be left untrained.
        outer: Names of what has been left before.

    Returns:
        What was loaded, what was new and what was left.

    Raises:
        ValueError: If they are of another network.
    """
    own: dict[str, Tensor] = model.state_dict()
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    _require_biases(arch, weights, own)
    if filter_fn:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            weights = filter_fn(dict(weights), model)
    given = {name: _fitted(name, value, own[name], model) for name, value in weights.items() if name in own}
    fits = {name: value for name, value in given.items() if value.shape == own[name].shape}
    new = [name for name in own if name not in fits]
    heads = head_names(model)
    apart = (*(f"{name}." for name in heads), "fc_norm.")
    if wrong := [name for name in new if not name.startswith(apart)]:
        raise ValueError(_of_another_network(arch, wrong, given, own))
    parts = {name.partition(".")[0] for name in own}
    if more := [n for n in weights if n not in own and n.partition(".")[0] in parts and not n.startswith(apart)]:
        raise ValueError(f"it has {some(more)}, which {arch} has not. Is it of another architecture?")
    if new and not new_head:
        kept = next((given[name].shape[0] for name in new if name in given), 0)
        there = f"has a head of {kept} classes" if kept else "has no head"
        raise ValueError(
            f"it {there}, and {arch} one of {getattr(model, 'num_classes', '?')}: a teacher keeps its own classes. Set "
            f"num_classes to {kept}{'' if kept else ', for features without logits'}."
        )
    model.load_state_dict(fits, strict=False)
    left = [*outer, *(name for name in weights if name not in fits)]
    said = f"{len(fits)} of {len(own)} tensors loaded into {arch}"
    return f"{said}; new: {some(new) or 'nothing'}; left: {some(left) or 'nothing'}."


def head_names(model: nn.Module) -> set[str]:
    """Returns the names of the modules that a timm model classifies by, whether they are there or not."""
    timm_model: Any = model
    named = getattr(timm_model, "pretrained_cfg", {}).get("classifier") or ()
    try:
        found = timm_model.get_classifier()
    except AttributeError:  # of a network that never has one, or looks for it inside a head that is gone
        found = ()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    own = {name for name, module in model.named_modules() if any(module is each for each in heads)}
    return {*([named] if isinstance(named, str) else named), *own} - {""}


def resized_positions(positions: Tensor, shape: Sequence[int], model: nn.Module) -> Tensor | None:
    """Resamples a position embedding, by timm's own bicubic interpolation.

    Args:
        positions: ``[1, N, D]``, perhaps with prefix tokens before those of the grid, ``[1, H, W, D]`` (VOLO) or
            ``[1, D, H, W]`` (PiT).
        shape: The shape that the model wants.
        model: The model, which knows its grid.

    Returns:
        The same in that shape; None if it is none of these.
    """
    if positions.ndim != len(shape) or positions.ndim not in (3, 4):
        return None
    tokens: Tensor
    if positions.ndim == 4:
        same = [axis for axis in (1, 3) if positions.shape[axis] == shape[axis]]
        channels = max(same, key=lambda axis: shape[axis], default=3)
        moved, size = positions.movedim(channels, 3), [n for axis, n in enumerate(shape) if axis not in (0, channels)]
        if not same or moved.shape[1] != moved.shape[2]:  # such as NesT's blocks and their tokens
            return None
        tokens = resample_abs_pos_embed(moved.flatten(1, 2), size, list(moved.shape[1:3]), num_prefix_tokens=0)
        return tokens.reshape(1, *size, -1).movedim(3, channels)
    for prefix in (0, 1, getattr(model, "num_prefix_tokens", 1)):
        old, new = (_grid(count - prefix, model) for count in (positions.shape[1], shape[1]))
        if old and new and positions.shape[2] == shape[2]:
            tokens = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=prefix)
            return tokens
    return None


def _grid(tokens: int, model: Any) -> tuple[int, int] | None:
    """Returns height and width of a grid of so many tokens: the model's own, or a square."""
    own: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    own = own or getattr(model, "tokens_spatial_shape", ())
    if len(own) == 2 and math.prod(own) == tokens:
        return (own[0], own[1])
    side = math.isqrt(max(tokens, 0))
    return (side, side) if side and side**2 == tokens else None


def _fitted(name: str, value: Tensor, own: Tensor, model: nn.Module) -> Tensor:
    """Returns a weight in the model's shape, where that is a matter of the input's size or channels."""
    if value.shape == own.shape:
        return value
    if "pos_embed" in name:
        resized = resized_positions(value, own.shape, model)
        return value if resized is None else resized
    first: Any = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    names = (first,) if isinstance(first, str) else first
    if name in map("{}.weight".format, names) and own.ndim == 4 and (own.shape[1], value.shape[1]) == (1, 3):
        grey: Tensor = adapt_input_conv(1, value)
        return grey
    return value


def _require_biases(arch: str, weights: Mapping[str, Tensor], own: Iterable[str]) -> None:
    """Raises ValueError where timm would drop DINOv3's biases of queries and values though they are not zero."""
    biases = [value for name, value in weights.items() if name.endswith(".attn.qkv.bias")]
    dropped = "storage_tokens" in weights and not any(name.endswith(".q_bias") for name in own)
    if dropped and any(bool(each.any()) for each in biases):
        raise ValueError(f"it has biases of queries and values, and {arch} has none. Take {arch}_qkvb.")


def _of_another_network(arch: str, wrong: Sequence[str], given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    odd = next((name for name in wrong if name in given), None)
    if odd is None:
        return f"it lacks {some(wrong)}."
    shapes = f"{list(given[odd].shape)} there and {list(own[odd].shape)} in {arch}"
    return (
        f"size mismatch for {some([name for name in wrong if name in given])}: {odd} is {shapes}. "
        "Is it of another architecture? If only the input size differs, this network cannot be resized: take the size "
        "of its weights (leave img_size out)."
    )
