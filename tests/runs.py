"""Short runs of the demo, by the command line."""

from __future__ import annotations

from kdvit.cli import main

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHORT = [*QUIET, "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2"]


def fit(method: str, teacher: str, *more: str) -> None:
    """Runs `kdvit fit` of a demo config into the folder "run"."""
    from_teacher = ["--model.teacher.init_args.arch", teacher] if method not in ("teacher", "plain") else []
    main(["fit", "--config", f"demo/{method}.yaml", "--trainer.default_root_dir", "run", *from_teacher, *more])
