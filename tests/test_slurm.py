"""`kdvit slurm`: the script, what it refuses, and what it tells Slurm. (tests/slurm has a real one.)"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from kdvit.errors import UserError
from kdvit.runtime.processes import planned_processes, require_all_tasks
from tests.runs import SHORT, fit

DEMO = ["slurm", "--config", "demo/plain.yaml"]


def script(capsys, *args: str) -> str:
    main([*DEMO, "--dry_run", *args])
    return capsys.readouterr().out


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def srun(text: str) -> list[str]:
    return shlex.split(text.partition("\nexec ")[2].replace("\\\n", ""))


def test_the_template_is_what_the_command_writes_for_its_first_line(tmp_path: Path, capsys) -> None:
    template = (packaged_configs() / "slurm" / "fit.sbatch").read_text()
    main(shlex.split(template.splitlines()[1].removeprefix("# kdvit ")))
    written = capsys.readouterr().out
    assert written.replace(sys.executable, "/path/to/python").replace(str(tmp_path), "/path/to/here") == template


def test_processes_of_a_job_that_draws_its_seed_share_it(capsys) -> None:
    words = srun(script(capsys, "--gpus=2", "--seed_everything=true"))
    assert words[-2] == "--seed_everything"
    assert words[-1].isdecimal()


def test_a_job_has_the_size_that_was_asked_for(tmp_path: Path, capsys) -> None:
    size = ["--nodes=2", "--gpus=8", "--time=1-00", "--mem=64G", "--cpus_per_task=6"]
    where = ["--partition=p", "--account=a", "--qos=q"]
    text = script(capsys, *size, *where, "--data.init_args.num_workers=3", "--sbatch=--constraint=a100&b")
    run = tmp_path / "runs/demo/plain"
    assert directives(text) == [
        *[
            "--job-name=plain",
            "--nodes=2",
            "--ntasks-per-node=8",
            "--gpus-per-node=8",
            "--cpus-per-task=6",
            "--mem=64G",
        ],
        *[
            "--time=1-00",
            "--partition=p",
            "--account=a",
            "--qos=q",
            f"--chdir={tmp_path}",
            f"--output={run}/slurm-%j.log",
        ],
        *["--open-mode=append", "--signal=SIGUSR1@120", "--requeue", "--constraint=a100&b"],
    ]
    assert "\nexport OMP_NUM_THREADS=3 " in text
    command = srun(text)
    assert command[:3] == ["srun", "--cpus-per-task=6", "--kill-on-bad-exit=1"]
    planned = "--trainer.accelerator gpu --trainer.devices 8 --trainer.num_nodes 2 --trainer.strategy ddp"
    assert " ".join(command).endswith(f" {planned} --trainer.default_root_dir {run} --seed_everything 0")
    assert list(tmp_path.iterdir()) == []


def test_gpus_may_be_of_a_kind_and_asked_for_as_the_cluster_wants(capsys) -> None:
    text = script(capsys, "--gpus", "a100:4")
    assert {"--gpus-per-node=a100:4", "--ntasks-per-node=4"} <= set(directives(text))
    assert "--trainer.devices 4" in text
    text = script(capsys, "--gpus=2", "--sbatch=--gres=gpu:v100:2")
    assert "--gres=gpu:v100:2" in directives(text)
    assert not [each for each in directives(text) if each.startswith("--gpus")]


def test_a_processor_is_asked_for_each_loader_worker_and_one_process_needs_no_ddp(capsys) -> None:
    text = script(capsys, "--gpus", "0", "--data.init_args.num_workers=3")
    assert "--cpus-per-task=4" in directives(text)
    assert not [each for each in directives(text) if each.startswith("--gpus")]
    assert "--trainer.strategy" not in srun(text)
    assert "--ntasks-per-node=2" in directives(script(capsys, "--gpus", "0", "--tasks_per_node", "2"))


def test_a_strategy_of_the_users_stays(capsys) -> None:
    command = srun(script(capsys, "--gpus", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"))
    assert command.count("--trainer.strategy") == 1


def test_whatever_was_typed_reaches_the_run_and_the_shell_runs_the_setup(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", f"{fakes(tmp_path, srun='for word; do echo $SETUP $word; done')}:{os.environ['PATH']}")
    odd = ["--model.distillers", "{}", "--trainer.default_root_dir", """it's a "run" & 100 %$HOME"""]
    text = script(capsys, "--gpus=0", *odd, "--setup", "export SETUP=ready", "--setup=:")
    shown = subprocess.run(["bash"], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    assert f"ready {odd[3]}" in shown
    assert shown[-1] == f"ready {tmp_path / odd[3]}"
    log = str(tmp_path / odd[3]).replace("%", "%%") + "/slurm-%j.log"
    assert f"--output={shlex.quote(log)}" in directives(text)


def test_seeds_are_an_array_of_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    text = script(capsys, "--seeds", "0", "12", "--trainer.default_root_dir", "root")
    assert "--array=0,12" in directives(text)
    assert f"--output={tmp_path}/root/seed_%a/slurm-%A_%a.log" in directives(text)
    path = f"{fakes(tmp_path, srun='echo $@')}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_ARRAY_TASK_ID": "12"}
    shown = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.endswith(f" --trainer.default_root_dir {tmp_path}/root/seed_12 --seed_everything 12\n")


def fakes(folder: Path, **programs: str) -> Path:
    """Writes shell scripts by their names, and returns their folder."""
    home = folder / "bin"
    home.mkdir(exist_ok=True)
    for name, code in programs.items():
        (home / name).write_text(f"#!/bin/sh\n{code}\n")
        (home / name).chmod(0o755)
    return home


