"""What a training step does on the device: nothing that waits, the right kernels, and compiled where asked for."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils._python_dispatch import TorchDispatchMode

from kdvit import DistillationModule, load_student
from kdvit.callbacks import BadImages, FirstBatch, NonFiniteGuard, StudentEMA, StudentExport, Throughput, nonfinite
from kdvit.distillers import FeatureDistiller, LiftDistiller, LogitDistiller, WideLastDistiller
from kdvit.models import TimmStudent, WideLastViT, avoid_slow_attention
from kdvit.models.cost import forward_cost
from kdvit.training.optim import OptimizerOptions
from kdvit.training.schedule import ScheduleOptions
from tests.tiny import FORMAT, SizedData, TinyData, student, teacher, trainer

WAITING = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "allclose")
OBJECTIVES = {
    None: {"feature": FeatureDistiller(0.2, loss="spectral", projector="linear")},
    "lift": {"logit": LogitDistiller(0.9), "lift": LiftDistiller(0.2)},
    "wide_last": {"logit": LogitDistiller(0.9), "wide_last": WideLastDistiller(0.2)},
}


def _module(remedy: str | None = "lift", grad_checkpointing: bool = False, **more: Any) -> DistillationModule:
    torch.manual_seed(0)
    given = {
        "optimizer": OptimizerOptions(lr=3e-3, lr_base_batch=None),
        "schedule": ScheduleOptions(warmup_epochs=0),
        "image_format": FORMAT,
        **more,
    }
    network = student(remedy, drop_path_rate=0.2, grad_checkpointing=grad_checkpointing)
    return DistillationModule(network, teacher=teacher(), distillers=copy.deepcopy(OBJECTIVES[remedy]), **given)


class Calls(TorchDispatchMode):
    """Notes the name of every operation on what a GPU would hold: all but numbers, and what is made of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.overloadpacket.__name__, [each for each in args if isinstance(each, torch.Tensor)]
        on_host = name == "lift_fresh" or (given and all(hasattr(each, "on_host") for each in given))
        result = func(*args, **(kwargs or {}))
        if on_host and isinstance(result, torch.Tensor):
            result.on_host = True  # type: ignore[attr-defined]
        if not on_host:
            self.names.append(name)
        return result


class Steps(pl.Callback):
    """Lists the operations of each step, from its start to that of the next: progress bar, logs and the next batch."""

    def __init__(self) -> None:
        self.calls: list[Calls] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.on_validation_start()
        self.calls.append(Calls().__enter__())

    def on_validation_start(self, *_: Any) -> None:
        if self.calls:
            self.calls[-1].__exit__(None, None, None)


class MixedData(SizedData):
    """Batches that Mixup mixes."""

    def __init__(self, batch_size: int, size: int) -> None:
        super().__init__(size, batch_size=batch_size, mixup=0.8, mean=FORMAT.mean, std=FORMAT.std)


@pytest.mark.parametrize(
    ("remedy", "data", "precision"),
    [
        (None, TinyData, "32-true"),
        ("lift", TinyData, "bf16-mixed"),
        ("wide_last", TinyData, "32-true"),
        ("wide_last", MixedData, "bf16-mixed"),
    ],
)
def test_only_logged_steps_may_wait_for_the_device(
    remedy: str | None, data: Any, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonfinite, "FREE_TO_READ", ())  # as on a GPU
    log = pl.LightningModule.log

    def logged(module: Any, name: str, value: Any, prog_bar: bool = False, **more: Any) -> None:
        assert isinstance(value, torch.Tensor) or not prog_bar, name  # Lightning moves numbers to the device
        log(module, name, value, prog_bar, **more)

    monkeypatch.setattr(pl.LightningModule, "log", logged)
    steps = Steps()
    callbacks = [steps, Throughput(), StudentEMA(0.9), NonFiniteGuard(skip_steps=1), BadImages()]
    logging = {"logger": CSVLogger(tmp_path), "enable_progress_bar": True, "log_every_n_steps": 4}
    run = trainer(tmp_path, callbacks=callbacks, precision=precision, limit_val_batches=0, **logging)
    run.fit(_module(remedy), datamodule=data(batch_size=16, size=112))
    steps.on_validation_start()
    names = [each.names for each in steps.calls]
    assert len(names) == 7
    for step in (names[i] for i in (0, 1, 2, 4, 5, 6)):
        assert "_fused_adamw_" in step
        assert {"convolution", "convolution_backward"} <= set(step)
        assert [name for name in step if name in WAITING] == []
    assert "_local_scalar_dense" in names[3]  # which may


def test_no_parameter_is_without_gradient() -> None:
    for remedy in OBJECTIVES:
        module = _module(remedy)
        module.trainer = trainer(".", log_every_n_steps=10**9)
        module.training_step(next(iter(TinyData().train_dataloader())), 0).backward()
        assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("precision", "fused"), [("32-true", True), ("bf16-mixed", False), ("bf16-true", False), ("64-true", True)]
)
def test_fused_attention_gives_way_where_its_backward_is_slow(precision: str, fused: bool, tmp_path: Path) -> None:
    module = _module()
    trainer(tmp_path, limit_train_batches=1, precision=precision).fit(module, datamodule=TinyData())
    assert {block.attn.fused_attn for block in module.student.model.blocks} == {fused}


def test_fused_attention_stays_on_gpus() -> None:
    network = student()
    avoid_slow_attention(network, torch.device("cuda"), torch.bfloat16)
    assert all(block.attn.fused_attn for block in network.model.blocks)


