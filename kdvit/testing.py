"""The contracts of a distiller and of a network, a call each, for kdvit's own tests and those of other projects."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdvit.distillers import Distiller
from kdvit.models import Network
from kdvit.seeding import seeded
from kdvit.structures import Layer, OutputShapes, SharedBasis, ViTOutput


def check_distiller(
    distiller: Distiller,
    student: tuple[tuple[int, int, int], ...] | None = None,
    teacher: tuple[tuple[int, int, int], ...] | None = None,
    classes: int = 10,
) -> None:
    """Builds a distiller on random outputs and checks every promise that `DistillationModule` relies on.

    A float32 scalar, finite and repeatable with the same global seed; unweighted; a gradient for the student and its
    own parameters and none for the teacher; no parameter made after `build`; inputs left as they were; target
    probabilities accepted as well as indices; a state dict that goes round; the same loss for maps that `target` has
    reduced, as a cache stores them.

    Args:
        distiller: A fresh distiller, not built yet.
        student: ``(C, H, W)`` of each of its `student_layers`; by default ``(12, 4, 4)`` each.
        teacher: ``(C, H, W)`` of each of its `teacher_layers`; by default ``(12, 4, 4)`` each.
        classes: Number of classes K.

    Raises:
        AssertionError: If a promise is broken; the message says which.

    Examples:
        >>> from kdvit.distillers import LogitDistiller
        >>> check_distiller(LogitDistiller(weight=0.9))
    """
    ours = OutputShapes(classes, student or ((12, 4, 4),) * len(distiller.student_layers))
    theirs = OutputShapes(
        classes if distiller.needs_teacher_logits else None, teacher or ((12, 4, 4),) * len(distiller.teacher_layers)
    )
    distiller.build(ours, theirs)
    _calibrate(distiller, theirs)
    parameters = list(distiller.parameters())
    generator = torch.Generator().manual_seed(0)
    inputs = _random_output(ours, generator, grad=True), _random_output(theirs, generator, grad=False)
    target = torch.arange(4) % classes
    before = copy.deepcopy([_tensors(output) for output in inputs])

    loss = _loss(distiller, inputs, target)
    _promise(isinstance(loss, Tensor) and loss.ndim == 0, "forward must return a scalar tensor")
    _promise(loss.dtype == torch.float32, f"the loss must be float32, it is {loss.dtype}")
    _promise(bool(torch.isfinite(loss)), f"the loss must be finite, it is {loss}")
    again = _loss(distiller, inputs, target)
    _promise(torch.equal(loss, again), "the same inputs and the same global seed must give the same loss")
    _promise(len(list(distiller.parameters())) == len(parameters), "parameters must be made in build, not in forward")
    for output, old in zip(inputs, before, strict=True):
        same = all(torch.equal(a, b) for a, b in zip(_tensors(output), old, strict=True))
        _promise(same, "forward must not edit its inputs in place")

    loss.backward()
    reached = any(x.grad is not None and bool(x.grad.any()) for x in _tensors(inputs[0]))
    _promise(reached, "the student must receive a gradient")
    for layer, feature in zip(distiller.student_layers, inputs[0].features, strict=True):
        used = feature.grad is not None and bool(feature.grad.any())
        _promise(used, f"the student's layer {layer!r} is asked for and must receive a gradient")
    for name, parameter in distiller.named_parameters():
        _promise(parameter.grad is not None, f"the parameter {name} must receive a gradient")

    _check_weight(distiller, inputs, target, loss)
    _check_targets(distiller, inputs, target, loss)
    probabilities = torch.nn.functional.one_hot(target, classes).float()
    _promise(distiller(*inputs, probabilities).ndim == 0, "targets may be probabilities [B, K] (Mixup)")
    for name, value in distiller.metrics(*inputs).items():
        _promise(value.ndim == 0, f"the metric {name} must be a scalar")
    distiller.load_state_dict(distiller.state_dict())


def _loss(distiller: Distiller, inputs: tuple[ViTOutput, ViTOutput], target: Tensor) -> Any:
    with seeded(0):
        return distiller(*inputs, target)


def _calibrate(distiller: Distiller, teacher: OutputShapes) -> None:
    """Gives a distiller random axes of the teacher, if it wants any, as a run does before its first step."""
    if distiller.is_calibrated():
        return
    generator = torch.Generator().manual_seed(0)
    bases = []
    for width, _, _ in teacher.features:
        axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        bases.append(SharedBasis(torch.linspace(2, 0.1, width).double(), axes, torch.ones(width).double()))
    distiller.calibrate(bases)
    _promise(distiller.is_calibrated(), "calibrate must be remembered by is_calibrated, so that a run calls it once")


def check_network(network: Network, layers: Sequence[Layer] = (0, -1)) -> None:
    """Runs a network on random images and checks every promise that training, analysis and export rely on.

    Logits ``[B, K]`` and one map ``[B, C, H, W]`` a layer, in the order asked, ``[B, C, 1, 1]`` for each of
    `token_layers`, which are asked for too; shapes as `output_shapes` says; in eval
    the same for the same image, alone or in a batch; no edit of the input; a gradient for every parameter; deep copies
    and state dicts that go round; bfloat16; an error for a layer that is not there.

    Args:
        network: The network. It is left in eval.
        layers: Layers to ask for, at least two different ones where the network has them.

    Raises:
        AssertionError: If a promise is broken; the message says which.

    Examples:
        >>> from kdvit.models import TimmStudent
        >>> check_network(TimmStudent("vit_tiny_patch16_224", num_classes=3, img_size=32))
    """
    _promise(isinstance(network, Network), f"a network is a subclass of kdvit.models.Network, got {type(network)}")
    network.eval()
    layers = (*layers, *network.token_layers())
    shape = 2, len(network.image_format.mean), *network.image_format.size
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    output = network(image, layers)
    _promise(isinstance(output, ViTOutput), f"forward must return a ViTOutput, got {type(output).__name__}")
    _promise(torch.equal(image, before), "forward must not edit its input in place")
    _check_shapes(network, output, layers)
    with torch.no_grad():
        _check_repeats(network, image, output, layers)
    if output.logits is not None:
        output.logits.square().sum().backward()
        idle = [name for name, each in network.named_parameters() if each.requires_grad and each.grad is None]
        _promise(not idle, f"logits must depend on every parameter, for DDP waits for all gradients; not on {idle}")
        network.zero_grad()
    network.load_state_dict(network.state_dict())
    try:
        network.resolve(network.depth + 99)
    except ValueError:
        return
    raise AssertionError("resolve must raise ValueError for a layer that does not exist")


def _check_shapes(network: Network, output: ViTOutput, layers: Sequence[Layer]) -> None:
    logits, features = output
    _promise(
        logits is None or (logits.ndim == 2 and len(logits) == 2),
        f"logits must be [B, K] or None, got {None if logits is None else list(logits.shape)}",
    )
    _promise(len(features) == len(layers), f"{len(layers)} layers must give as many maps, got {len(features)}")
    shapes = []
    for layer, feature in zip(layers, features, strict=True):
        hint = " (tokens [B, N, C] become a map by x.transpose(1, 2).reshape(B, C, H, W), without class tokens)"
        said = f"layer {layer!r} must give a map [B, C, H, W], got {list(feature.shape)}"
        _promise(feature.ndim == 4 and len(feature) == 2, said + (hint if feature.ndim == 3 else ""))
        fits = layer not in network.token_layers() or feature.shape[2:] == (1, 1)
        _promise(fits, f"layer {layer!r} is one of token_layers and must give [B, C, 1, 1], got {list(feature.shape)}")
        shapes.append((feature.shape[1], feature.shape[2], feature.shape[3]))
    told = network.output_shapes(layers)
    real = OutputShapes(None if logits is None else logits.shape[1], tuple(shapes))
    _promise(told == real, f"output_shapes says {told}, and forward gives {real}")


def _check_repeats(network: Network, image: Tensor, output: ViTOutput, layers: Sequence[Layer]) -> None:
    expected = _tensors(output)

    def same(other: ViTOutput, ours: list[Tensor], tolerance: float = 1e-4) -> bool:
        pairs = zip(ours, _tensors(other), strict=True)
        return all(torch.allclose(a, b.to(a), atol=tolerance, rtol=tolerance) for a, b in pairs)

    _promise(all(bool(x.isfinite().all()) for x in expected), "logits and maps must be finite")
    _promise(same(network(image, layers), expected, 0.0), "in eval, the same images must give the same output")
    alone = network(image[:1], layers)
    _promise(same(alone, [x[:1] for x in expected]), "in eval, an image must give the same alone as in a batch")
    turned = network(image, tuple(reversed(layers)), False)
    _promise(turned.logits is None, "logits=False must give no logits")
    _promise(same(turned, list(reversed(output.features))), "maps must come in the order in which layers are asked for")
    copied = copy.deepcopy(network)
    _promise(same(copied(image, layers), expected), "a deep copy must give the same output")
    half = copied.bfloat16()(image.bfloat16(), layers)
    _promise(all(bool(x.isfinite().all()) for x in _tensors(half)), "in bfloat16, logits and maps must be finite")


def _check_weight(distiller: Distiller, inputs: tuple[ViTOutput, ViTOutput], target: Tensor, loss: Tensor) -> None:
    weight, distiller.weight = distiller.weight, 1000.0
    _promise(
        torch.equal(loss, _loss(distiller, inputs, target)),
        "forward must not apply the weight: DistillationModule does, once",
    )
    distiller.weight = weight


def _check_targets(distiller: Distiller, inputs: tuple[ViTOutput, ViTOutput], target: Tensor, loss: Tensor) -> None:
    maps = tuple(distiller.target(i, feature) for i, feature in enumerate(inputs[1].features))
    for told, before, feature in zip(distiller.fixed_targets(), inputs[1].features, maps, strict=True):
        width = before.shape[1] if told is None else told.width
        _promise(told is None or width < before.shape[1], "a fixed target must be narrower than the teacher's map")
        _promise(feature.shape[1] == width, f"target must give {width} channels, it gives {feature.shape[1]}")
    again = _loss(distiller, (inputs[0], inputs[1]._replace(features=maps)), target)
    _promise(torch.allclose(loss, again, rtol=1e-4), "forward must give the same for what target makes of the maps")


def _promise(kept: bool, message: str) -> None:
    if not kept:
        raise AssertionError(message)


def _random_output(shapes: OutputShapes, generator: torch.Generator, grad: bool) -> ViTOutput:
    def draw(*shape: int) -> Tensor:
        return torch.randn(4, *shape, generator=generator).requires_grad_(grad)

    logits = None if shapes.classes is None else draw(shapes.classes)
    return ViTOutput(logits, tuple(draw(*shape) for shape in shapes.features))


def _tensors(output: ViTOutput) -> list[Tensor]:
    return [*([] if output.logits is None else [output.logits]), *output.features]
