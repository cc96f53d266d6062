"""The bridge between one gRPC call, on the event loop, and its request in the service's engine thread."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from moe_runtime.errors import MoERuntimeError

if TYPE_CHECKING:
    import asyncio

    from moe_runtime.service.pending import Ticket
    from moe_runtime.service.requests import LayerAnswer, LayerRequest
    from moe_runtime.service.router_service import RouterService


class PendingAnswer:
    """Submits one request from any thread, and gives its answer to the event loop.

    However the call ends, ``withdraw`` afterwards leaves nothing of it in the service: also when it was
    cancelled while another thread was still submitting it.
    """

    def __init__(self, service: RouterService, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop
        self._answer: asyncio.Future[LayerAnswer] = loop.create_future()
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

    def _on_done(self, outcome: LayerAnswer | MoERuntimeError) -> None:
        # the loop is closed once the server has stopped: then nobody waits for this answer any more
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle, outcome)

    def _settle(self, outcome: LayerAnswer | MoERuntimeError) -> None:
        if self._answer.done():
            return
        if isinstance(outcome, MoERuntimeError):
            self._answer.set_exception(outcome)
        else:
            self._answer.set_result(outcome)
