"""What the dense model says: asked once, since loading it takes longer than starting the actors, and kept."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
import transformers

from moe_runtime.demos.chat.check import CHECK_PROMPT, NUM_CHECKED

if TYPE_CHECKING:
    from pathlib import Path


def kept_tokens(path: Path) -> tuple[int, ...] | None:
    """What the dense model said to the same prompt with the same libraries; None if it was not asked yet."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return tuple(map(int, kept["token_ids"])) if kept["asked"] == _asked() else None
    except (OSError, ValueError, KeyError, TypeError):
        # Not there, or damaged: the model is asked again.
        return None


def keep_tokens(path: Path, token_ids: tuple[int, ...]) -> None:
    """Keep what it said for the next time.

    Raises:
        OSError: If the file cannot be written.
    """
    # Another chat may read or write it at the same time: it appears whole.
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps({"asked": _asked(), "token_ids": token_ids}) + "\n", encoding="utf-8")
    new.replace(path)


def _asked() -> dict[str, Any]:
    """What the tokens depend on, besides the model."""
    return {
        "prompt": CHECK_PROMPT,
        "num_tokens": NUM_CHECKED,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
