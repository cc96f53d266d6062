from __future__ import annotations

import importlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_runtime.errors import ConfigError, StartError, UnavailableError
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient
from moe_runtime.rpc.retries import RetryPolicy

EXPERTS = [{"kind": "feed_forward", "count": 3, "options": {"hidden_features": 8, "out_features": 4}}]


def config(**changes):
    return {
        "name": "local",
        "device": "cpu",
        "layers": {"l": {"item_shape": [6], "experts": EXPERTS, **changes.pop("layer", {})}},
        "router": {"address": "127.0.0.1:0", **changes.pop("router", {})},
        **changes,
    }


def own_threads():
    """Names of the runtime's threads; gRPC keeps one of its own."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moe-")]


def test_threads_of_this_process_answer_a_client():
    with serve(config(), ray=False) as runtime, MoEClient(runtime.address) as client:
        result = client.forward(torch.randn(5, 6), layer="l", timeout_s=20.0)
        assert result.outputs.shape == (5, 4)
        assert result.report.num_served == 10
        assert client.describe()["name"] == "local"
        description = runtime.describe()
    assert description["addresses"] == list(runtime.addresses)
    assert [host["state"] for host in description["hosts"]] == ["ready"] * 3
    assert list(description["layers"]) == ["l"]


def test_every_replica_of_an_expert_is_in_the_table():
    experts = [{**EXPERTS[0], "replicas": 2}]
    with serve(config(layer={"experts": experts}), ray=False) as runtime, MoEClient(runtime.address) as client:
        assert client.forward(torch.randn(5, 6), layer="l", timeout_s=20.0).report.num_served == 10
        description = runtime.describe()
    assert len(description["hosts"]) == 6
    assert [
        [replica["replica_id"] for replica in expert["replicas"]] for expert in description["layers"]["l"]["experts"]
    ] == [[f"l/feed_forward-{i}/0", f"l/feed_forward-{i}/1"] for i in range(3)]


def test_progress_counts_what_is_ready_up_to_everything():
    seen = []
    with serve(config(), ray=False, on_progress=lambda ready, total: seen.append((ready, total))):
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_every_router_has_an_address_and_serves():
    with serve(config(router={"replicas": 2}), ray=False) as runtime:
        assert len(set(runtime.addresses)) == 2
        for address in runtime.addresses:
            with MoEClient(address) as client:
                assert client.forward(torch.randn(1, 6), layer="l", timeout_s=20.0).report.num_served == 2


def test_an_address_given_to_serve_takes_the_place_of_the_configured_one():
    with serve(config(router={"address": "127.0.0.1:1"}), ray=False, address="127.0.0.1:0") as runtime:
        assert runtime.address != "127.0.0.1:1"


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"router\.address"):
        serve(config(), ray=False, address="nowhere")


def test_an_address_that_is_taken_is_a_start_error_and_leaves_no_threads():
    with serve(config(), ray=False) as runtime:
        during = own_threads()
        seen = []
        with pytest.raises(
            StartError, match=f"^router.address {runtime.address}: expected a free port, found it taken"
        ):
            serve(config(), ray=False, address=runtime.address, on_progress=lambda *ready: seen.append(ready))
        assert own_threads() == during
        assert seen == []
    assert not own_threads()


HELD_EXPERT = '''
import threading

from torch import nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.experts import ExpertContract, ExpertKind

opened = threading.Event()
opened.set()


class Held(nn.Module):
    """Answers its input once the test opens it."""

    def __init__(self, shape):
        super().__init__()
        self.contract = ExpertContract(shape, shape)

    def forward(self, rows):
        opened.wait()
        return rows


KIND = ExpertKind("held", StrictModel, lambda in_shape, options: Held(in_shape))
'''


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """The event that experts of kind ``held``, a plug-in, wait for."""
    (tmp_path / "held_expert.py").write_text(HELD_EXPERT)
    info = tmp_path / "held_expert-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: held-expert\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_runtime.experts]\nheld = held_expert:KIND\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("held_expert").opened


def test_close_answers_what_is_in_flight_and_refuses_what_comes_later(opened):
    held = {"experts": [{"kind": "held"}], "policy": {"kind": "switch"}, "timeout_ms": 60_000}
    runtime = serve(config(layer=held), ray=False)
    opened.clear()
    with MoEClient(runtime.address, retry_policy=RetryPolicy(max_attempts=1)) as client, ThreadPoolExecutor(8) as pool:

        def ask():
            return client.forward(torch.randn(2, 6), layer="l", timeout_s=30.0).report.num_served

        asked = [pool.submit(ask) for _ in range(4)]
        while client.status()["open_requests"] < 4:
            assert not any(request.done() for request in asked)
        closing = pool.submit(runtime.close)
        while not client.status()["draining"]:
            assert not closing.done()
        with pytest.raises(UnavailableError):
            ask()
        assert not any(request.done() for request in asked)
        opened.set()
        assert [request.result(timeout=30) for request in asked] == [2, 2, 2, 2]
        assert closing.result(timeout=30)


def test_closing_twice_is_harmless():
    runtime = serve(config(), ray=False)
    assert runtime.close()
    assert runtime.close()


def test_detaching_threads_is_refused():
    with pytest.raises(StartError, match="detach"):
        serve(config(), ray=False, detach=True)


def test_detaching_without_a_cluster_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(StartError, match="ray start --head"):
        serve(config(), detach=True)


def test_a_port_that_is_taken_is_found_before_ray_is_started(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port}: expected a free port, found it taken"):
            serve(config(), address=f"127.0.0.1:{port}")


def test_leaving_a_runtime_that_is_not_detached_is_refused():
    with serve(config(), ray=False) as runtime, pytest.raises(StartError, match="lease"):
        runtime.leave()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_a_line_that_says_so():
    with pytest.raises(StartError, match=r"^l/feed_forward-0/0: expected a GPU that torch can use, found none"):
        serve(config(device="cuda"), ray=False)
