"""Whether the head of the cluster is gone for good: then Ray ends every process of it, the runtime's and this one."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger(__name__)

#: After so long without a head Ray ends a process, by writing to its log only.
_PATIENCE_VARIABLE, _DEFAULT_PATIENCE_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
#: Before that, to be the one who says why.
_BEFORE_RAY_S = 6.0


def patience_s() -> float:
    """How long the processes of this cluster may be without its head."""
    try:
        patience = float(os.environ[_PATIENCE_VARIABLE])
    except (KeyError, ValueError):
        patience = _DEFAULT_PATIENCE_S
    return max(patience - _BEFORE_RAY_S, patience / 2)


class HeadWatch:
    """Looks whether the head can be reached; traffic needs none, but nothing is replaced without it."""

    def __init__(
        self,
        is_reached: Callable[[], bool],
        *,
        limit_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Look at nothing yet.

        Args:
            is_reached: Whether the head answers; bounded.
            limit_s: Without it for so long, the cluster counts as gone.
            now: Tells the time.
        """
        self._is_reached = is_reached
        self._limit_s = limit_s
        self._now = now
        self._away_since: float | None = None

    def look(self) -> str | None:
        """Why the cluster counts as gone; None while it does not."""
        if self._is_reached():
            if self._away_since is not None:
                _LOG.warning("the head of the Ray cluster is back after %.0f s", self._now() - self._away_since)
            self._away_since = None
            return None
        if self._away_since is None:
            self._away_since = self._now()
            _LOG.warning(
                "the head of the Ray cluster does not answer: requests are served, but nothing is replaced; "
                "without it for %.0f s, everything ends",
                self._limit_s,
            )
        if self._now() - self._away_since < self._limit_s:
            return None
        return (
            f"the head of the Ray cluster has not answered for {self._limit_s:.0f} s, and Ray now ends every process "
            "of the runtime; a head with a persistent store (RAY_gcs_storage=rocksdb) can be restarted in time"
        )
