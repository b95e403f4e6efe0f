"""The report: every number comes out of the JSON files into the marked parts of README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.replication import advice
from tests.replication.arms import ARMS, EPOCHS, LONGER, TEACHER
from tests.replication.claims import (
    QUESTIONS,
    Answer,
    Result,
    Results,
    accuracy,
    answers,
    beside,
    distance,
    geometry_findings,
    own_layer,
    paired,
    shown,
)
from tests.replication.figure import SHOWN, draw_arms, draw_claim, gains
from tests.replication.pairs import DIGITS, FASHION, TERMS, Study
from tests.replication.pairs import WEIGHTS as CHOSEN
from tests.replication.stages import RECIPE, WEIGHTS

SECOND = "glyphs"  # folder of the second data set's results


def write_report(results: Path, report: Path) -> None:
    """Fills in the marked parts of the report, and draws its figure beside it.

    Raises:
        RuntimeError: If there are no results yet.
    """
    files = read_results(results)
    found = by_arm(files)
    if not found["plain"]:
        raise RuntimeError(f"There is no result of the plain student in {results}: run the stage `arms` first.")
    text = report.read_text()
    for name, block in blocks(files).items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda part, block=block: f"{part[1]}{block}\n{part[2]}", text, flags=re.DOTALL)
        if not count:
            raise RuntimeError(f"{report} has no part <!-- {name} --> ... <!-- end --> to fill in.")
    draw_arms(found, report.parent / "arms.png")
    width = own_layer(next(iter(found["plain"].values())))["width"]
    draw_claim(own_layer(files[TEACHER]), width, gains(found, SHOWN), report.parent / "claim.png")
    report.write_text(text)
    print(f"{report} tells the results of {results}.")


def read_results(folder: Path) -> dict[str, Result]:
    """Returns what all JSON files of a folder hold, by name without suffix; those of a folder inside as FOLDER/NAME."""
    files = sorted(folder.rglob("*.json"))
    return {str(file.relative_to(folder).with_suffix("")): json.loads(file.read_text()) for file in files}


def by_arm(files: dict[str, Result], folder: str = "") -> Results:
    """Returns the results of all arms, by arm and seed."""
    return {
        arm: {each["seed"]: each for name, each in files.items() if re.fullmatch(rf"{folder}{arm}_seed_\d+", name)}
        for arm in ARMS
    }


def blocks(files: dict[str, Result]) -> dict[str, str]:
    """Returns the text of each marked part."""
    results, teacher = by_arm(files), files[TEACHER]
    student_width = own_layer(next(iter(results["plain"].values())))["width"]
    findings = geometry_findings(results, teacher, student_width)
    return {
        "questions": questions(results, by_arm(files, f"{SECOND}/")),
        "claims": table(("claim", "rule", "found", "verdict"), [(*f[:3], f"**{f.verdict}**") for f in findings]),
        "beside": table(("read beside them", "difference", "found"), beside(results, teacher)),
        "length": length(files[RECIPE], results),
        "arms": arms_table(results, teacher),
        "geometry": geometry_table(results, teacher),
        "advice": judged(DIGITS, files),
        "advice_fashion": judged(FASHION, files),
        "advice_weights": advice_weights(files.get(f"advice/{CHOSEN}")),
        "choices": choices(files[RECIPE], files[WEIGHTS]),
        "cost": cost(files.values(), results),
    }


def questions(results: Results, second: Results) -> str:
    """Returns every question with the answers of both data sets."""
    parts = []
    for letter, question in QUESTIONS.items():
        there = {answer.text: answer for answer in answers(second, question)}
        header = ("what", "arms", "points", "p", "verdict", "glyphs, points", "seeds above 0")
        rows = [
            (
                answer.text,
                " - ".join(f"`{arm}`" for arm in answer.arms),
                *_told(answer),
                *_direction(there.get(answer.text)),
            )
            for answer in answers(results, question)
        ]
        if not there:
            header, rows = header[:5], [row[:5] for row in rows]
        seeds = sorted({len(answer.found.values) for answer in answers(results, question)})
        about = f"{' or '.join(map(str, seeds))} seeds" if seeds else "not trained yet"
        parts += [f"**({letter}) {question.text}** ({about})", "", *([table(header, rows)] if rows else []), ""]
    return "\n".join(parts).strip()


def _direction(answer: Answer | None) -> tuple[str, str]:
    """Returns what the second data set says: its seeds are too few for a verdict."""
    if answer is None:
        return ("", "")
    values = answer.found.values
    return shown(answer.found), f"{sum(value > 0 for value in values)} of {len(values)}"


def _told(answer: Answer) -> tuple[str, str, str]:
    p = f"{answer.p:.3f}" if answer.p >= 0.001 else "< 0.001"
    return (shown(answer.found), p, f"**{answer.verdict}**")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None) -> str:
    """Returns a Markdown table; the columns from number `right` on are aligned to the right."""
    rule = ["---" if right is None or i < right else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def arms_table(results: Results, teacher: dict[str, Any]) -> str:
    """Returns accuracy and gain of every arm."""
    about = ("arm", "", "parameters", "feature weight", "seeds")
    header = (*about, "test top-1 (%)", "gain on plain, paired")
    rows = [("`teacher`", "on all images", f"{teacher['parameters']:,}", "", "1", f"{accuracy(teacher):.2f}", "")]
    for name, arm in ARMS.items():
        runs = list(results[name].values())
        if not runs:
            continue
        gain = None if name == "plain" else paired(results, name, "plain")
        weight = runs[0]["weight"]
        rows.append(
            (
                f"`{name}`",
                arm.title,
                f"{runs[0]['parameters']:,}",
                "" if weight is None else f"{weight:g}",
                str(len(runs)),
                _spread([accuracy(run) for run in runs]),
                "" if gain is None else shown(gain),
            )
        )
    return table(header, rows, 2)


def geometry_table(results: Results, teacher: dict[str, Any]) -> str:
    """Returns ranks, shared axes and SEP of the networks that were analysed, means over seeds."""
    header = ("network", "map", "width", "SVD rank", "PCA dimension", "distance", "SEP 90 %", "permuted", "noise")
    rows = [_geometry_row("`teacher`", [teacher["geometry"][0]], [])]
    for name, arm in ARMS.items():
        runs = list(results[name].values()) if arm.geometry else []
        for i in range(len(runs[0]["geometry"]) if runs else 0):
            distances = [distance(teacher)(run) for run in runs] if i == 0 else []
            rows.append(_geometry_row(f"`{name}`", [run["geometry"][i] for run in runs], distances))
    return table(header, rows, 2)


def _geometry_row(name: str, layers: list[dict[str, Any]], distances: list[float]) -> tuple[str, ...]:
    def mean(*path: str) -> float:
        values: list[Any] = layers
        for key in path:
            values = [value[key] for value in values]
        return float(np.mean(values))

    return (
        name,
        "last block" if layers[0]["layer"].isdigit() else layers[0]["layer"],
        str(layers[0]["width"]),
        f"{mean('svd_rank', 'p99'):.1f}",
        f"{mean('pca_dimension', 'p99'):.1f}",
        f"{np.mean(distances):.2f}" if distances else "",
        *(f"{mean('sep', '0.9', of):.2f}" for of in ("tokens", "permuted_mean", "gaussian")),
    )


def judged(study: Study, files: dict[str, Result]) -> str:
    """Returns how the advice fared with a study's pairs: the rules, the correlations, then each pair."""
    names = [f"advice/{name}_{width}" for name in study.teachers for width in study.widths]
    pairs = [files[name] for name in sorted(names) if name in files]
    if not pairs:
        return "No pair has been tried yet."
    methods = [f"gain, {name}" for name in TERMS]
    rules = ("the rule before", "the rule now")
    header = ("teacher", "channels", "shared axes", "of one image", "held (%)", *rules, *methods, "best")
    more = "more than the rule before (95 %, over teachers)"
    parts = [
        f"{len(pairs)} of {len(names)} pairs have been tried.",
        table(("rule", "mean gain over soft KD, points", more, "names the best"), advice.record(study, pairs), 1),
        table(
            ("predicted by", "gain of", "rank correlation (leaving a teacher out)", "within a width"),
            advice.correlations(pairs),
        ),
        table(header, advice.rows(pairs), 1),
    ]
    return "\n\n".join(parts)


