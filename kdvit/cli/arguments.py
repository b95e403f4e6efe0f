"""The commands that run no Trainer: each parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from kdvit.cli.commands.analyze import run_analysis
from kdvit.cli.commands.benchmark import benchmark
from kdvit.cli.commands.compare import compare
from kdvit.cli.commands.slurm import slurm
from kdvit.distillers.plugins import known_distillers
from kdvit.errors import UserError
from kdvit.models import export_student, load_released, load_student
from kdvit.models.checkpoint import student_spec
from kdvit.models.cost import parameter_count
from kdvit.models.export import export_onnx, export_program


def compare_command(args: list[str]) -> None:
    """Runs `kdvit compare`."""
    parser = ArgumentParser(prog="kdvit compare", description=COMPARE, exit_on_error=False)
    parser.add_argument("runs", nargs="+", help="run directories of `kdvit fit`")
    parser.add_argument("--out", default="runs/comparison", help="folder of curves.png and comparison.json")
    given = parser.parse_args(args)
    compare(given.runs, given.out)


def distillers_command(args: list[str]) -> None:
    """Runs `kdvit distillers`."""
    ArgumentParser(prog="kdvit distillers", description="List the objectives by their short names.").parse_args(args)
    for name, summary in known_distillers().items():
        print(f"{name:<20} {summary}")


def import_command(args: list[str]) -> None:
    """Runs `kdvit import`."""
    parser = ArgumentParser(prog="kdvit import", description=IMPORT, exit_on_error=False)
    parser.add_argument("checkpoint", help="the authors' .pth file")
    parser.add_argument("--out", required=True, help="folder of the student; kdvit.load_student reads it")
    parser.add_argument("--weights", choices=["raw", "ema"], default="raw", help="raw is what the paper reports")
    parser.add_argument("--num_heads", type=int, help="heads of the wide blocks, where they are not 64 channels each")
    given = parser.parse_args(args)
    try:
        released = load_released(given.checkpoint, given.weights == "ema", given.num_heads)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    student = released.student
    export_student(student, student_spec(student, student.image_format), given.out)
    print(
        f"{type(student).__name__}, {parameter_count(student):,} parameters, {given.weights} weights, in {given.out}."
    )
    if released.dropped:
        print(f"Left out, as no output depends on them: {', '.join(released.dropped)}.")


def export_command(args: list[str]) -> None:
    """Runs `kdvit export`."""
    parser = ArgumentParser(prog="kdvit export", description=EXPORT, exit_on_error=False)
    parser.add_argument(
        "--ckpt", required=True, help="a checkpoint of `kdvit fit` or of the authors, or an exported folder"
    )
    parser.add_argument(
        "--out", required=True, help="folder of model.safetensors and config.json, and of the format's file"
    )
    parser.add_argument(
        "--format", choices=["timm", "onnx", "torch-export"], default="timm", help="timm: the folder alone"
    )
    parser.add_argument("--weights", choices=["raw", "ema"], default="raw", help="raw is what is trained and reported")
    given = parser.parse_args(args)
    out = Path(given.out)
    try:
        student = load_student(given.ckpt, ema=given.weights == "ema")
        export_student(student, student.spec, out)
        print(f"{type(student).__name__}, {parameter_count(student):,} parameters, {given.weights} weights, in {out}.")
        if given.format != "timm":
            write, file = {"onnx": (export_onnx, "model.onnx"), "torch-export": (export_program, "model.pt2")}[
                given.format
            ]
            largest = write(student, out / file)
            print(f"{out / file}: its logits differ from PyTorch's by at most {largest:.2g}.")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(str(error)) from error


def benchmark_command(args: list[str]) -> None:
    """Runs `kdvit benchmark`."""
    parser = ArgumentParser(prog="kdvit benchmark", description=BENCHMARK, exit_on_error=False)
    parser.add_argument("networks", nargs="+", help="timm names, exported folders, checkpoints, or configs")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once, for the throughput")
    parser.add_argument("--out", help="a JSON file for the numbers and the machine")
    given = parser.parse_args(args)
    benchmark(given.networks, given.batch_size, given.out)


def analyze_command(args: list[str]) -> None:
    """Runs `kdvit analyze`."""
    parser = ArgumentParser(prog="kdvit analyze", description=ANALYZE, exit_on_error=False)
    named = parser.add_argument_group("what to analyse: --model, or --teacher and --student, or --config")
    named.add_argument(
        "--model", nargs="+", help="timm names, exported folders, checkpoints, or .npy and .npz features"
    )
    named.add_argument("--teacher", help="timm name or exported folder")
    named.add_argument("--student", help="timm name, exported folder or checkpoint")
    named.add_argument(
        "--config", help="a config of `kdvit fit`: its teacher, its student (trained, if its run is there)"
    )
    named.add_argument("--data", help="folder of images (ROOT/val/CLASS or ROOT/CLASS), or FashionMNIST or Digits")
    named.add_argument(
        "--pretrained", type=bool, default=True, help="published weights for timm names; else random ones"
    )
    measured = parser.add_argument_group("what to measure")
    measured.add_argument("--images", type=int, default=1000, help="how many, one of each class first")
    measured.add_argument(
        "--layers", nargs="+", help="indices, fractions of the depth or names; or all. Default: the last"
    )
    measured.add_argument(
        "--energies", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.99], help="shares of the energy"
    )
    measured.add_argument("--centred", type=bool, default=False, help="dataset PCA without the mean token")
    measured.add_argument("--permutations", type=int, default=100, help="of the channels, beside SEP")
    measured.add_argument("--seed", type=int, default=0, help="of the choice of images, the controls, random weights")
    run = parser.add_argument_group("how to run")
    run.add_argument("--out", default="runs/analysis", help="folder of the report")
    run.add_argument("--batch_size", type=int, default=32, help="images at once")
    run.add_argument("--num_workers", type=int, default=2, help="processes that load images")
    run.add_argument("--memory", type=float, default=4.0, help="GB for tokens; with less, images pass twice")
    run.add_argument("--trainer.accelerator", help="by default gpu where there is one, else cpu")
    run.add_argument("--trainer.devices", type=int, default=1, help="processes that share the images")
    run.add_argument("--trainer.num_nodes", type=int, default=1, help="machines")
    run.add_argument("--trainer.strategy", default="auto", help="Lightning's, for several processes")
    run.add_argument(
        "--trainer.precision", choices=["32-true", "bf16-mixed", "16-mixed"], default="32-true", help="of the networks"
    )
    run_analysis(parser.parse_args(args))


def slurm_command(args: list[str], parse_fit: Callable[[list[str]], Any]) -> None:
    """Runs `kdvit slurm`.

    Args:
        args: Arguments after the command's name. Those that are not its own are passed on to `kdvit fit`.
        parse_fit: Parses and checks the arguments of `kdvit fit`, and builds nothing.
    """
    parser = argparse.ArgumentParser(
        prog="kdvit slurm",
        usage="kdvit slurm --config CONFIG [options] [options of kdvit fit]",
        description=SLURM,
        allow_abbrev=False,
        exit_on_error=False,
    )
    size = parser.add_argument_group("how much")
    size.add_argument("--nodes", type=int, default=1, help="machines (1)")
    size.add_argument("--gpus", type=int, default=1, help="GPUs a node, one process each (1); 0 for processes on CPUs")
    size.add_argument("--tasks_per_node", type=int, help="with --gpus 0: processes a node (1)")
    size.add_argument("--cpus_per_task", type=int, help="processors a process (one, and one for each loader worker)")
    size.add_argument("--mem", help="memory a node, such as 64G (what the cluster gives)")
    size.add_argument("--time", help="limit, such as 24:00:00 or 3-00 (days-hours); the job is requeued and goes on")
    size.add_argument(
        "--seeds", type=int, nargs="+", default=[], help="a run for each, in RUN/seed_N: an array of jobs"
    )
    job = parser.add_argument_group("which job")
    for name in ("partition", "account", "qos"):
        job.add_argument(f"--{name}", help="Slurm's")
    job.add_argument("--job_name", help="by default the name of the run directory")
    job.add_argument("--signal_seconds", type=int, default=120, help="before the end, when the run saves itself (120)")
    job.add_argument("--sbatch", action="append", default=[], help="any other option: --sbatch=--constraint=a100")
    job.add_argument(
        "--setup", action="append", default=[], help="a line of shell before the start: 'module load cuda'"
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the script, and submit nothing")
    bound: list[str] = []  # argparse would take the value of --sbatch, an option as well, for one of kdvit's
    for arg in args:
        if bound and bound[-1] in ("--sbatch", "--setup"):
            bound[-1] += f"={arg}"
        else:
            bound.append(arg)
    given, fit = parser.parse_known_args(bound)
    slurm(given, fit, shlex.join(["kdvit", "slurm", *args]), parse_fit)


COMPARE = "Show finished runs side by side: parameters, latency, accuracy and time as a table, the curves as a picture."
IMPORT = "Turn a Lift or WideLast checkpoint of the authors into a student of kdvit."
EXPORT = "Take a student out of a run: as safetensors that timm loads, as ONNX, or as a program of torch.export."
BENCHMARK = "Show parameters, FLOPs, latency and throughput of networks side by side."
ANALYZE = (
    "Measure how many directions the features of one image and of all images take, how they spread over the channels, and "
    "what that means for a teacher and a student (arXiv:2511.15572). Writes a page, tables, numbers and figures."
)
SLURM = (
    "Submit a fit as a Slurm job that saves and requeues itself before its time is over or it is preempted. The config and all "
    "options are checked first. What is not listed here is passed on to `kdvit fit`."
)
COMMANDS = {
    "analyze": analyze_command,
    "benchmark": benchmark_command,
    "compare": compare_command,
    "distillers": distillers_command,
    "export": export_command,
    "import": import_command,
}
