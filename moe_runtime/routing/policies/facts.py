"""What a policy reads of the tokens, or an error that says how to give it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.routing.policy import RowFact, TokenInfo

_PURPOSES: dict[RowFact, str] = {
    "token_ids": "routes by them; give each token its id, such as its place in a vocabulary, or "  # nosec B105  # no secret: tokens of text
    "routing.hashing.ids_of_rows(tokens)",
    "row_seeds": "draws experts by them; give each row a number of its own, and another one in every step of training",
}


def row_ids_of(info: TokenInfo, *, num_tokens: int, device: torch.device) -> Tensor:
    """The row of each token within its request, its index in the batch when not known, int64 ``(num_tokens,)``."""
    if info.row_ids is None:
        return torch.arange(num_tokens, device=device)
    return info.row_ids.to(device)


def required_fact(info: TokenInfo, name: RowFact, *, device: torch.device) -> Tensor:
    """What is known of each token by that name, int64 ``(num_tokens,)``.

    Raises:
        InvalidRequestError: If it is not known.
    """
    rows: Tensor | None = getattr(info, name)
    if rows is None:
        raise InvalidRequestError(
            f"{name}: expected one integer per token, found none: the policy of the layer {_PURPOSES[name]}"
        )
    return rows.to(device)
