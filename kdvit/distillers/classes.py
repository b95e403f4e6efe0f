"""Which class of the teacher is which class of the student, for objectives that compare logits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from kdvit.errors import nearest, some
from kdvit.structures import OutputShapes

Classes = dict[int | str, int | str] | Literal["by_name"]
"""Classes of the teacher, by index or name, with those of the student; or all that have the same name."""
Names = Sequence[str] | None
"""Names of classes in the order of the logits, where known."""
SYNSET = re.compile(r"n\d{8}")
"""A WordNet id, as ImageNet's folders are named."""
WAY_OUT = "Set classes: by_name, or a mapping from the teacher's to the student's, such as classes: {0: 3, 1: 7}"
INDICES = "Give indices, the teacher's and the student's: classes: {0: 3, 1: 7}."


class SharedClasses(NamedTuple):
    """Pairs of classes, in the student's order.

    Attributes:
        student: Index of each in the student's logits.
        teacher: Index of each in the teacher's.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]


def share_classes(classes: Classes, student: OutputShapes, teacher: OutputShapes) -> SharedClasses:
    """Finds the classes of a mapping in two networks.

    Raises:
        ValueError: If a class is not there or given twice, names are not known, or fewer than two classes are shared.

    Examples:
        >>> student = OutputShapes(2, class_names=("cat", "dog"))
        >>> teacher = OutputShapes(3, class_names=("dog", "ox", "cat"))
        >>> share_classes("by_name", student, teacher)
        SharedClasses(student=(0, 1), teacher=(2, 0))
        >>> share_classes({1: "cat", "dog": 1}, student, teacher)
        SharedClasses(student=(0, 1), teacher=(1, 0))
    """
    if classes == "by_name":
        pairs = _by_name(student.class_names, teacher.class_names)
    else:
        pairs = [(_index(ours, student, "student"), _index(each, teacher, "teacher")) for each, ours in classes.items()]
    if len(pairs) < 2:
        raise ValueError(
            f"classes: {len(pairs)} of the student's {student.classes} and the teacher's {teacher.classes} are shared, "
            "and a softmax needs 2 or more."
        )
    shared = SharedClasses(*zip(*sorted(pairs), strict=True))
    for side, indices in shared._asdict().items():
        if len(set(indices)) < len(indices):
            twice = next(index for index in indices if indices.count(index) > 1)
            raise ValueError(f"classes: class {twice} of the {side} is given twice, and a class goes with one other.")
    return shared


def require_same_classes(student: OutputShapes, teacher: OutputShapes) -> None:
    """Raises ValueError unless two networks have the same classes in the same order, as far as is known."""
    if student.classes != teacher.classes:
        raise ValueError(
            f"one set of classes is needed, but the student has {student.classes} classes and the teacher "
            f"{teacher.classes}. {WAY_OUT}. Or distill features instead (FeatureDistiller, LiftDistiller, "
            "WideLastDistiller)."
        )
    if (first := first_difference(student.class_names, teacher.class_names)) is not None:
        number, ours, theirs = first
        raise ValueError(
            f"the teacher has other classes, or has them in another order: class {number} is {ours!r} for the student "
            f"and {theirs!r} for the teacher. {WAY_OUT}."
        )


def first_difference(ours: Names, theirs: Names) -> tuple[int, str, str] | None:
    """Returns the first class that has two names, with both; None where all are alike, or cannot be compared.

    They can where both are known, and are of one vocabulary: WordNet ids, or words.
    """
    if ours is None or theirs is None or _are_synsets(ours) != _are_synsets(theirs):
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next(((index, one, other) for index, (one, other) in pairs if one != other), None)


def numbers_by_name(ours: Names, theirs: Names) -> list[int] | None:
    """Returns the number of each of our classes among theirs; None where one is not among them, or names are not known.

    Examples:
        >>> numbers_by_name(["ox", "cat"], ["cat", "dog", "ox"]), numbers_by_name(["ox"], ["cat"])
        ([2, 0], None)
    """
    numbers = {name: number for number, name in enumerate(theirs or ())}
    return [numbers[name] for name in ours] if ours and numbers.keys() >= {*ours} else None


def _are_synsets(names: Sequence[str]) -> bool:
    return all(map(SYNSET.fullmatch, names))


def _by_name(ours: Names, theirs: Names) -> list[tuple[int, int]]:
    if ours is None or theirs is None:
        side = "student" if ours is None else "teacher"
        raise ValueError(
            f"classes: by_name needs the names of both sides' classes, and the {side}'s are not known. {INDICES}"
        )
    found = {name: index for index, name in enumerate(theirs)}
    pairs = [(index, found[name]) for index, name in enumerate(ours) if name in found]
    if not pairs:
        raise ValueError(
            f"classes: by_name finds no common name: the student's are {some(map(repr, ours))}, the "
            f"teacher's {some(map(repr, theirs))}. {INDICES}"
        )
    return pairs


def _index(key: int | str, shapes: OutputShapes, side: str) -> int:
    """Returns the index of a class that is given by index or name."""
    assert shapes.classes is not None
    names = shapes.class_names
    if isinstance(key, int):
        if not 0 <= key < shapes.classes:
            raise ValueError(f"classes: the {side} has no class {key}; its classes are 0 to {shapes.classes - 1}.")
        return key
    if names is None:
        raise ValueError(f"classes: {key!r} is a name, and those of the {side}'s classes are not known. {INDICES}")
    if key not in names:
        near, listed = nearest(key, names), some(map(repr, names))
        raise ValueError(f"classes: the {side} has no class {key!r}.{near} Its classes are {listed}.")
    return names.index(key)
