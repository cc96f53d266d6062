"""Whether a checkpoint has all of a model: transformers fills what is missing with random values, and goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from moe_runtime.errors import WeightsError
from moe_runtime.experts.checkpoints.folder import file_of_each_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_MOST_NAMED = 3


def check_shards(folder: Path) -> None:
    """Check that every file that a checkpoint's index names is there and whole; reads no tensor.

    Raises:
        WeightsError: If one is not, or the index is broken.
    """
    for name in sorted(set(file_of_each_key(folder).values())):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as exc:
            raise WeightsError(
                f"{folder / name}: expected a safetensors file of the checkpoint, found none or a broken one: {exc}"
            ) from exc


def check_all_loaded(about: Mapping[str, Any], folder: Path, *, may_differ: bool) -> None:
    """Check that every tensor of a model came from its checkpoint, but for those that transformers ties or ignores.

    Args:
        about: What ``output_loading_info`` gives.
        folder: Of the checkpoint.
        may_differ: Whether the caller allows tensors of other shapes.

    Raises:
        WeightsError: If one is missing, or has another shape.
    """
    differing = sorted(about["mismatched_keys"])
    if differing and not may_differ:
        key, found, expected = differing[0]
        raise WeightsError(
            f"{folder}: {key}: expected shape {list(expected)}, as config.json says, found {list(found)}"
            f"{_more(differing[1:])}"
        )
    missing = sorted(about["missing_keys"])
    if missing:
        named = ", ".join(missing[:_MOST_NAMED])
        raise WeightsError(
            f"{folder}: expected every tensor of the model, found none for {named}{_more(missing[_MOST_NAMED:])}; "
            "the model would get random values for it: complete the files, or load the class that they are of"
        )


def _more(rest: Sequence[object]) -> str:
    return f" (and {len(rest)} more)" if rest else ""
