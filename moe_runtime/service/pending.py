"""A request between its arrival and its one answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moe_runtime.service.report import PartReport, merge_parts
from moe_runtime.service.requests import LayerAnswer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.service.generations import Generation
    from moe_runtime.service.requests import LayerRequest
    from moe_runtime.wire.messages import Report

    OnDone = Callable[[LayerAnswer | MoERuntimeError], None]


@dataclass(frozen=True)
class Ticket:
    """Names a submitted request to the service."""

    request_key: int


@dataclass
class PendingRequest:
    """What has come back of a request so far.

    Attributes:
        request_key: The service's own number for it.
        request: The request.
        on_done: Gets the one answer.
        arrived_at: Clock time of its arrival.
        deadline: Clock time after which nobody waits for it.
        generation: What it was checked against, and is served by.
        warnings: What its report will say about its options.
        level: Of the layer that it was taken in for.
    """

    request_key: int
    request: LayerRequest
    on_done: OnDone
    arrived_at: float
    deadline: float
    generation: Generation
    warnings: tuple[str, ...] = ()
    level: int = 0
    _parts: list[tuple[PartReport, Tensor]] = field(default_factory=list)
    _num_rows: int = 0

    def add_part(self, start: int, outputs: Tensor, report: Report) -> bool:
        """Add the outputs of the rows from ``start`` on; True when the request is complete."""
        self._parts.append((PartReport(start, report), outputs))
        self._num_rows += int(outputs.shape[0])
        return self._num_rows == self.request.tokens.shape[0]

    def answer(self, now: float) -> LayerAnswer:
        """The answer, from all parts, in the order of the request's rows."""
        parts = sorted(self._parts, key=lambda part: part[0].start)
        report = merge_parts(
            self.request.request_id,
            [report for report, _ in parts],
            total_s=now - self.arrived_at,
            warnings=self.warnings,
        )
        outputs = [rows for _, rows in parts]
        return LayerAnswer(outputs[0] if len(outputs) == 1 else torch.cat(outputs), report)
