"""The batches that are with the engine: from a joined batch to the answers of the requests whose rows are in it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from moe_runtime.errors import InternalError
from moe_runtime.service.report import BatchLedger

if TYPE_CHECKING:
    from moe_runtime.service.batch import BatchResult
    from moe_runtime.service.batcher import JoinedBatch
    from moe_runtime.service.engine import RouterEngine
    from moe_runtime.service.generations import Generation
    from moe_runtime.service.open_requests import OpenRequests
    from moe_runtime.service.ports import Clock

_LOG = logging.getLogger(__name__)


class BatchesUnderWay:
    """Gives batches to the engine, and their rows back to the requests. Owned by the service's thread.

    Args:
        engine: Computes them.
        requests: Those whose rows are in them, as long as they are open.
        clock: Tells the time.
    """

    def __init__(self, engine: RouterEngine, requests: OpenRequests, *, clock: Clock) -> None:
        self._engine = engine
        self._requests = requests
        self._clock = clock
        self._batches: dict[int, tuple[JoinedBatch, Generation]] = {}

    def dispatch(self, joined: JoinedBatch, generation: Generation) -> None:
        """Route a batch and send its rows out; where that raises, its requests are answered with an error."""
        try:
            batch_id = self._engine.submit(joined.batch, generation.lineup)
        except Exception:
            # A gate that raises must not take the other layers' requests with it.
            _LOG.exception("layer %s: a batch could not be routed", joined.batch.layer)
            generation.batcher.batch_done(joined.batch.layer)
            error = InternalError("the batch could not be routed; see the router's log")
            for part in joined.parts:
                self._requests.fail(part.request_key, error)
            return
        self._batches[batch_id] = joined, generation
        if _LOG.isEnabledFor(logging.DEBUG):
            about = {"request_ids": joined.batch.request_ids, "layer": joined.batch.layer, "batch_id": batch_id}
            _LOG.debug("dispatched a batch of %d tokens", joined.batch.tokens.shape[0], extra=about)

    def finish(self, result: BatchResult) -> None:
        """Hand a batch's rows to their requests, and answer those that are complete."""
        if result.batch_id not in self._batches:
            # Its submission failed half-way, and its requests were answered then.
            return
        joined, generation = self._batches.pop(result.batch_id)
        generation.batcher.batch_answered(joined)
        generation.lineup.stats[joined.batch.layer].count_waits(joined)
        ledger = BatchLedger(result, generation.lineup.layer(joined.batch.layer))
        for place, part in enumerate(joined.parts):
            if place in result.errors:
                self._requests.fail(part.request_key, result.errors[place])
            pending = self._requests.get(part.request_key)
            if pending is None:
                continue
            last_row = part.offset + part.stop - part.start
            report = ledger.part(
                first_row=part.offset,
                last_row=last_row,
                queue_s=joined.joined_at - part.arrived_at,
                return_routing=part.return_routing,
            )
            if pending.add_part(part.start, result.outputs[part.offset : last_row], report):
                self._requests.answer(part.request_key, pending.answer(self._clock.now()))
