"""Ids of tokens that have none: from their bytes."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def ids_of_rows(tokens: Tensor) -> Tensor:
    """An id for each row from its bytes alone: equal rows have equal ids, on every machine and in every batch.

    Args:
        tokens: ``(num_tokens, *item_shape)`` of any dtype.

    Returns:
        int64 ``(num_tokens,)``, over the whole range.
    """
    rows = tokens.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    digests = [blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)
