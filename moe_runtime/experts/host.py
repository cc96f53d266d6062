"""Runs the experts of one device: the last stop of a batch's rows before they go back to the router."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_runtime.errors import ExpertError
from moe_runtime.experts.cuda_stage import CudaStage
from moe_runtime.experts.device_stage import CpuStage
from moe_runtime.experts.outputs import non_finite_rows, num_spoiled_rows
from moe_runtime.experts.served_expert import ServedExpert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moe_runtime.experts.build import LoadedExpert
    from moe_runtime.experts.device_stage import DeviceStage, Forwarded, Forwarding

_LOG = logging.getLogger(__name__)

#: Calls are merged up to this many rows: twice the router's default `max_batch_tokens`. More would not make
#: the products faster, and activations, which for a Transformer are a hundred times its rows, need memory.
MAX_MERGED_ROWS = 8192


class ExpertCall(NamedTuple):
    """Rows for one replica.

    Attributes:
        replica_id: The replica.
        rows: Full items, whatever the expert's view, ``(num_rows, *item_shape)`` in the wire's dtype.
    """

    replica_id: str
    rows: Tensor


class ExpertOutcome(NamedTuple):
    """How one call went.

    Attributes:
        rows: ``(num_rows, *out_shape)``, contiguous, in the wire's dtype, on the CPU; or None if there is an
            error. May share memory with the call's rows.
        error: None, or what went wrong, in words.
        compute_ms: Time that the product took that these rows were part of, with those of merged calls.
    """

    rows: Tensor | None
    error: str | None
    compute_ms: float


class ExpertRun(NamedTuple):
    """Calls that have begun: what ``ExpertHost.begin`` gives to ``finish``.

    Attributes:
        outcomes: Of the calls that cannot be run, by their index.
        products: The other calls.
    """

    outcomes: dict[int, ExpertOutcome]
    products: list[_Product]


class ExpertHost:
    """Owns the experts of one device and runs calls for them; used by one thread.

    Guarantees: ``run`` answers every call, in order, and does not raise for anything that an expert does. Calls
    for one replica are merged into one forward of at most ``MAX_MERGED_ROWS`` rows, unless the expert is exact;
    a call is never split, so that a call alone is the same product as in any other process. An error costs the
    calls that caused it: when a merged forward raises, its calls run again one by one.

    Attributes:
        overlaps: Whether forwards may be under way when ``begin`` returns, so that it pays to begin another run.
    """

    def __init__(
        self,
        experts: Mapping[str, LoadedExpert],
        *,
        device: str | torch.device = "cpu",
        now: Callable[[], float] = time.perf_counter,
        stage: DeviceStage | None = None,
    ) -> None:
        """Take over the experts.

        Args:
            experts: By replica id; their modules are on ``device``.
            device: Where rows are moved for the forward.
            now: Seconds, for ``compute_ms``.
            stage: How forwards run on that device; made for it when None.
        """
        self._experts = {replica_id: ServedExpert(replica_id, expert) for replica_id, expert in experts.items()}
        device = torch.device(device)
        self._stage: DeviceStage = stage or (CpuStage(now) if device.type == "cpu" else CudaStage(device))
        self._now = now
        self.overlaps = self._stage.overlaps

    def run(self, calls: Sequence[ExpertCall]) -> list[ExpertOutcome]:
        """Run calls for any replicas of this host, and give their outcomes in the same order."""
        return self.finish(self.begin(calls))

    def begin(self, calls: Sequence[ExpertCall]) -> ExpertRun:
        """Begin the forwards of some calls; runs are to be finished in the order in which they began.

        Quickest in a thread that is in inference mode: to enter it takes as long as a small expert does.
        """
        outcomes: dict[int, ExpertOutcome] = {}
        products: list[_Product] = []
        open_products: dict[str, _Product] = {}
        for index, (replica_id, rows) in enumerate(calls):
            expert = self._experts.get(replica_id)
            mistake = self._not_here(replica_id) if expert is None else expert.call_mistake(rows)
            if expert is None or mistake is not None:
                outcomes[index] = ExpertOutcome(None, mistake, 0.0)
                continue
            product = open_products.get(replica_id)
            if product is None or not product.has_room_for(rows):
                product = open_products[replica_id] = _Product(expert)
                products.append(product)
            product.add(index, rows)
        for product in products:
            product.forwarding = self._forward(product.expert, product.parts)
        return ExpertRun(outcomes, products)

    def finish(self, run: ExpertRun) -> list[ExpertOutcome]:
        """Wait for a run; the outcomes of its calls, in their order."""
        outcomes = run.outcomes
        for product in run.products:
            results = self._results(product.expert, product.parts, product.forwarding)
            outcomes.update(zip(product.indices, results, strict=True))
        return [outcomes[index] for index in range(len(outcomes))]

    def _not_here(self, replica_id: str) -> str:
        return f"{replica_id}: expected one of this host's replicas ({', '.join(self._experts)})"

    def _forward(self, expert: ServedExpert, parts: list[Tensor]) -> Forwarding | _Failure:
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self._forward(expert, parts)
        started = self._now()
        try:
            return self._stage.begin(expert.forward, parts, dtype=expert.dtype, row_dtype=expert.row_dtype)
        except ExpertError as exc:
            error = exc
        except Exception as exc:
            # Of its device, most likely: no memory left.
            error = expert.raised(exc)
        return _Failure(error, (self._now() - started) * 1e3)

    def _results(
        self, expert: ServedExpert, parts: list[Tensor], forwarding: Forwarding | _Failure
    ) -> list[ExpertOutcome]:
        """The outcomes of calls for one replica that were one forward."""
        if not isinstance(forwarding, _Failure):
            try:
                return _judged(expert, parts, forwarding.wait())
            except RuntimeError as exc:
                forwarding = _Failure(expert.raised(exc), 0.0)
        if len(parts) > 1:
            apart = ([part] for part in parts)
            return [outcome for part in apart for outcome in self._results(expert, part, self._forward(expert, part))]
        _LOG.warning("%s", forwarding.error, exc_info=forwarding.error.__cause__)
        return [ExpertOutcome(None, str(forwarding.error), forwarding.compute_ms)]


class _Failure(NamedTuple):
    """A forward that raised, and how long it took to."""

    error: ExpertError
    compute_ms: float


class _Product:
    """Calls for one replica that are one forward."""

    __slots__ = ("expert", "forwarding", "indices", "num_rows", "parts")

    forwarding: Forwarding | _Failure

    def __init__(self, expert: ServedExpert) -> None:
        self.expert = expert
        self.indices: list[int] = []
        self.parts: list[Tensor] = []
        self.num_rows = 0

    def has_room_for(self, rows: Tensor) -> bool:
        return not self.expert.exact and self.num_rows + rows.shape[0] <= MAX_MERGED_ROWS

    def add(self, index: int, rows: Tensor) -> None:
        self.indices.append(index)
        self.parts.append(self.expert.seen(rows))
        self.num_rows += rows.shape[0]


def _judged(expert: ServedExpert, parts: list[Tensor], forwarded: Forwarded) -> list[ExpertOutcome]:
    rows, compute_ms = forwarded
    pieces = [rows] if len(parts) == 1 else torch.split(rows, [part.shape[0] for part in parts])
    if non_finite_rows(rows) is None:
        return [ExpertOutcome(piece, None, compute_ms) for piece in pieces]
    return [
        _finite_outcome(expert.replica_id, piece, part, compute_ms) for piece, part in zip(pieces, parts, strict=True)
    ]


def _finite_outcome(replica_id: str, outputs: Tensor, inputs: Tensor, compute_ms: float) -> ExpertOutcome:
    spoiled = num_spoiled_rows(outputs, inputs)
    if spoiled:
        message = f"{replica_id}: expected finite outputs, found NaN or infinity in {spoiled} of {len(outputs)} rows"
        _LOG.warning("%s", message)
        return ExpertOutcome(None, message, compute_ms)
    return ExpertOutcome(outputs, None, compute_ms)
