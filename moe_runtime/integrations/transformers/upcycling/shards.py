"""Safetensors files written tensor by tensor: a file of any size takes the memory of its largest tensor."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from moe_runtime.integrations.transformers.upcycling.tensors import PlannedTensor

#: How safetensors names the dtypes that a mixture can have.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
#: Data begins at a multiple of this, as the format wants it: https://github.com/huggingface/safetensors#format
_ALIGNMENT = 8


@dataclass(frozen=True)
class Shard:
    """One file's tensors, in the order of their bytes."""

    name: str
    tensors: tuple[PlannedTensor, ...]


def num_bytes(tensors: Iterable[PlannedTensor], dtype: torch.dtype) -> int:
    """What the tensors take on disk, without the files' headers."""
    return sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize


def plan_shards(tensors: Iterable[PlannedTensor], *, dtype: torch.dtype, max_bytes: int) -> tuple[Shard, ...]:
    """The files of a checkpoint, filled in order, under the names that transformers looks for."""
    groups: list[list[PlannedTensor]] = []
    free = 0
    for tensor in tensors:
        size = num_bytes([tensor], dtype)
        if not groups or size > free:
            groups.append([])
            free = max_bytes
        groups[-1].append(tensor)
        free -= size
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(groups[0])),)
    names = (f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1))
    return tuple(Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True))


def write_shards(
    folder: Path, shards: tuple[Shard, ...], make: Callable[[PlannedTensor], torch.Tensor], *, dtype: torch.dtype
) -> Iterator[int]:
    """Write the files, and the index if there are several; yields the bytes of each tensor once it is written.

    Raises:
        OSError: If a file cannot be written.
    """
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(_header(shard.tensors, dtype))
            for tensor in shard.tensors:
                values = make(tensor).contiguous().reshape(-1)
                yield file.write(values.view(torch.uint8).numpy().data)
    if len(shards) > 1:
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        total = sum(num_bytes(shard.tensors, dtype) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _header(tensors: Iterable[PlannedTensor], dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + num_bytes([tensor], dtype)
        header[tensor.name] = {"dtype": DTYPE_NAMES[dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
