"""What a caller asks for beyond the inputs, checked before it is sent; errors name the option."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_runtime.errors import InvalidRequestError
from moe_runtime.rpc.arrays import ARRAY, to_wire
from moe_runtime.wire.fields import MAX_INT
from moe_runtime.wire.messages import RequestOptions

if TYPE_CHECKING:
    from moe_runtime.wire.messages import WireTensor

_PER_ROW = f"{ARRAY} of integers, (num_tokens,)"
_K = f"an integer of 1 to the layer's k, or {_PER_ROW}"
_SEED = f"an integer of 0 to {MAX_INT}"
#: Longer integers are not shown: printing one of a million digits takes longer than refusing it.
_MAX_SHOWN_BITS = 128


def options_to_wire(options: Any) -> RequestOptions[WireTensor]:
    """The caller's options as they travel: arrays as wire tensors, numpy's integers and bools as Python's.

    Raises:
        InvalidRequestError: If they are no ``RequestOptions``, or one is of the wrong type or out of every range.
        DTypeError: If the protocol has no dtype like that of an array.
    """
    if not isinstance(options, RequestOptions):
        raise InvalidRequestError(f"options: expected RequestOptions(k=..., ...), found {type(options).__name__}")
    return RequestOptions(
        gate_input=_array("gate_input", options.gate_input, f"{ARRAY} of floats, (num_tokens, gate_features)"),
        token_ids=_array("token_ids", options.token_ids, _PER_ROW),
        task=_task(options.task),
        k=_k(options.k),
        seed=None if options.seed is None else _integer("seed", options.seed, low=0, expected=_SEED),
        mask=_array("mask", options.mask, f"{ARRAY} of bool, (num_tokens,)"),
        isolated=_flag("isolated", options.isolated),
    )


def _array(name: str, value: Any, expected: str) -> WireTensor | None:
    return None if value is None else to_wire(value, name=f"option {name}", expected=expected)


def _k(value: Any) -> WireTensor | int | None:
    if _is_integer(value):
        return _integer("k", value, low=1, expected=_K)
    return _array("k", value, _K)


def _is_integer(value: Any) -> bool:
    # True is an int to Python, and no number to a caller
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _integer(name: str, value: Any, *, low: int, expected: str) -> int:
    if not _is_integer(value):
        raise _unexpected(name, expected, type(value).__name__)
    number = int(value)
    if not low <= number <= MAX_INT:
        is_long = number.bit_length() > _MAX_SHOWN_BITS
        raise _unexpected(name, expected, f"one of {number.bit_length()} bits" if is_long else str(number))
    return number


def _task(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _unexpected("task", "the name of a task, a string", type(value).__name__)
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _unexpected(name, "a bool", type(value).__name__)
    return bool(value)


def _unexpected(name: str, expected: str, found: str) -> InvalidRequestError:
    return InvalidRequestError(f"option {name}: expected {expected}, found {found}")
