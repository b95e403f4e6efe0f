"""`kdvit analyze`: what a teacher and a student suffer from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from kdvit.cli.config_files import find_config
from kdvit.errors import UserError, shown


@dataclass
class Processes:
    """Lightning's options of the same names.

    Attributes:
        accelerator: By default gpu where there is one, else cpu.
        devices: Processes that share the images.
        num_nodes: Machines.
        strategy: For several processes.
        precision: Of the networks; by default 32-true, and for `analyze` bf16-mixed where this machine computes in it.
    """

    accelerator: str | None = None
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    strategy: str = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None


def analyze(
    *,
    model: list[str] | None = None,
    teacher: str | None = None,
    student: str | None = None,
    config: str | None = None,
    data: str | None = None,
    pretrained: bool = True,
    img_size: PositiveInt | None = None,
    images: PositiveInt = 1000,
    layers: list[int | float | str] | None = None,
    energies: list[float] = [0.8, 0.9, 0.95, 0.99],  # noqa: B006
    centred: bool = False,
    permutations: int = 100,
    subspaces: NonNegativeInt = 0,
    seed: NonNegativeInt = 0,
    against: Literal["published"] | None = None,
    out: str = "runs/analysis",
    batch_size: PositiveInt = 32,
    num_workers: NonNegativeInt = 2,
    memory: NonNegativeFloat = 4.0,
    trainer: Processes = Processes(),  # noqa: B008
) -> None:
    """Measure the features of a pair, and say what to do about it (arXiv:2511.15572).

    How many directions the features of one image and of all images take, how they spread over the channels, and what
    that means for a teacher and a student. Writes a page, tables, numbers and figures. Say what to analyse by --model,
    by --teacher and --student, or by --config.

    Args:
        model: Names of timm, exported folders, checkpoints, or .npy and .npz features.
        teacher: Name of timm or exported folder.
        student: Name of timm, exported folder or checkpoint.
        config: A config of `kdvit fit`: its teacher, and its student (trained, if its run is there).
        data: Folder of images (ROOT/val/CLASS or ROOT/CLASS), or FashionMNIST or Digits.
        pretrained: Published weights for names of timm; else random ones.
        img_size: Input size in pixels of timm's networks, where it is not their own (DINOv2 in the paper: 224).
        images: How many, one of each class first.
        layers: Indices, fractions of the depth or names; or all. By default the last.
        energies: Shares of the energy.
        centred: SVD and dataset PCA without the mean token.
        permutations: Of the channels, beside SEP.
        subspaces: Dimensions needed where images are routed to 1, 2, 4 and so on up to so many PCA bases.
        seed: Of the choice of images, the controls and random weights.
        against: The paper's figures beside one's own in tables.md and tables.tex, for the models that it has.
        out: Folder of the report.
        batch_size: Images at once.
        num_workers: Processes that load images.
        memory: Gigabytes for tokens and curves of a process; with less, the images pass twice.
        trainer: How to run.

    Examples:
        kdvit analyze --config demo/lift.yaml --images 200
    """
    ways = [bool(model), bool(teacher or student), bool(config)]
    if sum(ways) != 1 or bool(teacher) != bool(student):
        raise UserError("Say what to analyse by one of: --model NAMES; --teacher NAME --student NAME; --config FILE.")
    config = config and find_config(config)
    with shown((OSError,), prefix=f"--out {out!r}: cannot write there: "):
        Path(out).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    from kdvit.analysis import Options
    from kdvit.cli.analyses import Analysis, write

    with shown():
        options = Options(tuple(sorted(energies)), centred, permutations, seed, subspaces)
        options.check()
    chosen = "all" if layers == ["all"] else layers
    analysis = Analysis(
        data, pretrained, img_size and int(img_size), images, chosen, options, batch_size, num_workers, memory, trainer
    )
    if model:
        write(analysis.of_models(model), None, out, against)
    elif config:
        write(*analysis.of_config(config), out, against)
    elif teacher and student:
        write(*analysis.of_pair(teacher, student), out, against)