def advice_weights(found: dict[str, Any] | None) -> str:
    """Returns what was chosen for the pairs that judge the advice, with all candidates."""
    if found is None:
        return "No weight has been chosen yet."
    values = sorted({weight for scores in found["scores"].values() for weight in scores}, key=float)
    rows = [
        (
            method,
            *(f"{scores[value]:.1f}" if value in scores else "" for value in values),
            f"**{found['chosen'][method]:g}**",
        )
        for method, scores in found["scores"].items()
    ]
    return table(("weight of the term", *values, "chosen"), rows, 1)


def choices(recipe: dict[str, Any], weights: dict[str, Any]) -> str:
    """Returns what was chosen on the held out images, with all candidates."""
    return "\n\n".join([_grid("learning rate", "rate", recipe), _grid("feature weight", "weight", weights)])


def _grid(title: str, key: str, found: dict[str, Any]) -> str:
    values = sorted({each[key] for of in found.values() for each in of["candidates"]})
    rows = []
    for arm, of in found.items():
        tried = {each[key]: _spread([100 * score for score in each["validation_acc1"]]) for each in of["candidates"]}
        rows.append((f"`{arm}`", *(tried.get(value, "") for value in values), f"**{of['chosen'][key]:g}**"))
    return table((title, *(f"{value:g}" for value in values), "chosen"), rows, 1)


def length(recipe: dict[str, Any], results: Results) -> str:
    """Returns how flat the plain student's curve is at its end."""
    curves = recipe["plain"]["curves"]
    points = [f"{epoch}: {100 * float(np.mean([curve[epoch] for curve in curves])):.1f}" for epoch in curves[0]]
    longer = paired(results, "plain_long", "plain")
    beyond = "" if longer is None else f" {LONGER * EPOCHS} epochs in place of {EPOCHS} give {shown(longer)} points."
    about = f"Accuracy on held out images (%) after so many epochs, mean of {len(curves)} seeds"
    return f"{about}: {'; '.join(points)}.{beyond}"


def cost(contents: Iterable[Result], results: Results) -> str:
    """Returns what it took, and where."""
    timed = [each for each in contents if "seconds" in each]
    hours = sum(each["seconds"] for each in timed) / 3600
    computed = sum(each["cpu_seconds"] for each in timed) / 3600
    machines = {(m["cpu"], m["cores"], m["torch"], m["timm"], m["lightning"]) for m in (t["machine"] for t in timed)}
    seeds = sorted({seed for runs in results.values() for seed in runs})
    hardware = "; ".join(
        f"{cpu}, {n} cores, torch {a}, timm {b}, lightning {c}" for cpu, n, a, b, c in sorted(machines)
    )
    return (
        f"{len(timed)} trainings and caches, {hours / 2:.1f} hours of two cores; they "
        f"computed for {computed:.1f} core hours, {computed / 2:.1f} hours of two. "
        f"Seeds {', '.join(map(str, seeds))}. {hardware}."
    )


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean
