"""The distillers of a run: who wants which layer of whom, and what they make of a batch."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from kdvit.distillers import Distiller, Weight, WeightSchedule
from kdvit.models import FrozenTeacher, Network
from kdvit.structures import Layer, OutputShapes, TeacherMap, ViTOutput


class Objectives(nn.ModuleDict):
    """The distillers by name, built for a pair of student and teacher.

    Student and teacher run once a batch, for the layers of all distillers; each distiller gets its own part.

    Args:
        distillers: Objectives by name; none for a supervised run.
        student: The student.
        teacher: The teacher; None for a supervised run.
        class_names: Names of the student's classes, where known.

    Attributes:
        student_layers: The student's layers that the distillers want, in the order of the distillers.
        teacher_layers: The same for the teacher.
        teacher_indices: `teacher_layers`, each block by its index; layers behind the blocks keep their name.
        teacher_maps: The same, each with what the distiller makes of it before it looks at the student.
        teacher_logits: Whether a distiller wants the teacher's logits.
        conversions: What is converted on the way, in words: the teacher's input, and maps of unequal grids.

    Raises:
        ValueError: If a name cannot be used, a distiller does not go with the pair, or only one of teacher and
            distillers is given.
    """

    def __init__(
        self,
        distillers: dict[str, Distiller],
        student: Network,
        teacher: FrozenTeacher | None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self._class_names = class_names
        self.student_layers: tuple[Layer, ...] = ()
        self.teacher_layers: tuple[Layer, ...] = ()
        self.teacher_indices: tuple[Layer, ...] = ()
        self.teacher_maps: tuple[TeacherMap, ...] = ()
        self.teacher_logits = False
        self.conversions = [] if teacher is None else teacher.conversions()
        self._slices: dict[str, tuple[slice, slice]] = {}
        try:
            if "task" in distillers:
                raise KeyError("that is the name of the cross-entropy")
            self.update(distillers)
        except KeyError as error:
            message = f"distillers: {list(distillers)} has a name that cannot be used: {error.args[0]}."
            raise ValueError(message) from error
        if teacher is not None and not distillers:
            raise ValueError(
                "A teacher is given, but nothing is distilled from it. Add distillers, or set teacher: null."
            )
        for name, distiller in self.items():
            if teacher is None:
                raise ValueError(
                    f"The distillers {list(self)} need a teacher, and teacher is null. Give a teacher, or leave the "
                    "distillers out for a supervised run."
                )
            self._build(name, distiller, student, teacher)

    def _build(self, name: str, distiller: Distiller, student: Network, teacher: FrozenTeacher) -> None:
        try:
            ours = student.output_shapes(distiller.student_layers)
            theirs = teacher.output_shapes(distiller.teacher_layers, distiller.needs_teacher_logits)
            distiller.build(_named(ours, self._class_names), _named(theirs, teacher.network.spec.get("class_names")))
        except ValueError as error:
            raise ValueError(f"distillers.{name}: {error}") from error
        if [shape[1:] for shape in ours.features] != [shape[1:] for shape in theirs.features]:
            shapes = f"distillers.{name}: {ours.features} and {theirs.features}"
            self.conversions.append(f"Of maps with unequal grids, the finer is resized. [C, H, W] in {shapes}.")
        self.conversions += [f"distillers.{name}: {each}" for each in distiller.conversions()]
        before = len(self.student_layers), len(self.teacher_layers)
        self.student_layers += distiller.student_layers
        self.teacher_layers += distiller.teacher_layers
        layers = tuple(map(teacher.network.canonical, distiller.teacher_layers))
        self.teacher_indices += layers
        self.teacher_maps += tuple(map(TeacherMap, layers, distiller.fixed_targets()))
        self.teacher_logits |= distiller.needs_teacher_logits
        self._slices[name] = slice(before[0], len(self.student_layers)), slice(before[1], len(self.teacher_layers))

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

    def weights(self, task: Weight) -> dict[str, Weight]:
        """Returns the weight of every term, that of the cross-entropy first."""
        return {"task": task, **{name: distiller.weight for name, distiller in self.items()}}

    def changing_weights(self, task: Weight, epoch: int) -> dict[str, float]:
        """Returns the weights that are schedules, in an epoch, by the names of the log."""
        weights = self.weights(task).items()
        return {f"train/{name}_weight": each.at(epoch) for name, each in weights if isinstance(each, WeightSchedule)}

    def terms(self, student: ViTOutput, teacher: ViTOutput | None, target: Tensor) -> dict[str, Tensor]:
        """Computes the term of every distiller, unweighted.

        Args:
            student: Logits, and the maps of `student_layers`, in float32.
            teacher: The same for `teacher_layers`; None where there is no distiller.
            target: Class indices ``[B]``, or probabilities ``[B, K]``.
        """
        return {name: self[name](*pair, target) for name, pair in self._pairs(student, teacher)}

    def metrics(self, student: ViTOutput, teacher: ViTOutput | None) -> dict[str, Tensor]:
        """Measures what every distiller measures, named ``DISTILLER_METRIC``."""
        pairs = dict(self._pairs(student, teacher))
        measured = {name: distiller.metrics(*pairs[name]) for name, distiller in self.items()}
        return {f"{name}_{metric}": value for name, values in measured.items() for metric, value in values.items()}

    def as_stored(self, output: ViTOutput, maps: Sequence[TeacherMap]) -> ViTOutput:
        """Makes of the teacher's output what a cache stores.

        Args:
            output: The output of the layer of each of `maps`, float32.
            maps: Maps as they are, and targets of `teacher_maps`.
        """
        makers = {
            each: (distiller, i)
            for name, distiller in self.items()
            for i, each in enumerate(self.teacher_maps[self._slices[name][1]])
        }
        features = list(output.features)
        for k, each in enumerate(maps):
            if each.target is not None:
                distiller, i = makers[each]
                features[k] = distiller.target(i, features[k])
        return output._replace(features=tuple(features))

    def _pairs(
        self, student: ViTOutput, teacher: ViTOutput | None
    ) -> Iterator[tuple[str, tuple[ViTOutput, ViTOutput]]]:
        """Cuts the outputs into what each distiller asked for."""
        for name, (ours, theirs) in self._slices.items():
            assert teacher is not None
            yield (
                name,
                (
                    student._replace(features=student.features[ours]),
                    teacher._replace(features=teacher.features[theirs]),
                ),
            )


def _named(shapes: OutputShapes, names: Sequence[str] | None) -> OutputShapes:
    return shapes._replace(class_names=tuple(names) if names is not None and len(names) == shapes.classes else None)
