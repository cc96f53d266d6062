"""Programs that route for themselves, as the controller knows them: whom hosts admit, and who uses which table."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import UnavailableError
from moe_runtime.ray_backend.caller_notes import CallerNews
from moe_runtime.ray_backend.spawner import within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from moe_runtime.ray_backend.caller_notes import CallerNote
    from moe_runtime.ray_backend.plan import Snapshot
    from moe_runtime.ray_backend.spawner import AsyncClock

_LOG = logging.getLogger(__name__)

#: A caller that has not asked for so long is gone, or stands still.
FORGOTTEN_AFTER_S = 10.0
_LOOK_EVERY_S = 1.0


@dataclass
class _Caller:
    """One of them; ``note`` is None where only the key is known, from before the controller restarted."""

    note: CallerNote | None
    public_key: str | None
    asked_at: float


class Callers:
    """Answers those who ask for news, and forgets those who do not. Owned by the controller's event loop."""

    def __init__(self, clock: AsyncClock, *, on_change: Callable[[], None]) -> None:
        """Know nobody yet.

        Args:
            clock: Tells the time.
            on_change: Called when hosts have to admit others than before.
        """
        self._clock = clock
        self._on_change = on_change
        self._snapshot: Snapshot | None = None
        self._callers: dict[str, _Caller] = {}
        self._joined = asyncio.Event()
        self._published = asyncio.Event()
        self._ended: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Of all of them that have one."""
        return frozenset(each.public_key for each in self._callers.values() if each.public_key is not None)

    def adopt(self, keys: Iterable[str]) -> None:
        """Know those again that an earlier controller knew, by their keys, until they ask or are forgotten."""
        for key in keys:
            self._callers[key] = _Caller(None, key, self._clock.now())
            self._joined.set()

    def publish(self, snapshot: Snapshot) -> None:
        """Answer all who wait with what this says."""
        self._snapshot = snapshot
        self._published.set()
        self._published = asyncio.Event()

    def end(self, reason: str) -> None:
        """Tell all who ask that there will be no more news."""
        self._ended = reason
        self._published.set()

    async def news(self, note: CallerNote, *, timeout_s: float) -> CallerNews | None:
        """What is newer than what a caller knows, once all hosts admit it; None if there is nothing in time.

        Raises:
            UnavailableError: If the runtime has ended.
        """
        self._note(note)
        deadline = self._clock.now() + timeout_s
        while True:
            if self._ended is not None:
                raise UnavailableError(self._ended)
            if (news := self._news_for(note)) is not None:
                return news
            try:
                await within(self._clock, deadline - self._clock.now(), self._published.wait())
            except TimeoutError:
                return None
            finally:
                self._note(note)

    def leave(self, caller: str) -> None:
        """Forget one who will not ask again."""
        if self._callers.pop(caller, None) is not None:
            self._on_change()

    def late(self, version: int) -> list[str]:
        """Those who may still use a table older than this version, in words."""
        return [
            f"a program with key {each.public_key}" if each.note is None else _name(each.note)
            for each in self._callers.values()
            if each.note is None or 0 < each.note.oldest_used < version
        ]

    def newest_known(self) -> int:
        """The newest version of the table that one of them was given."""
        return max((each.note.known for each in self._callers.values() if each.note is not None), default=0)

    def describe(self) -> list[dict[str, Any]]:
        """Who they are, and which tables they use, as plain values."""
        notes = [each.note for each in self._callers.values() if each.note is not None]
        return [{"node": note.node, "pid": note.pid, "oldest_table_version": note.oldest_used} for note in notes]

    async def forget(self) -> None:
        """Forget those who have not asked for some time, for ever."""
        while True:
            if not self._callers:
                self._joined.clear()
                await self._joined.wait()
            before = self._clock.now()
            await self._clock.sleep(_LOOK_EVERY_S)
            now = self._clock.now()
            if now - before > 2 * _LOOK_EVERY_S:
                # This process stood still: whoever asked meanwhile could not be heard.
                self._callers = {name: replace(each, asked_at=now) for name, each in self._callers.items()}
            gone = [name for name, each in self._callers.items() if now - each.asked_at > FORGOTTEN_AFTER_S]
            for name in gone:
                caller = self._callers.pop(name)
                _LOG.info("%s has not asked for %g s", _name(caller.note), FORGOTTEN_AFTER_S)
            if gone:
                self._on_change()

    def _note(self, note: CallerNote) -> None:
        if note.public_key is not None:
            # What was adopted is known by its key until now.
            self._callers.pop(note.public_key, None)
        is_new = note.caller not in self._callers
        self._callers[note.caller] = _Caller(note, note.public_key, self._clock.now())
        self._joined.set()
        snapshot = self._snapshot
        if is_new and (snapshot is None or note.public_key not in snapshot.caller_keys):
            self._on_change()

    def _news_for(self, note: CallerNote) -> CallerNews | None:
        snapshot = self._snapshot
        if snapshot is None or snapshot.plan is None or snapshot.table.version <= note.known:
            return None
        if note.public_key is not None and note.public_key not in snapshot.caller_keys:
            return None
        routers = snapshot.plan.routers
        factory = routers.factory if not note.known or routers.revision != note.revision else None
        return CallerNews(snapshot.table, routers.revision, factory)


def _name(note: CallerNote | None) -> str:
    return "a program" if note is None else f"the program with pid {note.pid} on node {note.node}"
