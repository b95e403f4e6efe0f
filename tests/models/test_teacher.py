"""The frozen teacher: what it is fed, and what cannot reach it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdvit.distillers import FeatureDistiller, LiftDistiller, LogitDistiller
from kdvit.models import FrozenTeacher, TimmTeacher, export_student
from kdvit.models.checkpoint import student_spec
from kdvit.structures import ImageFormat
from kdvit.training.module import DistillationModule
from tests.tiny import FORMAT, STUDENT, student, teacher


def test_images_reach_the_teacher_in_its_own_normalisation() -> None:
    network = teacher()
    network.image_format = ImageFormat((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pixels = torch.rand(2, 3, 16, 16)

    def normalised(images: ImageFormat) -> torch.Tensor:
        return (pixels - torch.tensor(images.mean).view(3, 1, 1)) / torch.tensor(images.std).view(3, 1, 1)

    holder = FrozenTeacher(network, FORMAT)
    torch.testing.assert_close(holder.convert(normalised(FORMAT)), normalised(network.image_format))
    expected = network(normalised(network.image_format)).logits
    torch.testing.assert_close(holder(normalised(FORMAT)).logits, expected)


def test_images_reach_the_teacher_in_its_own_size() -> None:
    holder = FrozenTeacher(teacher(img_size=24), ImageFormat((16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert holder.converts_size
    assert not holder.converts_values
    assert holder(torch.rand(2, 3, 16, 16), [-1]).features[0].shape == (2, 24, 6, 6)


def test_the_same_images_are_not_copied() -> None:
    network = teacher()
    image = torch.rand(1, 3, 16, 16)
    assert FrozenTeacher(network, network.image_format).convert(image) is image


def test_the_teacher_is_frozen_in_eval_and_its_own_deep_copy() -> None:
    network = teacher(drop_path_rate=0.5).train()
    holder = FrozenTeacher(network)
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert copy.deepcopy(holder) is holder
    assert not holder(torch.rand(1, 3, 16, 16)).logits.requires_grad


def test_shapes_of_one_layer_are_measured_once_however_it_is_named(monkeypatch) -> None:
    network = teacher()
    holder, run, asked = FrozenTeacher(network), network.forward, []
    monkeypatch.setattr(network, "forward", lambda image, *request: asked.append(request) or run(image, *request))
    last = holder.output_shapes([-1])
    assert holder.output_shapes((network.depth - 1,)) == holder.output_shapes([1.0]) == last
    assert holder.output_shapes([1.0]) == network.output_shapes([1.0]) != holder.output_shapes([-1], logits=False)
    assert len(asked) == 2  # of which one by the network itself


def test_one_pass_of_the_teacher_tells_all_objectives_their_shapes(monkeypatch) -> None:
    network, asked = teacher(), []
    run = network.forward
    monkeypatch.setattr(network, "forward", lambda image, *request: asked.append(request) or run(image, *request))
    objectives = {
        "logit": LogitDistiller(),
        "lift": LiftDistiller(),
        "early": FeatureDistiller(1.0, [0], [0], projector="linear"),
    }
    DistillationModule(student("lift"), network, objectives)
    assert asked == [((3, 0), True)]


def test_a_trained_head_is_never_replaced() -> None:
    with pytest.raises(ValueError, match="would replace the trained head of cait_s24_224"):
        TimmTeacher("cait_s24_224", model_args={"num_classes": 10})


def test_a_teacher_comes_from_a_file_or_an_exported_folder(tmp_path) -> None:
    source = student().eval()
    source.image_format = FORMAT
    export_student(source, student_spec(source, FORMAT), tmp_path / "student")
    torch.save(source.model.state_dict(), tmp_path / "weights.pth")
    args = {**STUDENT["model_args"], "num_classes": 5}
    from_file = TimmTeacher(STUDENT["arch"], checkpoint=str(tmp_path / "weights.pth"), img_size=16, model_args=args)
    from_folder = TimmTeacher(f"local-dir:{tmp_path / 'student'}")
    image = torch.rand(2, 3, 16, 16)
    for loaded in (from_file, from_folder):
        assert torch.equal(loaded.eval()(image).logits, source(image).logits)
    assert from_folder.image_format == FORMAT


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RuntimeError, match=r"weights of cait_xxs24_224 cannot be fetched.*pass the file as `checkpoint`"
    ):
        TimmTeacher("cait_xxs24_224")


SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3}
TEACHERS = {
    "deit_tiny_patch16_224": {**SMALL, "patch_size": 4},
    "cait_xxs24_224": {**SMALL, "patch_size": 4, "init_values": 0.1},
    "beit_base_patch16_224": {**SMALL, "patch_size": 4, "init_values": 0.1},
    "vit_small_patch16_dinov3": {**SMALL, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1), "num_heads": (3, 3), "window_size": 4},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)},
    "resnetv2_50": {"layers": (1, 1, 1, 1), "width_factor": 0.125},
}


class Casts(TorchDispatchMode):
    """Notes the shape of every tensor that is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", TEACHERS)
def test_under_autocast_weights_are_cast_once_and_no_bit_changes(arch: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size = None if "convnext" in arch or "resnet" in arch else 32
    network = TimmTeacher(arch, pretrained=False, img_size=size, model_args=TEACHERS[arch])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # no bias is zero, no norm one
    weights, image, layers = copy.deepcopy(network.state_dict()), torch.randn(2, 3, 32, 32), [-1, 0]
    network.image_format = network.image_format._replace(size=(32, 32))
    holder = FrozenTeacher(network, network.image_format._replace(mean=(0.1, 0.2, 0.3)))
    before = holder(image, layers)
    with torch.autocast("cpu", dtype):
        expected = network(holder.convert(image), layers)
        holder(image)
        with Casts() as casts:
            output = holder(image, layers)
    assert torch.equal(output.logits, expected.logits)
    assert all(map(torch.equal, output.features, expected.features))
    assert not {tuple(m.weight.shape) for m in network.modules() if isinstance(m, torch.nn.Linear)} & set(casts.shapes)
    for name, value in network.state_dict().items():
        assert value.dtype == weights[name].dtype
        assert torch.equal(value, weights[name])
    assert torch.equal(holder(image, layers).logits, before.logits)  # float32 again, behind a run in half precision


def test_what_runs_is_compiled_also_behind_a_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    holder = FrozenTeacher(teacher())
    with torch.autocast("cpu", torch.bfloat16):
        holder(torch.zeros(2, 3, 16, 16))
        holder.compile()
        holder(torch.zeros(2, 3, 16, 16))
    assert len(graphs) == 1
