"""A number that is not finite stops the run, or its step is skipped; the weights stay good."""

from __future__ import annotations

import csv
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from kdvit import DistillationModule, Distiller, load_student
from kdvit.callbacks import NonFiniteError, NonFiniteGuard, StudentEMA, nonfinite
from kdvit.data import Digits
from kdvit.distillers import LiftDistiller, LogitDistiller
from kdvit.structures import Batch
from kdvit.training.optim import OptimizerOptions, parameter_groups
from kdvit.training.schedule import ScheduleOptions
from tests.runs import SHORT, fit
from tests.several import PATHS
from tests.tiny import FORMAT, TinyData, student, teacher, trainer


class Breaks(Distiller):
    """A logit loss that breaks at some of its calls, in value or in gradient alone, on one rank."""

    student_layers = teacher_layers = ()

    def __init__(self, at: list[int], gradient: bool = False, rank: int = 0) -> None:
        super().__init__()
        self.at, self.gradient, self.calls = at, gradient, 0
        self.active = int(os.environ.get("LOCAL_RANK", 0)) == rank

    def forward(self, student: Any, teacher: Any, target: Tensor) -> Tensor:
        self.calls += 1
        loss = student.logits.square().mean()
        if self.active and self.calls - 1 in self.at:
            return loss + (0 * loss).sqrt() if self.gradient else loss * torch.nan
        return loss


def _module(distiller: Distiller | None = None, **more: Any) -> DistillationModule:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "teacher": teacher(),
        "distillers": {"lift": LiftDistiller(0.2), "odd": distiller or LogitDistiller(0.5)},
        "optimizer": OptimizerOptions(lr=3e-3, lr_base_batch=None),
        "schedule": ScheduleOptions(warmup_epochs=0),
        "image_format": FORMAT,
    }
    return DistillationModule(student("lift"), **{**given, **more})


