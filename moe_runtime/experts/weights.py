"""Weight files: safetensors, with a manifest of hashes beside them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe_runtime.errors import WeightsError
from moe_runtime.experts.golden_probe import PROBE_INPUT, PROBE_OUTPUT, probe_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from moe_runtime.experts.golden_probe import GoldenProbe

MANIFEST_NAME = "manifest.json"
_MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class Weights:
    """The contents of a weight file.

    Attributes:
        tensors: By name, on the CPU; those of the module.
        metadata: Text that the writer put beside them.
        sha256: Hash of the file, in hex.
        probe: What the expert must answer to a few rows; None if the writer stored none.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str
    probe: GoldenProbe | None = None


def save_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    probe: GoldenProbe | None = None,
) -> str:
    """Write tensors to a safetensors file, whole or not at all, and give its sha256.

    Args:
        path: The file; one that is there is replaced.
        tensors: By name, as ``module.state_dict()`` has them.
        metadata: Text to keep beside them.
        probe: What ``golden_probe`` made of the module; whoever loads the file compares the expert with it.

    Returns:
        The file's sha256 in hex.

    Raises:
        WeightsError: If a tensor has the name of one of the probe's.
    """
    path = Path(path)
    reserved = [name for name in (PROBE_INPUT, PROBE_OUTPUT) if name in tensors]
    if reserved:
        raise WeightsError(f"{path}: expected no tensor of the name {reserved[0]!r}, which is a golden probe's")
    if probe is not None:
        tensors = {**tensors, **probe.tensors()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # safetensors refuses tensors that share memory; clones don't.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(copies, unfinished, metadata=dict(metadata or {}))
        _replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return sha256_of(path)


def load_weights(path: str | Path) -> Weights:
    """The tensors of a safetensors file, after its hash was checked against the manifest beside it.

    Raises:
        WeightsError: If the file is missing, not what the manifest lists, or not a safetensors file.
    """
    path = Path(path)
    sha256 = verify(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as exc:
        raise WeightsError(f"{path}: expected a safetensors file, found one that cannot be read: {exc}") from exc
    try:
        probe = probe_in(tensors)
    except WeightsError as exc:
        raise WeightsError(f"{path}: {exc}") from exc
    tensors = {name: tensor for name, tensor in tensors.items() if name not in (PROBE_INPUT, PROBE_OUTPUT)}
    return Weights(tensors, metadata, sha256, probe)


def write_manifest(folder: str | Path, files: Iterable[str] | None = None) -> Path:
    """Write ``manifest.json``, which lists files of a folder with their hashes; give its path.

    Args:
        folder: The folder of the weight files.
        files: Names within the folder; every ``*.safetensors`` in it when not given.

    Raises:
        WeightsError: If one of the files is not there.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.glob("*.safetensors")) if files is None else sorted(files)
    entries = {name: _manifest_entry(folder / name) for name in names}
    path = folder / MANIFEST_NAME
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"format": _MANIFEST_FORMAT, "files": entries}, indent=2) + "\n")
    _replace(unfinished, path)
    return path


def verify(path: str | Path) -> str:
    """The sha256 of a weight file in hex, equal to its entry in the manifest of its folder, where it has one.

    Raises:
        WeightsError: If the file is missing or unreadable, the manifest is malformed, or the hashes differ.
    """
    path = Path(path)
    sha256 = sha256_of(path)
    expected = _listed_sha256(path)
    if expected is not None and expected != sha256:
        raise WeightsError(
            f"{path}: expected sha256 {expected} from {MANIFEST_NAME}, found {sha256}; the file is corrupt or was "
            f"replaced: fetch it again, or write the manifest anew"
        )
    return sha256


def listed_sha256(text: bytes, *, name: str, manifest: str) -> str | None:
    """What a manifest lists for a file; None if it does not list it.

    Args:
        text: The manifest.
        name: The file's, in the manifest's folder.
        manifest: How messages name the manifest.

    Raises:
        WeightsError: If it is malformed.
    """
    try:
        listed = json.loads(text)
        if listed["format"] != _MANIFEST_FORMAT:
            raise WeightsError(f"{manifest}: expected format {_MANIFEST_FORMAT}, found {listed['format']!r}")
        entry = listed["files"].get(name)
        return None if entry is None else str(entry["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        if isinstance(exc, WeightsError):
            raise
        raise WeightsError(f"{manifest}: expected a manifest of weight files, found something else: {exc!r}") from exc


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of a module, all of them or none.

    Raises:
        WeightsError: With one line per tensor that is missing, unexpected, of another shape or dtype, or not finite.
    """
    check_fit(module, tensors)
    module.load_state_dict(tensors)


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are those of a module, which may be on the meta device.

    Raises:
        WeightsError: With one line per tensor that is missing, unexpected, of another shape or dtype, or not finite.
    """
    wanted = module.state_dict()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    mistakes = [f"expected the tensor {name!r}, found none" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            mistakes.append(f"found the tensor {name!r}, which the module does not have")
        elif tensor.shape != wanted[name].shape:
            mistakes.append(f"{name}: expected shape {list(wanted[name].shape)}, found {list(tensor.shape)}")
        elif tensor.dtype != wanted[name].dtype:
            mistakes.append(
                f"{name}: expected dtype {wanted[name].dtype}, found {tensor.dtype}; convert the file, or set the "
                f"layer's `dtype`"
            )
        elif _is_spoiled(tensor, is_parameter=name in parameters):
            mistakes.append(f"{name}: holds NaN or infinities")
    if mistakes:
        raise WeightsError("\n".join(mistakes))


def _is_spoiled(tensor: Tensor, *, is_parameter: bool) -> bool:
    if not tensor.is_floating_point():
        return False
    # A buffer may be a mask of minus infinity.
    return not bool(tensor.isfinite().all()) if is_parameter else bool(tensor.isnan().any())


def _manifest_entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "num_bytes": path.stat().st_size}


def _listed_sha256(path: Path) -> str | None:
    manifest = path.parent / MANIFEST_NAME
    try:
        text = manifest.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise WeightsError(f"{manifest}: expected a manifest of weight files, found something else: {exc!r}") from exc
    return listed_sha256(text, name=path.name, manifest=str(manifest))


def sha256_of(path: Path) -> str:
    """The hash of a weight file, in hex.

    Raises:
        WeightsError: If it is missing or unreadable.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as exc:
        raise WeightsError(f"{path}: expected a weight file, found none") from exc
    except (OSError, ValueError) as exc:
        raise WeightsError(f"{path}: expected a readable weight file, found: {exc}") from exc


def _replace(unfinished: Path, path: Path) -> None:
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
