"""`kdvit slurm`: a `kdvit fit` as a Slurm job, its script and its submission."""

from __future__ import annotations

import getpass
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt, restricted_string_type

from kdvit.errors import UserError
from kdvit.files import write_whole
from kdvit.tables import text_table

SCRIPT = """\
#!/bin/bash
# {command}
#
# Written by `kdvit slurm`; `sbatch` takes it as it stands. All nodes must see the same files.
# SIGUSR1 comes before the time limit and before a preemption. The run then saves itself at the end of a batch,
# requeues this job, and goes on when it starts again. `scancel JOB` saves and ends it; the same command, or `sbatch` of
# this file, goes on from there.
{directives}

export OMP_NUM_THREADS={threads}  # of a process, beside its loader workers
export PYTHONUNBUFFERED=1  # the log shows what happens when it happens
{setup}
# A process a task. srun needs --cpus-per-task on its own line; if a process fails, the others are ended.
exec srun --cpus-per-task={cpus} --kill-on-bad-exit=1 {fit}
"""
OURS = ("--trainer.devices", "--trainer.num_nodes", "--trainer.accelerator")
SEED = '"$SLURM_ARRAY_TASK_ID"'
Gpus = restricted_string_type("Gpus", r"^(\w[\w.-]*:)?\d+$", docstring="a number, or KIND:NUMBER")


def slurm(
    *,
    nodes: PositiveInt = 1,
    gpus: Gpus = "1",  # type: ignore[valid-type]
    tasks_per_node: PositiveInt | None = None,
    cpus_per_task: PositiveInt | None = None,
    mem: str | None = None,
    time: str | None = None,
    seeds: list[int] = [],  # noqa: B006
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    job_name: str | None = None,
    signal_seconds: PositiveInt = 120,
    sbatch: list[str] = [],  # noqa: B006
    setup: list[str] = [],  # noqa: B006
    dry_run: bool = False,
    rest: list[str],
    typed: list[str],
) -> None:
    """Submit a fit as a Slurm job that saves and requeues itself before its time is over or it is preempted.

    The config and all options are checked first. What is not listed here is passed on to `kdvit fit`.

    Args:
        nodes: Machines.
        gpus: GPUs a node, one process each, such as 4 or a100:4; 0 for processes on CPUs. A cluster that wants --gres
            gets it by --sbatch=--gres=gpu:4, in place of --gpus-per-node.
        tasks_per_node: With --gpus 0, processes a node; by default 1.
        cpus_per_task: Processors a process; by default one, and one for each loader worker.
        mem: Memory a node, such as 64G; by default what the cluster gives.
        time: Limit, such as 24:00:00 or 3-00 (days-hours); the job is requeued and goes on.
        seeds: A run for each, in RUN/seed_N: an array of jobs.
        partition: Slurm's.
        account: Slurm's.
        qos: Slurm's.
        job_name: By default the name of the run directory.
        signal_seconds: Before the end, when the run saves itself.
        sbatch: Any other option of sbatch, as --sbatch=--constraint=a100.
        setup: Lines of shell before the start, such as 'module load cuda'.
        dry_run: Print the script, and submit nothing.
        rest: Options of `kdvit fit`.
        typed: All options.

    Examples:
        kdvit slurm --config lift.yaml --gpus 4 --time 24:00:00 --dry_run
    """
    count = int(str(gpus).rpartition(":")[2])
    refuse_options(rest, count, tasks_per_node, seeds, sbatch)
    config = parsed(rest, seeds)
    root = Path(config.trainer.default_root_dir).absolute()
    name, tasks = job_name or root.name, count or tasks_per_node or 1
    workers = config.get("data.init_args.num_workers") or 0
    cpus = cpus_per_task or workers + 1
    directives = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": gpus if count and not any(each.startswith("--gres") for each in sbatch) else None,
        "cpus-per-task": cpus,
        "mem": mem,
        "time": time,
        "partition": partition,
        "account": account,
        "qos": qos,
        "array": ",".join(map(str, seeds)) or None,
        "chdir": Path.cwd(),
        "output": log_pattern(str(root).replace("%", "%%"), seeds),
        "open-mode": "append",
        "signal": f"SIGUSR1@{signal_seconds}",
    }
    given = [f"--{key}={shlex.quote(str(value))}" for key, value in directives.items() if value is not None]
    planned = {
        "--trainer.accelerator": "gpu" if count else "cpu",
        "--trainer.devices": tasks,
        "--trainer.num_nodes": nodes,
        "--trainer.strategy": "ddp" if nodes * tasks > 1 and config.trainer.strategy == "auto" else None,
        "--trainer.default_root_dir": shlex.quote(f"{root}/seed_") + SEED if seeds else shlex.quote(str(root)),
        "--seed_everything": SEED if seeds else config.seed_everything if nodes * tasks > 1 else None,
    }
    words = [shlex.quote(word) for word in (sys.executable, "-m", "kdvit", "fit", *rest)]
    words += [str(word) for option in planned.items() if option[1] is not None for word in option]
    script = SCRIPT.format(
        command=" ".join(shlex.join(["kdvit", "slurm", *typed]).splitlines()),
        directives="\n".join(f"#SBATCH {option}" for option in [*given, "--requeue", *sbatch]),
        threads=max(1, cpus - workers),
        setup="".join(f"{line}\n" for line in setup),
        cpus=cpus,
        fit="".join(f" \\\n    {word}" if word.startswith("--") else f" {word}" for word in words).strip(),
    )
    if dry_run:
        print(script, end="")
    else:
        submit(script, root, seeds)


