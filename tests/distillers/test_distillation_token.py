"""Students with two heads: each learns from its own labels, as in timm's task, and both predict together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.task import TokenDistillationTask
from torch import nn

from kdvit import DistillationModule, load_student
from kdvit.cli import main
from kdvit.distillers import DistillationTokenDistiller, LogitDistiller
from kdvit.models import TimmNetwork
from kdvit.structures import Batch
from tests.runs import SHORT, demo_fit
from tests.tiny import FORMAT, student, teacher

TWO_HEADS = {"arch": "deit_tiny_distilled_patch16_224"}


def module_of(network: TimmNetwork, master: TimmNetwork, **distillers: Any) -> DistillationModule:
    for each in (network, master):
        each.image_format = FORMAT
    return DistillationModule(network, master, distillers, task_weight=0.5, image_format=FORMAT).train()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6) % 5, torch.arange(6))


@pytest.mark.parametrize("remedy", [None, "wide_last"])
@pytest.mark.parametrize(("mode", "temperature"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_losses_gradients_and_predictions_are_those_of_timms_task(mode: Any, temperature: float, remedy: Any) -> None:
    network, master = student(remedy, **TWO_HEADS), teacher()
    theirs = copy.deepcopy(network.model)
    theirs.pretrained_cfg = {**theirs.pretrained_cfg, "mean": FORMAT.mean, "std": FORMAT.std}
    master.model.pretrained_cfg = {**master.model.pretrained_cfg, "mean": FORMAT.mean, "std": FORMAT.std}
    task = TokenDistillationTask(
        theirs,
        copy.deepcopy(master.model),
        nn.CrossEntropyLoss(),
        distill_type=mode,
        distill_loss_weight=0.5,
        task_loss_weight=0.5,
        temperature=temperature,
        verbose=False,
    ).train()
    module = module_of(network, master, token=DistillationTokenDistiller(0.5, mode, temperature))
    given = batch()
    expected = task(given.image, given.target)
    output = module.student(given.image, module.distillers.student_layers)
    terms = module.terms(output, module.distillers.ask(module.teachers, given), given.target)
    torch.testing.assert_close(output.logits, expected["output"])
    torch.testing.assert_close(terms["task"], expected["task_loss"])
    torch.testing.assert_close(terms["token"], expected["distill_loss"])
    loss = sum(weight * terms[name] for name, weight in module.weights().items())
    torch.testing.assert_close(loss, expected["loss"])
    loss.backward()
    expected["loss"].backward()
    gradients = {name: each.grad for name, each in theirs.named_parameters()}
    assert all(each is not None for each in gradients.values())
    for name, parameter in network.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    module.eval()
    theirs.eval()
    assert torch.equal(module(given.image), theirs(given.image))
    assert torch.equal(network(given.image, ["distillation_logits"]).logits, theirs(given.image))


def test_without_the_objective_both_heads_learn_together() -> None:
    network = student(**TWO_HEADS)
    module = module_of(network, teacher(), logit=LogitDistiller(0.5))
    output = module.student(batch().image, module.distillers.student_layers)
    assert torch.equal(output.logits, copy.deepcopy(network.model).eval()(batch().image))


def test_a_student_with_one_head_is_refused_in_one_sentence(demo_teacher: str, capsys) -> None:
    said = "no layer 'distillation_logits': it has no distillation head; take one that has, such as deit_tiny_distilled"
    with pytest.raises(ValueError, match=rf"distillers\.token: TimmStudent has {said}_patch16_224\.$"):
        module_of(student(), teacher(), token=DistillationTokenDistiller())
    with pytest.raises(SystemExit) as end:
        main([*demo_fit("distillation_token", demo_teacher, *SHORT), "--model.student.arch", "deit_tiny_patch16_224"])
    assert end.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_run_deploys_the_mean_of_both_heads(demo_teacher: str) -> None:
    main([*demo_fit("distillation_token", demo_teacher, *SHORT)])
    deployed = load_student("run/student")
    image = torch.randn(2, 3, 8, 8)
    read: list[torch.Tensor] = []
    for head in (deployed.model.head, deployed.model.head_dist):
        head.register_forward_hook(lambda module, args, output: read.append(output))
    torch.testing.assert_close(deployed(image).logits, torch.stack(read).mean(0))
    assert not torch.equal(read[0], read[1])