def test_a_job_is_submitted_with_its_script_kept_and_all_that_one_wants_to_know_next(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    home = fakes(
        tmp_path,
        sbatch='echo "$@" > asked; echo "7;cluster"',
        squeue="echo '3 RUNNING /other/fit.sbatch'; echo '4 RUNNING'",
    )
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    main([*DEMO, "--trainer.default_root_dir", "a run"])
    run = tmp_path / "a run"
    assert Path("asked").read_text() == f"--parsable {run}/fit.sbatch\n"
    assert [file.name for file in run.iterdir()] == ["fit.sbatch"]
    told = capsys.readouterr().out
    assert told.startswith("Job 7 is submitted.\n")
    for line in (
        f"run directory  {run}\n",
        f"script         {run}/fit.sbatch\n",
        f"follow         tail -F '{run}'/slurm-7.log\n",
        "stop           scancel 7 ",
        "go on          the same command ",
    ):
        assert line in told
    dry = script(capsys, "--trainer.default_root_dir", "a run")
    assert dry.replace(" --dry_run", "") == (run / "fit.sbatch").read_text()
    main([*DEMO, "--seeds", "1", "2"])
    assert f"tail -F {tmp_path}/runs/demo/plain/seed_*/slurm-7_*.log" in capsys.readouterr().out
    assert {file.name for file in Path("runs/demo/plain").iterdir()} == {"fit.sbatch", "seed_1", "seed_2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nodes 0", "nodes: "),
        ("--nodes two", "nodes: "),
        ("--seeds 1 --seed_everything 2", "--seed_everything follows from --nodes"),
        ("--trainer.devices=4", "--trainer.devices=4 follows from --nodes, --gpus"),
        ("--gpus 4 --tasks_per_node 2", "A GPU has one process, got --gpus 4 and --tasks_per_node 2."),
        (
            "--sbatch exclusive",
            "--sbatch takes an option of sbatch, such as --sbatch=--constraint=a100, got 'exclusive'.",
        ),
        ("--ckpt_path other.ckpt", "There is no file 'other.ckpt'"),
        ("--ckpt_path last.ckpt", "go back to that checkpoint each time it is requeued. Leave it out"),
        ("--model.optimizer.lrr 1", "lrr"),
        ("--trainer.max_epochs null", "The schedule needs the length of the run: set trainer.max_epochs or"),
        ("--trainer.default_root_dir run", "'run' holds a run with other settings: seed_everything is 0 and was 1"),
        (
            "",
            "This machine has no squeue: give the command on a login node of the cluster. (--dry_run prints the script",
        ),
    ],
)
def test_what_is_wrong_shows_before_the_job_is_submitted(options: str, message: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "nowhere")
    if "default_root_dir" in options:
        fit("plain", "", *SHORT, "--seed_everything", "1")
    done = {"current": {"ready": 1, "started": 1, "processed": 1}}
    loops = {"fit_loop": {"epoch_progress": done, "epoch_loop.val_loop.batch_progress": done}}
    torch.save({"global_step": 1, "loops": loops, "optimizer_states": []}, "last.ckpt")
    with pytest.raises(SystemExit) as end:
        main([*DEMO, *options.split()])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        (
            {"sbatch": "echo 'sbatch: error: Invalid qos\nspecification' >&2; exit 1", "squeue": ""},
            "Slurm has refused: sbatch: error: Invalid qos specification",
        ),
        (
            {"squeue": 'echo "5_[1-2] PENDING $PWD/runs/demo/plain/fit.sbatch"'},
            "Job 5_[1-2] of this run is in the queue (PENDING), and two at once would write over one another. `scancel",
        ),
    ],
    ids=["refused", "already there"],
)
def test_what_slurm_says_is_one_line(programs: dict[str, str], message: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", f"{fakes(tmp_path, **programs)}:{os.environ['PATH']}")
    with pytest.raises(SystemExit):
        main(DEMO)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "devices", "message"),
    [
        (
            "NTASKS=2 NTASKS_PER_NODE=2 STEP_NUM_TASKS=2 JOB_NAME=train",
            "auto",
            "Slurm has started 2 of the 1 processes of this run (trainer.dev",
        ),
        (
            "NTASKS=2 STEP_NUM_TASKS=2 JOB_NAME=python",
            1,
            "Slurm has started 2 of the 1 processes of this run (trainer.dev",
        ),
        ("NTASKS=2 NTASKS_PER_NODE=2 JOB_NAME=train", 2, "Slurm has started 1 of the 2 processes of this run"),
        (
            "NTASKS=2 STEP_NUM_TASKS=2 JOB_NAME=interactive",
            2,
            "srun has started 2 processes, but Lightning takes a job n",
        ),
    ],
    ids=["more tasks than the machine has", "more tasks than devices", "no srun", "a job named like a shell"],
)
def test_a_run_of_other_processes_than_slurm_has_started_is_refused(
    environment: str, devices: int | str, message: str, monkeypatch, capsys
) -> None:
    for name, _, value in (each.partition("=") for each in environment.split()):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SystemExit):
        fit("plain", "", *SHORT, "--trainer.devices", str(devices))
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("run").exists()


def test_devices_that_the_machine_counts_are_no_number_of_processes_to_compare_with(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    for devices in (-1, "-1", "auto"):
        require_all_tasks(planned_processes(devices, num_nodes=1))
    for devices in (4, "4", "0,1,2,3", [0, 1, 2, 3]):
        require_all_tasks(planned_processes(devices, num_nodes=1))
        with pytest.raises(UserError, match="Slurm has started 4 of the 8 processes"):
            require_all_tasks(planned_processes(devices, num_nodes=2))


def test_a_single_process_in_a_shell_of_slurm_needs_no_srun(monkeypatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    fit("plain", "", *SHORT)
    assert Path("run/student").is_dir()
