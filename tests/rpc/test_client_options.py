"""What a client makes of the options that it is given: what travels, and what it says of those that cannot."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from fakes.live_router import WIDTH, LiveRouter
from moe_runtime.errors import DTypeError, InvalidRequestError
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.wishes import options_to_wire
from moe_runtime.wire.messages import NO_OPTIONS, RequestOptions
from moe_runtime.wire.tensors import from_numpy

ROWS = np.ones((3, WIDTH), np.float32)
NO_RANGE = "option k: expected an integer of 1 to the layer's k, or a numpy array or a torch tensor of integers, "


def test_every_option_travels() -> None:
    wishes: RequestOptions[Any] = RequestOptions(
        gate_input=ROWS,
        token_ids=torch.tensor([5, 6, 7]),
        task="label",
        k=np.array([1, 2, 1]),
        seed=2**63 - 1,
        mask=np.array([True, True, False]),
        isolated=True,
    )
    expected = dataclasses.replace(
        wishes,
        gate_input=from_numpy(ROWS),
        token_ids=from_numpy(np.array([5, 6, 7])),
        k=from_numpy(np.array([1, 2, 1])),
        mask=from_numpy(np.array([True, True, False])),
    )
    assert options_to_wire(wishes) == expected
    assert options_to_wire(NO_OPTIONS) == RequestOptions()


@pytest.mark.parametrize("integer", [np.int64, np.int8, np.uint8, np.uint64])
def test_integers_and_bools_of_numpy_travel_as_pythons(integer: type[np.integer[Any]]) -> None:
    wire = options_to_wire(RequestOptions(k=integer(1), seed=integer(2), isolated=np.bool_(True)))
    assert wire == RequestOptions(k=1, seed=2, isolated=True)
    assert [type(value) for value in (wire.k, wire.seed, wire.isolated)] == [int, int, bool]


def test_integers_of_numpy_reach_the_policy(client: MoEClient) -> None:
    options: RequestOptions[Any] = RequestOptions(k=np.int64(1), seed=np.int64(1), isolated=np.bool_(True))
    assert client.forward(ROWS, layer="vectors", options=options, timeout_s=10).report.num_assignments == 3


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("mask", [True], "option mask: expected a numpy array or a torch tensor of bool, (num_tokens,), found list"),
        ("mask", (True,), "option mask: expected a numpy array or a torch tensor of bool, (num_tokens,), found tuple"),
        (
            "token_ids",
            [1],
            "option token_ids: expected a numpy array or a torch tensor of integers, (num_tokens,), found list",
        ),
        (
            "gate_input",
            [[1.0]],
            "option gate_input: expected a numpy array or a torch tensor of floats, (num_tokens, gate_features), "
            "found list",
        ),
        ("k", [1], f"{NO_RANGE}(num_tokens,), found list"),
        ("k", 1.0, f"{NO_RANGE}(num_tokens,), found float"),
        ("k", True, f"{NO_RANGE}(num_tokens,), found bool"),
        ("k", 0, f"{NO_RANGE}(num_tokens,), found 0"),
        ("k", -1, f"{NO_RANGE}(num_tokens,), found -1"),
        ("k", np.int64(-1), f"{NO_RANGE}(num_tokens,), found -1"),
        ("k", 2**63, f"{NO_RANGE}(num_tokens,), found 9223372036854775808"),
        (
            "seed",
            2**64,
            "option seed: expected an integer of 0 to 9223372036854775807, found 18446744073709551616",
        ),
        ("seed", -1, "option seed: expected an integer of 0 to 9223372036854775807, found -1"),
        ("seed", "1", "option seed: expected an integer of 0 to 9223372036854775807, found str"),
        ("seed", True, "option seed: expected an integer of 0 to 9223372036854775807, found bool"),
        ("task", 3, "option task: expected the name of a task, a string, found int"),
        ("isolated", "yes", "option isolated: expected a bool, found str"),
    ],
)
def test_an_option_that_cannot_be_right_is_named_with_what_is_expected(option: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(message)}$"):
        options_to_wire(RequestOptions(**{option: value}))


def test_an_integer_of_thousands_of_digits_is_not_written_out() -> None:
    with pytest.raises(InvalidRequestError, match=r"^option k: expected .*, found one of 100001 bits$"):
        options_to_wire(RequestOptions(k=1 << 100_000))


@pytest.mark.parametrize("array", [np.array(["a"]), torch.ones(1, dtype=torch.complex64)])
def test_an_array_of_a_dtype_that_the_wire_lacks_is_named(array: Any) -> None:
    with pytest.raises(DTypeError, match=r"^option token_ids: expected a (numpy array|torch tensor) of float32, "):
        options_to_wire(RequestOptions(token_ids=array))


@pytest.mark.parametrize(("options", "found"), [({"k": 1}, "dict"), (None, "NoneType")])
async def test_both_clients_refuse_options_that_are_no_request_options(
    options: Any, found: str, router: LiveRouter
) -> None:
    message = rf"^options: expected RequestOptions\(k=\.\.\., \.\.\.\), found {found}$"
    with MoEClient(router.address) as client, pytest.raises(InvalidRequestError, match=message):
        client.forward(ROWS, layer="vectors", options=options, timeout_s=10)
    async with AsyncMoEClient(router.address) as aio_client:
        with pytest.raises(InvalidRequestError, match=message):
            await aio_client.forward(ROWS, layer="vectors", options=options, timeout_s=10)
