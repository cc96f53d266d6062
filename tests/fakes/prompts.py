"""What tiny models are asked."""

from __future__ import annotations

import torch


def prompt(*, rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Token ids and a mask of which the first row is padded on the left, as ``generate`` takes them."""
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
