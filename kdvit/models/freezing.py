"""Parameters of a student that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from kdvit.errors import nearest

N = TypeVar("N", bound=nn.Module)


def freeze_parameters(network: N, names: Sequence[str]) -> N:
    """Freezes parameters, in place.

    A module that has only frozen parameters stays in eval in training, so that its dropout, its stochastic depth and
    the statistics of its BatchNorms rest too.

    Args:
        network: A network of kdvit's.
        names: Of parameters, or of modules with all that is in them, as the wrapped model has them: ``patch_embed``,
            ``blocks.0``. ``*`` stands for any text: ``blocks.[0-5]``, ``*.bias``.

    Returns:
        The network.

    Raises:
        ValueError: If the network has nothing of a name, or nothing is left to train.
    """
    parameters = {name.removeprefix("model."): each for name, each in network.named_parameters()}
    for pattern in names:
        found = [name for name in parameters if any(fnmatchcase(each, pattern) for each in _with_owners(name))]
        if not found:
            owners = {each for name in parameters for each in _with_owners(name)}
            raise ValueError(f"freeze: the student has no parameter or module {pattern!r}.{nearest(pattern, owners)}")
        for name in found:
            parameters[name].requires_grad = False
    if names and not any(each.requires_grad for each in parameters.values()):
        raise ValueError("freeze leaves no parameter of the student to train.")
    return network.train(network.training) if names else network


def frozen_modules(network: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules inside a network that have parameters, and only frozen ones."""
    for module in (each for each in network.modules() if each is not network):
        wanted = [each.requires_grad for each in module.parameters()]
        if wanted and not any(wanted):
            yield module


def _with_owners(name: str) -> list[str]:
    """Returns the name of a parameter, and those of the modules around it."""
    steps = name.split(".")
    return [".".join(steps[:end]) for end in range(1, len(steps) + 1)]
