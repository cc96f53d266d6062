"""Ids of tokens that have none of their own: what a policy that routes by ids is given then."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from moe_runtime.routing.draws import hash_choices

if TYPE_CHECKING:
    from torch import Tensor

# Words hashed at once, which bounds the memory that it takes: 8 bytes each, some times over.
_WORDS_AT_ONCE = 1 << 18
_WORD_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ids_of_rows(tokens: Tensor) -> Tensor:
    """An id for each token, made from its bytes: equal rows get equal ids, on every machine and in every batch.

    Rows of different bytes get the same id by a chance of about 2**-64; so 0.0 and -0.0 differ, as does one row in two
    dtypes. Not meant to withstand someone who looks for rows of equal ids.

    Args:
        tokens: ``(num_tokens, *item_shape)`` of any real dtype.

    Returns:
        int64 ``(num_tokens,)``, over the whole signed range.
    """
    width = math.prod(tokens.shape[1:])
    # Whole numbers of the elements' own size: their value is the same whatever the byte order.
    words = tokens.detach().reshape(tokens.shape[0], width).contiguous().view(_WORD_TYPES[tokens.element_size()])
    places = torch.arange(width, device=words.device)
    # Integer sums wrap around and so don't depend on the order in which they are taken.
    at_once = max(1, _WORDS_AT_ONCE // (width + 1))
    parts = [words[start : start + at_once] for start in range(0, words.shape[0], at_once)]
    sums = [places.new_zeros(0), *(hash_choices(part.long(), places).sum(dim=1) for part in parts)]
    return hash_choices(torch.cat(sums), places.new_zeros(()))
