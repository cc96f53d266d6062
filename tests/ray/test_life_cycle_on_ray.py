"""Runtimes whose server process dies or leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from fakes.ray_head import is_alive
from moe_runtime.launch.runtime import attach
from moe_runtime.rpc.client import MoEClient
from moe_runtime.transport.ipc_folder import default_ipc_folder

#: The fewest processes that make a runtime: every one of them takes seconds to import torch.
ONE_EXPERT = {"experts": [{"kind": "identity"}], "policy": {"kind": "switch"}}

#: Serves the configuration of its first argument, says where, and waits for its input to close.
SERVER = """
import json, sys
import moe_runtime as moe
runtime = moe.serve(json.loads(sys.argv[1]))
print(runtime.address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start_server(cluster):
    """Starts a process that serves a configuration on the session's cluster; gives it and its address."""
    processes = []

    def start(config):
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(config)],
            env={**os.environ, "RAY_ADDRESS": cluster},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


#: Serves with no cluster around, and tells how its own Ray authenticates.
EMBEDDED = """
import json, os, sys
import moe_runtime as moe
with moe.serve(json.loads(sys.argv[1])) as runtime:
    with moe.MoEClient(runtime.address) as client:
        client.describe()
    print(os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]))
import ray
print(ray.is_initialized())
"""


@pytest.mark.timeout(120)
def test_without_a_cluster_serve_starts_one_that_strangers_cannot_use_and_ends_it(tmp_path, make_config):
    unset = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    config = make_config("embedded", **ONE_EXPERT)
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED, json.dumps(config)],
        env={**env, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.stdout.splitlines() == ["token 64", "False"], done.stderr
    assert not (tmp_path / ".ray" / "auth_token").exists()


@pytest.mark.timeout(120)
def test_when_the_server_process_is_killed_its_runtime_ends_with_its_lease(
    start_server, make_config, actor_names, eventually
):
    process, address = start_server(make_config("leased", **ONE_EXPERT))
    with MoEClient(address) as client:
        assert client.forward(torch.zeros(1, 8), layer="l", timeout_s=20.0).report.num_served == 1
    with attach("leased") as leased:
        description = leased.describe()
    pids = [each["pid"] for each in (*description["hosts"], *description["routers"])]
    pids.append(description["controller_pid"])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(actor_names("leased")) == 3
    eventually(lambda: not actor_names("leased"), deadline_s=25.0)
    eventually(lambda: not any(map(is_alive, pids)))
    assert not [path for pid in pids for path in default_ipc_folder().glob(f"{pid}-*")]


@pytest.mark.timeout(180)
def test_a_detached_runtime_outlives_its_command_until_another_one_stops_it(
    tmp_path, cluster, make_config, actor_names
):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(make_config("detached", **ONE_EXPERT)))
    served = command("serve", str(path), "--detach", "--ray-address", cluster)
    with attach("detached") as runtime:
        assert f"serving l at {runtime.address}\n" in served
    assert f"stop:    moe-runtime stop detached --ray-address {cluster}\n" in served
    with MoEClient(runtime.address) as client:
        assert client.forward(torch.zeros(1, 8), layer="l", timeout_s=20.0).report.num_served == 1
    stopped = command("stop", "detached", "--ray-address", cluster)
    assert "stopped detached: every request was answered" in stopped.splitlines()
    assert actor_names("detached") == []


def command(*arguments: str) -> str:
    """What a command of the command line prints."""
    main = "from moe_runtime.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", main, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
