"""A program routes for itself on a cluster: it gets every row, whoever dies meanwhile, and costs nothing once gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from moe_runtime.errors import ExpertError, UnavailableError
from moe_runtime.launch.library import LayerCaller
from moe_runtime.launch.runtime import attach, serve

pytestmark = pytest.mark.timeout(240)

TOKENS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
EXPERT_IDS = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3], [2, 1]])
CALLER = """
import sys, time, torch
from moe_runtime.launch.library import LayerCaller
from moe_runtime.launch.runtime import attach

runtime = attach("library", ray_address=sys.argv[1])
caller = LayerCaller(runtime)
caller.rows("a", torch.ones(1, 8), torch.tensor([[0]]))
print("ready", flush=True)
time.sleep(600)
"""

LEAVER = """
import sys, ray, torch
from moe_runtime.errors import StartError, UnavailableError
from moe_runtime.launch.library import LayerCaller
from moe_runtime.launch.runtime import attach

runtime = attach("library", ray_address=sys.argv[1])
caller = LayerCaller(runtime)
caller.rows("a", torch.ones(1, 8), torch.tensor([[0]]))
ray.shutdown()
try:
    while True:
        caller.rows("a", torch.ones(1, 8), torch.tensor([[0]]))
except UnavailableError as exc:
    print(exc)
caller.close()
try:
    runtime.describe()
except StartError as exc:
    print(exc)
