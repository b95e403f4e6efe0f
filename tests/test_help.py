"""Help: the list of commands, and for each an example that runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from kdvit.cli.entry import OTHERS
from kdvit.cli.help import OPTIONS, SUMMARIES
from tests.data.test_data_modules import image_folder
from tests.reference import reference_weights
from tests.runs import SHORT


def example(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Returns the words of the example at the end of a command's help, in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code in (None, 0)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"usage: kdvit {command} ")
    assert shown[1] == ""
    assert shown[-1].startswith(f"example: kdvit {command}")
    return shlex.split(shown[-1].removeprefix("example: kdvit "))


@pytest.mark.parametrize("command", [*SUMMARIES, *OTHERS])
def test_help_starts_with_the_usage_and_ends_with_an_example(command: str, monkeypatch, capsys) -> None:
    assert example(command, monkeypatch, capsys)[0] == command


def test_the_list_of_commands_cuts_no_sentence(capsys) -> None:
    main(["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(lines) == len(SUMMARIES) + len(OTHERS)
    assert [line for line in lines if not line.endswith(".") or len(line) > 120] == []


def test_a_shell_completes_commands_options_and_values(capsys) -> None:
    main(["completion", "bash"])
    script = capsys.readouterr().out
    Path("mine.yaml").touch()
    words = [
        *(
            "''",
            "comp",
            "fit --conf",
            "fit --config m",
            "fit --config demo/lif",
            "fit --model.compile ''",
            "fit --data I",
            "fit --data Li",
            "fit --model.student Timm",
            "fit --model.teacher Timm",
        ),
        *("fit --model.compile = st", "predict --ckpt_path b", "export --fo", "export --precision ''", "completion ''"),
        *(f"{command} {option.split()[0]}" for command in OPTIONS for option, _ in OPTIONS[command]),
    ]
    end = 'COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _kdvit; echo "${COMPREPLY[*]}"'
    asked = "\n".join(f"COMP_WORDS=(kdvit {each}); {end}" for each in words)
    told = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True, env={})
    found = dict(zip(words, told.stdout.splitlines(), strict=True))
    assert {*SUMMARIES, *OTHERS} <= {*found["''"].split()}
    assert {each: found[each] for each in words[1:15]} == {
        "comp": "compare completion",
        "fit --conf": "--config",
        "fit --config m": "mine.yaml",
        "fit --config demo/lif": "demo/lift.yaml",
        "fit --model.compile ''": "none student teacher both",
        "fit --data I": "ImageFolder ImageTable Images",
        "fit --data Li": "",
        "fit --model.student Timm": "TimmStudent",
        "fit --model.teacher Timm": "TimmStudent TimmTeacher",
        "fit --model.compile = st": "student",
        "predict --ckpt_path b": "best",
        "export --fo": "--fold --format",
        "export --precision ''": "float32 float16 int8",
        "completion ''": "bash zsh",
    }
    assert [each for each in words[15:] if each.split()[1] not in found[each].split() and "NAME" not in each] == []
    main(["completion", "zsh"])
    assert capsys.readouterr().out.endswith(f"autoload -U +X bashcompinit && bashcompinit\n{script}")


@pytest.mark.slow
def test_every_recipe_runs() -> None:
    page = (packaged_configs().parent / "kdvit/cli/README.md").read_text()
    recipes = [shlex.split(each) for each in re.findall(r"\| `kdvit ([^`]*)` \|", page)]
    assert len(recipes) == 10
    short = ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2", "--trainer.max_epochs"]
    for args in recipes:
        epochs = "2" if "--trainer.max_epochs" in args else "1"
        main([*args, *([*short, epochs] if args[0] == "fit" else [])])
    for left in ("teacher/metrics.csv", "lift/predictions.csv", "lift_half/student", "comparison.json"):
        assert Path("runs/demo", left).exists(), left


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*images are few:UserWarning")
def test_every_example_runs(monkeypatch, capsys) -> None:
    monkeypatch.setattr("kdvit.cli.commands.benchmark.ROUNDS", 2)
    monkeypatch.setattr("kdvit.cli.commands.benchmark.BATCH_ROUNDS", 2)
    main(["fit", "--config", "demo/teacher.yaml", *SHORT])
    main(["fit", "--config", "demo/lift.yaml", *SHORT])
    torch.save({"model": reference_weights("lift")}, "lift.pth")
    image_folder(Path("photographs"))
    short = {"fit": SHORT, "cache": ["--views", "1"], "benchmark": ["--batch_size", "1"]}
    for command in [*SUMMARIES, *OTHERS]:
        main([*example(command, monkeypatch, capsys), *short.get(command, [])])
    for left in ("runs/demo/cache", "runs/demo/plain/predictions.csv", "runs/analysis", "students/lift"):
        assert Path(left).exists(), left
