"""What becomes of rows that no expert answered: they are asked for again, or are zeros."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import ExpertError, PoisonedRequestError
from moe_runtime.launch.called_rows import missing_of
from moe_runtime.service.failures import FailureKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from moe_runtime.launch.called_rows import RowsAsked
    from moe_runtime.launch.calling_engine import CallingEngine
    from moe_runtime.service.batch import BatchResult
    from moe_runtime.service.failures import FailedAttempt
    from moe_runtime.service.routing_table import RoutingTable

_LOG = logging.getLogger(__name__)

#: Between two attempts, where no newer table comes.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


@dataclass(frozen=True, eq=False)
class Unanswered:
    """A batch of which rows may be missing.

    Attributes:
        asked: What it asked for.
        result: What came of it.
        rows: What did, ``(num_rows, *out_shape)``; the others are to be put here.
    """

    asked: RowsAsked
    result: BatchResult
    rows: Tensor


class Completion:
    """Completes the rows of calls, one after the other.

    Attributes:
        num_dropped: Rows that are zeros for want of an answer.
        num_retried: Rows that were asked for again.
    """

    def __init__(self, *, waits: bool, patience_s: float) -> None:
        """Complete nothing yet.

        Args:
            waits: Whether missing rows are asked for again; otherwise they are zeros.
            patience_s: For how long after a batch that lacks some; an expert that answers badly twice in a row is not
                waited for.
        """
        self.num_dropped = 0
        self.num_retried = 0
        self._waits = waits
        self._patience_s = patience_s
        self._warned: set[str] = set()

    def complete(self, calling: CallingEngine, batches: Iterable[Unanswered]) -> None:
        """Get the rows that some batches lack, or leave zeros.

        Raises:
            ExpertError: If an expert has not answered in the end.
            UnavailableError: If the runtime has ended.
            UnknownLayerError: If the layer was removed.
        """
        deadline = time.monotonic() + self._patience_s
        for each in batches:
            missing = missing_of(each.result)
            if missing is None:
                continue
            if self._waits:
                self._ask_again(calling, each, missing, deadline=deadline)
            else:
                self._drop(each, int(missing.sum()))

    def _ask_again(self, calling: CallingEngine, each: Unanswered, missing: Tensor, *, deadline: float) -> None:
        asked, result, pause_s = each.asked, each.result, _FIRST_PAUSE_S
        bad = _bad_answers(result)
        _LOG.warning("%s; asking again for %g s", failure_of(asked, result), self._patience_s)
        while True:
            for error in result.errors.values():
                if isinstance(error, PoisonedRequestError):
                    raise error
            version = calling.engine.table.version if pause_s > _FIRST_PAUSE_S else result.table_version
            calling.await_table(newer_than=version, until=min(deadline, time.monotonic() + pause_s))
            calling.check_has(asked.layer.name)
            if time.monotonic() >= deadline:
                state = _state_of_failed(asked, result, calling.engine.table)
                raise ExpertError(f"{failure_of(asked, result)}; waited {self._patience_s:g} s for it{state}")
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if not asked.may_be_served(missing, calling.engine.table):
                continue
            places = asked.to_send_again(missing)
            self.num_retried += len(places)
            result = calling.serve(asked.only(places).batch())
            each.rows[places] = result.outputs
            still = missing_of(result)
            if still is None:
                return
            bad_before, bad = bad, _bad_answers(result)
            again = bad.keys() & bad_before.keys()
            if again:
                raise ExpertError(f"{_named(asked, bad[min(again)])}; it was asked twice")
            missing = torch.zeros_like(missing)
            missing[places[still]] = True

    def _drop(self, each: Unanswered, num_rows: int) -> None:
        self.num_dropped += num_rows
        if each.asked.layer.name not in self._warned:
            self._warned.add(each.asked.layer.name)
            what = failure_of(each.asked, each.result)
            _LOG.warning("%s; %d rows are zeros, and so may others be from now on", what, num_rows)


def failure_of(asked: RowsAsked, result: BatchResult) -> str:
    """Which expert failed last in a batch, and why, in words."""
    if result.failures is None or not result.failures.attempts:
        return f"layer {asked.layer.name}: an expert gave no answer"
    return _named(asked, result.failures.attempts[-1])


def _named(asked: RowsAsked, attempt: FailedAttempt) -> str:
    layer = asked.layer
    return f"layer {layer.name}: expert {layer.experts[attempt.expert_id].name}: {attempt.reason}"


def _state_of_failed(asked: RowsAsked, result: BatchResult, table: RoutingTable) -> str:
    """What the runtime knows of the expert that failed last in a batch, to follow a sentence; empty if nothing."""
    if result.failures is None or not result.failures.attempts:
        return ""
    replicas = table.replicas.get((asked.layer.name, result.failures.attempts[-1].expert_id), ())
    known = (f"; replica {each.replica_id} is {each.state}: {each.reason}" for each in replicas if each.reason)
    return "".join(known)


def _bad_answers(result: BatchResult) -> dict[int, FailedAttempt]:
    """What experts that are there gave instead of the rows that are missing, by their ids."""
    last = {} if result.failures is None else result.failures.given_up()
    return {expert_id: each for expert_id, each in last.items() if each.kind is FailureKind.BAD_ANSWER}