runtime.leave()
print("Ray again:", ray.is_initialized())
"""


def layer(**changes):
    options = {"hidden_features": 16, "out_features": 4}
    return {
        "item_shape": [8],
        "policy": {"kind": "caller"},
        "residual": "none",
        "experts": [{"kind": "feed_forward", "count": 4, "options": options}],
        "experts_per_actor": 2,
        "actor_group": "model",
        **changes,
    }


@pytest.fixture(scope="module")
def runtime(cluster):
    config = {"name": "library", "device": "cpu", "router": {"replicas": 0}, "layers": {"a": layer(), "b": layer()}}
    with serve(config) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def caller(runtime):
    with LayerCaller(runtime) as caller:
        yield caller


@pytest.fixture(scope="module")
def rows(caller):
    return {name: caller.rows(name, TOKENS, EXPERT_IDS) for name in ("a", "b")}


def pids(runtime):
    return {host["host_id"]: host["pid"] for host in runtime.describe()["hosts"]}


def test_rows_of_layers_that_share_actors_take_a_short_way_to_each_of_them(runtime, caller, rows):
    assert rows["a"].shape == (12, 4)
    assert not torch.equal(rows["a"], rows["b"])
    assert torch.allclose(caller.rows("a", TOKENS[1:2], torch.tensor([[3]])), rows["a"][3], atol=1e-6)
    assert list(pids(runtime)) == ["group:model/0/0", "group:model/1/0"]
    assert list(runtime.describe()["layers"]) == ["a", "b"]
    # What is on this node does not go through ZeroMQ.
    assert caller._calling.engine._transport.counters.num_near > 0


def test_an_actor_that_is_killed_under_load_is_waited_for(runtime, caller, rows, eventually):
    stop, wrong, num_right = threading.Event(), [], [0]

    def call():
        while not stop.is_set():
            answer = caller.rows("a", TOKENS, EXPERT_IDS)
            if not torch.equal(answer, rows["a"]):
                wrong.append(answer)
            num_right[0] += 1

    thread = threading.Thread(target=call)
    thread.start()
    eventually(lambda: num_right[0] > 10)
    before = pids(runtime)
    os.kill(before["group:model/0/0"], signal.SIGKILL)
    eventually(lambda: pids(runtime)["group:model/0/0"] != before["group:model/0/0"])
    served = num_right[0]
    eventually(lambda: num_right[0] > served + 10)
    stop.set()
    thread.join()
    assert not wrong
    assert caller.num_dropped == 0


def test_an_actor_that_is_killed_costs_zeros_where_they_may_be_dropped(runtime, rows):
    with LayerCaller(runtime, on_failure="drop") as dropping:
        assert torch.equal(dropping.rows("a", TOKENS, EXPERT_IDS), rows["a"])
        os.kill(pids(runtime)["group:model/1/0"], signal.SIGKILL)
        while not dropping.num_dropped:
            answer = dropping.rows("a", TOKENS, EXPERT_IDS)
        # Experts 2 and 3 are gone, the others answer.
        is_there = EXPERT_IDS.reshape(-1) < 2
        assert torch.equal(answer[is_there], rows["a"][is_there])
        assert torch.equal(answer[~is_there], torch.zeros(6, 4))


def test_patience_that_ends_names_the_expert(runtime, caller, eventually):
    eventually(lambda: {host["state"] for host in runtime.describe()["hosts"]} == {"ready"})

    def call_for_ever(hasty):
        while True:
            hasty.rows("b", TOKENS, EXPERT_IDS)

    with LayerCaller(runtime, patience_s=0.3) as hasty:
        hasty.rows("b", TOKENS, EXPERT_IDS)
        os.kill(pids(runtime)["group:model/1/0"], signal.SIGKILL)
        with pytest.raises(ExpertError, match=r"layer b: expert feed_forward-[23]: .*; waited 0.3 s for it"):
            call_for_ever(hasty)


def test_patience_that_ends_says_why_the_expert_does_not_come_back(runtime, tmp_path, eventually):
    licence = tmp_path / "licence"
    licence.touch()
    experts = [{"kind": "licensed", "name": "e", "options": {"licence": str(licence)}}]
    own = {"experts": experts, "experts_per_actor": 1, "actor_group": None}
    runtime.add_layers({"licensed": layer(**own)})
    with LayerCaller(runtime, ["licensed"], patience_s=0.3) as hasty:
        ids = torch.zeros(6, 1, dtype=torch.int64)
        assert torch.equal(hasty.rows("licensed", TOKENS, ids), TOKENS)
        licence.unlink()
        os.kill(pids(runtime)["licensed/e/0"], signal.SIGKILL)

        def reason():
            hosts = {host["host_id"]: host for host in runtime.describe()["hosts"]}
            return hosts["licensed/e/0"]["reason"] or ""

        eventually(lambda: "the licence server is gone" in reason())
        said = r"layer licensed: expert e: .*; waited 0.3 s for it; replica licensed/e/0 is \w+: .*the licence server"
        with pytest.raises(ExpertError, match=said):
            hasty.rows("licensed", TOKENS, ids)
    runtime.remove_layers(["licensed"])
    assert "licensed/e/0" not in pids(runtime)


def test_callers_go_on_without_a_controller_and_follow_the_one_that_comes_back(runtime, caller, rows, eventually):
    eventually(lambda: {host["state"] for host in runtime.describe()["hosts"]} == {"ready"})
    before = runtime.describe()
    os.kill(before["controller_pid"], signal.SIGKILL)
    assert torch.equal(caller.rows("a", TOKENS, EXPERT_IDS), rows["a"])
    eventually(lambda: [each["pid"] for each in runtime.describe()["callers"]] == [os.getpid()])
    os.kill(pids(runtime)["group:model/0/0"], signal.SIGKILL)
    assert torch.equal(caller.rows("a", TOKENS, EXPERT_IDS), rows["a"])


def test_a_caller_that_is_killed_is_forgotten(cluster, runtime, caller, rows, eventually):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    other = subprocess.Popen([sys.executable, "-c", CALLER, cluster], stdout=subprocess.PIPE, text=True, env=env)
    assert other.stdout.readline() == "ready\n"
    assert {each["pid"] for each in runtime.describe()["callers"]} == {os.getpid(), other.pid}
    other.kill()
    other.wait()
    other.stdout.close()
    eventually(lambda: {each["pid"] for each in runtime.describe()["callers"]} == {os.getpid()})
    assert torch.equal(caller.rows("a", TOKENS, EXPERT_IDS), rows["a"])


def test_a_program_that_shuts_ray_down_is_told_and_goes_on(cluster, runtime, caller, rows):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", LEAVER, cluster], capture_output=True, text=True, env=env, check=True, timeout=60
    )
    lost = "runtime library: Ray was shut down in this program, which cannot reach the runtime any more"
    assert done.stdout.splitlines() == [lost, lost, "Ray again: False"]
    assert torch.equal(caller.rows("a", TOKENS, EXPERT_IDS), rows["a"])


def test_layers_are_added_beside_those_that_run_also_by_two_programs(cluster, runtime, caller, rows):
    before = pids(runtime)
    attached = attach("library")
    threads = [
        threading.Thread(target=each.add_layers, args=({name: layer(actor_group=None)},))
        for each, name in ((runtime, "c"), (attached, "d"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    attached.leave()
    assert list(runtime.config.layers)[:2] == ["a", "b"]
    assert {*runtime.config.layers} == {"a", "b", "c", "d"}
    assert before.items() <= pids(runtime).items()
    assert caller.rows("c", TOKENS, EXPERT_IDS).shape == caller.rows("d", TOKENS, EXPERT_IDS).shape == (12, 4)
    assert torch.equal(caller.rows("a", TOKENS, EXPERT_IDS), rows["a"])


def test_a_runtime_that_is_closed_ends_every_wait(cluster):
    config = {"name": "ending", "device": "cpu", "router": {"replicas": 0}, "layers": {"a": layer()}}
    runtime = serve(config)
    failures = []

    def call(caller):
        try:
            while True:
                caller.rows("a", TOKENS, EXPERT_IDS)
        except UnavailableError as exc:
            failures.append(str(exc))

    with LayerCaller(runtime) as one, LayerCaller(attach("ending")) as other:
        threads = [threading.Thread(target=call, args=(each,)) for each in (one, other)]
        for thread in threads:
            thread.start()
        runtime.close()
        for thread in threads:
            thread.join()
    assert failures[0].startswith("runtime ending: its controller has ended") or failures[0].endswith("it was closed")
    assert len(failures) == 2
