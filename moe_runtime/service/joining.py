"""Joins rows of several requests into one batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.hashing import ids_of_rows
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.service.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.requests import LayerRequest

# Odd, so that rows of one request never share a key; large, so that those of neighbouring seeds rarely do; and not the
# step between choices (routing/draws.py), with which one row's draws would be another's of another choice.
_ROW_STEP = 0x2545_F491_4F6C_DD1D
_MASK_63 = 2**63 - 1


@dataclass(frozen=True)
class BatchPart:
    """Rows ``[start, stop)`` of a request, which are rows ``[offset, offset + stop - start)`` of a batch.

    ``is_last`` says whether nothing of the request comes after them.
    """

    request_key: int
    start: int
    stop: int
    offset: int
    arrived_at: float
    return_routing: bool
    is_last: bool


def build_batch(taken: Sequence[tuple[LayerRequest, BatchPart]], layer: RoutedLayer) -> Batch:
    """One batch from rows of several requests; options that no request gives stay None."""
    requests = [request for request, _ in taken]
    tokens = _cat([request.tokens[part.start : part.stop] for request, part in taken])
    return Batch(
        layer=layer.name,
        tokens=tokens,
        gate_input=_cat([_gate_rows(request, part) for request, part in taken])
        if any(request.options.gate_input is not None for request in requests)
        else None,
        info=_token_info(taken, layer),
        tasks=_cat([_task_rows(request, part, layer) for request, part in taken]) if layer.gate.tasks else None,
        row_starts=tuple([part.offset for _, part in taken]),
        request_ids=tuple([request.request_id for request in requests]),
        awaited_until=max([math.inf if request.deadline is None else request.deadline for request in requests]),
    )


def _token_info(taken: Sequence[tuple[LayerRequest, BatchPart]], layer: RoutedLayer) -> TokenInfo:
    """What the layer's policy reads of the tokens, and what their requests ask for."""
    options, reads = [request.options for request, _ in taken], layer.policy.reads
    return TokenInfo(
        k=_cat([_k_rows(request, part, layer) for request, part in taken])
        if any(option.k is not None for option in options)
        else None,
        mask=_cat([_mask_rows(request, part) for request, part in taken])
        if any(option.mask is not None for option in options)
        else None,
        row_seeds=_cat([_seed_rows(request, part) for request, part in taken]) if layer.draws_at_random else None,
        row_ids=_cat([torch.arange(part.start, part.stop) for _, part in taken]) if "row_ids" in reads else None,
        token_ids=_cat([_id_rows(request, part) for request, part in taken]) if "token_ids" in reads else None,
    )


def _cat(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _gate_rows(request: LayerRequest, part: BatchPart) -> Tensor:
    gate_input = request.options.gate_input
    rows = request.tokens.flatten(1) if gate_input is None else gate_input
    return rows[part.start : part.stop].to(torch.float32)


def _k_rows(request: LayerRequest, part: BatchPart, layer: RoutedLayer) -> Tensor:
    k = layer.policy.max_k if request.options.k is None else request.options.k
    if isinstance(k, int):
        return torch.full((part.stop - part.start,), k, dtype=torch.int64)
    return k[part.start : part.stop].to(torch.int64)


def _id_rows(request: LayerRequest, part: BatchPart) -> Tensor:
    token_ids = request.options.token_ids
    if token_ids is None:
        return ids_of_rows(request.tokens[part.start : part.stop])
    return token_ids[part.start : part.stop].to(torch.int64)


def _task_rows(request: LayerRequest, part: BatchPart, layer: RoutedLayer) -> Tensor:
    place = layer.gate.tasks.index(layer.task_of(request))
    return torch.full((part.stop - part.start,), place, dtype=torch.int64)


def _mask_rows(request: LayerRequest, part: BatchPart) -> Tensor:
    mask = request.options.mask
    return torch.ones(part.stop - part.start, dtype=torch.bool) if mask is None else mask[part.start : part.stop]


def _seed_rows(request: LayerRequest, part: BatchPart) -> Tensor:
    """A key per row that depends on the request's seed and the row within the request, not on the batch."""
    seed = request.options.seed
    if seed is None:
        seed = int.from_bytes(blake2b(request.request_id.encode(), digest_size=8).digest(), "little") & _MASK_63
    return torch.arange(part.start, part.stop, dtype=torch.int64) * _ROW_STEP + seed
