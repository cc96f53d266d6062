"""Writes log records as lines for people or as JSON, one object per line, with who wrote them and about what.

Logs go to stderr of each process. Modules log through ``logging.getLogger(__name__)`` and give what a record is about
as ``extra``: ``request_id`` or ``request_ids``, ``layer``, ``expert``. Only processes that are the runtime's own call
``install``; a library that is imported leaves its program's logging alone.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

LogFormat = Literal["human", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

#: Attributes of every record; what a record has beside these came as ``extra``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PACKAGE = "moe_runtime"


@dataclass(frozen=True)
class LogSettings:
    """How a process logs.

    Attributes:
        format: Lines for people, or JSON.
        level: Of this package's loggers; other packages' are heard from ``warning`` on.
    """

    format: LogFormat = "human"
    level: LogLevel = "warning"


@dataclass(frozen=True)
class LogIdentity:
    """Who logs.

    Attributes:
        role: ``command``, ``controller``, ``router`` or ``expert``.
        runtime: Name of the runtime; empty where it is not known.
        node: Name of the node; empty where it is not known.
    """

    role: str
    runtime: str = ""
    node: str = ""
    pid: int = field(default_factory=os.getpid)


def install(settings: LogSettings, identity: LogIdentity, *, stream: TextIO | None = None) -> logging.Handler:
    """Make this process log so; what was installed before is replaced, handlers of others stay.

    Args:
        settings: Format and level.
        identity: Goes into every JSON line.
        stream: Where to; stderr when None.

    Returns:
        The handler on the root logger.
    """
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _OwnHandler)]:
        root.removeHandler(handler)
    own = _OwnHandler(stream or sys.stderr)
    own.setFormatter(JsonFormatter(identity) if settings.format == "json" else HumanFormatter())
    root.addHandler(own)
    logging.getLogger(_PACKAGE).setLevel(settings.level.upper())
    return own


class _OwnHandler(logging.StreamHandler[Any]):
    """So that a second ``install`` finds what the first one has added."""


class JsonFormatter(logging.Formatter):
    """One JSON object per record: ``time`` (UTC), ``level``, ``logger``, ``message``, who, and what it is about.

    An exception is one field, ``exception``. What is not JSON is written as its text; no line breaks get out.
    """

    def __init__(self, identity: LogIdentity) -> None:
        super().__init__()
        self._identity = vars(identity)

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        document = {
            "time": _iso_time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._identity,
            **_extra(record),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


class HumanFormatter(logging.Formatter):
    """Time, level, logger and message, then what the record is about as ``key=value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the base class names it so
        """The record's line, without its exception."""
        about = "".join(f" {key}={_short(value)}" for key, value in _extra(record).items())
        return super().formatMessage(record) + about


def _extra(record: logging.LogRecord) -> Mapping[str, Any]:
    # What begins with an underscore comes of other packages' record factories, Ray's for one.
    return {key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")}


def _short(value: Any) -> str:
    return ",".join(str(item) for item in value) if isinstance(value, list | tuple) else str(value)


def _iso_time(seconds: float) -> str:
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"
