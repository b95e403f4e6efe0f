"""Students on disk: exported folders, and the student inside a training checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from timm.models import get_pretrained_cfg_value
from timm.utils import reparameterize_model
from torch import Tensor, nn

from kdvit.errors import own_errors
from kdvit.files import write_whole
from kdvit.models.layouts import CONFIG, meant, read_spec, read_weights_only
from kdvit.models.module_network import ModuleNetwork
from kdvit.models.network import Network
from kdvit.models.own import as_plain, class_path, class_paths, find_trusted, import_packages
from kdvit.models.released import load_released
from kdvit.models.timm_model import WEIGHTS, published_class_names
from kdvit.models.timm_network import TimmNetwork
from kdvit.seeding import seeded
from kdvit.structures import ImageFormat, subclasses

PROGRAMS = {".onnx": "ONNX Runtime", ".pt2": "torch.export"}
REGISTERED = {"LiftViT": "lift_vit", "WideLastViT": "wide_last_vit"}


def student_spec(student: Network, image_format: ImageFormat, class_names: list[str] | None = None) -> dict[str, Any]:
    """Describes a student in plain types, enough to build it again.

    Args:
        student: The network. Without plain `init_args` its file has the weights, and `load_student` cannot build it.
        image_format: The images that it was trained on.
        class_names: Names of the classes, where known.
    """
    return {
        "kdvit_version": version("kdvit"),
        "class": class_path(type(student)),
        "init_args": as_plain(student.init_args),
        "image_format": image_format.to_json(),
        "class_names": class_names,
        **({"reparameterized": True} if student.spec.get("reparameterized") else {}),
    }


def export_student(
    student: Network, spec: dict[str, Any], folder: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Writes model.safetensors and config.json, which `load_student` reads.

    The folder is also one of timm's: ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it, a remedied
    student once `kdvit.models` has been imported.

    Args:
        student: The student.
        spec: Its `student_spec`.
        folder: Where to write; made if it is not there.
        weights: Its state dict, where the student itself has but a part of it.
    """
    folder = Path(folder)
    prefix = "model." if isinstance(student, (TimmNetwork, ModuleNetwork)) else ""
    state = student.state_dict() if weights is None else weights
    named = {name.removeprefix(prefix): value.detach().cpu().contiguous() for name, value in state.items()}
    write_whole(folder / WEIGHTS, save(named, metadata={"format": "pt"}))
    write_whole(folder / CONFIG, (json.dumps({**_timm_config(spec), "kdvit": spec}, indent=2) + "\n").encode())


