"""Refuses a request that cannot be right, before it takes a place in any queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.errors import (
    DTypeError,
    InvalidRequestError,
    NonFiniteError,
    RequestTooLargeError,
    ShapeError,
)
from moe_runtime.experts.outputs import non_finite_rows

if TYPE_CHECKING:
    from torch import Tensor

    from moe_runtime.config.runtime import LimitsConfig, RouterConfig
    from moe_runtime.service.layer import RoutedLayer
    from moe_runtime.service.requests import LayerRequest

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_SEED = 2**63 - 1


def validate_request(request: LayerRequest, layer: RoutedLayer, *, limits: LimitsConfig, router: RouterConfig) -> None:
    """Check a request against its layer and the router's limits.

    Raises:
        ShapeError: If the tokens or an option have another shape than the layer expects.
        DTypeError: If the tokens or an option have another dtype.
        NonFiniteError: If a value is NaN or infinite and the layer does not allow that.
        RequestTooLargeError: If the request can never be served within the limits.
        InvalidRequestError: If an option is out of range.
    """
    _check_tokens(request, layer)
    _check_size(request, layer, limits=limits, router=router)
    _check_gate_input(request, layer)
    _check_row_options(request, layer)


def unused_options(request: LayerRequest, layer: RoutedLayer) -> tuple[str, ...]:
    """Warnings, in words, for options of a valid request that change nothing in this layer."""
    options, name = request.options, layer.name
    reasons = {
        "token_ids": None if "token_ids" in layer.policy.reads else f"the policy of layer {name} does not use it",
        "task": None if layer.gate.tasks else f"the gate of layer {name} has one part for all tasks",
        "seed": None if layer.draws_at_random else f"nothing in layer {name} is drawn at random",
        "gate_input": None if layer.asks_gate else f"the policy of layer {name} does not ask the gate",
    }
    return tuple(
        f"option {option} has no effect: {reason}"
        for option, reason in reasons.items()
        if reason is not None and getattr(options, option) is not None
    )


def _check_tokens(request: LayerRequest, layer: RoutedLayer) -> None:
    tokens = request.tokens
    expected: tuple[int | str, ...] = ("num_tokens", *layer.item_shape)
    if tokens.ndim == 0 or tuple(tokens.shape[1:]) != layer.item_shape:
        raise ShapeError(
            f"layer {layer.name}: expected inputs of shape {_shown(expected)}, found {_shown(tuple(tokens.shape))}"
        )
    if tokens.dtype != layer.dtype:
        raise DTypeError(
            f"layer {layer.name}: expected inputs of dtype {_name(layer.dtype)}, found {_name(tokens.dtype)}; "
            f"convert them before the call"
        )
    if not layer.allow_non_finite:
        _check_finite("inputs", tokens, layer)
        _check_wire_range(tokens, layer)


def _check_size(request: LayerRequest, layer: RoutedLayer, *, limits: LimitsConfig, router: RouterConfig) -> None:
    num_tokens = request.tokens.shape[0]
    largest = min(limits.max_request_tokens, router.max_queued_tokens)
    if num_tokens > largest:
        raise RequestTooLargeError(f"expected at most {largest} tokens in a request, found {num_tokens}; split it")
    if request.tokens.nbytes > router.max_queued_bytes:
        raise RequestTooLargeError(
            f"expected at most {router.max_queued_bytes} bytes of tokens in a request, "
            f"found {request.tokens.nbytes}; split it"
        )
    is_whole = request.options.isolated or not layer.splits_requests
    if is_whole and num_tokens > router.max_batch_tokens:
        raise RequestTooLargeError(
            f"layer {layer.name}: expected a request to fit into one batch of at most {router.max_batch_tokens} "
            f"tokens, found {num_tokens}: {_why_whole(request, layer)}"
        )


def _check_gate_input(request: LayerRequest, layer: RoutedLayer) -> None:
    gate_input = request.options.gate_input
    if gate_input is None:
        if layer.gate_features != layer.item_size and request.tokens.shape[0] > 0:
            raise InvalidRequestError(
                f"layer {layer.name}: expected option gate_input, {layer.gate_features} wide: "
                f"the gate does not see the tokens, which are {layer.item_size} wide"
            )
        return
    expected = (request.tokens.shape[0], layer.gate_features)
    _check_shape("gate_input", gate_input, expected, layer)
    if gate_input.dtype not in _FLOATS:
        raise DTypeError(f"layer {layer.name}: expected gate_input of a float dtype, found {_name(gate_input.dtype)}")
    _check_finite("gate_input", gate_input, layer)


def _check_row_options(request: LayerRequest, layer: RoutedLayer) -> None:
    options, num_tokens = request.options, request.tokens.shape[0]
    if options.mask is not None:
        _check_shape("mask", options.mask, (num_tokens,), layer)
        _check_dtype("mask", options.mask, (torch.bool,), layer)
    if options.token_ids is not None:
        _check_shape("token_ids", options.token_ids, (num_tokens,), layer)
        _check_dtype("token_ids", options.token_ids, _INTEGERS, layer)
    if options.seed is not None and not 0 <= options.seed <= _MAX_SEED:
        raise InvalidRequestError(f"seed: expected 0 to {_MAX_SEED}, found {options.seed}")
    _check_task(request, layer)
    _check_k(request, layer)


def _check_task(request: LayerRequest, layer: RoutedLayer) -> None:
    tasks, task = layer.gate.tasks, layer.task_of(request)
    if tasks and task not in tasks:
        found = "none" if task is None else repr(task)
        raise InvalidRequestError(f"layer {layer.name}: expected option task, one of {', '.join(tasks)}, found {found}")


def _check_k(request: LayerRequest, layer: RoutedLayer) -> None:
    k, most = request.options.k, layer.policy.max_k
    if k is None:
        return
    if not layer.policy.accepts_k:
        raise InvalidRequestError(
            f"layer {layer.name}: expected no k, found one: its policy, {layer.policy_kind}, does not let a token "
            f"choose how many experts it gets"
        )
    if isinstance(k, int):
        smallest = largest = k
    else:
        _check_shape("k", k, (request.tokens.shape[0],), layer)
        _check_dtype("k", k, _INTEGERS, layer)
        if k.numel() == 0:
            return
        smallest, largest = int(k.min()), int(k.max())
    if smallest < 1 or largest > most:
        found = smallest if smallest < 1 else largest
        allowed = "1" if most == 1 else f"1 to {most}"
        raise InvalidRequestError(f"layer {layer.name}: expected k of {allowed}, found {found}")


def _why_whole(request: LayerRequest, layer: RoutedLayer) -> str:
    if layer.exact:
        return "the layer is exact"
    if layer.policy.batch_coupled:
        return f"what its policy, {layer.policy_kind}, gives a token depends on the others of the batch"
    return f"request {request.request_id} is isolated"


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], layer: RoutedLayer) -> None:
    if tuple(tensor.shape) != expected:
        raise ShapeError(
            f"layer {layer.name}: expected {name} of shape {_shown(expected)}, found {_shown(tuple(tensor.shape))}"
        )


def _check_dtype(name: str, tensor: Tensor, expected: tuple[torch.dtype, ...], layer: RoutedLayer) -> None:
    if tensor.dtype not in expected:
        allowed = " or ".join(_name(dtype) for dtype in expected)
        raise DTypeError(f"layer {layer.name}: expected {name} of dtype {allowed}, found {_name(tensor.dtype)}")


def _check_finite(name: str, tensor: Tensor, layer: RoutedLayer) -> None:
    rows = non_finite_rows(tensor)
    if rows is not None:
        row = int(rows.nonzero()[0])
        raise NonFiniteError(f"layer {layer.name}: expected finite {name}, found NaN or an infinity in row {row}")


def _check_wire_range(tokens: Tensor, layer: RoutedLayer) -> None:
    largest = torch.finfo(layer.row_dtype).max
    if largest < torch.finfo(layer.dtype).max and tokens.numel() and float(tokens.abs().max()) > largest:
        raise NonFiniteError(
            f"layer {layer.name}: expected inputs within the range of wire_dtype {_name(layer.row_dtype)}, "
            f"{largest:g}, found {float(tokens.abs().max()):g}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(str(size) for size in shape)}{',' if len(shape) == 1 else ''})"
