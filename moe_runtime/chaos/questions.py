"""The requests that clients make: mixed sizes, options and deadlines, and poisoned ones on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_runtime.chaos.faulty_expert import MAGIC
from moe_runtime.chaos.layer import MAX_ROWS, NUM_FEATURES, TOP_K
from moe_runtime.wire.messages import NO_OPTIONS, RequestOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moe_runtime.chaos.faulty_expert import Poison

LONG_TIMEOUT_S = 10.0
_SHORT_TIMEOUT_S = (0.02, 0.5)
_SHORT_SHARE, _ROUTING_SHARE = 0.1, 0.6
#: Rows within this stay far below the magic values.
_LARGEST = 16.0


@dataclass(frozen=True)
class Question:
    """One request, and what it asks for in the ledger's terms.

    Attributes:
        inputs: ``(num_rows, features)``.
        k: Assignments that each row asks for, ``(num_rows,)``; 0 where it is masked.
        options: What is sent.
        timeout_s: Its deadline, from the moment of the call.
        return_routing: Whether it asks for every assignment.
        poison: What one of its rows does to experts, if it does.
    """

    inputs: NDArray[np.float32]
    k: NDArray[np.int64]
    options: RequestOptions[np.ndarray] = NO_OPTIONS
    timeout_s: float = LONG_TIMEOUT_S
    return_routing: bool = True
    poison: Poison | None = None

    @property
    def num_assignments(self) -> int:
        """Assignments that its rows ask for."""
        return int(self.k.sum())


def draw_question(rng: np.random.Generator, *, may_hurry: bool = True) -> Question:
    """An ordinary request: 1 to 512 rows, small ones more often, sometimes with options, sometimes in a hurry.

    Args:
        rng: Draws everything.
        may_hurry: Whether its deadline may be one that the answer can miss.
    """
    num_rows = int(np.exp(rng.uniform(0.0, np.log(MAX_ROWS + 1))))
    inputs = _draw_rows(rng, num_rows)
    options, k = _draw_options(rng, num_rows)
    is_short = rng.random() < _SHORT_SHARE and may_hurry
    return Question(
        inputs=inputs,
        k=k,
        options=options,
        timeout_s=float(rng.uniform(*_SHORT_TIMEOUT_S)) if is_short else LONG_TIMEOUT_S,
        return_routing=bool(rng.random() < _ROUTING_SHARE),
    )


def draw_poisoned(rng: np.random.Generator, poison: Poison, *, num_rows: int = 4) -> Question:
    """A request one of whose rows does something to every expert that it reaches."""
    inputs = _draw_rows(rng, num_rows)
    inputs[rng.integers(num_rows), 0] = MAGIC[poison]
    return Question(inputs=inputs, k=np.full(num_rows, TOP_K), poison=poison)


def draw_small(rng: np.random.Generator) -> Question:
    """One of many that come one after the other."""
    return Question(_draw_rows(rng, 4), np.full(4, TOP_K))


def draw_flooding(rng: np.random.Generator) -> Question:
    """One of many that come at once."""
    return Question(_draw_rows(rng, MAX_ROWS), np.full(MAX_ROWS, TOP_K), timeout_s=2.0, return_routing=False)


def _draw_rows(rng: np.random.Generator, num_rows: int) -> NDArray[np.float32]:
    return np.clip(rng.standard_normal((num_rows, NUM_FEATURES)), -_LARGEST, _LARGEST).astype(np.float32)


def _draw_options(rng: np.random.Generator, num_rows: int) -> tuple[RequestOptions[np.ndarray], NDArray[np.int64]]:
    """Options, and how many experts each row then asks for."""
    k = np.full(num_rows, TOP_K)
    match rng.choice(["none", "k", "k per row", "mask", "isolated"], p=[0.5, 0.15, 0.15, 0.15, 0.05]):
        case "k":
            return RequestOptions(k=1), np.ones_like(k)
        case "k per row":
            k = rng.integers(1, TOP_K + 1, num_rows)
            return RequestOptions(k=k), k
        case "mask":
            mask = rng.random(num_rows) < 0.7
            return RequestOptions(mask=mask), k * mask
        case "isolated":
            return RequestOptions(isolated=True), k
        case _:
            return NO_OPTIONS, k
