"""What `make bench` measures where there is a GPU: teacher, online step, cached step, loader, and what waits.

The code is the same on a CPU: `tests/test_gpu_bench.py` runs it there, with tiny networks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import timm
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from kdvit import DistillationModule
from kdvit.callbacks import BadImages, NonFiniteGuard, StudentEMA, Throughput
from kdvit.data import ImageFolder
from kdvit.data.cached import collate
from kdvit.data.transforms import PixelTransform, train_transform
from kdvit.models import FrozenTeacher, TimmTeacher
from kdvit.structures import Batch, ViTOutput, as_batch
from tests.bench.cached import stored, views
from tests.bench.data import photograph
from tests.bench.device import device, peak_gb, timed, waits
from tests.bench.fit import WARM, batches, seconds_a_step
from tests.bench.online import ReferenceLift, ReferenceLoop, ReferenceWideLast, model_arguments
from tests.bench.plain_step import PUBLISHED, Pair, build, image_format, images, step
from tests.bench.rounds import Row, cost, interleave, row, speed_up

REFERENCES: dict[str, Any] = {"Lift": ReferenceLift, "WideLast": ReferenceWideLast}
WAIT = "synchronizing CUDA operation"
PHOTOGRAPHS = 64


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        pair: The networks.
        batch: Images a step.
        size: Their height and width.
        steps: Steps of a fit that count.
        workers: Loader processes.
    """

    pair: Pair = PUBLISHED
    batch: int = 256
    size: int = 224
    steps: int = 10
    workers: int = max((os.cpu_count() or 1) - 1, 1)


def rows(rounds: int, sizes: Sizes | None = None) -> Iterator[Row]:
    """Measures each row when it is asked for; what takes a compiler comes last."""
    sizes, on = sizes or Sizes(), device()
    half = torch.bfloat16, torch.float16
    for dtype in half:
        yield _teacher(rounds, sizes, on, dtype, "its talking heads as timm's", fast_attention=False)
        yield _teacher(rounds, sizes, on, dtype, "eager")
    for method in REFERENCES:
        yield from _steps(rounds, sizes, on, method)
        yield _under_lightning(rounds, sizes, on, method)
        yield _waiting(sizes, on, method)
    yield _pixels(rounds, sizes, on)
    yield _loader(sizes, on)
    for dtype in half:
        yield _teacher(rounds, sizes, on, dtype, "compiled", compile={})
        yield _teacher(rounds, sizes, on, dtype, "compiled to CUDA graphs", compile={"mode": "reduce-overhead"})
    for method in REFERENCES:
        yield from _compiled(rounds, sizes, on, method)


def _measured(
    what: str,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    rounds: int,
    compare: Callable[[float, float], float],
    goal: str,
    sizes: Sizes,
    on: torch.device,
) -> Row:
    """Returns a row with images/s, and on a GPU with the peak memory of both sides."""
    found = row(what, interleave(ours, theirs, rounds), compare, "ms", goal)
    peaks = peak_gb(ours, on), peak_gb(theirs, on)
    known = None if peaks[0] is None or peaks[1] is None else (peaks[0], peaks[1])
    return found._replace(images=sizes.batch, peak_gb=known)


def _teacher(
    rounds: int,
    sizes: Sizes,
    on: torch.device,
    dtype: torch.dtype,
    name: str,
    compile: dict[str, Any] | None = None,
    **options: Any,
) -> Row:
    """Logits and the last block's map against timm's, both under autocast."""
    torch.manual_seed(0)
    ours = FrozenTeacher(TimmTeacher(**sizes.pair.teacher, pretrained=False, **options))
    theirs = timm.create_model(**model_arguments(sizes.pair.teacher)).eval()
    theirs.load_state_dict(ours.network.model.state_dict())
    theirs.to(on)
    if compile is not None:
        ours.compile(**compile)
    image = images(sizes.batch, sizes.size).image.to(on)

    def kdvit() -> None:
        with torch.autocast(on.type, dtype):
            ours(image, [-1])

    @torch.no_grad()
    def timms() -> None:
        with torch.autocast(on.type, dtype):
            end, _ = theirs.forward_intermediates(image, indices=[ours.network.depth - 1])
            theirs.forward_head(end)

    what = f"teacher forward, {str(dtype).removeprefix('torch.')}, {name}: speed-up over timm"
    return _measured(what, timed(kdvit, on), timed(timms, on), rounds, speed_up, "none", sizes, on)


