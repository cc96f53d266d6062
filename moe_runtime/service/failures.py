"""What went wrong with a batch, and what was done about it; nothing of it exists for a batch without failures."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_runtime.errors import MoERuntimeError
    from moe_runtime.service.ports import SegmentResult


class FailureKind(Enum):
    """What came of an attempt that failed."""

    #: The replica is absent, or its host was lost or could do nothing with the rows.
    NO_ANSWER = "no answer"
    #: Its host may still be at work.
    TIMED_OUT = "timed out"
    #: The expert is there, and has raised or answered what cannot be used.
    BAD_ANSWER = "bad answer"

    @classmethod
    def of(cls, result: SegmentResult) -> FailureKind:
        """By what a host says of a segment that failed."""
        return cls.BAD_ANSWER if result.is_expert_error else cls.NO_ANSWER


class FailedAttempt(NamedTuple):
    """An expert did not answer for some planned rows.

    Attributes:
        expert_id: The expert's.
        rows: The planned rows.
        reason: Why, in words.
        kind: What came of it.
    """

    expert_id: int
    rows: Sequence[int]
    reason: str
    kind: FailureKind


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

    def given_up(self) -> dict[int, FailedAttempt]:
        """The last attempt at rows that were given up in the end, by the expert's id."""
        unserved = set(self.unserved)
        return {each.expert_id: each for each in self.attempts if not unserved.isdisjoint(each.rows)}
