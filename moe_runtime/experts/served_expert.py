"""One expert as its host runs it: everything that a call needs, looked up once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.errors import ExpertError
from moe_runtime.experts.foreign import in_one_line
from moe_runtime.experts.outputs import output_mistake

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.experts.build import LoadedExpert


class ServedExpert:
    """An expert under its replica's id; used by its host's thread.

    Attributes:
        replica_id: How messages name it.
        dtype: Of its computation.
        row_dtype: Of the rows that arrive and leave.
        exact: Whether every call is a matrix product of its own.
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
            ExpertError: If it raised, or its answer has the wrong shape or dtype.
        """
        if not rows.shape[0]:
            return rows.new_empty((0, *self._contract.out_shape))
        try:
            outputs: Tensor = self._module(rows)
        except (Exception, SystemExit) as exc:
            raise self.raised(exc) from exc
        mistake = output_mistake(outputs, num_rows=rows.shape[0], contract=self._contract, dtype=self.dtype)
        if mistake is not None:
            raise ExpertError(f"{self.replica_id}: {mistake}")
        return outputs

    def raised(self, error: BaseException) -> ExpertError:
        """The error that stands for one that came out of the expert, or out of its device."""
        return ExpertError(f"{self.replica_id}: the expert raised {in_one_line(error)}")
