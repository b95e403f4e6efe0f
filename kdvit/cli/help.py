"""Help that fits a screen: the options that people set, a line each; all others by group. Light to import."""

from __future__ import annotations

from kdvit.tables import text_table

SUMMARIES = {
    "check": "Show what a fit will do, and take a training and a validation batch of it.",
    "fit": "Train a student; the same command again goes on where it stopped.",
    "validate": "Score a student on the validation images.",
    "test": "Score a student on the test images.",
    "predict": "Write a table of a student's predictions.",
    "cache": "Store a teacher's outputs, so that it need not run in training.",
}
"""The commands of a Trainer."""
OF_A_RUN = "--config runs/demo/plain/config.yaml"
EXAMPLES = {
    "check": "--config demo/plain.yaml",
    "fit": "--config demo/plain.yaml",
    "validate": OF_A_RUN,
    "test": OF_A_RUN,
    "predict": OF_A_RUN,
    "cache": "--config demo/lift.yaml --out runs/demo/cache --views 4",
}
"""What stands behind the name of a command in the example at the end of its help."""
CONFIG = ("--config NAME", "the experiment: a file, or one that kdvit brings, such as demo/lift.yaml")
ROOT = ("--trainer.default_root_dir DIR", "the run directory: checkpoints, logs, student")
DATA = (
    ("--data.init_args.root DIR", "the images, such as ImageNet's folder"),
    ("--data.init_args.batch_size N", "images a step and process"),
    ("--data.init_args.num_workers N", "processes that load images, for each process of the run"),
)
MACHINE = (
    ("--trainer.accelerator KIND", "gpu, cpu or auto"),
    ("--trainer.devices N", "GPUs, or processes on CPUs; auto for all there are"),
    ("--trainer.precision KIND", "32-true, 16-mixed or bf16-mixed"),
)
SCORED = ("--ckpt_path FILE", "the checkpoint: best, last or a file; by default the best of the run")
PRINT = ("--print_config", "print the whole config, and stop")
FIT = (
    CONFIG,
    ROOT,
    ("--trainer.max_epochs N", "epochs of the whole run, those of earlier starts included"),
    *MACHINE,
    ("--trainer.accumulate_grad_batches N", "batches behind one step of the optimizer"),
    ("--trainer.log_every_n_steps N", "steps between two rows of metrics.csv"),
    *DATA,
    ("--model.student CLASS", "TimmStudent, LiftViT, WideLastViT or a class of your own"),
    ("--model.student.init_args.width N", "width of a remedy, that of the teacher"),
    ("--model.teacher.init_args.arch NAME", "timm's name of the teacher, or local-dir:FOLDER of an exported one"),
    ("--model.distillers.NAME.weight X", "weight of an objective of the config"),
    ("--model.optimizer.lr X", "learning rate, at the global batch of optimizer.lr_base_batch"),
    ("--model.schedule.warmup_epochs N", "epochs of warm-up"),
    ("--ema.decay X", "average the student's weights, too"),
    ("--seed_everything N", "the seed of everything"),
    PRINT,
)
"""The options that people set of a fit."""
OPTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "fit": FIT,
    "check": (*FIT, ("--images_per_second X", "rate of a process's steps, to be told the workers that it needs")),
    "validate": (CONFIG, ROOT, SCORED, *MACHINE, *DATA),
    "test": (CONFIG, ROOT, SCORED, *MACHINE, *DATA),
    "predict": (
        *(CONFIG, ROOT, SCORED, *MACHINE, *DATA),
        ("--callbacks.predictions.teacher true", "add the teacher's prediction to the table"),
    ),
    "cache": (
        CONFIG,
        ("--out DIR", "the folder to write; the same command goes on where it stopped"),
        ("--views N", "views of an image; epoch e of a training shows view e % N"),
        ("--store KIND", "auto, logits, features or both"),
        ("--topk N", "store the probabilities of N classes alone"),
        ("--check DIR", "compare a cache with what the teacher gives now"),
        ("--samples N", "records to compare"),
        *(*MACHINE, *DATA),
    ),
}
GROUPS = (
    "trainer",
    "data",
    "model",
    "callbacks",
    "checkpoint",
    "last_checkpoint",
    "ema",
    "nonfinite",
    "geometry",
    "probe",
)
"""Groups of options by the word before the first dot."""


def asked_for(args: list[str]) -> str | None:
    """Returns what help is asked for: "" for the short one, "all" or a group; None where none is.

    Examples:
        >>> asked_for(["--help"]), asked_for(["--help", "all"]), asked_for(["--config", "x", "--model.help"])
        ('', 'all', 'model')
        >>> asked_for(["--data.help", "Digits"]) is asked_for(["--config", "x"]) is None
        True
    """
    for word, behind in zip(args, [*args[1:], ""], strict=False):
        topic = "" if behind.startswith("-") else behind
        if word in ("-h", "--help"):
            return topic
        group = word.removeprefix("--").removesuffix(".help")
        if word == f"--{group}.help" and not topic and group.partition(".")[0] in GROUPS:
            return group
    return None


def short_help(command: str) -> str:
    """Returns the help of a command of a Trainer."""
    table = text_table((), [(f"  {option}", told) for option, told in OPTIONS[command]], left=2)
    return (
        f"usage: kdvit {command} --config NAME [options]\n\n{SUMMARIES[command]}\n\n"
        f"the options that people set:\n{table}\n\n"
        f"all others: kdvit {command} --help all, or --help GROUP\ngroups: {', '.join(GROUPS)}\n"
        f"of a class: kdvit {command} --model.student.help LiftViT, --data.help Digits\n\n"
        f"example: kdvit {command} {EXAMPLES[command]}"
    )
