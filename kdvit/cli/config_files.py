"""The configs that come with kdvit, found by their short names wherever one works."""

from __future__ import annotations

from pathlib import Path

from kdvit.errors import UserError, nearest, shown

FLAGS = ("--config", "-c")
ENDINGS = (".yaml", ".yml")
"""Of what is a config among names of networks."""


def packaged_configs() -> Path:
    """Returns the folder of the configs: inside an installed package, beside it in a checkout."""
    home = Path(__file__).parent.parent
    inside = home / "configs"
    return inside if inside.is_dir() else home.parent / "configs"


def find_configs(args: list[str]) -> list[str]:
    """Replaces every ``--config NAME`` by the path of its file.

    Raises:
        UserError: If there is no such config.

    Examples:
        >>> find_configs(["--config", "configs/lift.yaml"])[-1].endswith("lift.yaml")
        True
    """
    found = list(args)
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag in FLAGS and equals:
            found[i] = f"{flag}={find_config(value)}"
        elif i > 0 and args[i - 1] in FLAGS:
            found[i] = find_config(arg)
    return found


def find_config(name: str) -> str:
    """Returns the path of a config: a file, or one that kdvit brings.

    Raises:
        UserError: If it is neither.
    """
    home = packaged_configs()
    packaged = home / name.removeprefix("configs/")
    if Path(name).is_file():
        require_yaml(Path(name))
        return name
    if Path(name).is_dir() and (Path(name) / "config.yaml").is_file():
        raise UserError(f"{name!r} is a folder. Did you mean {Path(name) / 'config.yaml'!s}?")
    if packaged.is_file():
        return str(packaged)
    brought = [str(file.relative_to(home)) for file in home.rglob("*.yaml")]
    raise UserError(f"There is no config {name!r}.{nearest(name, brought)}")


def require_configs(names: list[str]) -> None:
    """Raises UserError if a config among names of networks is not there: before the imports, which take seconds."""
    for name in names:
        if name.endswith(ENDINGS):
            find_config(name)


def require_yaml(file: Path) -> None:
    """Raises UserError if a file is no YAML; the message names its line."""
    import yaml

    try:
        with file.open() as stream:
            for _ in yaml.parse(stream):
                pass
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{str(file)!r} is no YAML: {' '.join(str(error).split())}.") from error


def require_writable(out: str | None) -> None:
    """Raises UserError if the file of ``--out``, where one is named, cannot be written: before what takes long."""
    if out:
        with shown((OSError,), prefix=f"--out {out!r}: "):
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            Path(out).open("a").close()
