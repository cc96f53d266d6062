"""The experts of a model in memory, as files that actors read."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from moe_runtime.config.state_folder import locked_folder, state_folder
from moe_runtime.errors import ConfigError, StartError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import ExitStack

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from moe_runtime.experts.checkpoints.families import Family

_INDEX = "model.safetensors.index.json"


def folder_for(wanted: str | Path | None, stack: ExitStack, *, kind: str) -> Path:
    """An empty folder to write to: the wanted one, or a private one that ``stack`` removes, named after a kind.

    Raises:
        ConfigError: If the wanted one holds something.
        StartError: If there can be no such folder.
    """
    try:
        return _private_folder(stack, kind) if wanted is None else _empty_folder(Path(wanted).expanduser().absolute())
    except OSError as exc:
        raise StartError(
            f"folder: expected one that experts can be written to, found that it cannot be: {exc}"
        ) from exc


def write_experts(model: PreTrainedModel, families: Mapping[str, Family], folder: Path) -> None:
    """Write the experts' parameters, a file per module, and the configuration: what ``open_checkpoint`` opens.

    Args:
        model: Whose parameters are plain tensors in memory.
        families: Of its modules that hold experts, by their paths.
        folder: An empty one.

    Raises:
        StartError: If it cannot be written.
    """
    weight_map: dict[str, str] = {}
    try:
        for number, (path, family) in enumerate(families.items(), start=1):
            file = f"model-{number:05}-of-{len(families):05}.safetensors"
            tensors = _tensors(model.get_submodule(path), path, family)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, file))
        (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        model.config.save_pretrained(folder)
    except OSError as exc:
        raise StartError(
            f"{folder}: expected room for the experts' parameters, found that they cannot be written: {exc}"
        ) from exc


def _tensors(module: nn.Module, path: str, family: Family) -> dict[str, Tensor]:
    """Whole parameters by their names in the model, on the CPU; each one's memory its own."""
    names = {
        rows.parameter: None
        for expert in range(family.num_experts(module))
        for rows in family.parameters(module, expert).values()
    }
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name in names:
        tensor = module.get_parameter(name).detach().to("cpu").contiguous()
        # safetensors writes no tensors that share memory.
        memory = tensor.untyped_storage().data_ptr()
        tensors[f"{path}.{name}"] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return tensors


def _empty_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = next(folder.iterdir(), None)
    if held is not None:
        raise ConfigError(f"folder: expected a new or empty folder, found {held.name} in {folder}")
    return folder


def _private_folder(stack: ExitStack, kind: str) -> Path:
    root = state_folder() / "adopted"
    with locked_folder(root):
        _remove_forsaken(root)
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=root))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # Says that the folder is in use, for as long as this process lives.
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return folder


def _remove_forsaken(root: Path) -> None:
    """Remove what processes left that were killed."""
    for folder in root.iterdir():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
