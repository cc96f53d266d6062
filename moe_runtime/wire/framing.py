"""One msgpack map to bytes and back, within limits: the outermost check on what a peer sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import msgpack

from moe_runtime.errors import ProtocolError


@dataclass(frozen=True)
class FrameLimits:
    """Longest parts that a message may have; what exceeds them is refused before it is allocated.

    Attributes:
        max_array_len: Entries of one array.
        max_map_len: Entries of one map.
        max_str_len: Bytes of one string.
        max_containers: Arrays and maps, nested ones included; bounds what many small ones add up to.
    """

    max_array_len: int
    max_map_len: int
    max_str_len: int
    max_containers: int


REQUEST_LIMITS = FrameLimits(max_array_len=64, max_map_len=64, max_str_len=4096, max_containers=64)
REPLY_LIMITS = FrameLimits(max_array_len=1 << 17, max_map_len=64, max_str_len=1 << 16, max_containers=64)
INFO_LIMITS = FrameLimits(max_array_len=1 << 17, max_map_len=1 << 17, max_str_len=1 << 16, max_containers=1 << 20)


def pack(message: dict[str, Any]) -> bytes:
    """The message's bytes.

    Raises:
        TypeError, ValueError, OverflowError: If it holds a value that msgpack cannot carry.
    """
    return msgpack.packb(message)  # type: ignore[no-any-return]  # msgpack has no annotations


def unpack(body: bytes | bytearray, *, limits: FrameLimits) -> dict[str, Any]:
    """The one map with string keys that the bytes hold.

    Raises:
        ProtocolError: If the bytes are anything else: no msgpack, truncated, followed by more, too long or too
            deep in some part, with a key twice or one that is no string, with extension types, or no map.
    """
    counted = _Containers(limits.max_containers)
    try:
        message = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=counted.map_of_unique_strings,
            list_hook=counted.array,
            ext_hook=_refuse_extension,
            max_str_len=limits.max_str_len,
            max_bin_len=len(body),
            max_array_len=limits.max_array_len,
            max_map_len=limits.max_map_len,
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except Exception as exc:  # msgpack's own tree, and UnicodeError, ValueError, TypeError and more besides
        reason = " ".join(str(exc).split())[:200]
        raise ProtocolError(
            f"expected one msgpack map, found {len(body)} bytes that are not: {type(exc).__name__}: {reason}"
        ) from exc
    if not isinstance(message, dict):
        raise ProtocolError(f"expected a msgpack map, found {type(message).__name__}")
    return message


class _Containers:
    """Counts a message's arrays and maps while it is unpacked, and makes the maps."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = most

    def array(self, values: list[Any]) -> list[Any]:
        """An array as it is."""
        self._count()
        return values

    def map_of_unique_strings(self, pairs: list[tuple[object, Any]]) -> dict[str, Any]:
        """The map of these pairs."""
        self._count()
        unique: dict[str, Any] = {}
        for key, value in pairs:
            if not isinstance(key, str):
                raise ProtocolError(f"expected map keys that are strings, found {type(key).__name__}")
            if key in unique:
                raise ProtocolError(f"expected each map key once, found {key[:64]!r} twice")
            unique[key] = value
        return unique

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ProtocolError(f"expected at most {self._most} arrays and maps in a message, found more")


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ProtocolError(f"expected no extension types, found type {code} of {len(data)} bytes")
