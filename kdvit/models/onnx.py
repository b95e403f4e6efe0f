"""Students as ONNX files, each compared with the network that it came from."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdvit.files import write_whole
from kdvit.models.export import BATCHES, TOLERANCE, Agreement, Classifier, agreement, random_images
from kdvit.models.network import Network

Precision = Literal["float32", "float16", "int8"]
TOLERANCES: dict[Precision, float] = {"float32": TOLERANCE, "float16": 1e-2, "int8": float("inf")}
"""Of the largest logit. What int8 costs is measured and told."""


def export_onnx(
    student: Network,
    file: str | Path,
    precision: Precision = "float32",
    dynamic_size: bool = False,
    images: Sequence[Tensor] = (),
) -> Agreement:
    """Writes an ONNX file with a dynamic batch, float32 input "image" and output "logits", "features" without a head.

    Its metadata say in JSON what its images are (`size`, `mean`, `std`, `crop_pct`, `interpolation`) and its
    `class_names`. Attention is written in plain operations: torch.onnx has the fused one for some networks only.

    Args:
        student: The student.
        file: Where to write.
        precision: float16 halves the file. int8 quantises the weights to a quarter, and the activations as they come
            (onnxruntime's dynamic quantisation).
        dynamic_size: Whether the file takes images of other heights and widths, where the network can.
        images: Batches ``[B, C, H, W]`` to compare the two on, beside random ones.

    Returns:
        How far the logits of onnxruntime agree with those of PyTorch.

    Raises:
        ImportError: If the extra `onnx` is not installed.
        RuntimeError: If the network cannot be exported, or the logits differ by more than 1e-4 of the largest (1e-2 in
            float16). Nothing is written then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (what torch.onnx needs)
    except ImportError as error:
        raise ImportError("Export to ONNX needs the extra: pip install 'kdvit[onnx]'.") from error
    plain = _with_any_size(student) if dynamic_size else copy.deepcopy(student)
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # timm's switch, which all its attentions have
    height, width = student.image_format.size
    sizes = [(height, width), (2 * height, width)] if dynamic_size else [(height, width)]
    compared = [*images, *(random_images(student, batch, size) for size in sizes for batch in BATCHES)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised, too
    with TemporaryDirectory() as folder, _quiet():
        written = Path(folder, "model.onnx")
        try:
            _write(plain.eval(), written, precision, dynamic_size, student)
            session = onnxruntime.InferenceSession(str(written), options, providers=["CPUExecutionProvider"])
            logits = [torch.from_numpy(session.run(None, {"image": each.numpy()})[0]) for each in compared]
        except Exception as error:  # of torch.export, torch.onnx, the network's own code or onnxruntime
            what = " for images of any size (leave out --dynamic_size)" if dynamic_size else ""
            raise RuntimeError(f"{type(student).__name__} cannot be exported to ONNX{what}: {_cause(error)}") from error
        result = agreement(plain, logits, compared, TOLERANCES[precision])
        write_whole(Path(file), written.read_bytes())
    return result


class _Half(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half()

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image.half())
        return logits.float()


def _with_any_size(student: Any) -> Any:
    """Returns a copy whose position embeddings follow the size of the image, where timm has them do so by option."""
    if getattr(getattr(student, "model", None), "dynamic_img_size", True):
        return copy.deepcopy(student)
    args = student.init_args
    plain = type(student)(**{**args, "model_args": {**(args["model_args"] or {}), "dynamic_img_size": True}})
    plain.load_state_dict(student.state_dict())
    return plain


def _write(plain: Network, file: Path, precision: Precision, dynamic_size: bool, student: Network) -> None:
    network = Classifier(plain)
    axes = (0, 2, 3) if dynamic_size else (0,)
    program = torch.onnx.export(
        _Half(network) if precision == "float16" else network,
        (random_images(student, 2),),
        input_names=["image"],
        output_names=["features" if student.output_shapes().classes is None else "logits"],
        dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    told = {**student.image_format.to_json(), "class_names": student.class_names}
    program.model.metadata_props.update({name: json.dumps(value) for name, value in told.items()})
    program.save(file)
    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(file, file, weight_type=QuantType.QInt8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what torch.export and onnxruntime say of their own inner workings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


def _cause(error: BaseException) -> str:
    """Returns the first line of the error that the others came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
