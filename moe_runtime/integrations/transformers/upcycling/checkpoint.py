"""Sparse upcycling of a dense checkpoint on disk (https://arxiv.org/abs/2212.05055), one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_runtime import __version__
from moe_runtime.errors import ConfigError, WeightsError
from moe_runtime.integrations.transformers.upcycling.dense import check_tensors
from moe_runtime.integrations.transformers.upcycling.gguf_file import open_gguf
from moe_runtime.integrations.transformers.upcycling.layouts import choose_layout
from moe_runtime.integrations.transformers.upcycling.options import Upcycling
from moe_runtime.integrations.transformers.upcycling.safetensors_folder import open_folder
from moe_runtime.integrations.transformers.upcycling.shards import DTYPE_NAMES, num_bytes, plan_shards, write_shards
from moe_runtime.integrations.transformers.upcycling.tensors import is_untied, plan_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_runtime.integrations.transformers.upcycling.dense import DenseCheckpoint
    from moe_runtime.integrations.transformers.upcycling.layouts import Layout
    from moe_runtime.integrations.transformers.upcycling.tensors import PlannedTensor

NOTE_NAME = "upcycled.json"
#: A dense MLP's matrices; as many dense tensors are kept, since every copy needs them again.
_NUM_PROJECTIONS = 3


def open_dense(path: str | Path) -> DenseCheckpoint:
    """The dense checkpoint at a path: a folder of safetensors files, a GGUF file, or a folder with one.

    Raises:
        UnsupportedModelError: If it is a mixture already, of another family than Llama, Mistral and Qwen2, or has
            settings that would be lost.
        WeightsError: If files are missing, truncated, or do not hold what the configuration describes.
    """
    found = _locate(Path(path).expanduser().resolve())
    dense = open_folder(found) if found.is_dir() else open_gguf(found)
    check_tensors(dense)
    return dense


def upcycle(
    dense: str | Path,
    out: str | Path,
    options: Upcycling | None = None,
    *,
    force: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> Path:
    """A mixture-of-experts checkpoint of a dense one, that plain transformers loads.

    Llama and Mistral become a Mixtral, Qwen2 and all with a shared expert a Qwen2-MoE. The folder appears whole or not
    at all: it is written beside, and renamed. Tokenizer, chat template and generation config come along, and
    ``upcycled.json`` says what it was made from.

    Args:
        dense: As for ``open_dense``.
        out: The folder to make; its parents are made if need be.
        options: How many experts, and how they start; 4 copies with top-2 by default.
        force: Replace the folder if it is there and was made by upcycling.
        on_progress: Called after each tensor with the share of bytes that is written, 0 to 1.

    Returns:
        The folder's absolute path.

    Raises:
        ConfigError: If the folder is there, cannot be written, or its disk is full.
        UnsupportedModelError: As ``open_dense``; or if the mixture cannot have a setting of the dense model.
        WeightsError: As ``open_dense``.
    """
    options = options or Upcycling()
    target = Path(out).expanduser().resolve()
    _check_target(target, force=force)
    checkpoint = open_dense(dense)
    if checkpoint.path.is_relative_to(target):
        raise ConfigError(f"{target}: expected a folder apart from the dense model, which is {checkpoint.path}")
    if is_untied(checkpoint):
        checkpoint.config.tie_word_embeddings = False
    layout = choose_layout(checkpoint.path, checkpoint.config, options)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            _write(workplace / "new", checkpoint, layout, options=options, on_progress=on_progress)
            if target.exists():
                # Out of the way first: a folder cannot be renamed onto one that has files in it.
                target.rename(workplace / "old")
            (workplace / "new").rename(target)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    except OSError as exc:
        raise ConfigError(f"{target}: cannot be written: {exc}") from exc
    return target


def _locate(path: Path) -> Path:
    """The GGUF file or the folder of safetensors files that a path means."""
    if not os.path.exists(path):  # Path.exists raises where a folder on the way cannot be read
        raise WeightsError(
            f"{path}: expected a checkpoint's folder or a GGUF file on this machine, found nothing there"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise WeightsError(f"{path}: expected a checkpoint's folder or a GGUF file, found another file")
        return path
    found = sorted(path.glob("*.gguf"))
    if (path / "config.json").exists():
        return path
    if not found:
        raise WeightsError(f"{path}: expected a checkpoint's folder, found neither a config.json nor a GGUF file in it")
    if len(found) > 1:
        raise WeightsError(f"{path}: expected one GGUF file, found {len(found)}; name one: {found[0]}")
    return found[0]


def _check_target(target: Path, *, force: bool) -> None:
    if not os.path.exists(target):
        return
    was_made_here = (target / NOTE_NAME).is_file()
    if not force:
        hint = "; --force replaces it" if was_made_here else ""
        raise ConfigError(
            f"{target}: expected nothing there, found {'a folder' if target.is_dir() else 'a file'}{hint}"
        )
    if not was_made_here:
        raise ConfigError(f"{target}: expected a folder made by upcycling, to replace it; found no {NOTE_NAME} in it")


def _write(
    folder: Path,
    dense: DenseCheckpoint,
    layout: Layout,
    *,
    options: Upcycling,
    on_progress: Callable[[float], None] | None,
) -> None:
    folder.mkdir()
    dtype = _dtype(dense, options)
    tensors = plan_tensors(dense, layout, options)
    total = num_bytes(tensors, dtype)
    free = shutil.disk_usage(folder).free
    if free < total:
        raise ConfigError(
            f"{folder.parent.parent}: expected {_size(total)} free for the checkpoint, found {_size(free)}"
        )
    layout.config.dtype = dtype
    layout.config.save_pretrained(folder)
    dense.save_companions(folder)
    read = lru_cache(_NUM_PROJECTIONS)(dense.read)

    def make(tensor: PlannedTensor) -> torch.Tensor:
        return tensor.make(read, seed=options.seed, dtype=dtype)

    shards = plan_shards(tensors, dtype=dtype, max_bytes=options.max_shard_bytes)
    written = 0
    for size in write_shards(folder, shards, make, dtype=dtype):
        written += size
        if on_progress is not None:
            on_progress(written / total)
    _write_note(folder, dense, options)


def _dtype(dense: DenseCheckpoint, options: Upcycling) -> torch.dtype:
    if options.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[options.dtype]
    if dense.dtype not in DTYPE_NAMES:
        raise ConfigError(
            f"{dense.path}: dtype auto: expected float32, bfloat16 or float16, found {dense.dtype}; say one"
        )
    return dense.dtype


def _write_note(folder: Path, dense: DenseCheckpoint, options: Upcycling) -> None:
    note = {
        "moe_runtime": __version__,
        "source": str(dense.path),
        "model_type": dense.config.model_type,
        "files": {file.name: file.stat().st_size for file in dense.files},
        "options": asdict(options),
    }
    (folder / NOTE_NAME).write_text(json.dumps(note, indent=2) + "\n")


def _size(num: float) -> str:
    """Bytes, with one decimal and the unit that fits."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num < 1000:
            return f"{num:.1f} {unit}"
        num /= 1000
    return f"{num:.1f} TB"
