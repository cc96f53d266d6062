"""The bridge between gRPC calls, on the event loop, and their requests in the service's engine thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING

from moe_runtime.errors import MoERuntimeError

if TYPE_CHECKING:
    from moe_runtime.service.pending import Ticket
    from moe_runtime.service.requests import LayerAnswer, LayerRequest
    from moe_runtime.service.router_service import RouterService


class Answers:
    """Carries outcomes from the engine thread to the event loop; those of one batch wake the loop once."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[PendingAnswer, LayerAnswer | MoERuntimeError]] = deque()
        self._is_loop_woken = False

    def put(self, pending: PendingAnswer, outcome: LayerAnswer | MoERuntimeError) -> None:
        """Have the call's event loop settle it. Thread-safe."""
        # In this order, and the loop in the opposite one: so an outcome is either taken by the wake-up under way or
        # causes one of its own.
        self._arrived.append((pending, outcome))
        if not self._is_loop_woken:
            self._is_loop_woken = True
            # the loop is closed once the server has stopped: then nobody waits for this answer any more
            with contextlib.suppress(RuntimeError):
                pending.loop.call_soon_threadsafe(self._settle_all)

    def _settle_all(self) -> None:
        self._is_loop_woken = False
        while self._arrived:
            pending, outcome = self._arrived.popleft()
            pending.settle(outcome)


class PendingAnswer:
    """Submits one request from any thread, and gives its answer to the event loop that it was made on.

    However the call ends, ``withdraw`` afterwards leaves nothing of it in the service: also when it was
    cancelled while another thread was still submitting it.
    """

    def __init__(self, service: RouterService, answers: Answers) -> None:
        self.loop = asyncio.get_running_loop()
        self._service = service
        self._answers = answers
        self._answer: asyncio.Future[LayerAnswer] = self.loop.create_future()
        self._lock = threading.Lock()
        self._ticket: Ticket | None = None
        self._withdrawn = False

    def submit(self, request: LayerRequest) -> None:
        """Hand the request to the service; from any thread, once.

        Raises:
            MoERuntimeError: If the service refuses it.
        """
        ticket = self._service.submit(request, self._on_done)
        with self._lock:
            self._ticket = ticket
            withdrawn = self._withdrawn
        if withdrawn:
            self._service.cancel(ticket)

    async def wait(self) -> LayerAnswer:
        """The service's answer.

        Raises:
            MoERuntimeError: The error that it answered with.
        """
        return await self._answer

    def withdraw(self) -> None:
        """Cancel whatever is still under way; on the event loop. Harmless once the answer has arrived."""
        if self._answer.done() and not self._answer.cancelled():
            return
        self._answer.cancel()
        with self._lock:
            self._withdrawn = True
            ticket = self._ticket
        if ticket is not None:
            self._service.cancel(ticket)

    def settle(self, outcome: LayerAnswer | MoERuntimeError) -> None:
        """Give the outcome to the call, unless that has ended; on the event loop."""
        if self._answer.done():
            return
        if isinstance(outcome, MoERuntimeError):
            self._answer.set_exception(outcome)
        else:
            self._answer.set_result(outcome)

    def _on_done(self, outcome: LayerAnswer | MoERuntimeError) -> None:
        self._answers.put(self, outcome)
