"""Whether every node of a cluster has what a configuration needs, in the versions that the deploying machine has."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.errors import PlugInError, StartError
from moe_runtime.ray_backend.node_probe import installed_version

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from moe_runtime.ray_backend.node_calls import NodeAnswer

PACKAGE = "moe-runtime"
#: What every node computes with: others would give other results, or none.
_SHARED = (PACKAGE, "ray", "torch")


@dataclass(frozen=True)
class Expectation:
    """What every node must have.

    Attributes:
        versions: By distribution, and under ``python``; None where any version will do.
        plug_ins: Requirement of each plug-in, as the configuration has it, by its name.
    """

    versions: Mapping[str, str | None]
    plug_ins: Mapping[str, str]

    @property
    def distributions(self) -> tuple[str, ...]:
        """The distributions to look for."""
        return tuple(name for name in self.versions if name != "python")


def expectation(plug_ins: Iterable[str]) -> Expectation:
    """What nodes must have to serve a configuration with these plug-ins: the versions of this machine.

    A plug-in has the version that the configuration asks for; without one, this machine's, so that all replicas of
    an expert compute alike.
    """
    requirements = {re.split(r"\s*==", text.strip())[0]: text.strip() for text in plug_ins}
    versions = {"python": platform.python_version(), **{name: installed_version(name) for name in _SHARED}}
    for name, requirement in requirements.items():
        _, _, asked = requirement.partition("==")
        versions[name] = asked.strip() or installed_version(name)
    return Expectation(versions, requirements)


def mistakes(expected: Expectation, answers: Sequence[NodeAnswer]) -> list[str]:
    """One line per node and distribution that is missing or of another version, and per node without an answer."""
    return [line for answer in answers for line in _node_mistakes(expected, answer)]


def lacking(expected: Expectation, answers: Sequence[NodeAnswer]) -> dict[str, tuple[str, ...]]:
    """Per node's name, the distributions that are missing there or of another version."""
    lacks = {
        answer.node.name: tuple(name for name, asked in expected.versions.items() if _differs(asked, answer, name))
        for answer in answers
        if answer.error is None
    }
    return {node: names for node, names in lacks.items() if names}


def check(expected: Expectation, answers: Sequence[NodeAnswer]) -> None:
    """Raise what is wrong with the nodes.

    Raises:
        PlugInError: If nothing but plug-ins is missing or of another version; one line each.
        StartError: If a node lacks more than plug-ins, or does not answer.
    """
    lines = mistakes(expected, answers)
    if not lines:
        return
    wrong = {name for names in lacking(expected, answers).values() for name in names}
    answered = all(answer.error is None for answer in answers)
    kind = PlugInError if answered and wrong <= set(expected.plug_ins) else StartError
    raise kind("\n".join(lines))


def _node_mistakes(expected: Expectation, answer: NodeAnswer) -> list[str]:
    where = f"node {answer.node.name}"
    if answer.error is not None:
        return [f"{where}: expected it to say what is installed, found: {answer.error}"]
    return [
        f"{where}: expected {name} {asked or 'in any version'}, found {answer.value[name] or 'none'}; "
        + _remedy(expected, name)
        for name, asked in expected.versions.items()
        if _differs(asked, answer, name)
    ]


def _differs(asked: str | None, answer: NodeAnswer, name: str) -> bool:
    found = answer.value[name]
    return found is None or (asked is not None and found != asked)


def _remedy(expected: Expectation, name: str) -> str:
    if name in expected.plug_ins:
        return f"`--install` installs it, or run `pip install {expected.plug_ins[name]}` there"
    if name == PACKAGE:
        return "`--install --wheel PATH` installs it, or set up that node like this one"
    return "set up that node like this one"
