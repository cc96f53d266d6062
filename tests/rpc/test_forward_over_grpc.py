"""A request from a client through gRPC, the service and real experts, and back."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from fakes.live_router import WIDE, WIDTH, LiveRouter, StartRouter
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.rpc.aio_client import AsyncMoEClient
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.methods import UNARY_BYTES
from moe_runtime.wire.messages import RequestOptions

ROWS = np.arange(3 * WIDTH, dtype=np.float32).reshape(3, WIDTH) / 8


def test_numpy_in_gives_numpy_out(client: MoEClient) -> None:
    result = client.forward(ROWS, layer="vectors", timeout_s=10)
    assert isinstance(result.outputs, np.ndarray)
    assert result.outputs.dtype == np.float32
    np.testing.assert_allclose(result.outputs, ROWS, rtol=1e-6)


def test_torch_in_gives_torch_out(client: MoEClient) -> None:
    rows = torch.from_numpy(ROWS.copy()).requires_grad_()
    outputs = client.forward(rows, layer="vectors", timeout_s=10).outputs
    assert isinstance(outputs, torch.Tensor)
    torch.testing.assert_close(outputs, rows.detach())


def test_bfloat16_travels_as_it_is(client: MoEClient) -> None:
    rows = torch.from_numpy(ROWS.copy()).bfloat16()
    outputs = client.forward(rows, layer="brain", timeout_s=10).outputs
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, rows)


def test_float64_keeps_its_precision(client: MoEClient) -> None:
    rows = np.full((1, WIDTH), 1 / 3)
    np.testing.assert_allclose(client.forward(rows, layer="doubles", timeout_s=10).outputs, rows, rtol=1e-6)


def test_report_accounts_for_every_assignment(client: MoEClient) -> None:
    report = client.forward(ROWS, layer="vectors", timeout_s=10, return_routing=True).report
    assert (report.layer, report.num_tokens, report.num_assignments, report.num_served) == ("vectors", 3, 6, 6)
    assert report.table_version == 1
    assert report.token_ids is not None
    assert report.token_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert report.expert_ids is not None
    assert [set(pair) for pair in report.expert_ids.reshape(3, 2).tolist()] == [{0, 1}] * 3
    assert report.expert_weights is not None
    np.testing.assert_allclose(report.expert_weights.reshape(3, 2).sum(1), 1, rtol=1e-6)
    assert report.timings.total_ms > 0


def test_routing_stays_out_of_the_report_unless_it_was_asked_for(client: MoEClient) -> None:
    assert client.forward(ROWS, layer="vectors", timeout_s=10).report.expert_ids is None


def test_options_reach_the_policy(client: MoEClient) -> None:
    options = RequestOptions(k=np.array([1, 2, 1]), mask=np.array([True, True, False]), seed=5)
    report = client.forward(ROWS, layer="vectors", options=options, timeout_s=10).report
    assert report.num_assignments == 3


def test_options_may_be_of_the_other_kind_than_the_inputs(client: MoEClient) -> None:
    options = RequestOptions(mask=torch.tensor([True, False, False]))
    assert client.forward(ROWS, layer="vectors", options=options, timeout_s=10).report.num_assignments == 2


def test_empty_batch_gets_an_empty_answer(client: MoEClient) -> None:
    result = client.forward(np.empty((0, WIDTH), np.float32), layer="vectors", timeout_s=10)
    assert result.outputs.shape == (0, WIDTH)
    assert result.report.num_assignments == 0


def test_input_above_one_message_is_streamed(start_router: StartRouter) -> None:
    most = 1 << 20
    live = start_router(limits=LimitsConfig(max_request_tokens=most), router=RouterConfig(max_queued_tokens=most))
    rows = np.random.default_rng(0).standard_normal((300_000, WIDTH)).astype(np.float32)
    assert rows.nbytes > UNARY_BYTES
    with MoEClient(live.address) as client:
        result = client.forward(rows, layer="vectors", timeout_s=30, return_routing=True)
        calls = client.status()["rpc"]["num_calls"]
    np.testing.assert_allclose(result.outputs, rows, rtol=1e-5)
    assert result.report.num_served == 600_000
    assert calls == {"ForwardStream": 1, "Status": 1}


def test_answer_above_one_message_is_streamed(client: MoEClient) -> None:
    rows = np.ones((17, WIDTH), np.float32)
    result = client.forward(rows, layer="wide", timeout_s=30)
    assert result.outputs.shape == (17, WIDE)
    assert result.outputs.nbytes > UNARY_BYTES
    assert client.status()["rpc"]["num_errors"]["StreamRequiredError"] >= 1


def test_describe_names_layers_and_experts(client: MoEClient) -> None:
    description = client.describe(timeout_s=10)
    assert description["name"] == "live"
    layer = description["layers"]["vectors"]
    assert layer["item_shape"] == [WIDTH]
    assert [expert["name"] for expert in layer["experts"]] == ["expert-0", "expert-1"]


def test_status_counts_requests_and_refusals(client: MoEClient) -> None:
    before = client.status(timeout_s=10)
    client.forward(ROWS, layer="vectors", timeout_s=10)
    with pytest.raises(ValueError, match="nowhere"):
        client.forward(ROWS, layer="nowhere", timeout_s=10)
    after = client.status(timeout_s=10)
    assert after["rpc"]["num_calls"]["Forward"] == before["rpc"]["num_calls"].get("Forward", 0) + 2
    assert after["rpc"]["num_errors"]["UnknownLayerError"] == 1


async def test_asyncio_client_has_the_same_methods(router: LiveRouter) -> None:
    async with AsyncMoEClient(router.address) as client:
        small = [client.forward(ROWS + i, layer="vectors", timeout_s=10) for i in range(16)]
        large = client.forward(np.ones((17, WIDTH), np.float32), layer="wide", timeout_s=30)
        *answers, wide = await asyncio.gather(*small, large)
        assert wide.outputs.shape == (17, WIDE)
        for i, answer in enumerate(answers):
            np.testing.assert_allclose(answer.outputs, ROWS + i, rtol=1e-6)
        assert (await client.describe())["name"] == "live"
        assert (await client.status())["num_requests"] >= 17
