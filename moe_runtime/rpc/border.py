"""What of an error or a report may reach a client: no paths, no tokens, no values, no words of plug-ins."""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from moe_runtime.errors import ExpertError, InternalError, MoERuntimeError, TransportError
from moe_runtime.rpc.status import STATUS_CODES, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.wire.messages import Report

logger = logging.getLogger(__name__)

#: What is told of an expert's failure in place of its own words, by what those begin with or hold.
_KINDS = (
    (re.compile(r"\bInnerLayerError: layer \S+: served none of \d"), "its inner layer served nothing"),
    (re.compile(r"\bInnerLayerError\b"), "its inner layer gave no answer"),
    (re.compile(r"no replica is ready"), "no replica is ready"),
    (re.compile(r"finite"), "its output was not finite"),
    (re.compile(r"\braised\b"), "it raised"),
    (re.compile(r"expected (a tensor as )?output|it was sent|sent (no )?rows|no rows"), "its output was wrong"),
    (re.compile(r"waited|in time|within|did not answer|do not answer|time ?out"), "it did not answer in time"),
    (re.compile(r"queue|full"), "its queue is full"),
    (re.compile(r"\bhost\b|process|connection|died|closed|reached|handshake"), "its host is gone"),
)
_ANY_FAILURE = "it failed"
#: How reports and errors name an expert, why it failed, and what became of its rows.
_ABOUT_EXPERT = re.compile(
    r"(?P<who>(layer [\w.-]{1,128}: )?expert [\w.-]{1,128}): (?P<reason>.*?)"
    r"(?P<fate>; rerouted|; served by another replica|)",
    re.DOTALL | re.ASCII,
)
_OF_THE_INSIDE = (InternalError, ExpertError, TransportError)
_SAY_AGAIN_AFTER_S = 60.0
_MAX_SAID = 256


class Border:
    """Takes out of what leaves for clients whatever tells of the inside; the log has it.

    Args:
        now: Tells the time in seconds.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._said: dict[str, float] = {}

    def error(self, error: Exception, *, method: str) -> MoERuntimeError:
        """The error that a client gets in the place of another, which is logged where it is more than the client's.

        Args:
            error: What was raised.
            method: By which method.
        """
        # The very classes of the table: a subclass of a plug-in's may say anything.
        if isinstance(error, MoERuntimeError) and type(error) in STATUS_CODES and type(error) not in _OF_THE_INSIDE:
            return error
        reference = secrets.token_hex(4)
        logger.error("%s failed, reference %s", method, reference, exc_info=error)
        told = f"reference {reference}, by which the router's log has the details"
        if isinstance(error, ExpertError):
            about_expert = _ABOUT_EXPERT.fullmatch(str(error))
            who = "an expert failed" if about_expert is None else about_expert["who"]
            return ExpertError(f"{who}: {failure_kind(str(error))}; {told}")
        if isinstance(error, TransportError):
            return TransportError(f"an expert host could not be reached; {told}")
        return InternalError(f"the router failed to answer this request; {told}")

    def report(self, report: Report) -> Report:
        """A report whose warnings name experts and the kinds of their failures."""
        if not report.warnings:
            return report
        warnings = tuple(dict.fromkeys(self._warning(text, report.layer) for text in report.warnings))
        return replace(report, warnings=warnings)

    def _warning(self, text: str, layer: str) -> str:
        about_expert = _ABOUT_EXPERT.fullmatch(text)
        if about_expert is None:
            return printable(text)
        public = f"{about_expert['who']}: {failure_kind(about_expert['reason'])}{about_expert['fate']}"
        if text != public:
            self._say_once(f"layer {layer}: {text}")
        return public

    def _say_once(self, text: str) -> None:
        """Log a text, unless it was lately: each answer of a batch has it, and of the next."""
        now = self._now()
        if self._said.get(text, float("-inf")) > now - _SAY_AGAIN_AFTER_S:
            return
        if len(self._said) >= _MAX_SAID:
            self._said.clear()
        self._said[text] = now
        logger.warning("%s", printable(text))


def failure_kind(reason: str) -> str:
    """What kind of failure it is that an expert, its host or the transport gave as a reason."""
    return next((kind for pattern, kind in _KINDS if pattern.search(reason)), _ANY_FAILURE)
