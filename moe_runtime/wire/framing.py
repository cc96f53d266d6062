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
    """

    max_array_len: int
    max_map_len: int
    max_str_len: int


REQUEST_LIMITS = FrameLimits(max_array_len=64, max_map_len=64, max_str_len=4096)
REPLY_LIMITS = FrameLimits(max_array_len=1 << 17, max_map_len=64, max_str_len=1 << 16)
INFO_LIMITS = FrameLimits(max_array_len=1 << 17, max_map_len=1 << 17, max_str_len=1 << 16)


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
    try:
        message = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_map_of_unique_strings,
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


def _map_of_unique_strings(pairs: list[tuple[object, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ProtocolError(f"expected map keys that are strings, found {type(key).__name__}")
        if key in unique:
            raise ProtocolError(f"expected each map key once, found {key[:64]!r} twice")
        unique[key] = value
    return unique


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ProtocolError(f"expected no extension types, found type {code} of {len(data)} bytes")
