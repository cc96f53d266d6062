"""The policy of layers that their caller routes: it chooses nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.errors import InvalidRequestError
from moe_runtime.routing.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.assignments import Assignments
    from moe_runtime.routing.policy import TokenInfo


@dataclass(frozen=True, kw_only=True)
class CallerPolicy(Policy):
    """Whoever submits a batch brings its assignments."""

    accepts_k: bool = False

    @property
    def num_logits(self) -> int:
        """0: there is nothing to score."""
        return 0

    def select(self, logits: Tensor, info: TokenInfo) -> Assignments:
        """Nothing.

        Raises:
            InvalidRequestError: Always.
        """
        raise InvalidRequestError("policy caller: expected a batch with assignments of its own, found none")
