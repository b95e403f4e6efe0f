"""The scores of a classifier, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdvit.training.metrics import classification_scores


@pytest.mark.parametrize("classes", [2, 5, 6, 10])
def test_scores_are_those_by_hand_and_acc5_comes_with_six_classes(classes: int) -> None:
    logits, target = torch.randn(60, classes), torch.randint(classes, (60,))
    scores = classification_scores(classes)
    for part in (slice(0, 40), slice(40, 60)):
        scores.update(logits[part], target[part])
    values, right = logits.double().numpy(), target.numpy()
    ranks = (values > values[np.arange(60), right][:, None]).sum(1)
    losses = np.log(np.exp(values).sum(1)) - values[np.arange(60), right]
    expected = {"acc1": (ranks == 0).mean(), "acc5": (ranks < 5).mean(), "loss": losses.mean()}
    if classes < 6:
        assert expected.pop("acc5") == 1
    assert {name: value.item() for name, value in scores.compute().items()} == pytest.approx(expected, rel=1e-5)
