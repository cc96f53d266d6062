"""What a client and a router say to each other, before it becomes bytes and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

ArrayT = TypeVar("ArrayT")
OtherT = TypeVar("OtherT")


@dataclass(frozen=True)
class WireTensor:
    """A tensor as it travels: little-endian, row-major bytes with their dtype and shape.

    Attributes:
        dtype: One of the protocol's dtype names, ``"float32"`` for instance.
        shape: Sizes per dimension.
        data: Exactly ``prod(shape) * itemsize`` bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class RequestOptions(Generic[ArrayT]):
    """What a request may ask for beyond its inputs; everything is optional.

    Attributes:
        gate_input: What the gate sees instead of the flattened rows, ``(num_tokens, gate_features)``.
        token_ids: Integer id of each row, ``(num_tokens,)``, for policies that route by id.
        task: The task whose gate routes, for layers with a gate per task.
        k: Experts per token, at most the layer's: one number, or one per row, ``(num_tokens,)``.
        seed: Seeds whatever the routing draws at random for this request.
        mask: Boolean, ``(num_tokens,)``; rows that are False are padding and are not routed.
        isolated: The batch holds this request alone.
    """

    gate_input: ArrayT | None = None
    token_ids: ArrayT | None = None
    task: str | None = None
    k: ArrayT | int | None = None
    seed: int | None = None
    mask: ArrayT | None = None
    isolated: bool = False

    def map_arrays(self, convert: Callable[[ArrayT], OtherT]) -> RequestOptions[OtherT]:
        """The same options with every array converted."""

        def mapped(array: ArrayT | None) -> OtherT | None:
            return None if array is None else convert(array)

        return RequestOptions(
            gate_input=mapped(self.gate_input),
            token_ids=mapped(self.token_ids),
            task=self.task,
            k=self.k if self.k is None or isinstance(self.k, int) else convert(self.k),
            seed=self.seed,
            mask=mapped(self.mask),
            isolated=self.isolated,
        )


#: What a request asks for that asks for nothing in particular.
NO_OPTIONS: RequestOptions[Any] = RequestOptions()


@dataclass(frozen=True)
class ForwardRequest:
    """One request to run a layer over some tokens.

    Attributes:
        request_id: Chosen by the client, unique per request; kept over retries.
        layer: Name of the layer.
        inputs: ``(num_tokens, *item_shape)`` in the layer's dtype.
        options: Optional wishes.
        return_routing: Whether the report lists every assignment.
    """

    request_id: str
    layer: str
    inputs: WireTensor
    options: RequestOptions[WireTensor] = field(default_factory=RequestOptions)
    return_routing: bool = False


@dataclass(frozen=True)
class Timings:
    """Where a request's time went in the router, in milliseconds; sums over its batches."""

    queue_ms: float = 0.0
    gate_ms: float = 0.0
    experts_ms: float = 0.0
    combine_ms: float = 0.0
    total_ms: float = 0.0


#: How an assignment ended; the values of ``Report.outcomes``.
SERVED, DROPPED_CAPACITY, DROPPED_FAILURE = 0, 1, 2


@dataclass(frozen=True)
class Report:
    """How a request was answered; accounts for every assignment that its rows asked for.

    ``num_assignments == num_served + num_dropped_capacity + num_dropped_failure`` always holds.

    The first four arrays are there when the request asked for its routing: one entry per assignment, ordered by
    row and then by choice.

    Attributes:
        request_id: The request's.
        layer: Name of the layer.
        table_version: Version of the routing table that the (last) batch used.
        num_tokens: Rows of the request.
        num_assignments: Assignments requested by the gate for its valid rows.
        num_served: Assignments whose expert answered.
        num_dropped_capacity: Assignments dropped because the expert was full.
        num_dropped_failure: Assignments dropped because the expert was dead, late, or wrong.
        num_rerouted: Assignments sent to another expert because theirs was full, or failed.
        num_hedged: Assignments sent to a second replica as well.
        num_retried: Assignments sent to another replica after one failed.
        num_shared_served: Pairs of a row and a shared expert that this answered. Shared experts are counted here
            alone, and are in none of the numbers above.
        num_shared_dropped: Pairs of a row and a shared expert that was dead, late, or wrong.
        batch_tokens: Tokens in each batch that carried a part of the request.
        timings: Where the time went.
        warnings: What the caller should know, in words.
        token_ids: Row within the request, int64 ``(num_assignments,)``.
        expert_ids: Expert within the layer, int64 ``(num_assignments,)``.
        expert_weights: Weight applied, float32 ``(num_assignments,)``; 0 where the assignment was not served.
        outcomes: uint8 ``(num_assignments,)``: 0 served, 1 dropped by capacity, 2 dropped by failure.
        shared_weights: Weight applied to each shared expert, float32 ``(num_tokens, num_shared)``; 0 where it did not
            serve the row. With the routing of a layer that has shared experts.
    """

    request_id: str
    layer: str
    table_version: int
    num_tokens: int
    num_assignments: int
    num_served: int
    num_dropped_capacity: int
    num_dropped_failure: int
    num_rerouted: int
    num_hedged: int = 0
    num_retried: int = 0
    num_shared_served: int = 0
    num_shared_dropped: int = 0
    batch_tokens: tuple[int, ...] = ()
    timings: Timings = field(default_factory=Timings)
    warnings: tuple[str, ...] = ()
    token_ids: NDArray[np.int64] | None = None
    expert_ids: NDArray[np.int64] | None = None
    expert_weights: NDArray[np.float32] | None = None
    outcomes: NDArray[np.uint8] | None = None
    shared_weights: NDArray[np.float32] | None = None


ROUTING_FIELDS = ("token_ids", "expert_ids", "expert_weights", "outcomes")


@dataclass(frozen=True)
class ForwardReply:
    """A router's answer: ``(num_tokens, *out_shape)`` and the report about it."""

    outputs: WireTensor
    report: Report


@dataclass(frozen=True)
class ForwardResult:
    """What a client's ``forward`` returns.

    Attributes:
        outputs: ``(num_tokens, *out_shape)``: numpy where the inputs were numpy, torch where they were torch.
        report: How the request was answered.
    """

    outputs: Any
    report: Report
