"""Runs the experts of one device: the last stop of a batch's rows before they go back to the router."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_runtime.errors import InnerLayerError
from moe_runtime.experts.cuda_stage import CudaStage
from moe_runtime.experts.culprits import FailedRows, Failure, salvage
from moe_runtime.experts.device_stage import CpuStage
from moe_runtime.experts.outcomes import ExpertOutcome, outcomes_of
from moe_runtime.experts.outputs import non_finite_rows, spoiled_rows
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


class ExpertRun(NamedTuple):
    """Calls that have begun: what ``ExpertHost.begin`` gives to ``finish``.

    Attributes:
        outcomes: Of the calls that cannot be run, by their index.
        products: The other calls.
    """

    outcomes: dict[int, ExpertOutcome]
    products: list[_Product]


def _never() -> bool:
    return False


def _waited_for(expert: ServedExpert, forwarding: Forwarding | Failure) -> Forwarded | Failure:
    if isinstance(forwarding, Failure):
        return forwarding
    try:
        return forwarding.wait()
    except Exception as exc:
        return expert.failure(exc, 0.0)


class ExpertHost:
    """Owns the experts of one device and runs calls for them; used by one thread.

    Guarantees: ``run`` answers every call, in order, and does not raise for anything that an expert does. Calls
    for one replica are merged into one forward of at most ``MAX_MERGED_ROWS`` rows, unless the expert is exact;
    a call is never split, so that a call alone is the same product as in any other process.

    An error costs what caused it. A row whose output is not finite fails alone. When a forward raises, it runs again
    in halves until the culprits are alone (see ``salvage``), unless the expert is exact. An output of the wrong shape
    or dtype costs the whole call, and counts as a fault of the expert.

    Attributes:
        experts: As this host runs them, by replica id; their counters may be read from any thread.
        overlaps: Whether forwards may be under way when ``begin`` returns, so that it pays to begin another run.
        unfit: Why this host should be replaced: after a bad answer, an expert did not answer its golden probe as it
            did when it was loaded. None while all do; never None again. May be read from any thread.
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
        self.experts = {replica_id: ServedExpert(replica_id, expert) for replica_id, expert in experts.items()}
        device = torch.device(device)
        self._stage: DeviceStage = stage or (CpuStage(now) if device.type == "cpu" else CudaStage(device))
        self._now = now
        self.overlaps = self._stage.overlaps
        self.unfit: str | None = None

    def num_faults(self) -> dict[str, int]:
        """Outputs of the wrong kind, by replica, of those that gave any. Thread-safe."""
        return {name: expert.num_faults for name, expert in self.experts.items() if expert.num_faults}

    def note_wait(self, replica_id: str, seconds: float) -> None:
        """Count time that a call has waited before it was begun."""
        expert = self.experts.get(replica_id)
        if expert is not None:
            expert.queue_s += seconds

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
            expert = self.experts.get(replica_id)
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

    def finish(self, run: ExpertRun, *, is_late: Callable[[], bool] = _never) -> list[ExpertOutcome]:
        """Wait for a run; the outcomes of its calls, in their order.

        Args:
            run: The oldest that has begun.
            is_late: Whether nobody waits for the outcomes any more; then no more is done to find culprits.
        """
        outcomes, products = run.outcomes, run.products
        if len(products) == 1 and not outcomes:
            # All calls in their order, as for the one expert that most hosts have.
            return self._results(products[0], is_late)
        for product in products:
            outcomes.update(zip(product.indices, self._results(product, is_late), strict=True))
        return [outcomes[index] for index in range(len(outcomes))]

    def _not_here(self, replica_id: str) -> str:
        return f"{replica_id}: expected one of this host's replicas ({', '.join(self.experts)})"

    def _forward(self, expert: ServedExpert, parts: list[Tensor]) -> Forwarding | Failure:
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self._forward(expert, parts)
        started = self._now()
        try:
            return self._stage.begin(expert.forward, parts, dtype=expert.dtype, row_dtype=expert.row_dtype)
        except BaseException as exc:
            # An expert is anybody's code, and SystemExit is raised as easily as ValueError; or no memory is left.
            return expert.failure(exc, (self._now() - started) * 1e3)

    def _results(self, product: _Product, is_late: Callable[[], bool]) -> list[ExpertOutcome]:
        """The outcomes of calls for one replica that were one forward."""
        expert, parts = product.expert, product.parts
        forwarded = _waited_for(expert, product.forwarding)
        # Not a method: small experts cost what calls cost.
        expert.num_calls += len(parts)
        expert.num_rows += product.num_rows
        expert.num_forwards += 1
        expert.compute_ms += forwarded.compute_ms
        if isinstance(forwarded, Failure):
            return self._salvaged(product, forwarded, is_late)
        rows, compute_ms = forwarded
        if non_finite_rows(rows) is not None:
            return self._judged(product, rows, [], compute_ms)
        if len(parts) == 1:
            return [ExpertOutcome(rows, None, compute_ms)]
        pieces = torch.split(rows, [part.shape[0] for part in parts])
        return [ExpertOutcome(piece, None, compute_ms) for piece in pieces]

    def _salvaged(self, product: _Product, failure: Failure, is_late: Callable[[], bool]) -> list[ExpertOutcome]:
        """The outcomes of calls whose forward failed: some more forwards find out which rows are to blame."""
        expert, num_faults = product.expert, product.expert.num_faults - failure.is_fault
        is_distant = isinstance(failure.cause, InnerLayerError)
        if expert.may_tell(self._now()):
            # Where a call of another process has failed here, tells nothing.
            _LOG.warning("%s", failure.error, exc_info=None if is_distant else failure.cause)
        outputs = expert.zeros(product.num_rows)
        failed = [FailedRows(0, product.num_rows, failure)]
        before_ms = expert.compute_ms - failure.compute_ms
        # A call of an exact expert is never split, one that is answered wrongly fails as a whole, and of a layer that
        # gave no answer, its rows are not to blame.
        is_whole = failure.is_fault and len(product.parts) == 1
        if not expert.exact and not is_whole and not is_distant:
            failed = salvage(
                product.rows, failure, forward=partial(self._try, expert), outputs=outputs, is_late=is_late
            )
        if expert.num_faults > num_faults:
            self._question(expert)
        return self._judged(product, outputs, failed, expert.compute_ms - before_ms)

    def _try(self, expert: ServedExpert, rows: Tensor) -> Forwarded | Failure:
        forwarded = _waited_for(expert, self._forward(expert, [rows]))
        expert.num_forwards += 1
        expert.compute_ms += forwarded.compute_ms
        return forwarded

    def _judged(
        self, product: _Product, rows: Tensor, failed: list[FailedRows], compute_ms: float
    ) -> list[ExpertOutcome]:
        """The outcomes of calls some of whose rows failed, or are not finite."""
        expert = product.expert
        spoiled = spoiled_rows(rows, product.rows)
        if spoiled is not None:
            failure = Failure(f"{expert.replica_id}: expected finite outputs, found NaN or infinity", compute_ms)
            failed = [*failed, *(FailedRows(row, row + 1, failure) for row in spoiled.nonzero().flatten().tolist())]
            self._question(expert)
        return outcomes_of([part.shape[0] for part in product.parts], rows, failed, compute_ms=compute_ms)

    def _question(self, expert: ServedExpert) -> None:
        """Ask an expert that has answered badly whether it is what it was when it was loaded."""
        unfitness = expert.unfitness(self._now())
        if unfitness is not None and self.unfit is None:
            _LOG.error("%s", unfitness)
            self.unfit = unfitness


class _Product:
    """Calls for one replica that are one forward."""

    __slots__ = ("expert", "forwarding", "indices", "num_rows", "parts")

    forwarding: Forwarding | Failure

    def __init__(self, expert: ServedExpert) -> None:
        self.expert = expert
        self.indices: list[int] = []
        self.parts: list[Tensor] = []
        self.num_rows = 0

    @property
    def rows(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def has_room_for(self, rows: Tensor) -> bool:
        return not self.expert.exact and self.num_rows + rows.shape[0] <= MAX_MERGED_ROWS

    def add(self, index: int, rows: Tensor) -> None:
        self.indices.append(index)
        self.parts.append(self.expert.seen(rows))
        self.num_rows += rows.shape[0]
