"""Training: the loss, the log, the teacher's peace, and what is refused."""

from __future__ import annotations

import copy
import math
import re
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from kdvit import DistillationModule, load_student
from kdvit.callbacks import StudentEMA, StudentExport, TeacherScores
from kdvit.distillers import Distiller, FeatureDistiller, LiftDistiller, LogitDistiller, WideLastDistiller
from kdvit.models import Network, TimmStudent
from kdvit.runtime.length import RunEnd
from kdvit.structures import Batch, ImageFormat, ViTOutput
from kdvit.training.optim import OptimizerOptions, global_batch, highest_rate, parameter_groups, run_length
from kdvit.training.schedule import RunLength, ScheduleOptions
from tests.tiny import FORMAT, STUDENT, WIDE, TinyData, student, teacher, trainer

FAST = {"optimizer": OptimizerOptions(lr=3e-3, lr_base_batch=None), "schedule": ScheduleOptions(warmup_epochs=0)}


def _module(remedy: str | None = "lift", **more) -> DistillationModule:
    torch.manual_seed(0)
    distiller = {
        None: FeatureDistiller(0.2, projector="linear"),
        "lift": LiftDistiller(0.2),
        "wide_last": WideLastDistiller(0.2),
    }
    objectives = {"logit": LogitDistiller(0.9), "feature": distiller[remedy]}
    given = {"teacher": teacher(drop_path_rate=0.3), "distillers": objectives, "task_weight": 0.1, **FAST, **more}
    return DistillationModule(student(remedy), image_format=FORMAT, **given)


def test_the_loss_is_the_weighted_sum_of_independent_terms() -> None:
    module = _module("lift", label_smoothing=0.1)
    module.trainer = trainer(".", log_every_n_steps=10**9)
    image, target = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    loss = module.training_step(Batch(image, target, target), 0)
    ours = module.student(image, ["lift"])
    theirs = module.teacher(image, [-1])
    task = F.cross_entropy(ours.logits, target, label_smoothing=0.1)
    divergence = F.kl_div(ours.logits.log_softmax(1), theirs.logits.softmax(1), reduction="batchmean")
    expected = 0.1 * task + 0.9 * divergence + 0.2 * F.mse_loss(ours.features[0], theirs.features[0])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_each_objective_gets_the_layers_that_it_asked_for_from_one_pass() -> None:
    class Asks(Distiller):
        def __init__(self, ours: tuple, theirs: tuple) -> None:
            super().__init__()
            self.student_layers, self.teacher_layers = ours, theirs

        def forward(self, student: ViTOutput, teacher: ViTOutput, target: torch.Tensor) -> torch.Tensor:
            self.given = student, teacher
            return student.logits.mean()

    asked = {"two": Asks((1, "lift"), (0, -1)), "none": Asks((), ()), "one": Asks((0.5,), (2,))}
    module = _module(distillers=asked)
    image, passes = torch.randn(2, 3, 16, 16), []
    for network in (module.student, module.teacher.network):
        network.register_forward_hook(lambda network, *_: passes.append(network))
    module.trainer = trainer(".", log_every_n_steps=10**9)
    module.training_step(Batch(image, torch.tensor([0, 1]), torch.tensor([0, 1])), 0)
    assert len(passes) == 2
    request = module.distillers.only_request()
    assert ([each.layer for each in request.maps], request.logits) == ([0, 3, 2], True)
    for each in asked.values():
        ours, theirs = module.student(image, each.student_layers), module.teacher(image, each.teacher_layers)
        for given, expected in zip(each.given, (ours, theirs), strict=True):
            torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_losses_get_student_and_teacher_in_one_type(precision: str, tmp_path) -> None:
    class Asks(Distiller):
        student_layers = teacher_layers = (-1,)
        needs_teacher_logits = True
        types: ClassVar[set[torch.dtype]] = set()

        def forward(self, student: Any, teacher: Any, target: torch.Tensor) -> torch.Tensor:
            self.types.update(each.dtype for output in (student, teacher) for each in (output[0], *output[1]))
            return student.logits.square().mean()

    module = _module(distillers={"odd": Asks()})
    trainer(tmp_path, precision=precision, limit_train_batches=2).fit(module, datamodule=TinyData())
    assert Asks.types == {torch.float64 if precision == "64-true" else torch.float32}


