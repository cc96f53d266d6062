"""A router engine of this process on the hosts of a runtime, which a thread keeps up with the runtime's tables."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from typing import TYPE_CHECKING

from moe_runtime.errors import MoERuntimeError, UnavailableError
from moe_runtime.service.engine import RouterEngine

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from moe_runtime.service.batch import Batch, BatchResult
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.membership import Membership, Routes

_LOG = logging.getLogger(__name__)

#: Hosts, and news, end the wait; this only bounds it.
POLL_S = 1.0
_NEWS_TIMEOUT_S = 2.0
#: While an older table is in use: the runtime waits to hear that it no longer is.
_NEWS_TIMEOUT_IN_USE_S = 0.2
_PAUSE_S = 0.5


class CallingEngine:
    """A ``RouterEngine`` that a program drives itself, holding a lock but for ``rest`` and ``close``.

    Its thread asks for news. Where nobody holds the lock it makes the engine follow them at once; where somebody does,
    whoever drives the engine does so between two polls, for which it is woken.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        lock: threading.Lock,
        only: Collection[str] | None,
        start_timeout_s: float,
    ) -> None:
        """Join, and wait for the first table.

        Args:
            membership: The place among those who route; left by ``close``.
            lock: Held by whoever drives the engine.
            only: Layers to route to; all when None.
            start_timeout_s: How long the first table may take.

        Raises:
            UnavailableError: If the runtime has ended, or gives no table in time.
        """
        self._lock = lock
        self._membership = membership
        self._only = only
        self._news: list[Routes] = []
        self._end: UnavailableError | None = None
        self._oldest_used = 0
        self._closing = threading.Event()
        try:
            self._engine = self._first_engine(start_timeout_s)
        except BaseException:
            membership.leave()
            membership.transport.close()
            raise
        self._oldest_used = self._engine.table.version
        self._thread = threading.Thread(target=self._follow, name="moe-follow", daemon=True)
        self._thread.start()
        # The thread must not ask while the process, and Ray in it, comes to its end.
        atexit.register(self.close)

    @property
    def layers(self) -> Mapping[str, RoutedLayer]:
        """The layers by name, as they are now."""
        return self._engine.lineup.layers

    @property
    def engine(self) -> RouterEngine:
        """The engine itself: its table, and its counters, which may be read without the lock."""
        return self._engine

    def submit(self, batch: Batch) -> int:
        """Send a batch by the newest table; its id, which comes back in its result.

        Raises:
            UnavailableError: If the runtime has ended.
            UnknownLayerError: If the layer was removed.
        """
        if self._news or self._end is not None:
            self.catch_up()
        self.check_has(batch.layer)
        return self._engine.submit(batch)

    def check_has(self, layer: str) -> None:
        """Check that a layer is there, which may have been removed meanwhile.

        Raises:
            UnknownLayerError: If it is not.
        """
        self._engine.lineup.layer(layer)

    def poll(self, timeout_s: float) -> list[BatchResult]:
        """Finished batches; waits up to ``timeout_s`` for hosts, less when one is done or there are news.

        Raises:
            UnavailableError: If the runtime has ended.
        """
        results = self._engine.poll(timeout_s)
        if self._news or self._end is not None:
            self.catch_up()
        return results

    def serve(self, batch: Batch) -> BatchResult:
        """The result of one batch, where nothing else is under way.

        Raises:
            UnavailableError: If the runtime has ended.
            UnknownLayerError: If the layer was removed.
        """
        batch_id = self.submit(batch)
        while True:
            for result in self.poll(POLL_S):
                if result.batch_id == batch_id:
                    return result

    def await_table(self, *, newer_than: int, until: float) -> None:
        """Drive the engine until it has a table newer than a version, or until a time of ``time.monotonic``.

        Raises:
            UnavailableError: If the runtime has ended.
        """
        while self._engine.table.version <= newer_than and (left_s := until - time.monotonic()) > 0:
            self.poll(left_s)

    def catch_up(self) -> None:
        """Follow the news that have come.

        Raises:
            UnavailableError: If the runtime has ended.
        """
        while self._news:
            routes = self._news.pop(0)
            if routes.layers is None:
                self._engine.set_table(routes.table)
            else:
                before = self._engine.lineup
                self._engine.replace_layers(self._mine(routes.layers), routes.table)
                self._engine.let_go(before)
        self._oldest_used = self._engine.oldest_table_version()
        if self._end is not None:
            raise self._end

    def rest(self) -> None:
        """Follow news that came too late for whoever held the lock; call it without the lock."""
        if (self._news or self._oldest_used < self._engine.table.version) and self._lock.acquire(blocking=False):
            try:
                self.catch_up()
            except UnavailableError as exc:
                _LOG.debug("whoever calls next is told: %s", exc)
            finally:
                self._lock.release()

    def close(self) -> None:
        """Leave the runtime; whoever drives the engine must have stopped. Safe to call twice."""
        atexit.unregister(self.close)
        self._closing.set()
        self._membership.leave()
        self._thread.join()
        # Only now: the thread wakes it.
        self._membership.transport.close()

    def _first_engine(self, timeout_s: float) -> RouterEngine:
        membership = self._membership
        first = membership.news(oldest_used=0, timeout_s=timeout_s)
        if first is None or first.layers is None:
            raise UnavailableError(f"expected a routing table within {timeout_s:g} s, found none")
        engine = RouterEngine(self._mine(first.layers), membership.transport, node=membership.node)
        engine.set_table(first.table)
        return engine

    def _mine(self, layers: Mapping[str, RoutedLayer]) -> Mapping[str, RoutedLayer]:
        return layers if self._only is None else {name: layers[name] for name in layers if name in self._only}

    def _follow(self) -> None:
        while not self._closing.is_set():
            is_behind = self._oldest_used < self._engine.table.version
            timeout_s = _NEWS_TIMEOUT_IN_USE_S if is_behind else _NEWS_TIMEOUT_S
            try:
                routes = self._membership.news(oldest_used=self._oldest_used, timeout_s=timeout_s)
            except UnavailableError as exc:
                self._end = exc
            except MoERuntimeError as exc:
                _LOG.warning("no news of the routing table at the moment: %s", exc)
                self._closing.wait(_PAUSE_S)
                continue
            else:
                if routes is None:
                    self.rest()
                    continue
                self._news.append(routes)
            if self._closing.is_set():
                return
            self._membership.transport.wake()
            self.rest()
            if self._end is not None:
                return
