"""The record of the advice of `kdvit analyze`: what its rule gains on the pairs of `pairs.py`, beside other rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import numpy as np
from scipy.stats import spearmanr

from kdvit.analysis.rule import HOLDS
from tests.replication.claims import estimate, shown
from tests.replication.pairs import DIGITS, TERMS, Pair, Study

Predictor = Callable[[Pair], float]
SHARES = tuple(share / 20 for share in range(6, 20))
"""From which a fixed target may be worth as much as a lift."""


def rule_before(pair: Pair) -> str:
    """Returns the remedy by the rule of `kdvit analyze` when the pairs were trained."""
    if pair["width"] >= pair["advice"]["need"]:
        return "none"
    return "WideLast" if pair["width"] < pair["advice"]["rank"] else "Lift"


def rule_now(pair: Pair, holds: float = HOLDS) -> str:
    """Returns the remedy by the rule that was refitted to the pairs, for students whose WideLast costs too much."""
    if pair["width"] < min(pair["advice"]["need"], pair["advice"]["rank"]):
        return "WideLast"
    return "phi_s" if pair["advice"]["held"] >= holds else "Lift"


RULES: dict[str, Callable[[Pair], str]] = {
    "the rule before": rule_before,
    "the rule now": rule_now,
    "... without WideLast": lambda pair: "phi_s" if pair["advice"]["held"] >= HOLDS else "Lift",
    "... without Lift": lambda pair: "WideLast" if rule_now(pair) == "WideLast" else "phi_s",
    "always phi_s": lambda pair: "phi_s",
    "always Lift": lambda pair: "Lift",
    "always WideLast": lambda pair: "WideLast",
    "always the linear projector": lambda pair: "none",
    "the best of each pair, known afterwards": lambda pair: best(pair),
}
PREDICTORS: dict[str, Predictor] = {
    "shared axes over channels": lambda pair: pair["advice"]["need"] / pair["width"],
    "energy that the channels cannot hold": lambda pair: 1 - pair["advice"]["held"],
    "1 / channels": lambda pair: 1 / pair["width"],
}


def gain(pair: Pair, method: str) -> float:
    """Returns the mean gain of a method over soft KD alone, in points."""
    return float(np.mean(np.subtract(pair["scores"][method], pair["scores"]["soft_kd"])))


def share_without(pairs: Sequence[Pair], teacher: str) -> float:
    """Returns the share by which the refitted rule gains most on the pairs of all teachers but one."""
    kept = [pair for pair in pairs if pair["teacher"] != teacher]
    return max(SHARES, key=lambda share: sum(gain(pair, rule_now(pair, share)) for pair in kept))


def best(pair: Pair) -> str:
    """Returns the method that gained most."""
    return max(TERMS, key=lambda method: gain(pair, method))


GAINS: dict[str, Predictor] = {
    **{method: partial(gain, method=method) for method in ("phi_s", "Lift", "WideLast")},
    "phi_s more than Lift": lambda pair: gain(pair, "phi_s") - gain(pair, "Lift"),
}


def correlations(pairs: Sequence[Pair]) -> list[tuple[str, str, str, str]]:
    """Returns Spearman's correlation of what is predicted with what was gained.

    It is that of all pairs, with its range without each teacher, and that of the pairs of each width.
    """
    teachers, widths = (sorted({pair[of] for pair in pairs}) for of in ("teacher", "width"))
    rows = []
    for (name, predicted), (method, gained) in product(PREDICTORS.items(), GAINS.items()):

        def rank(kept: Sequence[Pair], by: Predictor = predicted, of: Predictor = gained) -> float:
            values = [[of_pair(pair) for pair in kept] for of_pair in (by, of)]
            varies = all(len(set(each)) > 1 for each in values)
            return float(spearmanr(*values).statistic) if varies else math.nan

        without = [rank([pair for pair in pairs if pair["teacher"] != teacher]) for teacher in teachers]
        within = [rank([pair for pair in pairs if pair["width"] == width]) for width in widths]
        alone = "; ".join(f"{w}: {r:+.2f}" for w, r in zip(widths, within, strict=True) if not math.isnan(r))
        rows.append((name, method, f"{rank(pairs):+.2f} ({min(without):+.2f} to {max(without):+.2f})", alone))
    return rows


def record(study: Study, pairs: Sequence[Pair]) -> list[tuple[str, str, str, str]]:
    """Returns what each rule gains on average, what more than the first, and how often it names the best.

    The interval of what it gains more is Student's over the teachers, whose pairs are not independent. Where the rule
    was refitted to the pairs, it is also asked with a share chosen without each pair's teacher.
    """
    rows = []
    rules = dict(RULES)
    if study is DIGITS:
        shares = {teacher: share_without(pairs, teacher) for teacher in {pair["teacher"] for pair in pairs}}
        rules["... its share chosen without the pair's teacher"] = lambda pair: rule_now(pair, shares[pair["teacher"]])
    for name, rule in rules.items():
        gains = [gain(pair, rule(pair)) for pair in pairs]
        hits = sum(rule(pair) == best(pair) for pair in pairs)
        more: dict[str, list[float]] = {}
        for pair, gained in zip(pairs, gains, strict=True):
            more.setdefault(pair["teacher"], []).append(gained - gain(pair, rule_before(pair)))
        of_teachers = [float(np.mean(each)) for each in more.values()]
        beside = "" if rule is rule_before or len(more) < 2 else shown(estimate(of_teachers))
        rows.append((name, f"{np.mean(gains):+.2f}", beside, f"{hits} of {len(pairs)}"))
    return rows


def rows(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    """Returns the row of each pair."""
    return [
        (
            pair["teacher"],
            str(pair["width"]),
            str(pair["advice"]["need"]),
            str(pair["advice"]["rank"]),
            f"{100 * pair['advice']['held']:.0f}",
            rule_before(pair) + ("" if pair["advice"]["decided"] else " (undecided)"),
            rule_now(pair),
            *(f"{gain(pair, method):+.1f}" for method in TERMS),
            best(pair),
        )
        for pair in pairs
    ]
