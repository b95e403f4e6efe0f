"""A `kdvit fit` as a Slurm job: its script, and its submission."""

from __future__ import annotations

import getpass
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdvit.errors import UserError
from kdvit.files import write_whole
from kdvit.runtime.processes import SHELLS

SCRIPT = """\
#!/bin/bash
# {command}
#
# Written by `kdvit slurm`; `sbatch` takes it as it stands. All nodes must see the same files.
# SIGUSR1 comes before the time limit and before a preemption. The run then saves itself at the end of a batch, requeues
# this job, and goes on when it starts again. `scancel JOB` saves and ends it; the same command, or `sbatch` of this file,
# goes on from there.
{directives}

export OMP_NUM_THREADS={threads}  # of a process, beside its loader workers
export PYTHONUNBUFFERED=1  # the log shows what happens when it happens
{setup}
# A process a task. srun needs --cpus-per-task on its own line; if a process fails, the others are ended.
exec srun --cpus-per-task={cpus} --kill-on-bad-exit=1 {fit}
"""
OURS = ("--trainer.devices", "--trainer.num_nodes", "--trainer.accelerator")
AT_LEAST = {"nodes": 1, "gpus": 0, "tasks_per_node": 1, "cpus_per_task": 1, "signal_seconds": 1}
SEED = '"$SLURM_ARRAY_TASK_ID"'


def slurm(given: Namespace, fit: list[str], command: str, parse_fit: Callable[[list[str]], Any]) -> None:
    """Submits a fit, or prints the script.

    Args:
        given: The options of `kdvit slurm`.
        fit: Those of `kdvit fit`.
        command: All that was typed.
        parse_fit: Parses and checks the options of `kdvit fit`, and builds nothing.

    Raises:
        UserError: If an option is wrong, or Slurm refuses the job.
    """
    check_options(given, fit)
    config = parse_fit(fit)
    if config.ckpt_path is not None:
        raise UserError(
            "With --ckpt_path, the job would go back to that checkpoint each time it is requeued. Leave it out: a run goes on "
            "from the newest in its own folder checkpoints, also from one that was copied there."
        )
    root = Path(config.trainer.default_root_dir).absolute()
    runs = {seed: root / f"seed_{seed}" for seed in given.seeds}
    for seed, run in runs.items():
        parse_fit([*fit, "--trainer.default_root_dir", str(run), "--seed_everything", str(seed)])
    script = render(given, fit, command, root, config)
    if given.dry_run:
        print(script, end="")
        return
    file = root / "fit.sbatch"
    refuse_a_second_job(file)
    for run in runs.values() or [root]:
        run.mkdir(parents=True, exist_ok=True)
    write_whole(file, script.encode())
    job = _answer("sbatch", "--parsable", str(file)).partition(";")[0]
    print(f"Job {job} is submitted.")
    for what, how in {
        "run directory": root,
        "script": file,
        "log": log_pattern(str(root), given.seeds, job, "*"),
        "follow": f"tail -F {log_pattern(shlex.quote(str(root)), given.seeds, job, '*')}",
        "stop": f"scancel {job} (the run is saved, and the job is not requeued)",
        "go on": "the same command again, once the job has ended",
    }.items():
        print(f"{what:<14} {how}")


