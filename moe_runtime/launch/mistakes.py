"""Mistakes of a configuration, collected so that all of them are told at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass
class Mistakes:
    """Collects mistakes, each with where it comes from."""

    origin: str
    lines: list[str] = field(default_factory=list)
    kinds: set[type[ConfigError]] = field(default_factory=set)

    def add(self, error: ConfigError, *, prefix: str = "", instead_of: str = "") -> None:
        """Take over an error's lines; ``prefix`` goes before each, in the place of ``instead_of``."""
        self.lines += [prefix + line.removeprefix(instead_of) for line in str(error).splitlines()]
        self.kinds.add(type(error))

    def add_lines(self, lines: Iterable[str]) -> None:
        """Take over mistakes of the configuration, one line each."""
        for line in lines:
            self.add(ConfigError(line))

    def raise_any(self) -> None:
        """Raise what was collected, if anything was."""
        if self.lines:
            kind = next(iter(self.kinds)) if len(self.kinds) == 1 else ConfigError
            raise kind("\n".join(dict.fromkeys(self.origin + line for line in self.lines)))
