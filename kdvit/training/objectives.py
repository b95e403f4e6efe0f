"""The distillers of a run: who wants which layer of whom, and what they make of a batch."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from kdvit.distillers import Distiller, Weight, WeightSchedule
from kdvit.errors import UserError
from kdvit.models import FrozenTeacher, Network
from kdvit.structures import Batch, Layer, OutputShapes, TeacherMap, ViTOutput
from kdvit.training.heads import leave_unreached, require_logits

LOGGED = ("task", "loss", "acc1", "grad_norm", "lr")
"""Names in the log that no term may have."""


@dataclass
class TeacherRequest:
    """What the distillers want of one teacher.

    Attributes:
        layers: Its layers, in the order of the distillers.
        maps: The same, each with what the distiller makes of it before it looks at the student. Blocks have their
            index, layers behind the blocks keep their name.
        logits: Whether logits, too.
    """

    layers: tuple[Layer, ...] = ()
    maps: tuple[TeacherMap, ...] = ()
    logits: bool = False


class Objectives(nn.ModuleDict):
    """The distillers by name, each built for the student and its teacher.

    Each network runs once a batch, for the layers of all its distillers; each distiller gets its own part.

    Args:
        distillers: Objectives by name; none for a supervised run.
        student: The student.
        teachers: The teachers by name; none for a supervised run.
        class_names: Names of the student's classes, where known.
        supervised: Whether the images have labels that the student's logits can be compared with.

    Attributes:
        student_layers: The student's layers that the distillers want, in the order of the distillers.
        requests: What the distillers want of each teacher, by its name.
        teacher_of: The name of each distiller's teacher.
        conversions: What is converted on the way, in words: the teacher's input, and maps of unequal grids.

    Raises:
        ValueError: If a distiller has a name that it cannot have, does not go with the pair or has no teacher, or a
            teacher has no distiller.
    """

    def __init__(
        self,
        distillers: dict[str, Distiller],
        student: Network,
        teachers: Mapping[str, FrozenTeacher],
        class_names: Sequence[str] | None = None,
        supervised: bool = True,
    ) -> None:
        super().__init__()
        self._class_names, self.supervised = class_names, supervised
        self.student_layers: tuple[Layer, ...] = ()
        self.requests = {name: TeacherRequest() for name in teachers}
        self.conversions = [each for teacher in teachers.values() for each in teacher.conversions()]
        self._slices: dict[str, tuple[slice, slice]] = {}
        for name in distillers:
            if name in LOGGED or "." in name or hasattr(self, name):
                raise ValueError(
                    f"distillers: {name!r} cannot be the name of one, which is that of its term in the log. Take "
                    f"another (with no dot, and none of {', '.join(LOGGED)})."
                )
        self.update(distillers)
        self.teacher_of = {name: _teacher_of(name, each, teachers) for name, each in self.items()}
        for name, teacher in teachers.items():
            if name not in self.teacher_of.values():
                raise ValueError(
                    f"A {teacher.label} is given, but nothing is distilled from it. Add distillers, or leave it out "
                    "(teacher: null for a supervised run)."
                )
        for name, teacher in teachers.items():
            asking = [each for asked, each in self.items() if self.teacher_of[asked] == name]
            layers = [layer for each in asking for layer in each.teacher_layers]
            with suppress(ValueError):  # of a layer that is not there, told below with the name of its distiller
                teacher.output_shapes(layers, any(each.needs_teacher_logits for each in asking))
        for name, distiller in self.items():
            self._build(name, distiller, student, teachers[self.teacher_of[name]])
        if not supervised:
            logits = any(distiller.needs_teacher_logits for distiller in self.values())
            self.conversions += leave_unreached(student, self.student_layers, logits)

    def _build(self, name: str, distiller: Distiller, student: Network, teacher: FrozenTeacher) -> None:
        try:
            ours = student.output_shapes(distiller.student_layers)
            theirs = teacher.output_shapes(distiller.teacher_layers, distiller.needs_teacher_logits)
            if distiller.needs_teacher_logits:
                require_logits({"student": ours, "teacher": theirs})
            distiller.build(_named(ours, self._class_names), _named(theirs, teacher.network.class_names))
        except ValueError as error:
            raise ValueError(f"distillers.{name}: {error}") from error
        if any(a[1:] != b[1:] for a, b in zip(ours.features, theirs.features, strict=False)):
            shapes = f"distillers.{name}: {ours.features} and {theirs.features}"
            self.conversions.append(f"Of maps with unequal grids, the finer is resized. [C, H, W] in {shapes}.")
        self.conversions += [f"distillers.{name}: {each}" for each in distiller.conversions()]
        asked = self.requests[self.teacher_of[name]]
        before = len(self.student_layers), len(asked.layers)
        self.student_layers += distiller.student_layers
        asked.layers += distiller.teacher_layers
        layers = tuple(map(teacher.network.canonical, distiller.teacher_layers))
        asked.maps += tuple(map(TeacherMap, layers, distiller.fixed_targets()))
        asked.logits |= distiller.needs_teacher_logits
        self._slices[name] = slice(before[0], len(self.student_layers)), slice(before[1], len(asked.layers))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Objectives:
        """Moves the distillers, and keeps them in float32 at least, under bf16-true too: losses need it."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(new.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def items(self) -> ItemsView[str, Distiller]:
        """Returns the distillers by name."""
        return cast("ItemsView[str, Distiller]", super().items())

    def ask(self, teachers: Mapping[str, FrozenTeacher], batch: Batch) -> dict[str, ViTOutput]:
        """Returns what is asked for in `requests`, of a cache where the batch brings it.

        In float32, and in float64 where the images are: on CUDA, losses need one type.
        """
        outputs = {}
        for name, asked in self.requests.items():
            output = batch.teacher or teachers[name](batch.image, asked.layers, asked.logits)
            outputs[name] = output.at_least_float32(batch.image.dtype)
        return outputs

    def only_request(self) -> TeacherRequest:
        """Returns what is asked of the one teacher of a run; nothing in a supervised run."""
        return next(iter(self.requests.values()), TeacherRequest())

    def weights(self, task: Weight) -> dict[str, Weight]:
        """Returns the weight of every term, that of the cross-entropy first, if there is one."""
        task_term = {"task": task} if self.supervised else {}
        return {**task_term, **{name: distiller.weight for name, distiller in self.items()}}

    def require_labels(self, task: Weight, classes: int) -> None:
        """Raises UserError if something needs labels and there are none, or nothing is left to train on.

        Args:
            task: Weight of the cross-entropy.
            classes: Classes of the student; 0 without a head.
        """
        if self.supervised:
            return
        why = "The images have no labels" if classes else "The student has no head"
        needing = [f"model.distillers.{name}" for name, distiller in self.items() if distiller.needs_labels]
        if task != 0:
            raise UserError(f"{why}, and model.task_weight is {task:g}. Set it to 0: the distillers alone train.")
        if needing:
            raise UserError(f"{why}, and {', '.join(needing)} cannot do without. Leave it out.")
        if not self:
            raise UserError(f"{why}, and there are no distillers. Give a teacher, and distillers to learn from it by.")

    def changing_weights(self, task: Weight, epoch: int) -> dict[str, float]:
        """Returns the weights that are schedules, in an epoch, by the names of the log."""
        weights = self.weights(task).items()
        return {f"train/{name}_weight": each.at(epoch) for name, each in weights if isinstance(each, WeightSchedule)}

    def terms(self, student: ViTOutput, teachers: Mapping[str, ViTOutput], target: Tensor) -> dict[str, Tensor]:
        """Computes the term of every distiller, unweighted.

        Args:
            student: Logits, and the maps of `student_layers`, in float32.
            teachers: What is asked for in `requests`, in float32, by the teacher's name.
            target: Class indices ``[B]``, or probabilities ``[B, K]``.
        """
        return {name: self[name](*pair, target) for name, pair in self._pairs(student, teachers)}

    def metrics(self, student: ViTOutput, teachers: Mapping[str, ViTOutput]) -> dict[str, Tensor]:
        """Measures what every distiller measures, named ``DISTILLER_METRIC``."""
        pairs = dict(self._pairs(student, teachers))
        measured = {name: distiller.metrics(*pairs[name]) for name, distiller in self.items()}
        return {f"{name}_{metric}": value for name, values in measured.items() for metric, value in values.items()}

    def as_stored(self, output: ViTOutput, maps: Sequence[TeacherMap]) -> ViTOutput:
        """Makes of the one teacher's output what a cache stores.

        Args:
            output: The output of the layer of each of `maps`, float32.
            maps: Maps as they are, and targets of the request.
        """
        makers = {
            each: (distiller, i)
            for name, distiller in self.items()
            for i, each in enumerate(self.only_request().maps[self._slices[name][1]])
        }
        features = list(output.features)
        for k, each in enumerate(maps):
            if each.target is not None:
                distiller, i = makers[each]
                features[k] = distiller.target(i, features[k])
        return output._replace(features=tuple(features))

    def _pairs(
        self, student: ViTOutput, teachers: Mapping[str, ViTOutput]
    ) -> Iterator[tuple[str, tuple[ViTOutput, ViTOutput]]]:
        """Cuts the outputs into what each distiller asked for."""
        for name, parts in self._slices.items():
            outputs = zip((student, teachers[self.teacher_of[name]]), parts, strict=True)
            ours, theirs = (output._replace(features=output.features[part]) for output, part in outputs)
            yield name, (ours, theirs)


def _teacher_of(name: str, distiller: Distiller, teachers: Mapping[str, FrozenTeacher]) -> str:
    """Returns the name of a distiller's teacher."""
    if not teachers:
        raise ValueError(
            f"The distiller {name!r} needs a teacher, and teacher is null. Give a teacher, or leave the distillers out "
            "for a supervised run."
        )
    named = distiller.teacher
    if named is None and len(teachers) == 1:
        return next(iter(teachers))
    if named is None or named not in teachers:
        wrong = "there are several teachers" if named is None else f"there is no teacher {named!r}"
        raise ValueError(f"distillers.{name}: {wrong}. Set its teacher to one of: {', '.join(teachers)}.")
    return named


def _named(shapes: OutputShapes, names: Sequence[str] | None) -> OutputShapes:
    return shapes._replace(class_names=tuple(names) if names is not None and len(names) == shapes.classes else None)
