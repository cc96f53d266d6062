"""Typed access to the fields of a map that came from a peer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import ProtocolError
from moe_runtime.wire.tensors import checked_tensor

if TYPE_CHECKING:
    from moe_runtime.wire.messages import WireTensor

MAX_INT = 2**63 - 1
MAX_REQUEST_ID_CHARS = 128
MAX_NAME_CHARS = 256


class Fields:
    """Takes the fields out of one map, each checked; a field that is absent or nil is missing.

    Args:
        values: The map.
        where: Its name in messages; empty for the message itself.
        lenient: Whether fields that nobody took are ignored, as those of a newer minor version are.
    """

    def __init__(self, values: dict[str, Any], *, where: str = "", lenient: bool = False) -> None:
        self._left = {key: value for key, value in values.items() if value is not None}
        self._where = where
        self._lenient = lenient

    def has(self, name: str) -> bool:
        """Whether the field is there and was not taken yet."""
        return name in self._left

    def is_map(self, name: str) -> bool:
        """Whether the field is there and a map."""
        return isinstance(self._left.get(name), dict)

    def integer(self, name: str, *, low: int = 0, high: int = MAX_INT) -> int:
        """The integer of that name, within ``[low, high]``; a bool is no integer."""
        value = self._take(name)
        if type(value) is not int or not low <= value <= high:
            raise self._unexpected(name, f"an integer of {low} to {high}", value)
        return value

    def number(self, name: str) -> float:
        """The finite number of at least 0 of that name."""
        value = self._take(name)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise self._unexpected(name, "a finite number of at least 0", value)
        return float(value)

    def flag(self, name: str) -> bool:
        """The bool of that name; False where it is missing."""
        value = self._take(name) if self.has(name) else False
        if not isinstance(value, bool):
            raise self._unexpected(name, "a bool", value)
        return value

    def text(self, name: str, *, low: int = 1, high: int) -> str:
        """The string of that name, of ``low`` to ``high`` printable characters: it goes into logs."""
        value = self._take(name)
        if not isinstance(value, str) or not low <= len(value) <= high:
            raise self._unexpected(name, f"a string of {low} to {high} characters", value)
        if not value.isprintable():
            raise self._unexpected(name, "a string of printable characters", value)
        return value

    def list(self, name: str) -> list[Any]:
        """The list of that name; empty where it is missing."""
        value = self._take(name) if self.has(name) else []
        if not isinstance(value, list):
            raise self._unexpected(name, "a list", value)
        return value

    def map(self, name: str) -> dict[str, Any]:
        """The map of that name; empty where it is missing."""
        value = self._take(name) if self.has(name) else {}
        if not isinstance(value, dict):
            raise self._unexpected(name, "a map", value)
        return value

    def fields(self, name: str) -> Fields:
        """The map of that name, for typed access; empty where it is missing."""
        return Fields(self.map(name), where=self._path(name), lenient=self._lenient)

    def tensor(self, name: str) -> WireTensor:
        """The tensor of that name."""
        if not self.is_map(name):
            raise self._unexpected(name, "a tensor (a map of dtype, shape and data)", self._take(name))
        inner = self.fields(name)
        where = self._path(name)
        tensor = checked_tensor(inner._take("dtype"), inner._take("shape"), inner._take("data"), where=where)
        inner.finish()
        return tensor

    def optional_tensor(self, name: str) -> WireTensor | None:
        """The tensor of that name; None where it is missing."""
        return self.tensor(name) if self.has(name) else None

    def finish(self) -> None:
        """Refuse the fields that nobody took.

        Raises:
            ProtocolError: If there are any, unless the peer speaks a newer minor version.
        """
        if self._left and not self._lenient:
            unknown = ", ".join(repr(key[:64]) for key in sorted(self._left)[:5])
            raise ProtocolError(f"{self._where or 'message'}: expected no further fields, found {unknown}")

    def _take(self, name: str) -> Any:
        if name not in self._left:
            raise ProtocolError(f"{self._path(name)}: expected this field, found none")
        return self._left.pop(name)

    def _path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def _unexpected(self, name: str, expected: str, value: object) -> ProtocolError:
        shown = repr(value) if isinstance(value, str | bool | int | float) else type(value).__name__
        return ProtocolError(f"{self._path(name)}: expected {expected}, found {shown[:80]}")
