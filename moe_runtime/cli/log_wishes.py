"""What the command line says of logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.logs import LogSettings

if TYPE_CHECKING:
    from moe_runtime.logs import LogFormat


@dataclass(frozen=True)
class LogWishes:
    """Options that all commands share: they go before what a configuration says."""

    format: LogFormat | None = None
    debug: bool = False

    def over(self, settings: LogSettings) -> LogSettings:
        """These settings, but for what the command line asks for."""
        return LogSettings(self.format or settings.format, "debug" if self.debug else settings.level)
