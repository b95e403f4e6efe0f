"""`kdvit slurm`."""

from __future__ import annotations

import shlex
from argparse import Namespace


def slurm(
    *,
    nodes: int = 1,
    gpus: int = 1,
    tasks_per_node: int | None = None,
    cpus_per_task: int | None = None,
    mem: str | None = None,
    time: str | None = None,
    seeds: list[int] = [],  # noqa: B006
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    job_name: str | None = None,
    signal_seconds: int = 120,
    sbatch: list[str] = [],  # noqa: B006
    setup: list[str] = [],  # noqa: B006
    dry_run: bool = False,
    rest: list[str],
) -> None:
    """Submit a fit as a Slurm job that saves and requeues itself before its time is over or it is preempted.

    The config and all options are checked first. What is not listed here is passed on to `kdvit fit`.

    Args:
        nodes: Machines.
        gpus: GPUs a node, one process each; 0 for processes on CPUs.
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
        sbatch: Any other option of sbatch, such as --constraint=a100.
        setup: A line of shell before the start, such as 'module load cuda'.
        dry_run: Print the script, and submit nothing.
        rest: Options of `kdvit fit`.

    Example:
        kdvit slurm --config lift.yaml --gpus 4 --time 24:00:00 --data.init_args.root /path/to/imagenet
    """
    from kdvit.cli.commands import slurm as old
    from kdvit.cli.fit import parse_fit

    given = Namespace(**{k: v for k, v in locals().items() if k not in ("rest", "old", "parse_fit")})
    old.slurm(given, rest, shlex.join(["kdvit", "slurm", *rest]), parse_fit)
