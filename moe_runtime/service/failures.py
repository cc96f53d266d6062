"""What went wrong with a batch, and what was done about it; nothing of it exists for a batch without failures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_runtime.errors import MoERuntimeError


class FailedAttempt(NamedTuple):
    """An expert did not answer for some planned rows.

    Attributes:
        expert_id: The expert's.
        rows: The planned rows.
        reason: Why, in words.
    """

    expert_id: int
    rows: Sequence[int]
    reason: str


@dataclass(slots=True)
class BatchFailures:
    """What is known of the failures of one batch.

    Attributes:
        attempts: Every one that failed, in order.
        unserved: Planned rows that were given up.
        moves: Expert that a planned row was moved to last, by row.
        retried: Planned rows that were sent to another replica of their expert.
        hedged: Planned rows that were sent to a second replica as well.
        errors: Why a request fails, by its place in the batch.
    """

    attempts: list[FailedAttempt] = field(default_factory=list)
    unserved: list[int] = field(default_factory=list)
    moves: dict[int, int] = field(default_factory=dict)
    retried: set[int] = field(default_factory=set)
    hedged: set[int] = field(default_factory=set)
    errors: dict[int, MoERuntimeError] = field(default_factory=dict)
