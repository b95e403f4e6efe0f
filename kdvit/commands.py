"""The commands that run no Trainer: each parses its arguments and calls one function."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from kdvit.benchmark import benchmark
from kdvit.compare import compare
from kdvit.messages import UserError
from kdvit.models import export_student, load_released, load_student
from kdvit.models.checkpoint import student_spec
from kdvit.models.cost import parameter_count
from kdvit.models.export import export_onnx, export_program
from kdvit.plugins import known_distillers


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


COMPARE = "Show finished runs side by side: parameters, latency, accuracy and time as a table, the curves as a picture."
IMPORT = "Turn a Lift or WideLast checkpoint of the authors into a student of kdvit."
EXPORT = "Take a student out of a run: as safetensors that timm loads, as ONNX, or as a program of torch.export."
BENCHMARK = "Show parameters, FLOPs, latency and throughput of networks side by side."
COMMANDS = {
    "benchmark": benchmark_command,
    "compare": compare_command,
    "distillers": distillers_command,
    "export": export_command,
    "import": import_command,
}