def _steps(rounds: int, sizes: Sizes, on: torch.device, method: str) -> Iterator[Row]:
    """The online step against the authors' loop, and the cached step against the online one and one with no teacher."""
    batch = _batch(sizes, on)
    module = build(method, size=sizes.size, pair=sizes.pair, on=on)
    online, measured = step(module, batch), partial(_measured, rounds=rounds, sizes=sizes, on=on)
    loop = ReferenceLoop(REFERENCES[method](sizes.pair), sizes.pair, on)
    authors = timed(lambda: loop.step(batch.image, batch.target), on)
    what = f"online step, {method}: speed-up over the authors' loop"
    yield measured(what, online, authors, compare=speed_up, goal="none")
    cached = _cached(module, batch, on)
    alone = step(build(method, with_teacher=False, size=sizes.size, pair=sizes.pair, on=on), batch)
    yield measured(
        f"cached step, {method}: speed-up over the online step", cached, online, compare=speed_up, goal="none"
    )
    what = f"cached step, {method}: share of a step with no teacher"
    yield measured(what, cached, alone, compare=cost, goal="<= 1.05")


def _compiled(rounds: int, sizes: Sizes, on: torch.device, method: str) -> Iterator[Row]:
    """The online and the cached step, teacher and student compiled, against the same eager."""
    batch, networks = _batch(sizes, on), [build(method, size=sizes.size, pair=sizes.pair, on=on) for _ in range(2)]
    compiled, eager = networks
    compiled.student.compile()
    compiled.teachers["teacher"].compile()
    for kind, made in ("online", step), ("cached", partial(_cached, on=on)):
        what = f"{kind} step, {method}, compiled: speed-up over the eager one"
        ours, theirs = made(compiled, batch), made(eager, batch)
        yield _measured(what, ours, theirs, rounds, speed_up, "none", sizes, on)


def _cached(module: DistillationModule, batch: Batch, on: torch.device) -> Callable[[], float]:
    """Returns a step on what a cache holds of the batch, which waits in pinned memory as loader workers give it."""
    with tempfile.TemporaryDirectory() as folder:
        output = stored(module, batch, Path(folder), "auto").read(views(batch), batch.index)
    kept = _moved(output, lambda x: x.pin_memory() if on.type == "cuda" else x)
    return step(module, batch, lambda: _moved(kept, lambda x: x.to(on, non_blocking=True)))


def _under_lightning(rounds: int, sizes: Sizes, on: torch.device, method: str) -> Row:
    """The online step in a Trainer, with all callbacks that a run has, against the same step in a bare loop."""
    batch = _batch(sizes, on)
    bare = step(build(method, size=sizes.size, pair=sizes.pair, on=on), batch)

    def fit() -> float:
        return seconds_a_step(_module(method, sizes, on), batches(batch, sizes.steps), "bf16-mixed", _callbacks(), on)

    what = f"online step under Lightning, {method}: share of a bare loop without average and guard"
    found = row(what, interleave(fit, bare, rounds), cost, "ms", "<= 1.02")
    return found._replace(images=sizes.batch)  # no peak: of the two, the fit alone builds its networks within the work


class _Marks(pl.Callback):
    """Notes how many places were listed when each step began."""

    def __init__(self, places: list[Any]) -> None:
        self.places, self.counts = places, list[int]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.counts.append(len(self.places))


