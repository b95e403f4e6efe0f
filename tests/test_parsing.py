"""A command line becomes the arguments of a function."""

from __future__ import annotations

from typing import Any

import pytest

from kdvit.cli import main
from kdvit.cli.parsing import call


def command(
    runs: list[str],
    *,
    layers: list[int | float | str] | None = None,
    seeds: list[int] = [],  # noqa: B006
    pretrained: bool = True,
) -> dict[str, Any]:
    """Return what came.

    Args:
        runs: Words.
        layers: Of a network.
        seeds: Whole numbers.
        pretrained: A switch.

    Examples:
        kdvit command a b
    """
    return {"runs": runs, "layers": layers, "seeds": seeds, "pretrained": pretrained}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--layers", "-1", "0.5", "lift"], {"layers": [-1, 0.5, "lift"]}),
        (["--seeds", "010", "2"], {"seeds": [10, 2]}),
        (["--seeds", "0", "--seeds=1"], {"seeds": [0, 1]}),
        (["--pretrained", "False"], {"pretrained": False}),
        (["--pretrained=true"], {"pretrained": True}),
        (["b", "--pretrained"], {"pretrained": True, "runs": ["a", "b"]}),
    ],
)
def test_words_become_the_values_that_they_say(words: list[str], expected: dict[str, Any]) -> None:
    assert call(command, "command", ["a", *words]) == {
        "runs": ["a"],
        "layers": None,
        "seeds": [],
        "pretrained": True,
        **expected,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["analyze", "--layers"], "argument --layers: expected at least one argument"),
        (["analyze", "--memory", "-1"], "memory: must be 0 or more, got -1."),
        (["analyze", "--layers", "3", "--model", "a", "--layers", "lift"], "--layers is given twice."),
        (["analyze", "--energies=0.8", "--energies=0.9"], "all its values behind one: --energies A B."),
        (["analyze", "--batch_size", "0"], "batch_size: must be above 0, got 0."),
        (["analyze", "--num_workers", "-1"], "num_workers"),
        (["analyze", "--images", "0"], "images"),
        (["benchmark", "vit_tiny_patch16_224", "--batch_size", "0"], "batch_size"),
        (
            ["compare", "a", "--out", "x", "b"],
            "'b' belongs to no option. What needs none comes first.",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_at_once(words: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert error.count("\n") == 1, error


def test_help_is_help_behind_a_list_too(capsys) -> None:
    for help in ("-h", "--help"):
        with pytest.raises(SystemExit) as end:
            main(["benchmark", "--batch_size", "2", help])
        assert end.value.code == 0
        with pytest.raises(SystemExit):
            main(["analyze", "--layers", "3", help])
        assert capsys.readouterr().out.count("example: kdvit") == 2
