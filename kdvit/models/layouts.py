"""Weights as other programs write them, under the names that timm and its converters take."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CONFIG = "config.json"
"""The description in an exported folder."""
OF_HUGGING_FACE = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"(?:encoder\.)?layer\.(\d+)\.", r"blocks.\1."),
    (r"attention\.(?:attention\.)?(?:q_proj|query)\.", "attn.q."),
    (r"attention\.(?:attention\.)?(?:k_proj|key)\.", "attn.k."),
    (r"attention\.(?:attention\.)?(?:v_proj|value)\.", "attn.v."),
    (r"attention\.(?:o_proj|output\.dense)\.", "attn.proj."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"layer_scale(\d)\.lambda1$", r"ls\1.gamma"),
    (r"(?<=\d\.)intermediate\.dense\.", "mlp.fc1."),
    (r"(?<=\d\.)output\.dense\.", "mlp.fc2."),
    (r"mlp\.weights_in\.", "mlp.w12."),
    (r"mlp\.weights_out\.", "mlp.w3."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
"""Names of Hugging Face's ViT, DINOv2 and DINOv3, with those of the original code."""
GATED = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}
PLAIN = {"up_proj": "fc1", "down_proj": "fc2"}
"""DINOv3's MLP, with a gate and without."""


def meant(folder: Path, names: Collection[str] = ("student", "checkpoints/best.ckpt", "best.ckpt", "last.ckpt")) -> str:
    """Returns " Did you mean X?" for the first of these that a folder holds, such as that of a run; or nothing."""
    found = [str(folder / each) for each in names if (folder / each).exists()]
    return f" Did you mean {found[0]!r}?" if found else ""


def read_weights_only(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that holds tensors and plain options, and runs no code that a file may bring.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {str(path.absolute())!r}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can lead the unpickler anywhere
        named = re.search(r"GLOBAL (\S+)", str(error))
        said = (str(error) or type(error).__name__).splitlines()[0]
        reason = f"it names {named[1]}, which is not run" if named else said
        raise ValueError(f"{str(path)!r} is damaged, or holds more than tensors and plain options: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}; expected a dictionary.")
    return content


def read_spec(path: str | Path) -> dict[str, Any]:
    """Returns the `student_spec` in an exported folder or a checkpoint of `kdvit fit`; empty in files of others."""
    path = Path(path)
    try:
        content: Any = json.loads((path / CONFIG).read_text()) if path.is_dir() else read_weights_only(path)
    except (OSError, ValueError):
        return {}
    return content.get("kdvit") or {}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a file, those inside dictionaries under names with dots.

    Of a training's checkpoint it is what stands under "state_dict" or "model".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds anything else than tensors and plain options.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    content = read_weights_only(path)
    inner = content.get("state_dict", content.get("model"))
    return dict(_tensors(inner if isinstance(inner, dict) else content))


def under_prefix(weights: Mapping[str, Tensor], own: Collection[str]) -> tuple[str, dict[str, Tensor]]:
    """Finds a network's weights among others: those behind the prefix that has most of its names.

    That is "model." in a checkpoint of Lightning's, "teacher.backbone." in one of DINO, which has a student's, too; the
    teacher's are what it is trained for. The names of OpenCLIP and CLIP are left to timm's converters.

    Args:
        weights: All weights of a file.
        own: Names of the network's own.

    Returns:
        The prefix, and the weights behind it, without it; all of them where no name is the network's.
    """
    found: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        found.update(".".join([*parts[:i], ""]) for i in range(len(parts)) if ".".join(parts[i:]) in own)
    prefix = max(found, key=lambda each: (found[each], "teacher" in each, -len(each)), default="")
    if "visual" in prefix:
        return "", dict(weights)
    return prefix, {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}


def from_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of Hugging Face's ViT, DINOv2 or DINOv3 as the original code names them.

    Queries, keys and values become one tensor, zero where a bias is missing. Weights of any other make are returned as
    they are.
    """
    patches = next((name for name in weights if "embeddings.patch_embeddings." in name), None)
    if patches is None:
        return dict(weights)
    outer = patches.partition("embeddings.")[0]
    mlp = GATED if any(".mlp.gate_proj." in name for name in weights) else PLAIN
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        short = re.sub(r"^model\.(?=layer\.|norm\.)", "", name.removeprefix(outer))
        for pattern, ours in OF_HUGGING_FACE:
            short = re.sub(pattern, ours, short)
        renamed[re.sub(r"mlp\.(\w+_proj)\.", lambda match: f"mlp.{mlp.get(match[1], match[1])}.", short)] = value
    _join(renamed)
    if "register_tokens" in renamed and "pos_embed" not in renamed:
        renamed["storage_tokens"] = renamed.pop("register_tokens")  # DINOv3's
    elif "register_tokens" in renamed:
        renamed.setdefault("mask_token", renamed["cls_token"])  # by which timm knows DINOv2's
    return renamed


def _join(weights: dict[str, Tensor]) -> None:
    """Joins queries, keys and values, in place."""
    for name in [name for name in weights if ".attn.q." in name]:
        parts = {each: weights.pop(name.replace(".attn.q.", f".attn.{each}."), None) for each in "qkv"}
        known = next(each for each in parts.values() if each is not None)
        joined = [torch.zeros_like(known) if each is None else each for each in parts.values()]
        weights[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(joined)


def _tensors(content: Mapping[Any, Any], outer: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{outer}{name}", value
        elif isinstance(value, dict):
            yield from _tensors(value, f"{outer}{name}.")
