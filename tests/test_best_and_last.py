"""best.ckpt is the best, last.ckpt is the end of the run, and what nobody measures is not waited for."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from kdvit.cli import main
from tests.runs import QUIET, assert_same_end, demo_fit, fit, numbers

EPOCHS = [*QUIET, "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2", "--trainer.log_every_n_steps=0"]
CHECKPOINTS = Path("run/checkpoints")


def of(file: str) -> tuple[int, int]:
    content = torch.load(CHECKPOINTS / file, weights_only=True)
    return content["epoch"], content["global_step"]


def test_of_several_checkpoints_best_is_a_copy_of_the_best() -> None:
    more = ["--model.optimizer.lr=0.3", "--trainer.max_epochs=5", "--checkpoint.save_top_k=2"]
    fit("plain", "", *EPOCHS, *more)
    scores = numbers("run", "val/acc1")
    best = scores.index(max(scores))
    assert of("best.ckpt")[0] == best
    kept = sorted(CHECKPOINTS.glob("best-epoch=*.ckpt"))
    assert len(kept) == 2
    assert (CHECKPOINTS / "best.ckpt").read_bytes() in [file.read_bytes() for file in kept]


def test_the_lower_loss_is_the_better_one() -> None:
    fit("plain", "", *EPOCHS, "--model.optimizer.lr=0.3", "--trainer.max_epochs=4", "--checkpoint.monitor=val/loss")
    losses = numbers("run", "val/loss")
    assert of("best.ckpt")[0] == losses.index(min(losses))


@pytest.mark.parametrize("rare", ["--trainer.check_val_every_n_epoch=2", "--last_checkpoint.every_n_epochs=2"])
def test_last_is_the_end_of_the_run(rare: str) -> None:
    fit("plain", "", *EPOCHS, "--trainer.max_epochs=3", rare)
    assert of("last.ckpt") == (2, 9)


def test_a_run_goes_on_from_its_best_checkpoint_as_from_its_last(demo_teacher: str) -> None:
    more = [*EPOCHS, "--ema.decay=0.9"]
    fit("lift", demo_teacher, *more, "--trainer.max_epochs=4", "--trainer.default_root_dir=whole")
    fit("lift", demo_teacher, *more, "--trainer.max_epochs=4", "--trainer.max_steps=6", "--checkpoint.save_top_k=-1")
    for name in ("last", "best"):
        (CHECKPOINTS / f"{name}.ckpt").unlink()
    first, second = numbers("run", "val/acc1")
    names = ["best-epoch=0-step=3.ckpt", "best-epoch=1-step=6.ckpt"]
    best, other = names if first >= second else reversed(names)
    (CHECKPOINTS / best).rename(CHECKPOINTS / "best.ckpt")
    (CHECKPOINTS / other).unlink()
    fit("lift", demo_teacher, *more, "--trainer.max_epochs=4")
    assert of("last.ckpt") == (3, 12)
    assert len(numbers("run", "val/acc1")) == 4
    assert_same_end("whole", "run")


STOPPING = "{class_path: EarlyStopping, init_args: {monitor: val_loss}}"


@pytest.mark.parametrize("command", ["fit", "check"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--checkpoint.monitor=val/acc", "StepCheckpoint waits for 'val/acc', and the validation logs val/acc1, "),
        (f"--trainer.callbacks={STOPPING}", "EarlyStopping waits for 'val_loss', and the validation logs val/acc1"),
        ("--checkpoint.monitor=val/speed", "checkpoint.mode: say which is better of 'val/speed', min or max."),
    ],
)
def test_a_metric_that_nobody_logs_is_named_before_the_first_step(
    command: str, option: str, message: str, capsys
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, *demo_fit("plain", "", *QUIET, option)[1:]])
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert "Did you mean" in error or "speed" in error
    assert not CHECKPOINTS.exists()


class Scores(pl.Callback):
    """Logs a given score at each validation."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("val/given_acc", torch.tensor(self.scores[trainer.current_epoch]))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [((3, 3), 1), ((1, 1), 3)], ids=["fewer", "more"])
def test_the_best_stays_the_best_where_the_number_of_those_kept_changes(first: tuple[int, int], then: int) -> None:
    scores = "{class_path: tests.test_best_and_last.Scores, init_args: {scores: [0.5, 0.6, 0.55, 0.57, 0.58]}}"
    more = [*EPOCHS, "--checkpoint.monitor=val/given_acc", f"--trainer.callbacks={scores}"]
    kept, epochs = first
    fit("plain", "", *more, f"--checkpoint.save_top_k={kept}", f"--trainer.max_epochs={epochs}")
    for epochs in (4, 5):
        fit("plain", "", *more, f"--checkpoint.save_top_k={then}", f"--trainer.max_epochs={epochs}")
        assert of("best.ckpt")[0] == 1


def test_a_best_checkpoint_without_a_name_of_ours_stays_known() -> None:
    for epochs in (1, 2):
        fit("plain", "", *EPOCHS, "--checkpoint.filename=null", f"--trainer.max_epochs={epochs}")
    states = torch.load(CHECKPOINTS / "last.ckpt", weights_only=True)["callbacks"]
    (best,) = (state["best_model_path"] for state in states.values() if state.get("monitor") == "val/acc1")
    assert Path(best).is_file()
