"""An expert of kind ``remote`` and a real router: answers, deadlines, drops, refusals, and routers that move."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.live_router import WIDTH, LiveRouter, StartRouter
from fakes.secured import ALICE, BOB, tls_config, write_tokens
from moe_runtime.config.experts import ResourcesConfig
from moe_runtime.config.security import SecurityConfig
from moe_runtime.errors import InnerLayerError
from moe_runtime.experts.build import LoadedExpert, build_expert
from moe_runtime.experts.deadline import answer_within, time_left_s
from moe_runtime.experts.host import ExpertCall, ExpertHost
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.launch.expert_process import ExpertProcess
from moe_runtime.launch.nested.asked_layer import AskedLayer, LayerCalls
from moe_runtime.launch.nested.kinds import register_nested_kinds
from moe_runtime.launch.nested.options import AccessOptions
from moe_runtime.launch.recipes import HostedExpert, HostSpec
from moe_runtime.rpc.border import failure_kind
from moe_runtime.rpc.certificates import make_certificates
from moe_runtime.service.ports import HostReply, HostRequest, Segment
from moe_runtime.service.routing_table import RoutingTable
from moe_runtime.transport.in_process import InProcessNetwork

LONG_S = 20.0


@pytest.fixture(autouse=True)
def _time_left() -> None:
    register_nested_kinds()
    answer_within(LONG_S)


def load(target: str | list[str], *, layer: str = "vectors", dtype: str = "float32", **options: Any) -> LoadedExpert:
    given = {"target": target, "layer": layer, **options}
    return build_expert(ExpertSpec("outer", 0, "far", "remote", (WIDTH,), options=given, dtype=dtype))


def rows(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows))


def ask(target: str, num_rows: int = 2, **options: Any) -> torch.Tensor:
    outputs: torch.Tensor = load(target, **options).module(rows(num_rows))
    return outputs


def vectors(where: str) -> AskedLayer:
    return AskedLayer("vectors", where, (WIDTH,), (WIDTH,))


def test_rows_come_back_as_the_layer_answers_them_and_are_counted(router: LiveRouter) -> None:
    expert = load(router.address)
    [outcome] = ExpertHost({"outer/far/0": expert}).run([ExpertCall("outer/far/0", rows(5))])
    # The layer's experts are identities, and the weights of its two add up to 1.
    torch.testing.assert_close(outcome.rows, rows(5))
    assert expert.module.counts() == {
        "num_calls": 1,
        "num_assignments": 10,
        "num_served": 10,
        "num_dropped_capacity": 0,
        "num_dropped_failure": 0,
        "num_rerouted": 0,
    }


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_every_dtype_that_the_layer_has_comes_back(router: LiveRouter, dtype: str) -> None:
    layer = {"float64": "doubles", "bfloat16": "brain"}[dtype]
    given = rows(3).to(getattr(torch, dtype))
    outputs = load(router.address, layer=layer, dtype=dtype).module(given)
    assert outputs.dtype == given.dtype
    torch.testing.assert_close(outputs, given, rtol=1e-2, atol=1e-2)


def test_rows_that_exceed_one_message_are_streamed(router: LiveRouter) -> None:
    assert ask(router.address, 20, layer="wide", out_shape=[1 << 16]).shape == (20, 1 << 16)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layer": "victors"}, "expected a layer victors, found brain, doubles, raw, stuck, vectors, wide"),
        ({"out_shape": [7]}, r"out_shape: expected \[7\], found \[4\]"),
        ({"layer": "doubles"}, "dtype: expected float32, found float64"),
    ],
)
def test_a_layer_that_is_not_as_stated_is_told_at_the_first_rows(
    router: LiveRouter, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InnerLayerError, match=f"^layer {router.address}/{options.get('layer', 'vectors')}: {expected}"):
        ask(router.address, **options)


def test_an_inner_layer_that_does_not_answer_fails_the_call_before_the_outer_one_is_given_up(
    start_router: StartRouter,
) -> None:
    router = start_router()
    expert = load(router.address, layer="stuck")
    host = ExpertHost({"outer/far/0": expert})
    answer_within(1.0)
    started = time.monotonic()
    outcomes = host.run([ExpertCall("outer/far/0", rows(8)), ExpertCall("outer/far/0", rows(3))])
    assert time.monotonic() - started < 1.0
    assert [outcome.rows for outcome in outcomes] == [None, None]
    assert "InnerLayerError: layer " in str(outcomes[0].error)
    assert "DeadlineExceededError" in str(outcomes[0].error)
    # Not tried again in halves.
    assert host.experts["outer/far/0"].num_forwards == 1
    assert expert.module.counts() == {"num_calls": 1, "num_failed_calls": 1, "num_DeadlineExceededError": 1}


def test_a_timeout_of_its_own_is_shorter_than_what_the_outer_layer_has_left(start_router: StartRouter) -> None:
    expert = load(start_router().address, layer="stuck", timeout_ms=200)
    started = time.monotonic()
    with pytest.raises(InnerLayerError, match="DeadlineExceededError"):
        expert.module(rows(1))
    assert time.monotonic() - started < LONG_S / 2


def test_no_call_is_sent_when_nobody_waits_any_more(router: LiveRouter) -> None:
    expert = load(router.address)
    answer_within(-1.0)
    with pytest.raises(InnerLayerError, match="the time of the outer layer's attempt is over"):
        expert.module(rows(1))
    assert (time_left_s() or 0.0) < 0.0


def test_a_row_that_the_inner_layer_refuses_fails_alone(router: LiveRouter) -> None:
    host = ExpertHost({"outer/far/0": load(router.address)})
    bad = rows(4)
    bad[2, 1] = float("nan")
    good, spoiled = host.run([ExpertCall("outer/far/0", rows(4)), ExpertCall("outer/far/0", bad)])
    assert good.error is None
    assert good.rows is not None
    torch.testing.assert_close(good.rows, rows(4))
    assert spoiled.failed_rows == (2,)
    assert "NonFiniteError" in str(spoiled.error)


def test_what_the_inner_layer_loses_is_counted_and_logged_once_in_a_while(
    start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    router = start_router()
    expert = load(router.address)
    # Each row's other expert is served.
    table = router.service.describe()["table_version"] + 1
    router.service.set_table(RoutingTable(table, {("vectors", 1): router.replicas["vectors", 1]}))
    with caplog.at_level(logging.WARNING, logger="moe_runtime.launch.nested"):
        for _ in range(3):
            assert expert.module(rows(2)).shape == (2, WIDTH)
    counts = expert.module.counts()
    assert (counts["num_dropped_failure"], counts["num_served"]) == (6, 6)
    assert "num_failed_calls" not in counts
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"layer {router.address}/vectors: 2 of 4 assignments lost: expert expert-0: no replica is")


def test_an_inner_layer_that_lost_everything_fails_the_call_and_its_residual_is_no_answer(
    start_router: StartRouter, caplog: pytest.LogCaptureFixture
) -> None:
    router = start_router()
    expert = load(router.address)
    host = ExpertHost({"outer/far/0": expert})
    router.service.set_table(RoutingTable(2, {}))
    with caplog.at_level(logging.WARNING):
        outcomes = host.run([ExpertCall("outer/far/0", rows(1)), ExpertCall("outer/far/0", rows(3))])
    assert [outcome.rows for outcome in outcomes] == [None, None]
    lost = f"InnerLayerError: layer {router.address}/vectors: served none of 8 assignments: expert expert-0: no replica"
    assert lost in str(outcomes[0].error)
    assert failure_kind(str(outcomes[1].error)) == "its inner layer served nothing"
    assert expert.module.counts() == {
        "num_calls": 1,
        "num_failed_calls": 1,
        "num_assignments": 8,
        "num_served": 0,
        "num_dropped_capacity": 0,
        "num_dropped_failure": 8,
        "num_rerouted": 0,
    }
    # Once, by the host, and not tried again in halves.
    assert [lost in record.getMessage() for record in caplog.records] == [True]
    assert host.experts["outer/far/0"].num_forwards == 1


def test_a_router_that_cannot_be_reached_is_this_expert_s_failure_and_it_serves_when_it_is_back(
    start_router: StartRouter,
) -> None:
    first = start_router()
    expert = load(first.address)
    expert.module(rows(1))
    first.stop()
    answer_within(2.0)
    with pytest.raises(InnerLayerError, match=r"UnavailableError|DeadlineExceededError"):
        expert.module(rows(1))
    start_router(address=first.address)
    answer_within(LONG_S)
    give_up_at = time.monotonic() + LONG_S
    while True:
        try:
            torch.testing.assert_close(expert.module(rows(2)), rows(2))
            break
        except InnerLayerError:
            assert time.monotonic() < give_up_at


def test_routers_that_moved_are_found_within_the_call(start_router: StartRouter) -> None:
    first = start_router()
    addresses = [first.address]
    calls = LayerCalls(vectors("l"), AccessOptions(), find_routers=lambda: addresses)
    calls.forward(rows(1))
    addresses[:] = [start_router().address]
    first.stop()
    torch.testing.assert_close(calls.forward(rows(2)), rows(2))
    calls.close()


def test_routers_that_have_not_started_are_looked_for_again_with_the_next_rows(start_router: StartRouter) -> None:
    addresses: list[str] = []
    calls = LayerCalls(vectors("l"), AccessOptions(), find_routers=lambda: addresses)
    with pytest.raises(InnerLayerError, match="l: UnavailableError: no router has started yet"):
        calls.forward(rows(1))
    addresses.append(start_router().address)
    torch.testing.assert_close(calls.forward(rows(2)), rows(2))
    calls.close()


def test_a_host_that_stops_does_not_wait_for_the_inner_layer(start_router: StartRouter) -> None:
    router = start_router()
    network = InProcessNetwork()
    options = {"target": router.address, "layer": "stuck"}
    spec = ExpertSpec("outer", 0, "far", "remote", (WIDTH,), options=options)
    host_spec = HostSpec("outer/far/0", (HostedExpert("outer/far/0", spec),), "cpu", ResourcesConfig())
    process = ExpertProcess(host_spec, open_transport=network.host_transport, num_threads=None)
    endpoint = process.start().endpoint
    transport = network.router_transport()
    transport.send(endpoint, HostRequest(1, (Segment("outer/far/0", 2),), rows(2), LONG_S))
    router.wait_for(lambda status: status["open_requests"] == 1)
    assert process.health().busy_s > 0.0
    started = time.monotonic()
    process.stop()
    assert time.monotonic() - started < LONG_S / 2
    # And then that the host is gone.
    reply = transport.poll(LONG_S)[0]
    assert isinstance(reply, HostReply)
    assert "InnerLayerError" in str(reply.results[0].error)
    transport.close()


def test_one_router_of_two_is_enough(start_router: StartRouter) -> None:
    first, second = start_router(), start_router()
    expert = load([first.address, second.address])
    expert.module(rows(1))
    first.stop()
    for _ in range(4):
        torch.testing.assert_close(expert.module(rows(2)), rows(2))


def test_the_inner_runtime_s_token_and_certificate_are_shown(start_router: StartRouter, tmp_path: Path) -> None:
    files = make_certificates(tmp_path / "certs")
    tokens = write_tokens(tmp_path / "tokens.json")
    tls = tls_config(files, mutual=True).tls
    router = start_router(security=SecurityConfig(tls=tls, tokens=str(tokens)))
    (tmp_path / "token").write_text(ALICE)
    access = {"ca": str(files.ca), "cert": str(files.client), "key": str(files.client_key)}
    torch.testing.assert_close(ask(router.address, **access, token_file=str(tmp_path / "token")), rows(2))
    with pytest.raises(InnerLayerError, match="UnauthenticatedError"):
        ask(router.address, **access)


def test_a_token_that_was_rotated_is_read_again_and_is_in_no_message(
    start_router: StartRouter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    router = start_router(security=SecurityConfig(tokens=str(write_tokens(tmp_path / "tokens.json"))))
    file = tmp_path / "token"
    file.write_text("x" * 20)
    expert = load(router.address, token_file=str(file))
    with pytest.raises(InnerLayerError, match="UnauthenticatedError") as caught:
        expert.module(rows(1))
    assert "x" * 20 not in str(caught.value) + caplog.text + repr(expert)
    file.write_text(BOB)
    torch.testing.assert_close(expert.module(rows(2)), rows(2))


def test_the_environment_s_token_is_not_sent_to_another_runtime(
    start_router: StartRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = start_router(security=SecurityConfig(tokens=str(write_tokens(tmp_path / "tokens.json"))))
    monkeypatch.setenv("MOE_RUNTIME_TOKEN", ALICE)
    with pytest.raises(InnerLayerError, match="UnauthenticatedError"):
        ask(router.address)