def _waiting(sizes: Sizes, on: torch.device, method: str) -> Row:
    """How often the host waits for the GPU in the steps that are not logged, of every fourth that is."""
    with waits(on) as places:
        marks = _Marks(places)
        loader = batches(_batch(sizes, on), 4 * WARM)
        callbacks = [marks, *_callbacks()]
        seconds = seconds_a_step(_module(method, sizes, on), loader, "bf16-mixed", callbacks, on, every=4)
        spans = [
            places[first:last]
            for i, (first, last) in enumerate(zip(marks.counts, marks.counts[1:], strict=False))
            if i >= WARM and (i + 1) % 4
        ]
    found = [f"{each.filename}:{each.lineno}" for span in spans for each in span if WAIT in str(each.message)]
    what = f"{method}: waits for the GPU in {len(spans)} steps that are not logged"
    what += "".join(f" ({place})" for place in dict.fromkeys(found))
    return Row(what, 1e3 * seconds, 1e3 * seconds, "ms", len(found), (len(found), len(found)), "0", sizes.batch)


def _pixels(rounds: int, sizes: Sizes, on: torch.device) -> Row:
    """A training batch from pinned memory to the device: as pixels, normalised and erased there, against floats."""
    crop = train_transform(image_format(sizes.size))
    drawn = [PixelTransform(crop)(photograph(i % PHOTOGRAPHS)) for i in range(sizes.batch)]
    pixels = collate([(each, 0, i) for i, each in enumerate(drawn)])
    floats = as_batch(pixels)
    if on.type == "cuda":
        pixels, floats = pin_memory(pixels), pin_memory(floats)
    ours, theirs = (timed(partial(_sent, each, on), on) for each in (pixels, floats))
    what = "training images to the GPU as uint8 pixels, normalised and erased there: speed-up over floats"
    return _measured(what, ours, theirs, rounds, speed_up, "none", sizes, on)


def _sent(batch: Batch, on: torch.device) -> None:
    as_batch(move_data_to_device(batch, on))


def _loader(sizes: Sizes, on: torch.device) -> Row:
    """A run on JPEG photographs of 500 x 375 without a teacher, as a cached run nearly is, against one from memory.

    Some 8 batches a worker, for its first two are ready when the clock starts.
    """
    steps = max(sizes.steps, 8 * sizes.workers)
    with tempfile.TemporaryDirectory() as root:
        files = [Path(root, f"{i}.jpg") for i in range(PHOTOGRAPHS)]
        for i, file in enumerate(files):
            photograph(i).save(file, quality=90)
        for i in range(sizes.batch * (steps + WARM) + 2):  # one of each class is held out
            link = Path(root, "train", "ab"[i % 2], f"{i}.jpg")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(files[i % PHOTOGRAPHS])
        data = ImageFolder(root, batch_size=sizes.batch, img_size=sizes.size, num_workers=sizes.workers, val_share=1e-9)
        loaded, memory = (
            seconds_a_step(_module("Lift", sizes, on, with_teacher=False), each, "bf16-mixed", _callbacks(), on)
            for each in (data, batches(_batch(sizes, on), sizes.steps))
        )
    what = f"step of Lift without a teacher, photographs by {sizes.workers} workers: share of one from memory"
    share = loaded / memory
    return Row(what, 1e3 * loaded, 1e3 * memory, "ms", share, (share, share), "1, with workers enough", sizes.batch)


def _module(method: str, sizes: Sizes, on: torch.device, with_teacher: bool = True) -> DistillationModule:
    return build(method, with_teacher, sizes.size, sizes.pair, on, DistillationModule)


def _batch(sizes: Sizes, on: torch.device) -> Batch:
    batch = images(sizes.batch, sizes.size)
    classes = sizes.pair.student.get("num_classes", 1000)
    return batch._replace(image=batch.image.to(on), target=batch.target.to(on) % classes)


def _moved(output: ViTOutput, move: Callable[[torch.Tensor], torch.Tensor]) -> ViTOutput:
    return ViTOutput(None if output.logits is None else move(output.logits), tuple(map(move, output.features)))


def _callbacks() -> list[pl.Callback]:
    return [Throughput(), StudentEMA(0.99996), NonFiniteGuard(skip_steps=1), BadImages()]
