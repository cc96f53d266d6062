"""One expert as its host runs it: everything that a call needs, looked up once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import ExpertError
from moe_runtime.experts.culprits import Failure
from moe_runtime.experts.foreign import in_one_line
from moe_runtime.experts.outputs import output_mistake

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.experts.build import LoadedExpert


#: How often one expert is tried with its golden probe, and what it raised is logged in full.
MIN_SECONDS_BETWEEN_CHECKS = 1.0


class WrongOutputError(ExpertError):
    """An expert answered with something else than its contract says."""


class ServedExpert:
    """An expert under its replica's id; used by its host's thread, but its counters may be read from any.

    Attributes:
        replica_id: How messages name it.
        dtype: Of its computation.
        row_dtype: Of the rows that arrive and leave.
        exact: Whether every call is a matrix product of its own.
        num_calls: Calls that were answered.
        num_rows: Rows of these calls.
        num_forwards: Forwards that these calls were merged into.
        num_faults: Forwards of these whose output was not what the contract says.
        compute_ms: Time that its forwards took.
        queue_s: Time that calls waited at their host before they were begun.
    """

    def __init__(self, replica_id: str, expert: LoadedExpert) -> None:
        """Look up what calls need: the properties of a spec cost more than a small forward."""
        self.replica_id = replica_id
        self.dtype = expert.spec.torch_dtype
        self.row_dtype = expert.spec.row_dtype
        self.exact = expert.spec.exact
        self._item_shape = expert.spec.item_shape
        self._view = None if expert.view.is_whole_item else expert.view
        self._module = expert.module
        self._contract = expert.contract
        self._probe = expert.probe
        self._checked_at = self._told_at = -math.inf
        self.num_calls = 0
        self.num_rows = 0
        self.num_forwards = 0
        self.num_faults = 0
        self.compute_ms = 0.0
        self.queue_s = 0.0

    def call_mistake(self, rows: Tensor) -> str | None:
        """What is wrong with a call's rows in shape or dtype; None if nothing is."""
        shape = rows.shape
        if not shape or shape[1:] != self._item_shape:
            return f"{self.replica_id}: expected rows of shape {list(self._item_shape)}, found {list(shape[1:])}"
        if rows.dtype != self.row_dtype:
            return f"{self.replica_id}: expected rows of dtype {self.row_dtype}, found {rows.dtype}"
        return None

    def seen(self, rows: Tensor) -> Tensor:
        """What the expert sees of a call's rows, ``(num_rows, *in_shape)``."""
        return rows if self._view is None else self._view.apply(rows)

    def forward(self, rows: Tensor) -> Tensor:
        """The expert's answer, ``(num_rows, *out_shape)``, in its dtype and on its device.

        Raises:
            WrongOutputError: If its answer has the wrong shape or dtype.
            BaseException: Whatever the expert raises.
        """
        if not rows.shape[0]:
            return rows.new_empty((0, *self._contract.out_shape))
        outputs: Tensor = self._module(rows)
        mistake = output_mistake(outputs, num_rows=rows.shape[0], contract=self._contract, dtype=self.dtype)
        if mistake is not None:
            raise WrongOutputError(f"{self.replica_id}: {mistake}")
        return outputs

    def failure(self, error: BaseException, compute_ms: float) -> Failure:
        """What stands for an error that came out of the expert, or out of its device."""
        if isinstance(error, WrongOutputError):
            self.num_faults += 1
            return Failure(str(error), compute_ms, error, is_fault=True)
        return Failure(f"{self.replica_id}: the expert raised {in_one_line(error)}", compute_ms, error)

    def zeros(self, num_rows: int) -> Tensor:
        """Outputs of rows that have none, as they travel."""
        return torch.zeros(num_rows, *self._contract.out_shape, dtype=self.row_dtype)

    def unfitness(self, now: float) -> str | None:
        """Why it is not what it was when it was loaded; None if it is, or was asked a moment ago.

        For an expert whose answer was bad: what it was asked may be to blame, or the expert.

        Args:
            now: Seconds.
        """
        if self._probe is None or now - self._checked_at < MIN_SECONDS_BETWEEN_CHECKS:
            return None
        self._checked_at = now
        mistake = self._probe.mistake(self._module)
        return None if mistake is None else f"{self.replica_id}: {mistake}"

    def may_tell(self, now: float) -> bool:
        """Whether a failure is to be logged in full: not if another was a moment ago."""
        if now - self._told_at < MIN_SECONDS_BETWEEN_CHECKS:
            return False
        self._told_at = now
        return True
