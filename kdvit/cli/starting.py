"""What a first config holds, for these images, this pair of networks and this machine."""

from __future__ import annotations

import math
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from kdvit.cli.machine import cores
from kdvit.data import ImageFolder
from kdvit.data.reading import FORMATS
from kdvit.errors import UserError, shown
from kdvit.models import LiftViT, Network, TimmStudent, TimmTeacher, WideLastViT, export_student, load_student
from kdvit.models.checkpoint import known_class_names
from kdvit.models.timm_model import WEIGHTS
from kdvit.pages import filled

EPOCHS = 300
"""Of the published runs (arXiv:2511.15572); fewer where they take longer than `HOURS`, but at least `FEWEST`."""
FEWEST = 20
HOURS = {"GPU": 24, "CPU": 3}
MEASURED = 100
"""Images whose sizes are looked at."""
TIMED = 8
"""Images of the step that is timed on CPUs. GPUs time the config's batch: a few take them as long as many."""
STUDENTS: dict[str, type[TimmStudent]] = {"lift": LiftViT, "wide_last": WideLastViT, "none": TimmStudent}
OBJECTIVES = {"lift": "LiftDistiller", "wide_last": "WideLastDistiller"}
PHI_S = "phi_s", "the teacher's leading axes, evened out"


class Machine(NamedTuple):
    """What a run gets of this machine.

    Attributes:
        devices: Processes, one a GPU.
        gpu: Whether they are GPUs.
        precision: Lightning's name.
        workers: Processes that load images, for each device.
    """

    devices: int
    gpu: bool
    precision: str
    workers: int

    @classmethod
    def here(cls) -> Machine:
        """Looks at this machine: all GPUs of it, and two thirds of its cores for loading."""
        gpus = torch.cuda.device_count()
        half = "bf16-mixed" if gpus and torch.cuda.is_bf16_supported() else "16-mixed"
        return cls(gpus or 1, gpus > 0, half if gpus else "32-true", max(1, min(12, 2 * cores() // 3 // (gpus or 1))))

    def __str__(self) -> str:
        return f"{self.devices} GPU{'s' * (self.devices > 1)}" if self.gpu else f"{cores()} cores and no GPU"

    def batch_size(self, images: int) -> int:
        """Returns the images a step and process: a power of two, with ten steps an epoch or more where that can be."""
        size = 256 if self.gpu else 64
        while size > 8 and size * self.devices * 10 > images:
            size //= 2
        return size


def first_config(
    images: str, teacher: str, student: str, remedy: str, labels: bool | None, file: Path
) -> tuple[str, str]:
    """Returns the text of a config, and what was found, for the user.

    Args:
        images: Folder of images.
        teacher: Name, folder, or checkpoint.
        student: Name.
        remedy: "lift", "wide_last" or "none".
        labels: Whether folders are classes; None to look.
        file: Where the config will be.

    Raises:
        UserError: If there are no images, or a network cannot be built.
    """
    machine = Machine.here()
    with shown((OSError, ValueError, TypeError, RuntimeError)):
        data = _images(images, labels)
        arch = _teacher(teacher, file)
        network = TimmTeacher(arch, pretrained=False)
        classes = data.num_classes or network.output_shapes().classes or 0
        own, args = _student(student, remedy, network, classes)
        count = len(data.dataset("train"))  # type: ignore[arg-type]
        batch, of_image = _fitting(own, network, machine, count)
    seconds = of_image * count / machine.devices
    epochs = max(FEWEST, min(EPOCHS, int(3600 * HOURS["GPU" if machine.gpu else "CPU"] / seconds)))
    minutes = epochs * seconds / 60
    takes = f"about {minutes / 60:.0f} hours" if minutes > 90 else f"about {math.ceil(minutes)} minutes"
    distillers, why = _objectives(remedy, own, network, data)
    height, width = own.image_format.size
    seen = f"Images: {data.summary()}. {_sizes(data, (height, width))}"
    text = filled(
        Path(__file__).with_name("start.yaml.jinja"),
        file=file,
        name=file.stem,
        machine=machine,
        root=str(Path(images).absolute()),
        said=[
            *textwrap.wrap(seen, 100),
            *textwrap.wrap(f"{why} Written by `kdvit init` for a machine of {machine}.", 100),
        ],
        epochs=epochs,
        takes=takes,
        published=EPOCHS,
        warmup=max(1, min(5, epochs // 20)),
        batch=batch,
        logged=max(1, min(50, count // (batch * machine.devices))),
        rate=5e-4 * (batch * machine.devices / 512) ** 0.5,
        size=height if height == width else (height, width),
        student_class=type(own).__name__,
        student_args=args,
        teacher=network,
        teacher_arch=arch,
        distillers=distillers,
        task=0 if not data.num_classes else 0.5 if distillers[0][0] == "logit" else 1,
    )
    told = (
        f"{seen}\nTeacher: {teacher}. Student: {type(own).__name__} {student}. {why}\n"
        f"This machine has {machine}: {epochs} epochs take {takes}."
    )
    return "".join(map(_aligned, text.splitlines())), told


def _images(folder: str, labels: bool | None) -> ImageFolder:
    if not Path(folder).is_dir():
        raise UserError(f"--images: there is no folder {str(Path(folder).absolute())!r}.")
    if labels is not False:
        try:
            data = ImageFolder(folder)
            if labels or data.num_classes > 1:
                return data
        except FileNotFoundError:
            if labels:
                raise
    return ImageFolder(folder, labels=False)


def _sizes(data: ImageFolder, size: tuple[int, int]) -> str:
    """Says how large the images typically are."""
    samples = data.samples["train"]
    numbers = np.unique(np.linspace(0, len(samples) - 1, MEASURED).astype(int)).tolist()
    found = []
    for path in (samples[number][0] for number in numbers):
        with suppress(OSError), Image.open(path, formats=FORMATS) as image:
            found.append((image.height, image.width))
    if not found:
        return ""
    height, width = np.median(found, axis=0).astype(int).tolist()
    return f"They are typically {height} x {width} pixels, and scaled to {size[0]} x {size[1]} for the student."


def _teacher(name: str, file: Path) -> str:
    """Returns the teacher's `arch`; a checkpoint is exported beside the config."""
    path = Path(name)
    if path.is_file():
        folder = file.absolute().with_name(f"{file.stem}_teacher")
        student = load_student(path)
        export_student(student, student.spec, folder)
        return f"local-dir:{folder}"
    if path.is_dir():
        folders = [each for each in (path, path / "student") if (each / WEIGHTS).is_file()]
        if not folders:
            raise UserError(f"--teacher: {name!r} is neither an exported folder nor a run with a folder student.")
        return f"local-dir:{folders[0].absolute()}"
    return name


def _student(arch: str, remedy: str, teacher: Network, classes: int) -> tuple[TimmStudent, dict[str, Any]]:
    """Builds the student; for a teacher of smaller images, at their size and with the same patches."""
    args: dict[str, Any] = {"arch": arch, "num_classes": classes}
    if len(teacher.image_format.mean) == 1:
        args["in_chans"] = 1
    channels, height, _ = teacher.output_shapes([-1], logits=False).features[0]
    plain, size = TimmStudent(**args), teacher.image_format.size
    smaller = size[0] < plain.image_format.size[0]
    if smaller and hasattr(plain.model, "patch_embed"):
        args["img_size"] = size[0] if size[0] == size[1] else list(size)
        args["model_args"] = {"patch_size": size[0] // height}
    if remedy != "none":
        args["width"] = channels
    student = STUDENTS[remedy](**args)
    student.image_format = student.image_format._replace(size=size if smaller else student.image_format.size)
    return student, args


def _fitting(student: Network, teacher: Network, machine: Machine, images: int) -> tuple[int, float]:
    """Returns a batch size, and the seconds that an image of a training step takes here.

    A GPU has room for forward and backward of the batch.

    Raises:
        UserError: If a GPU has no room for one image.
    """
    batch = machine.batch_size(images)
    while True:
        try:
            return batch, _image_seconds(student, teacher, machine.gpu, batch if machine.gpu else TIMED)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise UserError("The GPU has no room for one image of this pair: choose smaller networks.") from None
            batch //= 2


def _image_seconds(student: Network, teacher: Network, gpu: bool, images: int) -> float:
    """Returns the seconds that an image of a training step takes here, the teacher's part included."""
    device = torch.device("cuda" if gpu else "cpu")
    student, teacher = student.to(device).train(), teacher.to(device).eval()
    ours, theirs = (each.blank_image().expand(images, -1, -1, -1) for each in (student, teacher))
    with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
        for _ in range(2):  # the first is slower
            start = time.perf_counter()
            with torch.no_grad():
                teacher(theirs, [-1])
            output = student(ours, [-1], student.output_shapes().classes is not None)
            output.features[0].float().sum().backward()
            if gpu:
                torch.cuda.synchronize()
    return (time.perf_counter() - start) / images


def _objectives(
    remedy: str, student: Network, teacher: TimmTeacher, data: ImageFolder
) -> tuple[list[tuple[str, str, str, str]], str]:
    """Returns name, class, arguments and comment of each distiller, the one of logits first, and why it is there."""
    classes = teacher.output_shapes().classes
    names = teacher.class_names or known_class_names(teacher.init_args["arch"], True, None)
    shared = {*(names or ())} & {*data.class_names}
    by_name = ""
    if classes is None:
        logit, why = False, "The teacher has no classes, so its maps alone are distilled."
    elif not data.num_classes or names == [*data.class_names] or (names is None and classes == data.num_classes):
        logit, why = True, "The teacher's classes are the student's."
    elif len(shared) > 1:
        logit, by_name = True, ", classes: by_name"
        why = f"{len(shared)} classes of the teacher have the names of the student's: their logits are distilled."
    else:
        logit = False
        why = f"The teacher's {classes} classes are others than the student's, so its maps alone are distilled."
    found = [("logit", "LogitDistiller", f"{{weight: 0.5, temperature: 1.0{by_name}}}", "")] if logit else []
    narrow = TimmStudent(**{key: value for key, value in student.init_args.items() if key != "width"})
    ours, theirs = (each.output_shapes([-1], logits=False).features[0][0] for each in (narrow, teacher))
    if remedy in OBJECTIVES:
        found.append((remedy, OBJECTIVES[remedy], "{weight: 0.2}", "the published weight"))
        if ours > theirs:
            why += (
                f" The student has {ours} channels and the teacher {theirs}: {remedy} is for wider teachers, so "
                "compare with --remedy none."
            )
    elif not logit:
        projector, is_so = ("linear", "dropped after training") if ours > theirs else PHI_S
        found.append(("feature", "FeatureDistiller", f"{{weight: 1.0, projector: {projector}}}", is_so))
    return found, why


def _aligned(line: str) -> str:
    text, mark, comment = line.partition(" # ")
    return f"{text:<44} # {comment}\n" if mark and text.strip() else f"{line}\n"
