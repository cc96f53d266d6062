"""The files of a checkpoint's folder: whether it is one, which holds which tensor, and what stands for them all."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from moe_runtime.errors import WeightsError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
#: Of each shard, for the version: a megabyte at most.
_NUM_SAMPLES, _SAMPLE_BYTES = 256, 4096
_REFUSED = {
    ".gguf": "a GGUF file, whose experts cannot be read one by one; "
    "`moe-runtime upcycle` makes a checkpoint of a dense model's",
    ".bin": "pickled weights (.bin), which are not read because reading them runs code; "
    "load them with transformers where you trust them, and `save_pretrained` writes safetensors",
}


def check_folder(folder: Path) -> None:
    """Check that a folder holds a configuration and safetensors files, as ``save_pretrained`` writes them.

    Raises:
        WeightsError: If it does not; the message says what to do.
    """
    if folder.suffix in _REFUSED and folder.is_file():
        _refuse(folder, _REFUSED[folder.suffix])
    if not folder.is_dir():
        _refuse(folder, "no such folder")
    if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        suffixes = {file.suffix for file in folder.iterdir()}
        _refuse(folder, next((_REFUSED[suffix] for suffix in _REFUSED if suffix in suffixes), "neither of the latter"))
    if not (folder / CONFIG).is_file():
        _refuse(folder, f"no {CONFIG}")


def file_of_each_key(folder: Path) -> dict[str, str]:
    """The name of the file that holds each tensor; of a sharded checkpoint from its index alone.

    Raises:
        WeightsError: If the index or the file is broken.
    """
    index = folder / INDEX
    if not index.is_file():
        try:
            with safe_open(folder / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (OSError, SafetensorError) as exc:
            raise WeightsError(f"{folder / SINGLE}: expected a safetensors file, found a broken one: {exc}") from exc
    try:
        files = json.loads(index.read_text())["weight_map"]
        return {str(key): _inside(str(name)) for key, name in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise WeightsError(
            f"{index}: expected a JSON object whose `weight_map` names a file of the folder for each tensor, "
            f"found none: {exc}"
        ) from exc


def first_dtype(folder: Path) -> torch.dtype:
    """The dtype of the first floating-point tensor, by which transformers goes where the configuration names none.

    Raises:
        WeightsError: If the index or the first file is missing or broken, or there is no such tensor.
    """
    file = folder / min(file_of_each_key(folder).values(), default=SINGLE)
    try:
        with safe_open(file, framework="pt") as tensors:
            names = (tensors.get_slice(key).get_dtype() for key in tensors.keys())  # noqa: SIM118  it is no mapping
            found = next((_DTYPES[name] for name in names if name in _DTYPES), None)
    except (OSError, SafetensorError) as exc:
        raise WeightsError(f"{file}: expected a safetensors file, found none or a broken one: {exc}") from exc
    if found is None:
        raise WeightsError(f"{file}: expected a tensor of one of {', '.join(_DTYPES)}, found none")
    return found


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of change of the files that say what the folder holds; changes when they do."""
    return tuple(found for name in (CONFIG, INDEX, SINGLE) if (found := _stat(folder / name)) is not None)


def version_of(folder: Path) -> str:
    """Stands for the weights: sha256 over the configuration, and the names, sizes and samples of every shard.

    A copy has the same, whatever its times. Of each shard the beginning, which names its tensors, and blocks all over
    it are read: what training changes, changes it; a change of few weights alone may go unseen.

    Raises:
        WeightsError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        digest.update((folder / CONFIG).read_bytes())
        for shard in sorted(file for file in folder.iterdir() if file.suffix == ".safetensors"):
            size = shard.stat().st_size
            digest.update(f"{shard.name} {size}".encode())
            with shard.open("rb") as file:
                for place in sorted({size * block // _NUM_SAMPLES for block in range(_NUM_SAMPLES)}):
                    file.seek(place)
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as exc:
        raise WeightsError(f"{folder}: expected files that can be read, found one that cannot: {exc}") from exc
    return digest.hexdigest()


def _stat(file: Path) -> tuple[str, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return file.name, found.st_size, found.st_mtime_ns


def _inside(name: str) -> str:
    if "/" in name or "\\" in name or name in {"", ".", ".."}:
        raise ValueError(f"{name!r} is not the name of a file of the folder")
    return name


def _refuse(folder: Path, found: str) -> NoReturn:
    raise WeightsError(
        f"{folder}: expected the folder of a checkpoint, with {CONFIG} and {SINGLE} or {INDEX}, found {found}"
    )
