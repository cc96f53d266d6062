"""Runs the experts of one device: the last stop of a batch's rows before they go back to the router."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_runtime.errors import ExpertError
from moe_runtime.experts.foreign import in_one_line
from moe_runtime.experts.outputs import num_spoiled_rows, output_mistake

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moe_runtime.experts.build import LoadedExpert

_LOG = logging.getLogger(__name__)

#: Calls are merged up to this many rows: twice the router's default `max_batch_tokens`. More would not make
#: the products faster, and activations, which for a Transformer are a hundred times its rows, need memory.
MAX_MERGED_ROWS = 8192


@dataclass(frozen=True)
class ExpertCall:
    """Rows for one replica.

    Attributes:
        replica_id: The replica.
        rows: Full items, whatever the expert's view, ``(num_rows, *item_shape)`` in the wire's dtype.
    """

    replica_id: str
    rows: Tensor


@dataclass(frozen=True)
class ExpertOutcome:
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


class ExpertHost:
    """Owns the experts of one device and runs calls for them; used by one thread.

    Guarantees: ``run`` answers every call, in order, and does not raise for anything that an expert does. Calls
    for one replica are merged into one forward of at most ``MAX_MERGED_ROWS`` rows, unless the expert is exact;
    a call is never split, so that a call alone is the same product as in any other process. An error costs the
    calls that caused it: when a merged forward raises, its calls run again one by one.
    """

    def __init__(
        self,
        experts: Mapping[str, LoadedExpert],
        *,
        device: str | torch.device = "cpu",
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take over the experts.

        Args:
            experts: By replica id; their modules are on ``device``.
            device: Where rows are moved for the forward.
            now: Seconds, for ``compute_ms``.
        """
        self._experts = dict(experts)
        self._device = torch.device(device)
        self._now = now

    def run(self, calls: Sequence[ExpertCall]) -> list[ExpertOutcome]:
        """Run calls for any replicas of this host, and give their outcomes in the same order."""
        outcomes: dict[int, ExpertOutcome] = {}
        accepted: dict[str, list[int]] = {}
        for index, call in enumerate(calls):
            mistake = self._mistake(call)
            if mistake is not None:
                outcomes[index] = ExpertOutcome(None, mistake, 0.0)
            else:
                accepted.setdefault(call.replica_id, []).append(index)
        for replica_id, indices in accepted.items():
            for group in self._groups(replica_id, indices, calls):
                results = self._run_merged(replica_id, [calls[index].rows for index in group])
                outcomes.update(zip(group, results, strict=True))
        return [outcomes[index] for index in range(len(calls))]

    def _mistake(self, call: ExpertCall) -> str | None:
        expert = self._experts.get(call.replica_id)
        if expert is None:
            return f"{call.replica_id}: expected one of this host's replicas ({', '.join(self._experts)})"
        spec, rows = expert.spec, call.rows
        if rows.ndim == 0 or tuple(rows.shape[1:]) != spec.item_shape:
            return f"{call.replica_id}: expected rows of shape {list(spec.item_shape)}, found {list(rows.shape[1:])}"
        if rows.dtype != spec.row_dtype:
            return f"{call.replica_id}: expected rows of dtype {spec.row_dtype}, found {rows.dtype}"
        return None

    def _groups(self, replica_id: str, indices: list[int], calls: Sequence[ExpertCall]) -> list[list[int]]:
        if self._experts[replica_id].spec.exact:
            return [[index] for index in indices]
        return _groups(indices, [calls[index].rows.shape[0] for index in indices])

    def _run_merged(self, replica_id: str, parts: list[Tensor]) -> list[ExpertOutcome]:
        """The outcomes of calls for one replica, from one forward if that goes well."""
        started = self._now()
        try:
            inputs, outputs = self._forward(replica_id, parts[0] if len(parts) == 1 else torch.cat(parts))
        except ExpertError as exc:
            if len(parts) > 1:
                return [outcome for part in parts for outcome in self._run_merged(replica_id, [part])]
            _LOG.warning("%s", exc, exc_info=exc.__cause__)
            return [ExpertOutcome(None, str(exc), self._elapsed_ms(started))]
        compute_ms = self._elapsed_ms(started)
        sizes = [part.shape[0] for part in parts]
        return [
            _finite_outcome(replica_id, output, given, compute_ms)
            for output, given in zip(torch.split(outputs, sizes), torch.split(inputs, sizes), strict=True)
        ]

    def _forward(self, replica_id: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the expert saw and what it answered, both on the CPU.

        Raises:
            ExpertError: If it raised, or its answer has the wrong shape or dtype.
        """
        expert = self._experts[replica_id]
        dtype = expert.spec.torch_dtype
        try:
            with torch.inference_mode():
                inputs = expert.view.apply(rows)
                if not rows.shape[0]:
                    return inputs, rows.new_empty((0, *expert.contract.out_shape))
                outputs: Tensor = expert.module(inputs.to(self._device, dtype))
                mistake = output_mistake(outputs, num_rows=rows.shape[0], contract=expert.contract, dtype=dtype)
                if mistake is None:
                    return inputs, outputs.to("cpu", expert.spec.row_dtype).contiguous()
        except (Exception, SystemExit) as exc:
            raise ExpertError(f"{replica_id}: the expert raised {in_one_line(exc)}") from exc
        raise ExpertError(f"{replica_id}: {mistake}")

    def _elapsed_ms(self, started: float) -> float:
        return (self._now() - started) * 1e3


def _groups(indices: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Neighbours whose rows together stay within the limit; whoever exceeds it alone is alone."""
    groups: list[list[int]] = []
    num_rows = 0
    for index, size in zip(indices, sizes, strict=True):
        if not groups or num_rows + size > MAX_MERGED_ROWS:
            groups.append([])
            num_rows = 0
        groups[-1].append(index)
        num_rows += size
    return groups


def _finite_outcome(replica_id: str, outputs: Tensor, inputs: Tensor, compute_ms: float) -> ExpertOutcome:
    spoiled = num_spoiled_rows(outputs, inputs)
    if spoiled:
        message = f"{replica_id}: expected finite outputs, found NaN or infinity in {spoiled} of {len(outputs)} rows"
        _LOG.warning("%s", message)
        return ExpertOutcome(None, message, compute_ms)
    return ExpertOutcome(outputs, None, compute_ms)