def _same_weights(one: DistillationModule, other: DistillationModule) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.fixture(params=["read at once", "read late"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Reads the verdict as on a CPU, and as on a GPU."""
    if request.param == "read late":
        monkeypatch.setattr(nonfinite, "FREE_TO_READ", ())
    return request.param


@pytest.mark.parametrize("gradient", [False, True], ids=["term", "gradient"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_steps_left_out_are_as_if_they_had_not_been(reading: str, accumulated: int, gradient: bool) -> None:
    bad = [1, 2, 5, 9]
    module = _module(Breaks(bad, gradient))
    guard = NonFiniteGuard(skip_steps=4)
    run = trainer(".", callbacks=[guard, StudentEMA(0.9)], accumulate_grad_batches=accumulated, gradient_clip_val=1.0)
    run.fit(module, datamodule=TinyData(batch_size=8))

    expected = _module(Breaks([]))
    groups = parameter_groups([expected.student, expected.distillers], 0.05)
    optimizer = expected.optimizer_options.build(groups, 1, fused=True)
    batches = list(TinyData(batch_size=8).train_dataloader())
    steps = [range(i, i + accumulated) for i in range(0, 10, accumulated)]
    good = [step for step in steps if not set(step) & set(bad)]
    for step in good:
        optimizer.zero_grad()
        for batch in (batches[i] for i in step):
            output = expected.student(batch.image, expected.distillers.student_layers)
            terms = expected.terms(output, expected.distillers.ask(expected.teachers, batch), batch.target)
            (
                torch.stack([expected.weights()[name] * term for name, term in terms.items()]).sum() / accumulated
            ).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
    _same_weights(module, expected)
    assert guard.state_dict() == {"skipped": len(steps) - len(good)}
    assert run.global_step == len(steps)
    assert len(list(Path("nonfinite").iterdir())) == len(steps) - len(good)


@pytest.mark.parametrize("name", ["lamb", "sgd"])
def test_any_optimizer_leaves_a_step_out(name: str, reading: str) -> None:
    module = _module(Breaks([0, 1, 2, 3, 4]), optimizer=OptimizerOptions(name=name, lr=3e-3, lr_base_batch=None))
    trainer(".", callbacks=[NonFiniteGuard(skip_steps=5)]).fit(module, datamodule=TinyData())
    _same_weights(module, _module(Breaks([])))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")  # TinyData starts its epoch again
@pytest.mark.parametrize("at", [1, 4], ids=["in an epoch", "last of an epoch"])
def test_a_run_that_stops_keeps_the_weights_before_it(at: int, reading: str) -> None:
    def run(module: DistillationModule, resumed: str | None = None) -> pl.Trainer:
        made = trainer(".", max_epochs=2, callbacks=[NonFiniteGuard()])
        made.fit(module, datamodule=TinyData(), ckpt_path=resumed, weights_only=True if resumed else None)
        return made

    with pytest.raises(
        NonFiniteError, match=rf"^At step {at} of epoch 0, loss term 'odd' is nan \(batch {at}, training"
    ):
        run(_module(Breaks([at])))
    saved = torch.load(f"nonfinite/step_{at}.ckpt", weights_only=True)
    before = _module(Breaks([]))
    trainer(".", limit_train_batches=at, limit_val_batches=0).fit(before, datamodule=TinyData())
    for name, value in before.state_dict().items():
        assert torch.equal(saved["state_dict"][name], value), name
    assert saved["global_step"] == at + (2 if reading == "read late" and at == 1 else 1)
    assert run(_module(Breaks([])), f"nonfinite/step_{at}.ckpt").global_step == 10


class StopsAt(pl.Callback):
    """Saves and leaves at the end of a step, as a preemption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint("last.ckpt")
            raise KeyboardInterrupt


def test_no_checkpoint_lies_behind_a_step_that_stops_the_run(reading: str) -> None:
    with pytest.raises(NonFiniteError, match="At step 1 of epoch 0"):
        trainer(".", callbacks=[StopsAt(2), NonFiniteGuard()]).fit(_module(Breaks([1])), datamodule=TinyData())
    assert not Path("last.ckpt").exists()


def test_the_weights_of_a_run_that_stops_are_no_best(reading: str) -> None:
    best = ModelCheckpoint("checkpoints", monitor="val/acc1", filename="best")
    run = trainer(".", callbacks=[NonFiniteGuard(), best], val_check_interval=2, enable_checkpointing=True)
    with pytest.raises(NonFiniteError, match="At step 1 of epoch 0"):
        run.fit(_module(Breaks([1])), datamodule=TinyData())
    states = torch.load("nonfinite/step_1.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for state in states.values() if "best_model_path" in state)
    assert state["best_model_path"] == ""
    assert not Path("checkpoints").exists()


def test_on_a_full_disk_the_finding_is_reported_all_the_same(monkeypatch, caplog) -> None:
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    caplog.set_level("INFO")
    with pytest.raises(OSError, match=r"No space left on device: 'nonfinite/step_1_rank_0\.pt'"):
        trainer(".", callbacks=[NonFiniteGuard()]).fit(_module(Breaks([1])), datamodule=TinyData())
    assert "At step 1 of epoch 0, loss term 'odd' is nan (batch 1, training" in caplog.text
    assert not list(Path("nonfinite").iterdir())


class OneBadImage(TinyData):
    """The 20th image has a pixel without a value."""

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        take = loader.collate_fn

        def collate(samples: Any) -> Batch:
            batch = take(samples)
            batch.image[batch.index == 19, 0, 0, 0] = torch.inf
            return batch

        loader.collate_fn = collate
        return loader


def test_a_saved_batch_and_the_weights_before_it_give_the_bad_number_again() -> None:
    with pytest.raises(NonFiniteError) as raised:
        trainer(".", callbacks=[NonFiniteGuard()]).fit(_module(), datamodule=OneBadImage())
    told = str(raised.value)
    assert told.startswith("At step 1 of epoch 0, loss term 'task' is nan and loss term 'lift' is nan and ")
    assert "as the image is not finite (batch 1, training images 19)." in told
    assert "--nonfinite.skip_steps 10" in told
    saved = torch.load("nonfinite/step_1_rank_0.pt", weights_only=True)
    assert saved["step"] == 1
    (bad,) = saved["batches"]
    assert bad["index"].tolist() == list(range(16, 32))
    module = _module()
    module.load_state_dict(torch.load("nonfinite/step_1.ckpt", weights_only=True)["state_dict"])
    batch = Batch(bad["image"], bad["target"], bad["index"])
    output = module.student(batch.image, module.distillers.student_layers)
    terms = module.terms(output, module.distillers.ask(module.teachers, batch), batch.target)
    assert all(term.isnan() for term in terms.values())
    assert all(value != value for value in bad["terms"].values())


def test_a_gradient_is_named_by_its_parameter() -> None:
    class OneGradient(Distiller):
        def build(self, student: Any, teacher: Any) -> None:
            self.scale = torch.nn.Parameter(torch.zeros(1))

        def forward(self, student: Any, teacher: Any, target: Tensor) -> Tensor:
            return self.scale.sqrt().sum()

    with pytest.raises(
        NonFiniteError, match=r"step 0 of epoch 0, the gradient of distillers\.odd\.scale is not finite \("
    ):
        trainer(".", callbacks=[NonFiniteGuard()]).fit(_module(OneGradient()), datamodule=TinyData())
    assert torch.load("nonfinite/step_0_rank_0.pt", weights_only=True)["gradients"] == ["distillers.odd.scale"]


@pytest.mark.parametrize("layer", [False, True], ids=["logits", "layer"])
def test_a_teacher_that_is_not_finite_is_named_with_its_images(layer: bool) -> None:
    broken = teacher()
    parameter = broken.model.blocks[-1].mlp.fc2.bias if layer else broken.model.head.bias
    torch.nn.init.constant_(parameter, torch.inf)
    source = "the teacher's layer 3" if layer else "the teacher's output of logits"
    with pytest.raises(
        NonFiniteError, match=f"'odd' is nan as {source} is not finite .batch 0, training images 0, 1, 2, "
    ):
        trainer(".", callbacks=[NonFiniteGuard()]).fit(_module(teacher=broken), datamodule=TinyData())


def test_a_cached_output_that_is_not_finite_is_named_and_saved() -> None:
    data, module = TinyData(), _module()
    loader = data.train_dataloader()
    take = loader.collate_fn

    def collate(samples: Any) -> Batch:
        batch = take(samples)
        asked = module.distillers.only_request()
        output = module.teacher(batch.image, asked.layers, asked.logits)
        output.features[0][batch.index == 3] = torch.nan
        return batch._replace(teacher=output)

    loader.collate_fn = collate
    said = r"'lift' is nan as the cached teacher's layer 3 is not finite \(batch 0, training images 3\)"
    with pytest.raises(NonFiniteError, match=said):
        trainer(".", callbacks=[NonFiniteGuard()], limit_val_batches=0).fit(module, loader, data.val_dataloader())
    (saved,) = torch.load("nonfinite/step_0_rank_0.pt", weights_only=True)["batches"]
    assert saved["teacher"]["features"][0][3].isnan().all()


class Overflows(Distiller):
    """Has a gradient beyond float16 under any scale at its first call."""

    calls = 0

    def forward(self, student: Any, teacher: Any, target: Tensor) -> Tensor:
        self.calls += 1
        return student.logits.float().square().mean() * (1e30 if self.calls == 1 else 1)


def test_gradients_that_overflow_under_a_scaler_are_its_business(monkeypatch: pytest.MonkeyPatch) -> None:
    for distiller, error in ((Overflows(), None), (Breaks([1]), "loss term 'odd' is nan")):
        plugin = MixedPrecision("16-mixed", "cpu")
        run = trainer(".", callbacks=[NonFiniteGuard()], plugins=[plugin])
        module = _module(distiller)
        if error is None:
            run.fit(module, datamodule=TinyData())
            assert plugin.scaler.get_scale() < 65536
        else:
            with pytest.raises(NonFiniteError, match=error):
                run.fit(module, datamodule=TinyData())
        assert all(value.isfinite().all() for value in module.state_dict().values())


def _breaking(at: int, **more: Any) -> list[str]:
    given = ", ".join(f"{name}: {value}" for name, value in {"at": [at], **more}.items())
    module = "tests.callbacks.test_nonfinite"
    return ["--model.distillers.logit", f"{{class_path: {module}.Breaks, init_args: {{{given}}}}}"]


def test_the_command_line_stops_with_one_message_leaves_out_or_goes_on_behind(demo_teacher: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        fit("soft_kd", demo_teacher, *SHORT, *_breaking(4))
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("kdvit: error: At step 4 of epoch 1, loss term 'logit' is nan (batch 1, training images ")
    index = torch.load("run/nonfinite/step_4_rank_0.pt", weights_only=True)["batches"][0]["index"]
    assert f"images {', '.join(str(int(i)) for i in index[:4])} and 60 more: " in message
    assert Digits(seed=0).path(int(index[0]), "train") in message
    assert all(value.isfinite().all() for value in load_student("run/student").state_dict().values())

    every = ["--trainer.log_every_n_steps", "1"]
    fit("soft_kd", demo_teacher, *SHORT, *_breaking(99), "--ckpt_path", "run/nonfinite/step_4.ckpt")
    skipping = ["--nonfinite.skip_steps", "1", "--trainer.default_root_dir", "skipping"]
    fit("soft_kd", demo_teacher, *SHORT, *every, *_breaking(4), *skipping)
    with Path("skipping/metrics.csv").open() as stream:
        counts = [row["train/skipped_steps"] for row in csv.DictReader(stream)]
    assert [float(count) for count in counts if count] == [0, 0, 0, 0, 1, 1]
    behind, left_out = (load_student(f"{root}/student").state_dict() for root in ("run", "skipping"))
    for name, value in left_out.items():
        assert torch.equal(behind[name], value), name


def test_a_resumed_run_goes_on_counting_the_steps_left_out() -> None:
    run = trainer(".", callbacks=[NonFiniteGuard(skip_steps=1)])
    run.fit(_module(Breaks([2])), datamodule=TinyData())
    run.save_checkpoint("end.ckpt")
    with pytest.raises(NonFiniteError, match="At step 7 of epoch 1, loss term 'odd' is nan"):
        trainer(".", callbacks=[NonFiniteGuard(skip_steps=1)], max_epochs=2).fit(
            _module(Breaks([2])), datamodule=TinyData(), ckpt_path="end.ckpt", weights_only=True
        )


@pytest.mark.slow
def test_two_processes_stop_together_and_say_whose_batch_it_was(demo_teacher: str) -> None:
    given = ["--config", "demo/soft_kd.yaml", "--model.teacher.init_args.arch", demo_teacher, *SHORT]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.default_root_dir", "run"]
    environment = {**os.environ, **PATHS}
    done = subprocess.run(
        [sys.executable, "-m", "kdvit", "fit", *given, *two, *_breaking(2, rank=1)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("kdvit: error: ")]
    assert "At step 2 of epoch 0, loss term 'logit' is nan (batch 2, training images" in said
    assert "(rank 1)." in said
    assert sorted(file.name for file in Path("run/nonfinite").iterdir()) == ["step_2.ckpt", "step_2_rank_1.pt"]