def test_an_error_of_the_last_export_does_not_hide_what_has_ended_the_run(tmp_path, monkeypatch, caplog) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ZeroDivisionError("the device is lost")

    def write(*args: Any) -> None:
        raise RuntimeError("nothing can be copied from it")

    monkeypatch.setattr(StudentExport, "_write", write)
    with pytest.raises(ZeroDivisionError, match="the device is lost"):
        trainer(tmp_path, callbacks=[Fails(), StudentExport()]).fit(_module(), datamodule=TinyData())
    assert "The student could not be written: nothing can be copied from it" in caplog.text


@pytest.mark.parametrize("remedy", [None, "lift", "wide_last"])
def test_a_run_learns_and_leaves_the_teacher_alone(remedy: str | None, tmp_path) -> None:
    module = _module(remedy, task_weight=2.0)
    network = module.teacher.network
    before = copy.deepcopy(network.state_dict())
    modes = []
    network.register_forward_pre_hook(lambda *_: modes.append(any(m.training for m in network.modules())))
    ema = StudentEMA(0.9)
    data = TinyData()
    run = trainer(tmp_path, max_epochs=15, callbacks=[ema, TeacherScores(), StudentExport()])
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "end.ckpt")

    assert run.callback_metrics["val/acc1"] > 0.8
    assert run.callback_metrics["val/acc1_ema"] > 0.5
    assert modes
    assert not any(modes)
    module.train()
    assert not any(m.training for m in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(name.startswith("teacher") for name in module.state_dict())
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert _largest_tensors(checkpoint).isdisjoint(_fingerprints(before.values()))
    loaded, averaged = load_student(tmp_path / "end.ckpt"), load_student(tmp_path / "end.ckpt", ema=True)
    image = torch.randn(2, 3, 16, 16)
    module.eval()
    assert torch.equal(loaded(image).logits, module(image))
    assert torch.equal(load_student(tmp_path / "student")(image).logits, module(image))
    assert not torch.equal(averaged(image).logits, module(image))


def _fingerprints(tensors) -> set[float]:
    return {tensor.double().sum().item() for tensor in tensors if tensor.numel() > 200}


def _largest_tensors(value) -> set[float]:
    if isinstance(value, torch.Tensor):
        return _fingerprints([value])
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return set().union(*(_largest_tensors(child) for child in children))


@pytest.mark.parametrize("remedy", [None, "lift", "wide_last"])
def test_every_trainable_parameter_gets_a_gradient(remedy: str | None) -> None:
    module = _module(remedy)
    module.trainer = trainer(".", log_every_n_steps=10**9)
    target = torch.tensor([0, 1, 2, 3])
    module.training_step(Batch(torch.randn(4, 3, 16, 16), target, target), 0).backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_losses_are_float32_at_every_precision(precision: str, tmp_path) -> None:
    seen = []

    class Spy(Distiller):
        def forward(self, student: ViTOutput, teacher: ViTOutput, target: torch.Tensor) -> torch.Tensor:
            loss = F.mse_loss(student.logits @ student.logits.T, teacher.logits @ teacher.logits.T)
            seen.append((student.logits.dtype, teacher.logits.dtype, loss.dtype))
            return loss

    module = _module(distillers={"spy": Spy()})
    trainer(tmp_path, precision=precision, max_steps=2).fit(module, datamodule=TinyData())
    assert set(seen) == {(torch.float32,) * 3}


def test_the_log_has_every_term_raw_and_weighted(tmp_path) -> None:
    module = _module("lift")
    run = trainer(tmp_path, log_every_n_steps=1)
    run.fit(module, datamodule=TinyData())
    logged = run.logged_metrics | run.callback_metrics
    for name, weight in {"task": 0.1, "logit": 0.9, "feature": 0.2}.items():
        assert logged[f"train/{name}_weighted"] == pytest.approx(weight * logged[f"train/{name}"].item(), rel=1e-6)
    total = sum(logged[f"train/{name}_weighted"] for name in ("task", "logit", "feature"))
    assert logged["train/loss"] == pytest.approx(total.item(), rel=1e-6)
    others = {f"train/{name}" for name in ("acc1", "lr", "grad_norm")}
    others |= {f"train/feature_{name}" for name in ("cosine", "explained_variance", "r2", "r2_median")}
    assert others | {"val/acc1", "val/loss"} <= set(logged)


def test_a_teacher_without_logits_stops_early() -> None:
    module = _module("lift", distillers={"lift": LiftDistiller(teacher_layer=1)})
    module.trainer = trainer(".", log_every_n_steps=10**9)
    ran = []
    for i, block in enumerate(module.teacher.network.model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    target = torch.tensor([0, 1])
    module.training_step(Batch(torch.randn(2, 3, 16, 16), target, target), 0)
    assert ran == [0, 1]


def test_the_learning_rate_follows_the_global_batch_and_timms_schedule(tmp_path) -> None:
    rates = []

    class Record(DistillationModule):
        def on_train_epoch_start(self) -> None:
            rates.append(self.optimizers().param_groups[0]["lr"])

    module = Record(student(), image_format=FORMAT, schedule=ScheduleOptions(warmup_epochs=2, warmup_lr=0.0))
    run = trainer(tmp_path, max_epochs=4, accumulate_grad_batches=2)
    run.fit(module, datamodule=TinyData())
    assert global_batch(run) == 32
    peak = 5e-4 * 32 / 512
    half = 1e-5 + (peak - 1e-5) * 0.5  # cosine in the middle of the run
    assert rates[:3] == pytest.approx([0.0, peak / 2, half])
    assert len(rates) == 4


def test_biases_norms_and_exempt_names_are_not_decayed() -> None:
    network = student("lift")
    plain, decayed = parameter_groups([network], 0.05)
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for parameter in plain["params"]:
        name = names[id(parameter)]
        assert parameter.ndim <= 1 or name.endswith(("pos_embed", "cls_token"))
    for parameter in decayed["params"]:
        assert parameter.ndim > 1
        assert not names[id(parameter)].endswith(("pos_embed", "cls_token"))
    assert len(plain["params"]) + len(decayed["params"]) == len(names)
    plain, decayed = parameter_groups([network], 0.05, decay_embeddings=True)
    assert all(parameter.ndim <= 1 for parameter in plain["params"])
    assert {"model.pos_embed", "model.cls_token"} < {names[id(parameter)] for parameter in decayed["params"]}


@pytest.mark.parametrize(("remedy", "depth"), [(None, 3), ("wide_last", 3)])
def test_layers_learn_by_rates_that_fall_from_the_head_down(remedy: str | None, depth: int) -> None:
    network = student(remedy)
    options = OptimizerOptions(
        lr=1.0, lr_base_batch=None, args={"layer_decay": 0.5, "layer_decay_min_scale": 0.1, "filter_bias_and_bn": False}
    )
    distiller = torch.nn.Linear(2, 2)
    groups = parameter_groups([network, distiller], 0.05, **options.grouping)
    optimizer = options.build(groups, global_batch=1)
    ScheduleOptions(warmup_epochs=0, name="constant").build(optimizer, RunLength(2)).set(1, 0)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in network.named_parameters()}
    for name, rate in found.items():  # BEiT: layer i of n learns by decay ** (n + 1 - i), the embedding is layer 0
        block = re.match(r"model.blocks.(\d+)", name)
        outside = {"model.head": 0, "model.norm": 1}  # timm counts the norm to the last block
        above = depth - int(block[1]) if block else outside.get(name.rpartition(".")[0], depth + 1)
        assert rate == pytest.approx(max(0.5**above, 0.1)), name
    assert [rates[id(parameter)] for parameter in distiller.parameters()] == [1.0, 1.0]
    assert highest_rate(optimizer) == 1.0
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    undecayed = {name for name, parameter in network.named_parameters() if decays[id(parameter)] == 0}
    assert undecayed == {"model.pos_embed", "model.cls_token"}
    with pytest.raises(ValueError, match="layer_decay has no effect on a Network, whose layers timm does not know"):
        parameter_groups([Network(1, FORMAT)], 0.05, layer_decay=0.5)


def test_raw_and_averaged_scores_differ_by_the_known_average(tmp_path) -> None:
    module = DistillationModule(student(), image_format=FORMAT, **FAST)
    start = copy.deepcopy(module.student.state_dict())
    ema = StudentEMA(0.75)
    run = trainer(tmp_path, max_steps=1, callbacks=[ema])
    run.fit(module, datamodule=TinyData())
    average = ema.state_dict()["student"]
    for name, value in module.student.state_dict().items():
        torch.testing.assert_close(average[name], 0.75 * start[name] + 0.25 * value)


def test_a_run_says_what_it_converts_at_its_start(tmp_path, caplog) -> None:
    finer = teacher(model_args={**WIDE, "patch_size": 2})
    module = _module(distillers={"map": FeatureDistiller(projector="linear")}, teacher=finer)
    with caplog.at_level("INFO"):
        trainer(tmp_path, fast_dev_run=True).fit(module, datamodule=TinyData())
    assert "the finer is resized. [C, H, W] in distillers.map: ((16, 4, 4),) and ((24, 8, 8),)" in caplog.text
    assert "converted to its own mean and standard deviation" in caplog.text


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_the_images_of_a_module_are_those_of_its_data_or_are_told(run: str, tmp_path, caplog) -> None:
    class Silent(TinyData):
        image_format = None

    module = DistillationModule(student(), **FAST)  # of ImageNet's mean and std, as its architecture
    with pytest.raises(
        ValueError, match=r"gives images of size, mean and std .*0\.5.* takes .*0\.485.* image_format=data"
    ):
        getattr(trainer(tmp_path, fast_dev_run=True), run)(module, datamodule=TinyData())
    with caplog.at_level("INFO"):
        getattr(trainer(tmp_path, fast_dev_run=True), run)(module, datamodule=Silent())
    (line,) = [each for each in caplog.messages if "has no image_format" in each]
    assert line.startswith("The data has no image_format: its images are taken for those of ((16, 16), (0.485, ")


def test_a_ready_made_timm_model_is_wrapped() -> None:
    module = DistillationModule(student().model, teacher=teacher().model, distillers={"logit": LogitDistiller()})
    assert module(torch.randn(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"teacher": None}, "distiller 'logit' needs a teacher, and teacher is null"),
        ({"distillers": {}}, "nothing is distilled from it"),
        *(
            ({"distillers": {name: LogitDistiller()}}, f"distillers: '{name}' cannot be the name of one")
            for name in ("task", "loss", "cait.logit", "metrics")
        ),
        ({"task_weight": -0.1}, "task_weight must be 0 or more, got -0.1"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"class_names": list("abc")}, "student has 5 classes and the data 3. Set num_classes of the student to 3"),
        ({"teacher": teacher(num_classes=7)}, "distillers.logit: .*student has 5 classes and the teacher 7"),
        ({"distillers": {"wide": WideLastDistiller()}}, "distillers.wide: .*no layer 'wide_last'"),
        ({"distillers": {"far": FeatureDistiller(teacher_layers=[9])}}, "distillers.far: .*no layer 9"),
        (
            {"distillers": {"plain": FeatureDistiller()}},
            "distillers.plain: .*16 channels wide and the teacher's layer -1 24",
        ),
    ],
)
def test_contradictions_are_refused_before_training(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _module(**change)


def test_a_student_of_another_size_than_the_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes images of \(16, 16\) pixels and the data gives \(32, 32\)"):
        DistillationModule(TimmStudent(**STUDENT), image_format=ImageFormat((32, 32), FORMAT.mean, FORMAT.std))


def test_a_module_that_is_no_network_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no forward_intermediates"):
        DistillationModule(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("processes", [1, 2])
def test_steps_are_counted_for_loaders_that_lightning_deals_out(processes: int) -> None:
    run = SimpleNamespace(
        datamodule=TinyData(),  # 80 images in batches of 16, of which Lightning gives each process its share
        world_size=processes,
        callbacks=[RunEnd(None, has_epochs=True)],
        max_steps=-1,
        max_epochs=4,
        limit_train_batches=1.0,
        accumulate_grad_batches=1,
    )
    assert run_length(run, by_steps=True).steps_an_epoch == math.ceil(5 / processes)
