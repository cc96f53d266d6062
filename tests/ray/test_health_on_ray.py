"""Hosts whose forward hangs, whose outputs are wrong, or that grow, as their own health tells it."""

from __future__ import annotations

import os

import pytest
import torch

from fakes.callers import TOKENS, calling
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient

pytestmark = pytest.mark.timeout(240)


def config_of(make_config, *arguments, **changes):
    """A configuration that gives actors time to start on a machine that others use."""
    return {**make_config(*arguments, **changes), "start_timeout_s": 150}


def host_of(runtime):
    return runtime.describe()["hosts"][0]


def answer_of(address):
    with MoEClient(address) as client:
        return client.forward(TOKENS, layer="l", timeout_s=20.0)


def is_served(address):
    return answer_of(address).report.num_served == len(TOKENS)


def test_a_host_whose_forward_hangs_is_replaced_while_requests_are_answered(make_config, eventually, tmp_path, caplog):
    is_busy = tmp_path / "is-busy"
    options = {"quick_pid": os.getpid(), "busy_while": str(is_busy)}
    experts = [{"name": "p", "kind": "patient", "options": options}]
    config = config_of(make_config, "hanging", experts=experts, policy={"kind": "switch"}, timeout_ms=500)
    with serve(config) as runtime:
        hung = host_of(runtime)["pid"]
        is_busy.touch()
        with calling(runtime.addresses, allows_drops=True) as clients:
            eventually(lambda: "a forward has run for" in (host_of(runtime)["reason"] or ""))
            eventually(lambda: host_of(runtime)["pid"] != hung)
            is_busy.unlink()
            eventually(lambda: host_of(runtime)["state"] == "ready")
            eventually(lambda: is_served(runtime.address))
        eventually(lambda: "expert host l/p/0 is out: its forward hangs: it has run for" in caplog.text)
    assert clients.errors == []


def test_a_host_that_gives_wrong_outputs_is_suspect_and_ready_again_when_they_are_right(
    make_config, eventually, tmp_path
):
    is_wrong = tmp_path / "is-wrong"
    experts = [{"name": "s", "kind": "sick", "options": {"wrong_while": str(is_wrong)}}]
    with serve(config_of(make_config, "faulty", experts=experts, policy={"kind": "switch"})) as runtime:
        first = host_of(runtime)["pid"]
        eventually(lambda: host_of(runtime)["health"] is not None)
        is_wrong.touch()
        answer_of(runtime.address)
        is_wrong.unlink()
        reason = eventually(lambda: host_of(runtime)["reason"])
        assert reason.startswith("outputs of the wrong kind: ")
        with MoEClient(runtime.address) as client:

            def replica():
                return client.describe()["layers"]["l"]["experts"][0]["replicas"][0]

            eventually(lambda: {"state": "suspect", "reason": reason}.items() <= replica().items())
        assert is_served(runtime.address)
        eventually(lambda: host_of(runtime)["state"] == "ready")
        assert host_of(runtime)["pid"] == first


def test_a_host_that_grows_gives_way_to_a_successor_without_a_dropped_assignment(
    make_config, eventually, tmp_path, caplog, actor_names
):
    hoards = tmp_path / "hoards"
    expert = {
        "name": "s",
        "kind": "sick",
        "options": {"hoards_when": str(hoards), "num_hoarded_mib": 600},
        "resources": {"max_rss_bytes": 900 << 20},
    }
    with serve(config_of(make_config, "growing", experts=[expert], policy={"kind": "switch"})) as runtime:
        grown = host_of(runtime)["pid"]
        with calling(runtime.addresses) as clients:
            hoards.touch()
            reason = eventually(lambda: host_of(runtime)["reason"])
            hoards.unlink()
            eventually(lambda: (now := host_of(runtime))["pid"] != grown and now["state"] == "ready")
            eventually(lambda: len(actor_names("growing")) == 3)
        assert torch.equal(answer_of(runtime.address).outputs, TOKENS)
        eventually(lambda: "its successor has taken its place" in caplog.text)
    assert clients.errors == []
    assert reason.endswith("MiB, more than max_rss_bytes: 900 MiB")