def refuse_options(fit: list[str], gpus: int, tasks_per_node: int | None, seeds: list[int], sbatch: list[str]) -> None:
    """Raises UserError if options contradict one another."""
    ours = (*OURS, "--seed_everything") if seeds else OURS
    for word in fit:
        if word.partition("=")[0] in ours:
            raise UserError(f"{word} follows from --nodes, --gpus, --tasks_per_node and --seeds: leave it out.")
    if gpus and tasks_per_node not in (None, gpus):
        raise UserError(
            f"A GPU has one process, got --gpus {gpus} and --tasks_per_node {tasks_per_node}. (--gpus 0 is for "
            "processes on CPUs.)"
        )
    for option in sbatch:
        if not option.startswith("-"):
            raise UserError(f"--sbatch takes an option of sbatch, such as --sbatch=--constraint=a100, got {option!r}.")


def parsed(fit: list[str], seeds: list[int]) -> Any:
    """Returns the config of a fit, checked for each seed.

    Raises:
        UserError: If an option is wrong, or the job would go back to one checkpoint for ever.
    """
    from kdvit.cli.parsed import parse_fit

    config = parse_fit(fit)
    if config.ckpt_path is not None:
        raise UserError(
            "With --ckpt_path, the job would go back to that checkpoint each time it is requeued. Leave it out: a run "
            "goes on from the newest in its own folder checkpoints, also from one that was copied there."
        )
    for seed in seeds:
        run = str(Path(config.trainer.default_root_dir).absolute() / f"seed_{seed}")
        parse_fit([*fit, "--trainer.default_root_dir", run, "--seed_everything", str(seed)])
    return config


def submit(script: str, root: Path, seeds: list[int]) -> None:
    """Writes ``ROOT/fit.sbatch``, submits it, and shows where it logs and how to stop it.

    Raises:
        UserError: If a job of this run is in the queue, or Slurm refuses this one.
    """
    file = root / "fit.sbatch"
    refuse_a_second_job(file)
    for run in [root / f"seed_{seed}" for seed in seeds] or [root]:
        run.mkdir(parents=True, exist_ok=True)
    write_whole(file, script.encode())
    job = _run("sbatch", "--parsable", str(file)).partition(";")[0]
    print(f"Job {job} is submitted.")
    shown = {
        "run directory": str(root),
        "script": str(file),
        "follow": f"tail -F {log_pattern(shlex.quote(str(root)), seeds, job, '*')}",
        "stop": f"scancel {job} (the run is saved, and the job is not requeued)",
        "go on": "the same command again, once the job has ended",
    }
    print(text_table((), list(shown.items()), left=2))


def log_pattern(root: str, seeds: list[int], job: str | None = None, seed: str = "%a") -> str:
    """Returns the path of the log; without a job, with Slurm's placeholders."""
    return f"{root}/seed_{seed}/slurm-{job or '%A'}_{seed}.log" if seeds else f"{root}/slurm-{job or '%j'}.log"


def refuse_a_second_job(script: Path) -> None:
    """Raises a UserError if a job of this script waits or runs."""
    queue = _run("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A %T %o")
    for line in queue.splitlines():
        job, state, command = [*line.split(" ", 2), ""][:3]  # an interactive job has no command
        if command == str(script):
            raise UserError(
                f"Job {job} of this run is in the queue ({state}), and two at once would write over one another. "
                f"`scancel {job}` ends it."
            )


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"This machine has no {command[0]}: give the command on a login node of the cluster. (--dry_run prints the "
            "script here, and `sbatch` takes it there.)"
        ) from error
    if done.returncode:
        raise UserError(f"Slurm has refused: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout.strip()
