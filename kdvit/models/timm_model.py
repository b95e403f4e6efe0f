"""Building timm models from a config, with errors that name the way out."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from huggingface_hub import constants
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from kdvit.errors import nearest
from kdvit.models.layouts import meant
from kdvit.models.loading import load_checkpoint, load_weights

WEIGHTS = "model.safetensors"
"""The weights in an exported folder."""
FILES = (".ckpt", ".pth", ".pt", ".safetensors")
"""Endings of files of weights, which are no names of networks."""
PATIENCE = 5.0
"""Seconds to wait for the hub."""


def create_timm_model(
    arch: str,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    img_size: int | Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
    model_args: dict[str, Any] | None = None,
    in_chans: int | None = None,
    new_head: bool = True,
) -> nn.Module:
    """Builds a timm model.

    Args:
        arch: timm's model name, or ``local-dir:FOLDER`` for an exported folder.
        num_classes: Number of classes, 0 for a network without a head; None leaves the architecture's own.
        pretrained: Load timm's published weights.
        checkpoint: Load weights from a local file instead (see `kdvit.models.layouts`), or from a folder's
            model.safetensors.
        img_size: Input size in pixels, a number or height and width; None leaves the architecture's own. A network
            that takes images of any size is not told.
        drop_path_rate: Stochastic depth.
        model_args: More arguments of the model.
        in_chans: Channels of the images, 1 for grey ones; None leaves the architecture's own.
        new_head: Whether a checkpoint of other classes may leave the model with an untrained head.

    Raises:
        ValueError: If the architecture or an argument is unknown, or weights do not fit.
        FileNotFoundError: If the checkpoint is not there.
        RuntimeError: If published weights cannot be fetched.
    """
    _check_arch(arch)
    if pretrained and checkpoint:
        raise ValueError(
            f"{arch}: give either pretrained: true or a checkpoint, not both; got checkpoint {checkpoint!r}."
        )
    file = checkpoint and _weights_file(arch, checkpoint)
    size = img_size if isinstance(img_size, int | None) else tuple(img_size)
    given = {"num_classes": num_classes, "img_size": size, "drop_path_rate": drop_path_rate or None}
    given["in_chans"] = in_chans
    args = {**{name: value for name, value in given.items() if value is not None}, **(model_args or {})}
    try:
        with offline_where_unreachable(pretrained):
            model = _create(arch, pretrained, args)
    except TypeError as error:
        raise ValueError(f"{arch} does not take these arguments: {args}. timm says: {error}") from error
    except (AssertionError, RuntimeError, ZeroDivisionError, OverflowError, MemoryError) as error:
        raise ValueError(f"timm cannot build {arch} with {args}: {str(error) or type(error).__name__}") from error
    except OSError as error:
        raise RuntimeError(
            f"The published weights of {arch} cannot be fetched ({type(error).__name__}: {error}). Fetch them where "
            "there is internet and pass the file as `checkpoint`, or set HF_HUB_CACHE to a folder that has them."
        ) from error
    if file:
        start_from(model, arch, file, new_head)
    return model


def start_from(model: nn.Module, arch: str, checkpoint: str, new_head: bool = True) -> None:
    """Loads weights into a timm model; see `create_timm_model`.

    Raises:
        ValueError: If they do not fit.
        FileNotFoundError: If there are none.
    """
    file = _weights_file(arch, checkpoint)
    try:
        load_checkpoint(model, arch, Path(file), new_head)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"The checkpoint {file!r} does not fit {arch}: {error}") from error


def _weights_file(arch: str, checkpoint: str) -> str:
    file = str(Path(checkpoint) / WEIGHTS) if Path(checkpoint).is_dir() else checkpoint
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"{arch}: there is no checkpoint file {str(Path(file).absolute())!r}.{meant(Path(checkpoint))}"
        )
    return file


def _create(arch: str, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    """Builds a model; where timm does not resize published weights on loading, resizes them behind it."""
    try:
        model: nn.Module = timm.create_model(arch, pretrained=pretrained, **args)
    except TypeError as error:
        if "img_size" not in args or "'img_size'" not in str(error):
            raise
        return _create(arch, pretrained, {name: value for name, value in args.items() if name != "img_size"})
    except RuntimeError as error:
        if not pretrained or "img_size" not in args or "size mismatch" not in str(error):
            raise
        model = timm.create_model(arch, **args)
        native = _create(arch, True, {name: value for name, value in args.items() if name != "img_size"})
        load_weights(model, arch, native.state_dict(), new_head=False)
    return model


def published_class_names(arch: str) -> list[str] | None:
    """Returns the names of the classes of timm's published weights, which are ImageNet's; None where not known."""
    config = timm.get_pretrained_cfg(arch)
    subset = config and infer_imagenet_subset({"num_classes": config.num_classes})
    return ImageNetInfo(subset).label_names() if subset else None  # type: ignore[no-untyped-call]


@contextmanager
def offline_where_unreachable(pretrained: bool) -> Iterator[None]:
    """Takes weights from the local cache alone where the hub does not answer: its client would try for a minute.

    Args:
        pretrained: Whether weights are wanted at all.
    """
    before = constants.HF_HUB_OFFLINE
    if pretrained and not before and not getproxies():
        address = urlsplit(constants.ENDPOINT)
        try:
            socket.create_connection((str(address.hostname), address.port or 443), timeout=PATIENCE).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def without_folder(arch: str, model: Any, model_args: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments by which a network of ``local-dir:FOLDER`` is built again once that folder has gone."""
    if not arch.startswith("local-dir:"):
        return {}
    config = json.loads((Path(arch.partition(":")[2]) / "config.json").read_text())
    pool = config.get("global_pool") or config.get("pretrained_cfg", {}).get("global_pool")
    args = {**(config.get("model_args") or {}), **({"global_pool": pool} if pool else {}), **(model_args or {})}
    patches: Any = getattr(model, "patch_embed", None)
    size = args.get("img_size")
    if getattr(patches, "strict_img_size", False):
        size = patches.img_size[0] if len({*patches.img_size}) == 1 else list(patches.img_size)
    own = {name: value for name, value in args.items() if name not in ("num_classes", "img_size", "drop_path_rate")}
    return {"arch": config["architecture"], "img_size": size, "model_args": own}


def _check_arch(arch: str) -> None:
    source, _, folder = arch.rpartition(":")
    if source == "local-dir":
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(
                f"There is no exported network in {str(Path(folder).absolute())!r}: expected config.json and "
                f"{WEIGHTS} there.{meant(Path(folder), ['student']) or ' Train it first, or correct the path.'}"
            )
        if "architecture" not in json.loads((Path(folder) / "config.json").read_text()):
            raise ValueError(
                f"{folder!r} holds a student that timm cannot build. Take it as it is, by `class_path: "
                f"kdvit.load_student` and `init_args: {{path: {folder}}}`."
            )
    elif not source and not timm.is_model(arch.split(".")[0]):
        if Path(arch).exists():
            raise ValueError(f"{arch!r} is a path: expected timm's name, or local-dir:FOLDER of an exported network.")
        if "/" in arch or arch.endswith(FILES):
            raise FileNotFoundError(f"There is no {str(Path(arch).absolute())!r}, nor a network of that name in timm.")
        raise ValueError(f"timm has no model {arch!r}.{nearest(arch, timm.list_models())} timm.list_models() has all.")
