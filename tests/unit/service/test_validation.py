"""Requests that cannot be right are refused with the error and the words that say why."""

from __future__ import annotations

import pytest
import torch

from fakes.service import make_layer, tokens_of
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.errors import (
    DTypeError,
    InvalidRequestError,
    MoERuntimeError,
    NonFiniteError,
    RequestTooLargeError,
    ShapeError,
)
from moe_runtime.service.requests import LayerRequest
from moe_runtime.service.validation import unused_options, validate_request
from moe_runtime.wire.messages import RequestOptions

LAYER = make_layer(num_experts=3, k=2, gate_features=3)
ROUTER = RouterConfig(max_batch_tokens=8, max_queued_tokens=32, max_queued_bytes=32 * 12)


def check(tokens: torch.Tensor, layer=LAYER, limits: LimitsConfig | None = None, **options) -> None:
    request = LayerRequest("r", layer.name, tokens, RequestOptions(**options))
    validate_request(request, layer, limits=limits or LimitsConfig(max_request_tokens=16), router=ROUTER)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate_input": torch.zeros(2, 3)},
        {"gate_input": torch.zeros(2, 3, dtype=torch.float64)},
        {"k": 1},
        {"k": torch.tensor([1, 2])},
        {"mask": torch.tensor([True, False])},
        {"token_ids": torch.tensor([5, 6], dtype=torch.int32), "task": "a", "seed": 0},
        {"isolated": True},
    ],
)
def test_a_right_request_passes(options) -> None:
    check(tokens_of(2), **options)


def test_a_request_without_rows_passes() -> None:
    check(torch.zeros(0, 3), k=torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        (torch.zeros(2, 4), {}, ShapeError, r"inputs of shape \(num_tokens, 3\), found \(2, 4\)"),
        (torch.zeros(3), {}, ShapeError, r"found \(3,\)"),
        (torch.tensor(1.0), {}, ShapeError, r"found \(\)"),
        (torch.zeros(2, 3, dtype=torch.float64), {}, DTypeError, "dtype float32, found float64"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, DTypeError, "found int64"),
        (torch.tensor([[0, 0, 0], [0, torch.nan, 0]]), {}, NonFiniteError, "finite inputs.* in row 1"),
        (torch.full((1, 3), -torch.inf), {}, NonFiniteError, "in row 0"),
        (torch.zeros(17, 3), {}, RequestTooLargeError, "at most 16 tokens in a request, found 17"),
        (torch.zeros(9, 3), {"isolated": True}, RequestTooLargeError, "one batch of at most 8 tokens, found 9"),
        (torch.zeros(2, 3), {"gate_input": torch.zeros(1, 3)}, ShapeError, r"gate_input of shape \(2, 3\)"),
        (torch.zeros(2, 3), {"gate_input": torch.zeros(2, 3).long()}, DTypeError, "gate_input of a float dtype"),
        (torch.zeros(1, 3), {"gate_input": torch.full((1, 3), torch.inf)}, NonFiniteError, "finite gate_input"),
        (torch.zeros(2, 3), {"mask": torch.ones(3, dtype=torch.bool)}, ShapeError, r"mask of shape \(2,\)"),
        (torch.zeros(2, 3), {"mask": torch.ones(2)}, DTypeError, "mask of dtype bool, found float32"),
        (torch.zeros(2, 3), {"token_ids": torch.ones(2)}, DTypeError, "token_ids of dtype int8 or"),
        (torch.zeros(2, 3), {"token_ids": torch.ones(1).int()}, ShapeError, r"token_ids of shape \(2,\)"),
        (torch.zeros(2, 3), {"seed": -1}, InvalidRequestError, "seed: expected 0 to 9223372036854775807, found -1"),
        (torch.zeros(2, 3), {"seed": 2**63}, InvalidRequestError, "seed: expected"),
        (torch.zeros(2, 3), {"k": 0}, InvalidRequestError, "k of 1 to 2, found 0"),
        (torch.zeros(2, 3), {"k": 3}, InvalidRequestError, "k of 1 to 2, found 3"),
        (torch.zeros(2, 3), {"k": torch.tensor([1, 3])}, InvalidRequestError, "found 3"),
        (torch.zeros(2, 3), {"k": torch.tensor([0, 3])}, InvalidRequestError, "found 0"),
        (torch.zeros(2, 3), {"k": torch.tensor([1.0, 1.0])}, DTypeError, "k of dtype int8"),
        (torch.zeros(2, 3), {"k": torch.tensor([1])}, ShapeError, r"k of shape \(2,\)"),
    ],
)
def test_a_wrong_request_is_refused(tokens: torch.Tensor, options, error: type[MoERuntimeError], message: str) -> None:
    with pytest.raises(error, match=message):
        check(tokens, **options)


def test_the_k_of_a_layer_that_allows_one_alone_is_told_as_one() -> None:
    layer = make_layer(3, k=1, gate_features=3)
    with pytest.raises(InvalidRequestError, match=r"expected k of 1, found 2$"):
        check(tokens_of(2), layer=layer, k=2)


def test_more_bytes_than_the_queue_holds_are_refused() -> None:
    wide = make_layer(item_shape=(400,), gate_features=2)
    with pytest.raises(RequestTooLargeError, match="at most 384 bytes of tokens in a request, found 1600"):
        check(torch.zeros(1, 400), layer=wide)


def test_a_gate_that_does_not_see_the_tokens_needs_its_own_input() -> None:
    with pytest.raises(InvalidRequestError, match="expected option gate_input, 2 wide"):
        check(torch.zeros(1, 3), layer=make_layer(num_experts=2))
    check(torch.zeros(0, 3), layer=make_layer(num_experts=2))


def test_a_layer_may_allow_non_finite_input() -> None:
    check(torch.full((1, 3), torch.nan), layer=make_layer(3, k=2, gate_features=3, allow_non_finite=True))


def test_options_that_the_policy_does_not_read_are_named() -> None:
    request = LayerRequest("r", "layer", tokens_of(1), RequestOptions(token_ids=torch.tensor([1]), task="x"))
    assert unused_options(request, LAYER) == (
        "option token_ids has no effect: the policy of layer layer does not use it",
        "option task has no effect: the gate of layer layer has one part for all tasks",
    )
    assert unused_options(LayerRequest("r", "layer", tokens_of(1)), LAYER) == ()


def test_a_token_beyond_the_range_of_the_wires_dtype_is_refused() -> None:
    narrow = make_layer(3, k=2, gate_features=3, wire_dtype=torch.float16)
    check(torch.full((2, 3), 65504.0), layer=narrow)
    with pytest.raises(NonFiniteError, match="within the range of wire_dtype float16, 65504, found 70000"):
        check(torch.full((2, 3), -70000.0), layer=narrow)


def test_a_request_to_an_exact_layer_must_fit_one_batch() -> None:
    with pytest.raises(RequestTooLargeError, match="one batch of at most 8 tokens, found 9"):
        check(torch.zeros(9, 3), layer=make_layer(3, k=2, gate_features=3, exact=True))
