"""Students on disk: exported folders, and the student inside a training checkpoint."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kdvit.files import write_whole
from kdvit.models.layouts import read_weights_only
from kdvit.models.network import Network, TimmNetwork
from kdvit.models.released import load_released
from kdvit.models.timm_model import WEIGHTS, published_class_names
from kdvit.structures import ImageFormat, subclasses

CONFIG = "config.json"
PROGRAMS = {".onnx": "ONNX Runtime", ".pt2": "torch.export"}
REGISTERED = {"LiftViT": "lift_vit", "WideLastViT": "wide_last_vit"}


def student_spec(student: Network, image_format: ImageFormat, class_names: list[str] | None = None) -> dict[str, Any]:
    """Describes a student in plain types, enough to build it again.

    Args:
        student: A network with `init_args`; any other is described by its class name alone.
        image_format: The images that it was trained on.
        class_names: Names of the classes, where known.
    """
    return {
        "kdvit_version": version("kdvit"),
        "class": type(student).__name__,
        "init_args": getattr(student, "init_args", None),
        "image_format": image_format.to_json(),
        "class_names": class_names,
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
    prefix = "model." if isinstance(student, TimmNetwork) else ""
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


def load_student(path: str | Path, ema: bool = False) -> Network:
    """Loads a student from an exported folder, a checkpoint of `kdvit fit`, or one of the authors' code, in eval.

    Args:
        path: The folder, or the checkpoint file.
        ema: Take the averaged weights of a checkpoint instead of the raw ones.

    Returns:
        The student, with `transform` for its images, its `class_names`, and `spec`, which says what else is known of
        it, such as the run's scores.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it is not a student of kdvit's, its class has not been imported, or it has no averaged weights.
    """
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
    target = student.model if path.is_dir() and isinstance(student, TimmNetwork) else student
    target.load_state_dict(weights)
    student.image_format = ImageFormat.from_json(spec["image_format"])
    student.spec = spec
    return student.eval()


def trained_class_names(path: str | Path) -> list[str] | None:
    """Returns the names of a network's classes that an exported folder or a checkpoint of `kdvit fit` holds.

    None where it holds none, as a file of another program.
    """
    path = Path(path)
    try:
        content: Any = json.loads((path / CONFIG).read_text()) if path.is_dir() else read_weights_only(path)
    except (OSError, ValueError):
        return None
    names: list[str] | None = (content.get("kdvit") or {}).get("class_names")
    return names


def known_class_names(arch: str, pretrained: bool, checkpoint: str | None) -> list[str] | None:
    """Returns the names of the classes of the weights that a timm model starts from, where known.

    Args:
        arch: timm's name, or ``local-dir:FOLDER``. Published weights have ImageNet's classes.
        pretrained: Whether its own weights are loaded.
        checkpoint: A file or folder of weights instead.
    """
    source, _, folder = arch.rpartition(":")
    if checkpoint or source == "local-dir":
        return trained_class_names(checkpoint or folder)
    return published_class_names(arch) if pretrained and not source else None


def _timm_config(spec: dict[str, Any]) -> dict[str, Any]:
    """Describes the student as timm does; a network of other make has no such description."""
    if spec["class"] not in ("TimmStudent", *REGISTERED):
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
            "fixed_input_size": True,
            "num_classes": classes,
            **images,
            **({"label_names": names} if (names := spec["class_names"]) else {}),
        },
    }


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = folder / CONFIG
    if not config.is_file() or not (folder / WEIGHTS).is_file():
        found = [
            each for each in ("student", "checkpoints/best.ckpt", "best.ckpt", "last.ckpt") if (folder / each).exists()
        ]
        meant = f" Did you mean {str(folder / found[0])!r}?" if found else ""
        raise FileNotFoundError(
            f"{str(folder.absolute())!r} is no exported student: expected {CONFIG} and {WEIGHTS} in it.{meant}"
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
    classes = subclasses(Network)
    if spec["class"] not in classes or spec["init_args"] is None:
        raise ValueError(
            f"The student in {str(path)!r} is of the class {spec['class']!r}, which kdvit cannot build from the file "
            "alone. Import its class first, and give it an attribute `init_args` with the plain arguments of its "
            "constructor."
        )
    student: Network = classes[spec["class"]](**spec["init_args"])
    return student
