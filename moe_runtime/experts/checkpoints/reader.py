"""Reading some rows of a parameter from the checkpoint's files, and nothing else of them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from moe_runtime.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor, nn

    from moe_runtime.experts.checkpoints.plan import ParameterPlan, Source


class ShardReader:
    """Reads slices of the tensors of a checkpoint's files; a context manager, which keeps the files mapped.

    Attributes:
        bytes_read: Of tensors, so far; the headers of the files are not counted.
        keys_read: Names of the tensors that something was read of, in order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        self.bytes_read = 0
        self.keys_read: list[str] = []

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, source: Source, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of dimension 0 of a tensor, or all of it; a view of the mapped file.

        Raises:
            WeightsError: If the file is missing or broken, or lacks the tensor.
        """
        file = self._open(source)
        try:
            tensor: Tensor = file.get_tensor(source.key) if start is None else file.get_slice(source.key)[start:stop]
        except SafetensorError as exc:
            raise _unreadable(source, self._folder, f"found a file without it: {exc}") from exc
        self.bytes_read += tensor.numel() * tensor.element_size()
        self.keys_read.append(source.key)
        return tensor

    def num_rows(self, source: Source) -> int:
        """Size of dimension 0 of a tensor, from the file's header."""
        file = self._open(source)
        try:
            shape = file.get_slice(source.key).get_shape()
        except SafetensorError as exc:
            raise _unreadable(source, self._folder, f"found a file without it: {exc}") from exc
        return int(shape[0]) if shape else 0

    def _open(self, source: Source) -> Any:
        if source.file not in self._files:
            try:
                opened = safe_open(self._folder / source.file, framework="pt", device="cpu")
                self._files[source.file] = self._stack.enter_context(opened)
            except OSError as exc:
                raise _unreadable(source, self._folder, f"found no such file: {exc}") from exc
            except SafetensorError as exc:
                raise _unreadable(source, self._folder, f"found a broken or truncated file: {exc}") from exc
        return self._files[source.file]


def fill(
    parameter: Tensor, plan: ParameterPlan, reader: ShardReader, *, rows: tuple[int, int] | None, module: nn.Module
) -> None:
    """Read rows of a parameter's dimension 0 into a tensor of their shape.

    Args:
        parameter: Is written to, in its own dtype.
        plan: Of the model's parameter.
        reader: Of the checkpoint.
        rows: First row and the one after the last; None for all.
        module: Has the parameter, under the last part of the plan's name, in the shape and dtype wanted.
    """
    start, stop = rows or (None, None)
    if plan.conversion is None:
        ((source,),) = plan.sources.values()
        parameter.copy_(_fitting(reader.read(source, start, stop), parameter, source))
        return
    read: dict[str, list[Tensor]] = {}
    for pattern, sources in plan.sources.items():
        if plan.conversion.operations[-2:-1] + plan.conversion.operations[-1:] and "MergeModulelist" in plan.conversion.operations:
            read[pattern] = [reader.read(source) for source in sources[start:stop]]
        else:
            (source,) = sources
            read[pattern] = [reader.read(source, start, stop)]
    parameter.copy_(plan.conversion(plan.name.rpartition(".")[2], read, module))


def _fitting(tensor: Tensor, parameter: Tensor, source: Source) -> Tensor:
    if tensor.shape != parameter.shape:
        raise WeightsError(
            f"{source.file}: {source.key}: expected shape {list(parameter.shape)}, found {list(tensor.shape)}"
        )
    return tensor


def _unreadable(source: Source, folder: Path, found: str) -> WeightsError:
    return WeightsError(f"{folder / source.file}: expected the tensor {source.key!r} in it, {found}")
