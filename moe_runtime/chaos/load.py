"""Clients that know every router and ask one question after the other, each answer checked and entered."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.chaos.checks import mistakes_in_answer, mistakes_in_error
from moe_runtime.chaos.layer import LAYER
from moe_runtime.chaos.ledger import Ending, Outcome
from moe_runtime.chaos.questions import draw_question
from moe_runtime.errors import MoERuntimeError, UnavailableError
from moe_runtime.rpc.aio_client import AsyncMoEClient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_runtime.chaos.lag import Lag
    from moe_runtime.chaos.ledger import Ledger
    from moe_runtime.chaos.questions import Question
    from moe_runtime.chaos.reference import Reference

NUM_CLIENTS = 16
#: Pause between a client's answer and its next question: up to this.
_PAUSE_S = 0.04
#: How long after its deadline a call may take to return before its request is given up as lost.
_LOST_AFTER_S = 30.0


class Asker:
    """Asks questions through one client, checks what comes back, and enters it; one per client."""

    def __init__(self, client: AsyncMoEClient, *, ledger: Ledger, reference: Reference, lag: Lag) -> None:
        """Share the ledger, the reference and the lag meter with the others."""
        self._client = client
        self._ledger = ledger
        self._reference = reference
        self._lag = lag

    async def ask(self, question: Question) -> Outcome | None:
        """Ask one question; its outcome, or None if it has none: then the ledger has it as lost."""
        number = self._ledger.enter(question.num_assignments)
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(question.timeout_s + _LOST_AFTER_S):
                outcome = await self._answered(question, asked_at)
        except TimeoutError:
            return None
        self._ledger.close(number, outcome)
        return outcome

    async def _answered(self, question: Question, asked_at: float) -> Outcome:
        timeout_s = question.timeout_s
        try:
            result = await self._client.forward(
                question.inputs,
                layer=LAYER,
                options=question.options,
                timeout_s=timeout_s,
                return_routing=question.return_routing,
            )
        except MoERuntimeError as exc:
            elapsed_s, lag_s = self._elapsed_and_lag(asked_at, timeout_s)
            # No router has to be there to answer with it; everything else is a router's word, or the client's own.
            ending = Ending.TRANSPORT_ERROR if isinstance(exc, UnavailableError) else Ending.TYPED_ERROR
            return Outcome(
                ending,
                elapsed_s,
                timeout_s,
                lag_s,
                error=type(exc).__name__,
                message="; ".join([str(exc), *getattr(exc, "__notes__", ())]),
                is_poisoned=question.poison is not None,
                mistakes=mistakes_in_error(question, exc),
            )
        elapsed_s, lag_s = self._elapsed_and_lag(asked_at, timeout_s)
        # In a thread: the loop is what the other clients' deadlines are measured with.
        mistakes = await asyncio.to_thread(mistakes_in_answer, question, result, self._reference)
        return Outcome(Ending.OK, elapsed_s, timeout_s, lag_s, report=result.report, mistakes=mistakes)

    def _elapsed_and_lag(self, asked_at: float, timeout_s: float) -> tuple[float, float]:
        """Seconds since the call, and those of them after its deadline for which this process did not run."""
        now = time.monotonic()
        deadline = asked_at + timeout_s
        return now - asked_at, self._lag.since(deadline, now) if now > deadline else 0.0


class Load:
    """The clients of a run. Traffic can be held for a moment, and goes on."""

    def __init__(self, addresses: Sequence[str], *, seed: int, ledger: Ledger, reference: Reference, lag: Lag) -> None:
        """Make the clients; they connect with their first question."""
        self._seed = seed
        self._ledger = ledger
        self._clients = [AsyncMoEClient(addresses) for _ in range(NUM_CLIENTS)]
        self.askers = [Asker(client, ledger=ledger, reference=reference, lag=lag) for client in self._clients]
        self._may_ask = asyncio.Event()
        self._may_ask.set()
        self._may_hurry = True
        self._stopping = False

    async def run(self) -> None:
        """Ask until ``stop``; returns when every question has its answer."""
        await asyncio.gather(*(self._ask_in_turn(i, asker) for i, asker in enumerate(self.askers)))

    def hold(self) -> None:
        """Begin no question until ``release``."""
        self._may_ask.clear()

    def release(self) -> None:
        """Go on."""
        self._may_ask.set()

    def calm_down(self) -> None:
        """From now on give every request the time that its answer takes."""
        self._may_hurry = False

    async def may_ask(self) -> None:
        """Return when traffic is not held."""
        # It may be held again before whoever was let go runs.
        while not self._may_ask.is_set():
            await self._may_ask.wait()

    def stop(self) -> None:
        """Begin no more questions."""
        self._stopping = True
        self._may_ask.set()

    async def close(self) -> None:
        """Close the clients' connections."""
        await asyncio.gather(*(client.close() for client in self._clients))

    async def _ask_in_turn(self, index: int, asker: Asker) -> None:
        rng = np.random.default_rng([self._seed, index])
        while not self._stopping:
            await self.may_ask()
            await asker.ask(draw_question(rng, may_hurry=self._may_hurry))
            await asyncio.sleep(float(rng.uniform(0.0, _PAUSE_S)))
