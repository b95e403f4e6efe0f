"""The config that follows the advice on a pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdvit.analysis.costs import OF_A_REMEDY, REMEDIES, Remedy
from kdvit.analysis.mismatch import Advice
from kdvit.analysis.rule import Verdict
from kdvit.distillers import FeatureDistiller, LiftDistiller, WideLastDistiller
from kdvit.models.one_token import NAMES as ONE_TOKEN
from kdvit.structures import Layer

DISTILLERS: dict[Remedy, tuple[str, type[FeatureDistiller]]] = {
    "none": ("feature", FeatureDistiller),
    "Lift": ("lift", LiftDistiller),
    "WideLast": ("wide_last", WideLastDistiller),
}
"""The map objective of each remedy, and its name in a config."""
PROJECTORS: dict[Verdict, str] = {"linear": "linear", "phi_s": "phi_s", "logits": "phi_s"}
"""Of FeatureDistiller, by verdict."""
MAP_OBJECTIVES = {
    name
    for _, kind in DISTILLERS.values()
    for name in (kind.__name__, f"kdvit.distillers.{kind.__name__}", f"{kind.__module__}.{kind.__name__}")
}
"""Class paths of them in a config."""

REMEDY_LAYERS = [name for remedy, (name, _) in DISTILLERS.items() if remedy != "none"]
"""Layers that a student has by a remedy alone; they are called like the objectives."""


def distilled_layer(model: Mapping[str, Any]) -> Layer | None:
    """Returns the teacher's map that a config names for its map objective; of several the last, or None.

    Args:
        model: The `model` part of a config.
    """
    named = [layer for each in _maps(model).values() for layer in _teacher_layers(each) if layer not in ONE_TOKEN]
    return named[-1] if named else None


def _maps(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the map objectives of a config; what looks at one token an image alone is none."""
    return {
        key: each
        for key, each in (model.get("distillers") or {}).items()
        if each["class_path"] in MAP_OBJECTIVES and not _of_one_token(each)
    }


def _of_one_token(objective: Mapping[str, Any]) -> bool:
    layers = _teacher_layers(objective)
    return bool(layers) and {*layers} <= {*ONE_TOKEN}


def _teacher_layers(objective: Mapping[str, Any]) -> list[Layer]:
    asked = [v for k, v in objective.get("init_args", {}).items() if k in ("teacher_layer", "teacher_layers")]
    return [layer for one in asked for layer in (one if isinstance(one, list) else [one])]


def advised_model(advice: Advice, model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `model` part of a config, changed as the advice says.

    Student and map objective change; all the rest stays, and of the objective its weight, loss, layer of the teacher
    and `normalize` (without one, layer_norm where the advice rests on tokens at length 1). A student that is as advised
    stays as it is. A narrow student that no remedy fits keeps its other objectives alone, or gets the fixed target
    where it has none. Other objectives of a remedy's map that the student loses take the map that it gets, or its last
    block.

    Args:
        advice: The advice.
        model: The `model` part: student, teacher, distillers and the rest.
    """
    given = model.get("distillers") or {}
    maps = _maps(model)
    kept = {key: each for key, each in given.items() if key not in maps}
    even = {"normalize": "layer_norm"} if advice.rests_on.unit else {}
    projector, fits = PROJECTORS.get(advice.verdict), advice.verdict != "logits"
    if advice.unchanged and maps and fits:
        bridge = {"projector": projector} if projector else {}
        bridged = {
            key: {**each, "init_args": {**even, **each.get("init_args", {}), **bridge}} if key in maps else each
            for key, each in given.items()
        }
        return {**model, "distillers": bridged}
    name, objective = DISTILLERS[advice.remedy]
    options: dict[str, Any] = {"weight": 0.2, **even}
    for each in maps.values():
        init_args = each.get("init_args", {})
        options |= {name: init_args[name] for name in ("weight", "loss", "normalize", "teacher") if name in init_args}
    if (layer := distilled_layer(model)) is not None:
        options |= {"teacher_layers": [layer]} if advice.remedy == "none" else {"teacher_layer": layer}
    if advice.remedy == "none":
        options |= {"projector": projector}
    key = f"{name}_map" if name in kept else name  # `name` is also the layer's
    new = {key: {"class_path": objective.__name__, "init_args": options}}
    moved = {key: _with_layer(each, -1 if advice.remedy == "none" else name) for key, each in kept.items()}
    distillers = {**moved, **new} if fits or not kept else moved
    return {**model, "student": _advised_student(advice, model["student"]), "distillers": distillers}


def _advised_student(advice: Advice, student: Mapping[str, Any]) -> Mapping[str, Any]:
    if advice.unchanged or advice.present == advice.remedy == "none":
        return student
    args = {name: value for name, value in student.get("init_args", {}).items() if name not in OF_A_REMEDY}
    if advice.remedy == "none":
        return {"class_path": "TimmStudent", "init_args": args}
    heads = next(cost.num_heads for cost in advice.costs if cost.remedy == advice.remedy)
    args |= {"width": advice.width, **({} if heads is None else {"num_heads": heads})}
    return {"class_path": REMEDIES[advice.remedy].__name__, "init_args": args}


def _with_layer(objective: Mapping[str, Any], layer: Layer) -> dict[str, Any]:
    """Returns an objective that asks the student for a layer in place of a remedy's map."""

    def moved(asked: Any) -> Any:
        if isinstance(asked, list):
            return [moved(each) for each in asked]
        return layer if asked in REMEDY_LAYERS else asked

    asked = {k: moved(v) for k, v in objective.get("init_args", {}).items() if k.startswith("student_layer")}
    return {**objective, "init_args": {**objective["init_args"], **asked}} if asked else dict(objective)