def weights_sha256(network: nn.Module) -> str:
    """Returns the SHA-256 of all weights and buffers with their names, whatever device they are on."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_student(path: str | Path, ema: bool = False, imports: Sequence[str] = ()) -> Network:
    """Loads a student from an exported folder, a checkpoint of `kdvit fit`, or one of the authors' code, in eval.

    A student of one's own class needs that class: import its package before, or name it in `imports`.

    Args:
        path: The folder, or the checkpoint file.
        ema: Take the averaged weights of a checkpoint instead of the raw ones.
        imports: Packages of one's own whose classes and functions the file may call.

    Returns:
        The student, with `transform` for its images, its `class_names`, and `spec`, which says what else is known of
        it, such as the run's scores.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it is not a student of kdvit's, its class has not been imported or fails, or it has no averaged
            weights.
    """
    import_packages(imports)
    path = Path(path)
    if path.is_dir() and ema:
        raise ValueError(f"{str(path)!r} is an exported folder and holds one set of weights: leave ema out.")
    if path.is_dir():
        spec, weights = _read_folder(path)
    elif path.suffix in PROGRAMS:
        raise ValueError(
            f"{str(path)!r} is a program for {PROGRAMS[path.suffix]}, which holds no student to load. Give the folder "
            "beside it, which has config.json and model.safetensors, or a checkpoint."
        )
    elif path.is_file():
        spec, weights = _read_checkpoint(path, ema)
    else:
        raise FileNotFoundError(f"There is no exported folder or checkpoint {str(path.absolute())!r}.")
    student = _build(spec, path)
    wraps = isinstance(student, (TimmNetwork, ModuleNetwork))
    target: nn.Module = student.model if path.is_dir() and wraps else student  # type: ignore[assignment]
    target.load_state_dict(weights)
    student.image_format = ImageFormat.from_json(spec["image_format"])
    student.spec = spec
    return student.eval()


def known_class_names(arch: str, pretrained: bool, checkpoint: str | None) -> list[str] | None:
    """Returns the names of the classes of the weights that a timm model starts from, where known.

    Args:
        arch: timm's name, or ``local-dir:FOLDER``. Published weights have ImageNet's classes.
        pretrained: Whether its own weights are loaded.
        checkpoint: A file or folder of weights instead.
    """
    source, _, folder = arch.rpartition(":")
    if checkpoint or source == "local-dir":
        names: list[str] | None = read_spec(checkpoint or folder).get("class_names")
        return names
    return published_class_names(arch) if pretrained and not source else None


def _timm_config(spec: dict[str, Any]) -> dict[str, Any]:
    """Describes the student as timm does; a network of other make has no such description."""
    if spec["class"] not in ("TimmStudent", *REGISTERED) or spec.get("reparameterized"):
        return {}
    args, images = dict(spec["init_args"]), dict(spec["image_format"])
    classes, architecture = args.pop("num_classes"), REGISTERED.get(spec["class"])
    if architecture is None:
        architecture, more = args.pop("arch"), args.pop("model_args")
        args |= more or {}
    return {
        "architecture": architecture,
        "num_classes": classes,
        "model_args": {name: value for name, value in args.items() if value is not None},
        "pretrained_cfg": {
            "input_size": [len(images["mean"]), *images.pop("size")],
            "fixed_input_size": architecture in REGISTERED.values()
            or bool(get_pretrained_cfg_value(architecture, "fixed_input_size")),
            "num_classes": classes,
            **images,
            **({"label_names": names} if (names := spec["class_names"]) else {}),
        },
    }


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = folder / CONFIG
    if not config.is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{str(folder.absolute())!r} is no exported student: expected {CONFIG} and {WEIGHTS} in it.{meant(folder)}"
        )
    spec = json.loads(config.read_text()).get("kdvit")
    if spec is None:
        raise ValueError(
            f"{str(config)!r} was not written by kdvit. Load it with timm.create_model('local-dir:{folder}')."
        )
    return spec, load_file(folder / WEIGHTS)


def _read_checkpoint(path: Path, ema: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    checkpoint = read_weights_only(path)
    if "kdvit" not in checkpoint:
        try:
            released = load_released(path, ema).student
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} is neither a checkpoint of `kdvit fit` nor one of the authors' code: {error}"
            ) from error
        return student_spec(released, released.image_format), released.state_dict()
    if ema:
        if "StudentEMA" not in checkpoint.get("callbacks", {}):
            raise ValueError(f"{str(path)!r} has no averaged weights: the run had no EMA (`--ema.decay`).")
        return checkpoint["kdvit"], checkpoint["callbacks"]["StudentEMA"]["student"]
    prefix = "student."
    weights = {
        key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)
    }
    return checkpoint["kdvit"], weights


def _build(spec: dict[str, Any], path: Path) -> Network:
    kind, args = spec["class"], spec["init_args"]
    try:
        if args is None:
            raise ValueError("its arguments are not plain values, and not in the file.")
        for each in class_paths(args) if kind == ModuleNetwork.__name__ else ():
            find_trusted(each)
        student = _built(spec)
    except ValueError as error:
        raise ValueError(
            f"The student in {str(path)!r} is of the class {kind!r}, and cannot be built: {error}"
        ) from error
    return student


def _built(spec: dict[str, Any]) -> Network:
    """Builds a network of its description, with random weights."""
    kind = spec["class"]
    found = find_trusted(kind) if "." in kind else subclasses(Network).get(kind)
    if found is None or not issubclass(found, Network):
        raise ValueError("there is no such subclass of kdvit.models.Network.")
    with own_errors(kind):
        student: Network = found(**spec["init_args"])
    if spec.get("reparameterized"):
        reparameterize_model(student, inplace=True)
    return student


def require_loadable(student: Network, spec: dict[str, Any]) -> None:
    """Checks that `load_student` will get a student of one's own back: builds another of its description, and compares.

    Args:
        student: The student.
        spec: Its `student_spec`.

    Raises:
        ValueError: If it cannot be built, has other weights, or gives other logits with the same weights.
    """
    kind = spec["class"]
    if kind in ("TimmStudent", *REGISTERED):
        return
    try:
        if spec["init_args"] is None:
            raise ValueError("its constructor takes more than numbers, text, lists and mappings of them.")
        with seeded((torch.initial_seed() + 1) % 2**32), torch.no_grad(), student.evaluating():
            other, image = _built(spec).eval(), torch.randn_like(student.blank_image())
            other.to(image).load_state_dict(student.state_dict())
            layers = () if student(image).logits is not None else (student.end_layer(),)
            ours, theirs = (each(image, layers) for each in (student, other))
            pairs = zip((ours.logits, *ours.features), (theirs.logits, *theirs.features), strict=True)
            same = all(a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
        if not same:
            raise ValueError("a second one, of the same arguments and weights, gives other outputs.")
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"The student {kind} could not be loaded after the training: {error} It is built of its class path and "
            f"`init_args`, which are {spec['init_args']}; see kdvit/models/README.md."
        ) from error
