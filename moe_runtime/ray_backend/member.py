"""Membership in a runtime on Ray: news of the routing table from its controller, asked for again and again."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from moe_runtime.errors import StartError, UnavailableError
from moe_runtime.ray_backend.caller_notes import CallerNews, CallerNote
from moe_runtime.ray_backend.connection import LOST, Connection
from moe_runtime.ray_backend.plan import Failure
from moe_runtime.service.membership import Routes

if TYPE_CHECKING:
    from moe_runtime.ray_backend.processes import RouterFactory
    from moe_runtime.service.ports import Transport

#: In steps, so that whoever leaves need not wait for the controller.
_STEP_S = 0.1
#: Beyond what the controller was given: while it is restarted it answers nobody.
_SPARE_S = 2.0


class RayMember:
    """A member of a runtime whose hosts are actors; implements the port ``Membership``."""

    def __init__(self, controller: Any, transport: Transport, *, name: str, node: str) -> None:
        """Ask for nothing yet.

        Args:
            controller: The runtime's.
            transport: The member's own.
            name: The runtime's.
            node: Name of this node.
        """
        self._connection = Connection()
        self._controller = controller
        self._transport = transport
        self._name = name
        self._node = node
        self._caller = secrets.token_hex(8)
        self._known = 0
        self._revision = ""
        self._asking = threading.Lock()
        self._end: str | None = None

    @property
    def node(self) -> str:
        """Name of this node."""
        return self._node

    @property
    def transport(self) -> Transport:
        """The member's end of the data plane, which is the member's to close."""
        return self._transport

    def news(self, *, oldest_used: int, timeout_s: float) -> Routes | None:
        """What is newer than what was given last; waits up to ``timeout_s`` for it, then None.

        Raises:
            UnavailableError: If the runtime has ended, or the member has left.
            StartError: If the controller does not answer just now.
        """
        with self._asking:
            note = CallerNote(
                self._caller,
                self._node,
                os.getpid(),
                self._transport.public_key,
                oldest_used=oldest_used,
                known=self._known,
                revision=self._revision,
            )
            news = self._ask(note, timeout_s)
        if news is None:
            return None
        layers = None
        if news.factory is not None:
            factory: RouterFactory = pickle.loads(news.factory)  # nosec B301  # from the controller, by Ray
            layers = factory.prepare().layers
        self._known, self._revision = news.table.version, news.revision
        return Routes(news.table, layers)

    def leave(self) -> None:
        """Be a member no longer, and return when this process asks no more. Thread-safe, safe to call twice."""
        if self._end is None:
            self.dismiss("the member has left it")
            if not self._connection.is_there:
                return
            with contextlib.suppress(RayError):
                # Nobody waits for it: who does not say so is forgotten after some seconds.
                self._controller.caller_left.remote(self._caller)

    def dismiss(self, reason: str) -> None:
        """Have whoever asks for news told the reason why there are none, and return when this process asks no more."""
        self._end = self._end or f"runtime {self._name}: {reason}"
        # Ray must not be shut down while it is asked.
        with self._asking:
            return

    def _ask(self, note: CallerNote, timeout_s: float) -> CallerNews | None:
        deadline = time.monotonic() + timeout_s + _SPARE_S
        self._expect_membership()
        try:
            answer = self._answer(self._controller.caller_news.remote(note, timeout_s), deadline)
        except ActorDiedError as exc:
            raise UnavailableError(f"runtime {self._name}: its controller has ended") from exc
        except (RayError, GetTimeoutError) as exc:
            raise StartError(f"runtime {self._name}: its controller does not answer: {type(exc).__name__}") from exc
        if isinstance(answer, Failure):
            raise UnavailableError(answer.message)
        news: CallerNews | None = answer
        return news

    def _answer(self, asked: ray.ObjectRef[Any], deadline: float) -> Any:
        try:
            while not ray.wait([asked], timeout=_STEP_S)[0]:
                self._expect_membership()
                if time.monotonic() > deadline:
                    raise StartError(f"runtime {self._name}: its controller does not answer")
            self._expect_membership()
            return ray.get(asked, timeout=_STEP_S)
        except SystemExit:
            # What Ray says to those who wait while it is shut down.
            self._expect_membership()
            raise
        finally:
            self._connection.hold(asked)

    def _expect_membership(self) -> None:
        if self._end is None and not self._connection.is_there:
            self._end = f"runtime {self._name}: {LOST}"
        if self._end is not None:
            raise UnavailableError(self._end)
