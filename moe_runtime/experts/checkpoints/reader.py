"""Reading some rows of a parameter from the checkpoint's files, and nothing else of them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from moe_runtime.errors import WeightsError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from moe_runtime.experts.checkpoints.plan import Source


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

    def read(self, source: Source, rows: slice | None = None) -> Tensor:
        """Some rows of a tensor's dimension 0, or all of it; a view of the mapped file, which must not be written to.

        Raises:
            WeightsError: If the file is missing or broken, or lacks the tensor or those rows.
        """
        file = self._open(source)
        try:
            stored = file.get_slice(source.key)
            tensor: Tensor = stored[rows] if rows is not None else stored[...]
        except (SafetensorError, IndexError, ValueError) as exc:
            raise self._unreadable(source, str(exc)) from exc
        self.bytes_read += tensor.numel() * tensor.element_size()
        self.keys_read.append(source.key)
        return tensor

    def _open(self, source: Source) -> Any:
        if source.file not in self._files:
            try:
                opened = safe_open(self._folder / source.file, framework="pt", device="cpu")
                self._files[source.file] = self._stack.enter_context(opened)
            except FileNotFoundError as exc:
                raise self._unreadable(source, "no such file") from exc
            except (OSError, SafetensorError) as exc:
                raise self._unreadable(source, f"a broken or truncated file: {exc}") from exc
        return self._files[source.file]

    def _unreadable(self, source: Source, found: str) -> WeightsError:
        return WeightsError(f"{self._folder / source.file}: expected the tensor {source.key!r} in it, found {found}")
