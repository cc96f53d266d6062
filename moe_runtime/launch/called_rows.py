"""What a program asks of a layer's experts in one call: as batches, and what of it is still missing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import DTypeError, InvalidRequestError, RequestTooLargeError, ShapeError
from moe_runtime.routing.assignments import Assignments, Grid, WeightRule
from moe_runtime.service.batch import Batch
from moe_runtime.transport.row_frames import MAX_ROWS_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from moe_runtime.service.batch import BatchResult
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.routing_table import RoutingTable

#: Rows of one batch, unless the layer is exact: of two such batches, most lie in memory shared with hosts of this node.
MAX_BATCH_BYTES = 48 << 20
#: The weights are the caller's: these are never looked at.
_NO_RULE = WeightRule(normalize="none")


@lru_cache
def _any_scores(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(1).expand(shape)


@dataclass(frozen=True, eq=False)
class RowsAsked:
    """Rows that one call asks for, by token, then by choice.

    Attributes:
        layer: The layer.
        tokens: ``(num_tokens, *item_shape)`` in the layer's dtype.
        expert_ids: Int64 ``(num_tokens, k)``.
        assignments: The same for the engine.
    """

    layer: RoutedLayer
    tokens: Tensor
    expert_ids: Tensor
    assignments: Assignments

    @classmethod
    def of(cls, layer: RoutedLayer, tokens: Tensor, expert_ids: Tensor) -> RowsAsked:
        """What a caller asks for, checked.

        Raises:
            ShapeError: If a shape is not the layer's, or tokens and choices differ in number.
            DTypeError: If a dtype is not as expected.
            InvalidRequestError: If a tensor is not on the CPU, or an expert is none of the layer's.
        """
        _check(layer, tokens, expert_ids)
        num_tokens = tokens.shape[0]
        grid = Grid(expert_ids, _any_scores(tuple(expert_ids.shape)))
        assignments = Assignments(grid, None, num_tokens, layer.num_experts, _NO_RULE)
        _check_experts(layer, assignments)
        return cls(layer, tokens, expert_ids, assignments)

    @property
    def num_rows(self) -> int:
        """Number of rows asked for."""
        return self.expert_ids.numel()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on its way to its expert, or back if that is more."""
        layer = self.layer
        return max(layer.item_size, _size(layer.out_shape)) * layer.row_dtype.itemsize

    @property
    def fits_one_batch(self) -> bool:
        """Whether it need not be split; what is exact must not be."""
        return self.layer.exact or self.num_rows * self.row_bytes <= MAX_BATCH_BYTES

    def batch(self) -> Batch:
        """All of it as one batch."""
        return Batch(self.layer.name, self.tokens, assignments=self.assignments)

    def parts(self) -> Iterator[RowsAsked]:
        """The same, in parts of neighbouring tokens that are small enough to travel."""
        k = self.expert_ids.shape[1]
        step = max(1, MAX_BATCH_BYTES // max(1, k * self.row_bytes))
        for start in range(0, self.tokens.shape[0], step):
            yield self._of(self.tokens[start : start + step], self.expert_ids[start : start + step])

    def only(self, places: Tensor) -> RowsAsked:
        """Some of the rows, each as a token of its own.

        Args:
            places: Which, int64, ascending.
        """
        k = self.expert_ids.shape[1]
        return self._of(self.tokens[places // k], self.expert_ids.reshape(-1)[places].unsqueeze(1))

    def to_send_again(self, missing: Tensor) -> Tensor:
        """Places of the rows to ask for again, int64, where some are missing.

        Args:
            missing: Which are, bool ``(num_rows,)``.

        Returns:
            The missing ones; in an exact layer all of their experts', for a product of another size has other bits.
        """
        if self.layer.exact:
            experts = self.expert_ids.reshape(-1)
            missing = torch.isin(experts, experts[missing])
        return missing.nonzero().squeeze(1)

    def may_be_served(self, missing: Tensor, table: RoutingTable) -> bool:
        """Whether some of the missing rows, bool ``(num_rows,)``, have an expert with a usable replica."""
        experts = torch.bincount(self.expert_ids.reshape(-1)[missing]).nonzero().flatten().tolist()
        return any(table.usable(self.layer.name, expert_id) for expert_id in experts)

    def check_size(self, table: RoutingTable) -> None:
        """Check that every host's share of an exact layer's only batch fits into a message.

        Raises:
            RequestTooLargeError: If one does not.
        """
        if not self.layer.exact or self.num_rows * self.row_bytes <= MAX_ROWS_BYTES:
            return
        by_host: Counter[int] = Counter()
        for expert_id, num_rows in enumerate(self.assignments.load):
            for replica in table.usable(self.layer.name, expert_id)[:1]:
                by_host[replica.endpoint.incarnation] += num_rows
        most = max(by_host.values(), default=0) * self.row_bytes
        if most > MAX_ROWS_BYTES:
            raise RequestTooLargeError(
                f"layer {self.layer.name}: expected at most {MAX_ROWS_BYTES} bytes of rows for one actor, found {most} "
                f"for {self.tokens.shape[0]} tokens: an exact layer sends them at once; send fewer tokens in one call, "
                f"or give its experts more actors"
            )

    def _of(self, tokens: Tensor, expert_ids: Tensor) -> RowsAsked:
        grid = Grid(expert_ids, _any_scores(tuple(expert_ids.shape)))
        assignments = Assignments(grid, None, tokens.shape[0], self.layer.num_experts, _NO_RULE)
        return RowsAsked(self.layer, tokens, expert_ids, assignments)


def missing_of(result: BatchResult) -> Tensor | None:
    """Which rows of a batch nobody answered, by token, then by choice, bool ``(num_rows,)``; None is none."""
    if result.combined.served is None:
        return None
    missing = ~result.combined.served[result.plan.rows_by_token]
    return missing if bool(missing.any()) else None


def _check(layer: RoutedLayer, tokens: Tensor, expert_ids: Tensor) -> None:
    if tokens.shape[1:] != layer.item_shape:
        raise ShapeError(
            f"layer {layer.name}: expected tokens of shape (T, {', '.join(map(str, layer.item_shape))}), "
            f"found {tuple(tokens.shape)}"
        )
    if expert_ids.dim() != 2 or expert_ids.shape[0] != tokens.shape[0]:
        raise ShapeError(
            f"layer {layer.name}: expected expert_ids of shape ({tokens.shape[0]}, k), found {tuple(expert_ids.shape)}"
        )
    if tokens.dtype != layer.dtype:
        raise DTypeError(f"layer {layer.name}: expected tokens of {layer.dtype}, found {tokens.dtype}")
    if expert_ids.dtype != torch.int64:
        raise DTypeError(f"layer {layer.name}: expected expert_ids of torch.int64, found {expert_ids.dtype}")
    if not (tokens.is_cpu and expert_ids.is_cpu):
        found = tokens.device if expert_ids.is_cpu else expert_ids.device
        raise InvalidRequestError(f"layer {layer.name}: expected tensors on the CPU, found one on {found}")


def _check_experts(layer: RoutedLayer, assignments: Assignments) -> None:
    try:
        is_known = len(assignments.load) == layer.num_experts
    except RuntimeError:
        # What torch says where one is negative.
        is_known = False
    if not is_known:
        expert_ids = assignments.choices.expert_ids
        raise InvalidRequestError(
            f"layer {layer.name}: expected experts 0 to {layer.num_experts - 1}, found "
            f"{int(expert_ids.min())} to {int(expert_ids.max())}"
        )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
