"""ViTKD against its formula in NumPy, and that a resumed run draws the masks of an uninterrupted one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdvit.cli import main
from kdvit.distillers import ViTKDDistiller
from kdvit.structures import OutputShapes, ViTOutput
from tests.runs import QUIET, assert_same_end, demo_fit

TARGET = torch.zeros(3)


def built(width: int, **more: float) -> ViTKDDistiller:
    distiller = ViTKDDistiller(**more)
    distiller.build(OutputShapes(None, ((width, 4, 4),) * 3), OutputShapes(None, ((6, 4, 4),) * 3))
    torch.nn.init.normal_(distiller.mask_token)
    return distiller


def maps(width: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(3, width, 4, 4, generator=generator) + 1 for _ in range(3))


def convolved(x: np.ndarray, layer: torch.nn.Conv2d) -> np.ndarray:
    """Returns a convolution of 3 x 3 with a border of zeros, of maps ``[B, H, W, C]``."""
    weight, padded = layer.weight.detach().double().numpy(), np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((*x.shape[:3], len(weight))) + layer.bias.detach().double().numpy()
    for row in range(3):
        for column in range(3):
            out += padded[:, row : row + x.shape[1], column : column + x.shape[2]] @ weight[:, :, row, column].T
    return out


def normed(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("width", [4, 6])
def test_two_layers_are_mimicked_and_the_deep_one_is_generated(width: int) -> None:
    student, teacher, distiller = maps(width, 0), maps(6, 1), built(width)
    s, t = ([x.double().numpy().transpose(0, 2, 3, 1) for x in of] for of in (student, teacher))
    torch.manual_seed(5)
    mask = distiller.draw_mask(student[2]).numpy().transpose(0, 2, 3, 1)
    assert mask.reshape(3, -1).sum(1).tolist() == [8, 8, 8]

    def lifted(x: np.ndarray, i: int) -> np.ndarray:
        if width == 6:
            return x
        layer = distiller.projectors[i]
        return x @ layer.weight.detach().double().numpy()[:, :, 0, 0].T + layer.bias.detach().double().numpy()

    mimicked = sum(((lifted(s[i], i) - t[i]) ** 2).sum() for i in (0, 1)) / 3
    token = distiller.mask_token.detach().double().numpy()[:, 0, 0]
    hidden = convolved(np.where(mask, token, lifted(normed(s[2]), 2)), distiller.generator[0])
    generated = convolved(np.maximum(hidden, 0), distiller.generator[2])
    missed = (((generated - normed(t[2])) ** 2) * mask).sum() / 3
    torch.manual_seed(5)
    loss = distiller(ViTOutput(None, student), ViTOutput(None, teacher), TARGET)
    assert loss.item() == pytest.approx(3e-5 * mimicked + 3e-6 / 0.5 * missed, rel=1e-5)


def test_the_mask_has_its_share_of_each_image_and_follows_the_global_seed() -> None:
    distiller, feature = built(4, masked=0.25), torch.zeros(5, 4, 4, 4)
    first, second = distiller.draw_mask(feature), distiller.draw_mask(feature)
    assert first.flatten(1).sum(1).tolist() == [4] * 5
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(0)
    third = distiller.draw_mask(feature)
    torch.manual_seed(0)
    assert torch.equal(distiller.draw_mask(feature), third)


def test_what_is_not_masked_counts_only_as_context() -> None:
    distiller = built(6, alpha=0.0)
    student, teacher = maps(6, 0), maps(6, 1)
    torch.manual_seed(5)
    mask = distiller.draw_mask(student[2])
    other = torch.where(mask, torch.randn(3, 6, 4, 4), student[2])  # the masked tokens themselves are not looked at
    losses = []
    for deep in (student[2], other):
        torch.manual_seed(5)
        losses.append(distiller(ViTOutput(None, (*student[:2], deep)), ViTOutput(None, teacher), TARGET).item())
    assert losses[0] == losses[1] > 0


@pytest.mark.slow
def test_a_resumed_run_draws_the_masks_of_an_uninterrupted_one(demo_teacher: str) -> None:
    options = [*QUIET, "--trainer.max_epochs=2", "--ema.decay=0.9", "--trainer.limit_val_batches=2"]
    options += ["--last_checkpoint.every_n_train_steps=26"]
    main([*demo_fit("vitkd", demo_teacher, *options), "--trainer.default_root_dir", "whole"])
    main([*demo_fit("vitkd", demo_teacher, *options), "--trainer.max_steps=26"])
    main(demo_fit("vitkd", demo_teacher, *options))
    assert_same_end("whole", "run")
