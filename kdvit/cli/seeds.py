"""Runs that differ only in their seed, as one setting: mean and interval, paired where seeds agree."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from kdvit.errors import UserError

SEED = "seed_everything"
UNSAID = (
    *("data.init_args.root", "data.init_args.num_workers", "data.init_args.on_error"),
    *("ckpt_path", "config", "trainer.default_root_dir", "trainer.enable_progress_bar"),
)
"""What of a config may change in a run without a word: a run may go on elsewhere, and past a damaged image."""
CACHE = "data.init_args.cache"
"""May move, too: what it holds is compared when it is opened."""
OF_ONE_RUN = (SEED, "data.init_args.seed", CACHE, *UNSAID, "checkpoint.dirpath", "last_checkpoint.dirpath")
"""In what of a config runs of one setting may differ."""
TAIL = re.compile(r"[_./=-]*(seed)?[_=-]*\d*$")
"""What stands in the name of a run behind that of its setting."""
Settings = dict[str, Any]
"""The values of a config by their keys, ``model.optimizer.lr``."""


class Estimate(NamedTuple):
    """A mean with half the width of its 95 % interval, by Student's t; None for a single value."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.half is None else f"{self.mean:.2f} ± {self.half:.2f}"


def read_config(file: Path) -> dict[str, Any]:
    """Returns a run's config.yaml as it is written; nothing where there is none.

    Raises:
        UserError: If it is torn.
    """
    if not file.is_file():
        return {}
    try:
        config = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise UserError(
            f"{str(file)!r} is no whole config. Restore it, or remove it, and nobody compares what the run was trained "
            "with."
        )
    return config


def flat(config: Any, key: str = "") -> Settings:
    """Returns a config by its keys.

    Examples:
        >>> flat({"model": {"student": {"arch": "vit"}, "teacher": None}})
        {'model.student.arch': 'vit', 'model.teacher': None}
    """
    if not (isinstance(config, dict) and config):
        return {key: config}
    parts = (flat(value, f"{key}.{name}".lstrip(".")) for name, value in config.items())
    return {name: value for part in parts for name, value in part.items()}


def group(runs: Sequence[Settings]) -> list[list[int]]:
    """Returns the numbers of the runs of each setting, in the order given; a seed is in each once."""
    groups: list[tuple[Settings, list[int]]] = []
    for number, settings in enumerate(runs):
        ours = {key: value for key, value in settings.items() if key not in OF_ONE_RUN}
        for theirs, members in groups:
            seeds = [runs[i][SEED] for i in members if SEED in runs[i]]
            if ours and ours == theirs and settings.get(SEED) not in seeds:
                members.append(number)
                break
        else:
            groups.append((ours, [number]))
    return [members for _, members in groups]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Returns the end of each path, as long as it must be to differ from all others and be more than a seed.

    Examples:
        >>> short_names([Path("/runs/lift/seed_0"), Path("/runs/plain/seed_0"), Path("/runs/wide_last")])
        ['lift/seed_0', 'plain/seed_0', 'wide_last']
    """
    paths = [folder.absolute().parts for folder in folders]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        ends = (path[-n:] for n in range(1, len(path)))
        told = (
            end for end in ends if TAIL.sub("", "/".join(end)) and end not in [each[-len(end) :] for each in others]
        )
        names.append("/".join(next(told, path)))
    return names


def setting_name(folders: Sequence[Path]) -> str:
    """Returns what the folders of a setting's runs have in common.

    Examples:
        >>> setting_name([Path("/runs/lift_384/seed_0"), Path("/runs/lift_384/seed_1")])
        'lift_384'
    """
    shared = os.path.commonprefix([str(folder.absolute()) for folder in folders])  # noqa: RUF071  # of names, too
    return Path(TAIL.sub("", shared)).name


def differing(runs: Sequence[Settings]) -> tuple[list[str], list[list[str]]]:
    """Returns the keys in which settings differ, and for each the values of all: blank for null, and for none."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run) if key not in OF_ONE_RUN]
    values = {key: ["" if run.get(key) is None else _text(run[key]) for run in runs] for key in keys}
    found = {key: row for key, row in values.items() if len(set(row)) > 1}
    return list(found), list(found.values())


def _text(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of values, and half the width of its 95 % interval."""
    if len(values) == 1:
        return Estimate(values[0], None)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(float(np.mean(values)), students_t(len(values) - 1) * error)


@cache
def students_t(freedom: int, share: float = 0.95) -> float:
    """Returns the t that Student's distribution does not exceed in absolute value, with the probability `share`.

    The density of ``arctan(t / sqrt(freedom))`` is ``cos^(freedom - 1)``: its area is summed up and inverted.

    Examples:
        >>> [round(students_t(freedom), 3) for freedom in (1, 2, 4, 30)]
        [12.706, 4.303, 2.776, 2.042]
    """
    angles = np.linspace(0, np.pi / 2, 2**20)
    density = np.cos(angles) ** (freedom - 1)
    area = np.cumsum(density[1:] + density[:-1])
    return float(math.sqrt(freedom) * np.tan(np.interp(share * area[-1], area, angles[1:])))
