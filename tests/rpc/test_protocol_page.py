"""docs/protocol.md says what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.config.runtime import LimitsConfig
from moe_runtime.rpc import methods
from moe_runtime.rpc.retries import DEFAULT_RETRY_POLICY
from moe_runtime.rpc.status import STATUS_CODES
from moe_runtime.wire import fields as wire_fields
from moe_runtime.wire.codec import (
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    decode_info_request,
    decode_reply,
    decode_request,
    encode_info,
    encode_reply,
    encode_request,
)
from moe_runtime.wire.framing import REQUEST_LIMITS
from moe_runtime.wire.messages import Report, RequestOptions, Timings
from moe_runtime.wire.tensors import MAX_DIMS, WIRE_DTYPES, to_numpy

PAGE = Path(__file__).parents[2].joinpath("docs", "protocol.md").read_text()


def example(name: str) -> bytes:
    block = re.search(rf"```hex {name}\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    return bytes.fromhex(block[1])


def first_cells(section: str) -> list[str]:
    """Names in the first column of all tables of a section."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def test_request_of_the_page_decodes_and_encodes_to_the_same_bytes() -> None:
    request = decode_request(example("request"))
    assert (request.request_id, request.layer, request.return_routing) == ("example-1", "vectors", True)
    assert to_numpy(request.inputs).tolist() == [[1.0, -2.0]]
    assert request.options == RequestOptions(k=1)
    assert encode_request(request) == example("request")


def test_reply_of_the_page_decodes_and_encodes_to_the_same_bytes() -> None:
    reply = decode_reply(example("reply"))
    assert to_numpy(reply.outputs).tolist() == [[2.0, -4.0]]
    assert (reply.report.request_id, reply.report.table_version, reply.report.num_served) == ("example-1", 3, 1)
    assert reply.report.timings == Timings(0.5, 0.25, 1.0, 0.25, 2.0)
    assert reply.report.expert_ids is not None
    np.testing.assert_array_equal(reply.report.expert_ids, [4])
    assert encode_reply(reply) == example("reply")


def test_question_of_the_page_is_the_one_that_clients_send() -> None:
    decode_info_request(example("question"))
    assert encode_info() == example("question")


def test_page_lists_every_method() -> None:
    for method in (methods.FORWARD, methods.FORWARD_STREAM, methods.DESCRIBE, methods.STATUS):
        assert f"`{methods.path(method)}`" in PAGE


def test_page_lists_every_dtype_with_its_size() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d) \|", PAGE, re.MULTILINE)
    assert {name: int(size) for name, size in rows} == {name: d.itemsize for name, d in WIRE_DTYPES.items()}


def test_page_lists_every_error_with_its_status() -> None:
    rows = re.findall(r"^\| `(\w+Error)` \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert dict(rows) == {error.__name__: code.name for error, code in STATUS_CODES.items()}


def test_page_lists_every_field_of_requests_and_replies() -> None:
    documented = first_cells("Forward")
    for kind in (RequestOptions, Report):
        assert {f.name for f in fields(kind)} <= set(documented)
    assert {"request_id", "layer", "inputs", "options", "return_routing", "outputs", "report"} <= set(documented)
    assert all(f"`{f.name}`" in PAGE for f in fields(Timings))


@pytest.mark.parametrize(
    "statement",
    [
        f"Version described here: **{PROTOCOL_MAJOR}.{PROTOCOL_MINOR}**",
        f"**{methods.UNARY_BYTES:,} bytes**",
        f"strings above {REQUEST_LIMITS.max_str_len:,} bytes",
        f"arrays and maps above {REQUEST_LIMITS.max_array_len} entries",
        f"at most {MAX_DIMS} sizes",
        f"1 to {wire_fields.MAX_REQUEST_ID_CHARS} characters",
        f"1 to {wire_fields.MAX_NAME_CHARS} characters",
        f"`{methods.ERROR_KEY}`",
        f"`{methods.RETRY_AFTER_KEY}`",
        f"`limits.max_request_bytes` ({LimitsConfig().max_request_bytes >> 20} MiB by default)",
        f"`limits.default_timeout_s` ({LimitsConfig().default_timeout_s:.0f} s)",
        f"`limits.max_timeout_s` ({LimitsConfig().max_timeout_s:.0f} s)",
        f"pauses {DEFAULT_RETRY_POLICY.first_backoff_s * 1e3:.0f} ms",
        f"makes at most {DEFAULT_RETRY_POLICY.max_attempts} attempts",
        f"at most {DEFAULT_RETRY_POLICY.budget:.0f} retries",
    ],
)
def test_number_on_the_page_is_the_number_in_the_code(statement: str) -> None:
    assert statement in " ".join(PAGE.split())


def test_array_and_map_limits_are_one_number() -> None:
    assert REQUEST_LIMITS.max_array_len == REQUEST_LIMITS.max_map_len