def check_options(given: Namespace, fit: list[str]) -> None:
    """Raises a UserError if an option has a wrong value, or says what another one says."""
    for name, least in AT_LEAST.items():
        value = getattr(given, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be {least} or more, got {value}.")
    ours = (*OURS, "--seed_everything") if given.seeds else OURS
    if twice := [each for each in fit if each.partition("=")[0] in ours]:
        raise UserError(f"{twice[0]} follows from --nodes, --gpus, --tasks_per_node and --seeds: leave it out.")
    if given.gpus and given.tasks_per_node not in (None, given.gpus):
        raise UserError(
            f"A GPU has one process, got --gpus {given.gpus} and --tasks_per_node {given.tasks_per_node}. (--gpus 0 is for "
            "processes on CPUs.)"
        )
    if given.time is not None and seconds(given.time) <= given.signal_seconds:
        raise UserError(
            f"--time must be longer than --signal_seconds, got {given.time} and {given.signal_seconds} s: the job would be "
            "requeued as soon as it has started."
        )
    if len(given.seeds) != len(set(given.seeds)) or any(seed < 0 for seed in given.seeds):
        raise UserError(f"--seeds must be different numbers, 0 or more, got {' '.join(map(str, given.seeds))}.")
    if wrong := [each for each in given.sbatch if not re.fullmatch("-.+", each)]:
        raise UserError(f"--sbatch takes an option of sbatch, such as --sbatch=--constraint=a100, got {wrong[0]!r}.")


def seconds(time: str) -> int:
    """Returns the seconds of a time in one of Slurm's formats.

    Raises:
        UserError: If it is in none.

    Example:
        >>> [seconds(time) for time in ("90", "90:30", "1:30:00", "1-12", "1-12:30", "1-12:30:15")]
        [5400, 5430, 5400, 129600, 131400, 131415]
    """
    if not (match := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)):
        raise UserError(
            "--time must be minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or "
            f"days-hours:minutes:seconds, got {time!r}."
        )
    days, *rest = match.groups()
    parts = [int(each) for each in rest if each is not None]
    hours, minutes, left = (*parts, 0, 0)[:3] if days or len(parts) == 3 else (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left


def render(given: Namespace, fit: list[str], command: str, root: Path, config: Any) -> str:
    """Returns the sbatch script.

    Args:
        given: The options of `kdvit slurm`.
        fit: Those of `kdvit fit`.
        command: All that was typed.
        root: The run directory; with seeds, the folder of the run directories.
        config: The parsed config.

    Raises:
        UserError: If the job has a name that hides it from Lightning.
    """
    tasks = given.gpus or given.tasks_per_node or 1
    workers = config.get("data.init_args.num_workers") or 0
    cpus = given.cpus_per_task or workers + 1
    name = given.job_name or root.name
    if name in SHELLS:
        raise UserError(f"Lightning takes a job named {name!r} for a shell, not for a run: give another --job_name.")
    directives = {
        "job-name": name,
        "nodes": given.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": given.gpus or None,
        "cpus-per-task": cpus,
        "mem": given.mem,
        "time": given.time,
        "partition": given.partition,
        "account": given.account,
        "qos": given.qos,
        "array": ",".join(map(str, given.seeds)) or None,
        "chdir": Path.cwd(),
        "output": log_pattern(str(root).replace("%", "%%"), given.seeds),
        "open-mode": "append",
        "signal": f"SIGUSR1@{given.signal_seconds}",
    }
    options = [f"--{key}={shlex.quote(str(value))}" for key, value in directives.items() if value is not None]
    planned = {
        "--trainer.accelerator": "gpu" if given.gpus else "cpu",
        "--trainer.devices": tasks,
        "--trainer.num_nodes": given.nodes,
        "--trainer.strategy": "ddp" if given.nodes * tasks > 1 and config.trainer.strategy == "auto" else None,
        "--trainer.default_root_dir": shlex.quote(f"{root}/seed_") + SEED if given.seeds else shlex.quote(str(root)),
        "--seed_everything": SEED if given.seeds else None,
    }
    words = [shlex.quote(word) for word in (sys.executable, "-m", "kdvit", "fit", *fit)]
    words += [str(word) for option in planned.items() if option[1] is not None for word in option]
    return SCRIPT.format(
        command=" ".join(command.splitlines()),
        directives="\n".join(f"#SBATCH {option}" for option in [*options, "--requeue", *given.sbatch]),
        threads=max(1, cpus - workers),
        setup="".join(f"{line}\n" for line in given.setup),
        cpus=cpus,
        fit="".join(f" \\\n    {word}" if word.startswith("--") else f" {word}" for word in words).strip(),
    )


def log_pattern(root: str, seeds: list[int], job: str | None = None, seed: str = "%a") -> str:
    """Returns the path of the log; without a job, with Slurm's placeholders."""
    return f"{root}/seed_{seed}/slurm-{job or '%A'}_{seed}.log" if seeds else f"{root}/slurm-{job or '%j'}.log"


def refuse_a_second_job(script: Path) -> None:
    """Raises a UserError if a job of this script waits or runs."""
    queue = _answer("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A %T %o")
    for line in queue.splitlines():
        job, state, command = [*line.split(" ", 2), ""][:3]  # an interactive job has no command
        if command == str(script):
            raise UserError(
                f"Job {job} of this run is in the queue ({state}), and two at once would write over one another. `scancel {job}` "
                "ends it."
            )


def _answer(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"This machine has no {command[0]}: give the command on a login node of the cluster. (--dry_run prints the script "
            "here, and `sbatch` takes it there.)"
        ) from error
    if done.returncode:
        raise UserError(f"Slurm has refused: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout.strip()
