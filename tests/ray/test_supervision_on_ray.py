"""What hangs, freezes or fails again and again is replaced; what is restarted on purpose costs no request."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from fakes.callers import TOKENS, calling
from fakes.ray_head import is_alive
from moe_runtime.cli.restarting import restart_and_report
from moe_runtime.errors import UnavailableError
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient

pytestmark = pytest.mark.timeout(240)


def config_of(make_config, *arguments, **changes):
    """A configuration that gives actors time to start on a machine that others use."""
    return {**make_config(*arguments, **changes), "start_timeout_s": 150}


IDENTITY = {"experts": [{"name": "same", "kind": "identity"}], "policy": {"kind": "switch"}}
TWINS = {"experts": [{"name": "same", "kind": "identity", "replicas": 2}], "policy": {"kind": "switch"}}


def pids(runtime, kind="hosts"):
    return [each["pid"] for each in runtime.describe()[kind]]


def replaced(runtime, kind, index, old_pid):
    """What stands in the place of a process now, once it is ready."""
    now = runtime.describe()[kind][index]
    return now if now["state"] == "ready" and now["pid"] != old_pid else None


def answer_of(address):
    with MoEClient(address) as client:
        return client.forward(TOKENS, layer="l", timeout_s=20.0)


def is_served(address):
    """Whether a router answers from its expert; gRPC itself may not try to connect again yet."""
    try:
        return answer_of(address).report.num_served == len(TOKENS)
    except UnavailableError:
        return False


def test_a_frozen_expert_is_replaced_and_its_stale_process_never_answers_for_its_successor(
    make_config, eventually, actor_names
):
    with serve(config_of(make_config, "frozen", timeout_ms=1000, **IDENTITY)) as runtime:
        (frozen,) = pids(runtime)
        with calling(runtime.addresses, allows_drops=True) as clients:
            os.kill(frozen, signal.SIGSTOP)
            eventually(lambda: replaced(runtime, "hosts", 0, frozen))
            if is_alive(frozen):
                os.kill(frozen, signal.SIGCONT)
            eventually(lambda: not is_alive(frozen), deadline_s=10.0)
            eventually(lambda: answer_of(runtime.address).report.num_dropped_failure == 0)
        answer = answer_of(runtime.address)
        assert torch.equal(answer.outputs, TOKENS)
        replicas = runtime.describe()["layers"]["l"]["experts"][0]["replicas"]
        assert [replica["pid"] for replica in replicas] == pids(runtime) != [frozen]
    assert clients.errors == []
    assert actor_names("frozen") == []


def test_a_frozen_router_is_killed_and_comes_back_at_its_address(make_config, eventually):
    config = config_of(make_config, "stuck", router={"replicas": 2}, **IDENTITY)
    with serve(config) as runtime, calling(runtime.addresses) as clients:
        frozen = pids(runtime, "routers")[0]
        os.kill(frozen, signal.SIGSTOP)
        eventually(lambda: replaced(runtime, "routers", 0, frozen))
        assert not is_alive(frozen)
        assert runtime.describe()["addresses"] == list(runtime.addresses)
        eventually(lambda: is_served(runtime.addresses[0]))
    assert clients.errors == []


def test_an_expert_that_cannot_be_built_again_says_why_and_is_tried_ever_later(
    make_config, eventually, tmp_path, caplog
):
    licence = tmp_path / "licence"
    licence.touch()
    experts = [{"name": "picky", "kind": "licensed", "options": {"licence": str(licence)}}]
    with serve(config_of(make_config, "crashing", experts=experts, policy={"kind": "switch"})) as runtime:
        licence.unlink()
        os.kill(pids(runtime)[0], signal.SIGKILL)

        def failed_twice():
            host = runtime.describe()["hosts"][0]
            return host if host["state"] == "out" and host["num_failures"] >= 3 else None

        host = eventually(failed_twice)
        assert host["reason"].endswith("RuntimeError: the licence server is gone")
        with MoEClient(runtime.address) as client:
            replica = client.describe()["layers"]["l"]["experts"][0]["replicas"][0]
        assert replica["state"] in ("out", "starting")
        assert replica["reason"].endswith("RuntimeError: the licence server is gone")
        licence.touch()
        eventually(lambda: runtime.describe()["hosts"][0]["state"] == "ready")
        eventually(lambda: answer_of(runtime.address).report.num_dropped_failure == 0)
    assert "the licence server is gone" in caplog.text


def test_neither_a_dead_controller_nor_then_a_dead_twin_costs_a_request_or_an_assignment(make_config, eventually):
    with serve(config_of(make_config, "twins", **TWINS)) as runtime, calling(runtime.addresses) as clients:
        before = runtime.describe()
        os.kill(before["controller_pid"], signal.SIGKILL)
        eventually(lambda: runtime.describe()["controller_pid"] != before["controller_pid"])
        eventually(lambda: all(host["state"] == "ready" for host in runtime.describe()["hosts"]))
        assert pids(runtime) == [host["pid"] for host in before["hosts"]]
        killed = pids(runtime)[0]
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: replaced(runtime, "hosts", 0, killed))
        assert runtime.describe()["table_version"] > before["table_version"]
    assert clients.errors == []
    assert clients.num_answers > 20


def test_every_process_is_restarted_under_load_without_a_failed_request(make_config, eventually, actor_names, capsys):
    experts = [{"name": name, "kind": "identity"} for name in ("a", "b")]
    config = config_of(make_config, "renewed", experts=experts, policy={"kind": "switch"}, router={"replicas": 2})
    with serve(config) as runtime:
        before = {*pids(runtime), *pids(runtime, "routers")}
        with calling(runtime.addresses) as clients:
            restart_and_report("renewed", experts=True, routers=True, ray_address=None)
        # Ray may print between the lines that a worker has ended.
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("restarted")]
        assert said == ["restarted l/a/0", "restarted l/b/0", "restarted renewed: expert hosts 2, routers 2"]
        after = runtime.describe()
        assert before.isdisjoint({*pids(runtime), *pids(runtime, "routers")})
        assert all(each["state"] == "ready" for each in (*after["hosts"], *after["routers"]))
        assert after["addresses"] == list(runtime.addresses)
        assert all(eventually(lambda at=address: is_served(at)) for address in runtime.addresses)
        assert len(actor_names("renewed")) == 5
        assert all(eventually(lambda pid=pid: not is_alive(pid)) for pid in before)
    assert clients.errors == []
    assert clients.num_answers > 20
