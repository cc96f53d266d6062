"""Which kinds of experts there are: the built-in ones and those that installed plug-ins register."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, entry_points
from typing import TYPE_CHECKING, Any

from moe_runtime.config.strict import StrictModel
from moe_runtime.errors import ConfigError, PlugInError
from moe_runtime.experts.checkpoints.kind import TRANSFORMERS
from moe_runtime.experts.foreign import in_one_line
from moe_runtime.experts.kinds.conv import CONV
from moe_runtime.experts.kinds.feed_forward import FEED_FORWARD, SWIGLU
from moe_runtime.experts.kinds.recurrent import RECURRENT
from moe_runtime.experts.kinds.transformer import TRANSFORMER
from moe_runtime.experts.kinds.zero_computation import CONSTANT, IDENTITY, ZERO
from moe_runtime.experts.protocol import ExpertKind
from moe_runtime.experts.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

ENTRY_POINT_GROUP = "moe_runtime.experts"

BUILT_IN_KINDS: Mapping[str, ExpertKind[Any]] = {
    kind.name: kind
    for kind in (FEED_FORWARD, SWIGLU, CONV, RECURRENT, TRANSFORMER, TRANSFORMERS, IDENTITY, ZERO, CONSTANT)
}

#: Kinds of layers above, which nothing here may import: the composition root hands them over.
_KINDS_FROM_ABOVE: dict[str, ExpertKind[Any]] = {}

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(==\s*(?P<version>[A-Za-z0-9.+!_-]+))?")


def known_kinds() -> tuple[str, ...]:
    """Names of all kinds that a config may use here, sorted; plug-ins are listed without loading them."""
    return tuple(sorted({*built_in_kinds(), *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def built_in_kinds() -> Mapping[str, ExpertKind[Any]]:
    """The kinds that need no plug-in, by name: those of this layer, and those that a layer above has registered."""
    return {**BUILT_IN_KINDS, **_KINDS_FROM_ABOVE}


def register_built_in(kinds: Iterable[ExpertKind[Any]]) -> None:
    """Add built-in kinds that need more than this layer may import; to do so again changes nothing."""
    _KINDS_FROM_ABOVE.update({kind.name: kind for kind in kinds})


def resolve_kind(kind: str) -> ExpertKind[Any]:
    """The kind of that name; built-in names come first, then the plug-ins of this Python environment.

    Raises:
        ConfigError: If no kind has that name; the message suggests the nearest.
        PlugInError: If two plug-ins register the name, or the one that does cannot be loaded.
    """
    built_in = BUILT_IN_KINDS.get(kind) or _KINDS_FROM_ABOVE.get(kind)
    return built_in if built_in is not None else _plug_in_kind(kind)


def check_plug_ins(requirements: Sequence[str]) -> None:
    """Check that the plug-ins of a config are installed here, in the versions asked for, and work.

    Args:
        requirements: ``"name"`` or ``"name==version"`` each: distributions as pip knows them.

    Raises:
        PlugInError: With one line per mistake.
    """
    mistakes = [line for index, text in enumerate(requirements) for line in _mistakes(f"plug_ins.{index}", text)]
    if mistakes:
        raise PlugInError("\n".join(mistakes))


# A failure is not remembered: the plug-in may be installed or mended meanwhile.
@cache
def _plug_in_kind(kind: str) -> ExpertKind[Any]:
    points = tuple(entry_points(group=ENTRY_POINT_GROUP, name=kind))
    if not points:
        raise ConfigError(
            f"unknown kind {kind!r}; {did_you_mean(kind, known_kinds())}. A kind of a plug-in needs its "
            f"distribution installed on every node"
        )
    if len(points) > 1:
        owners = ", ".join(sorted(_owner(point) for point in points))
        raise PlugInError(f"kind {kind!r}: expected one plug-in to register it, found {owners}; uninstall all but one")
    return _load(points[0])


def _load(point: EntryPoint) -> ExpertKind[Any]:
    try:
        loaded = point.load()
    except (Exception, SystemExit) as exc:
        raise PlugInError(
            f"kind {point.name!r}: loading {point.value!r} from {_owner(point)} raised {in_one_line(exc)}"
        ) from exc
    if not isinstance(loaded, ExpertKind):
        raise PlugInError(
            f"kind {point.name!r}: expected {point.value!r} from {_owner(point)} to be an ExpertKind, "
            f"found {type(loaded).__name__}"
        )
    if loaded.name != point.name:
        raise PlugInError(
            f"kind {point.name!r}: expected the ExpertKind from {_owner(point)} to have its entry point's name, "
            f"found {loaded.name!r}"
        )
    if not (isinstance(loaded.options, type) and issubclass(loaded.options, StrictModel)):
        raise PlugInError(
            f"kind {point.name!r}: expected the options from {_owner(point)} to be a StrictModel, "
            f"found {loaded.options!r}"
        )
    return loaded


def _mistakes(where: str, requirement: str) -> list[str]:
    match = _REQUIREMENT.fullmatch(requirement.strip())
    if match is None:
        return [f"{where}: expected `name` or `name==version`, found {requirement!r}"]
    name, version = match["name"], match["version"]
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return [f"{where}: expected the distribution {name!r} to be installed, found none; `pip install {requirement}`"]
    if version is not None and found.version != version:
        return [f"{where}: expected {name} {version}, found {found.version}; `pip install {requirement}`"]
    return [f"{where}: {mistake}" for mistake in _mistakes_of(found)]


def _mistakes_of(found: Distribution) -> list[str]:
    points = found.entry_points.select(group=ENTRY_POINT_GROUP)
    if not points:
        return [f"expected {found.name} to register experts in the entry-point group {ENTRY_POINT_GROUP!r}, found none"]
    mistakes = []
    for point in points:
        if point.name in built_in_kinds():
            mistakes.append(f"{found.name} registers the kind {point.name!r}, which is built in; it needs another name")
            continue
        try:
            resolve_kind(point.name)
        except ConfigError as exc:
            mistakes.append(str(exc))
    return mistakes


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"