@pytest.mark.parametrize(
    ("options", "fused"),
    [({}, True), ({"args": {"fused": False}}, False), ({"args": {"foreach": True}}, None), ({"name": "lamb"}, None)],
)
def test_the_optimizer_is_fused_where_it_can_be(options, fused: bool | None, tmp_path: Path) -> None:
    module = _module(optimizer=OptimizerOptions(lr_base_batch=None, **options))
    run = trainer(tmp_path, limit_train_batches=1, gradient_clip_val=1.0)
    run.fit(module, datamodule=TinyData())
    assert run.optimizers[0].defaults.get("fused") is fused


def test_gradients_can_be_clipped_in_mixed_precision(tmp_path: Path) -> None:
    class Norm(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-2)

    options = {"callbacks": [Norm()], "gradient_clip_val": 1e-3, "precision": "bf16-mixed"}
    run = trainer(tmp_path, limit_train_batches=1, **options)
    run.fit(_module(), datamodule=TinyData())
    assert not run.optimizers[0].defaults.get("fused")


def test_fp16_gradients_are_unscaled_before_they_are_logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pl.Trainer, "scaler", object())  # as 16-mixed has it, which needs a GPU
    run = trainer(tmp_path, limit_train_batches=1)
    run.fit(_module(), datamodule=TinyData())
    assert run.optimizers[0].defaults["fused"] is None


class StopAfter(pl.Callback):
    """Stops a run after so many epochs, as a time limit would."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets torch.compile trace without a C++ compiler, and lists the graphs that ran."""
    graphs: list[Any] = []
    ahead = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return ahead(graph, inputs)  # with its random numbers kept for what is computed again, unlike graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compile", "graphs", "again"),
    [("student", 1, True), ("teacher", 1, False)],  # both: see the slow tests below
)
def test_compiled_networks_train_as_others_do(
    compile: Any, graphs: int, again: bool, eager: list[Any], tmp_path: Path
) -> None:
    expected, module = _module(), _module(compile=compile, grad_checkpointing=again)
    for each in (expected, module):
        drawing = {"callbacks": [FirstBatch(4)], "logger": TensorBoardLogger(tmp_path)}
        trainer(tmp_path, limit_val_batches=0, **drawing).fit(each, datamodule=TinyData())
    assert len(eager) == graphs
    assert list(module.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("both", "none"), ("none", "both")])
def test_a_checkpoint_goes_on_compiled_or_not(before: Any, after: Any, eager: list[Any], tmp_path: Path) -> None:
    first = _module(compile=before)
    run = trainer(tmp_path, max_epochs=2, callbacks=[StudentEMA(0.9), StudentExport(), StopAfter(1)])
    run.fit(first, datamodule=TinyData())
    run.save_checkpoint(tmp_path / "epoch1.ckpt")
    image = torch.randn(2, 3, 16, 16)
    first.eval()
    torch.testing.assert_close(load_student(tmp_path / "epoch1.ckpt")(image).logits, first(image))
    torch.testing.assert_close(load_student(tmp_path / "student")(image).logits, first(image))
    assert load_student(tmp_path / "epoch1.ckpt", ema=True)(image).logits.shape == (2, 5)

    second = _module(compile=after)
    run = trainer(tmp_path, max_epochs=2, callbacks=[StudentEMA(0.9), StudentExport()])
    run.fit(second, datamodule=TinyData(), ckpt_path=tmp_path / "epoch1.ckpt", weights_only=True)
    assert run.global_step == 10


@pytest.mark.slow
def test_inductor_compiles_both_networks(tmp_path: Path) -> None:
    torch._dynamo.reset()
    expected, module = _module(), _module(compile="both")
    for each in (expected, module):
        for layer in each.student.modules():
            if hasattr(layer, "drop_prob"):
                layer.drop_prob = 0.0
        trainer(tmp_path, limit_val_batches=0).fit(each, datamodule=TinyData())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("remedy", OBJECTIVES)
def test_activations_computed_again_change_no_gradient_and_no_file(remedy: str | None) -> None:
    found = []
    for again in (False, True):
        module = _module(remedy, grad_checkpointing=again).double()
        module.trainer = trainer(".", log_every_n_steps=10**9)
        batch = next(iter(TinyData().train_dataloader()))
        torch.manual_seed(1)  # of stochastic depth
        module.training_step(batch._replace(image=batch.image.double()), 0).backward()
        found.append(({name: each.grad for name, each in module.named_parameters()}, module.spec(), module.student))
    (kept, spec, one), (again, same, other) = found
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-10, atol=1e-14)
    assert spec == same
    assert forward_cost(other).kept_bytes < 0.4 * forward_cost(one).kept_bytes


def test_rotary_positions_reach_blocks_that_are_computed_again() -> None:
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    networks = [
        WideLastViT("vit_small_patch16_dinov3", 64, img_size=16, model_args=sizes, grad_checkpointing=again).double()
        for again in (False, True)
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for network in networks:
        network(image, ["wide_last", 0], logits=False).features[0].square().sum().backward()
    one, other = (dict(network.named_parameters()) for network in networks)
    for name, each in one.items():
        torch.testing.assert_close(other[name].grad, each.grad, rtol=1e-10, atol=1e-14)


def test_a_network_that_cannot_compute_activations_again_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"grad_checkpointing: timm cannot compute the activations of crossvit_tiny_240"
    ):
        TimmStudent("crossvit_tiny_240", grad_checkpointing=True)


def test_compiling_a_teacher_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compile is 'both', and teacher is null\. Give a teacher, or compile"):
        DistillationModule(student(), image_format=FORMAT, compile="both")
