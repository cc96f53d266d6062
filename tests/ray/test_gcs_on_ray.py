"""The head's store is killed under load: with a persistent one nothing is lost, without one there is a clear end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from fakes.callers import TOKENS, calling
from fakes.ray_head import RayHead, is_alive
from moe_runtime.rpc.client import MoEClient

pytestmark = [pytest.mark.soak, pytest.mark.timeout(240)]
CONFIG = {
    "name": "outage",
    "device": "cpu",
    "layers": {"l": {"item_shape": [8], "experts": [{"kind": "identity"}], "policy": {"kind": "switch"}}},
    "router": {"address": "127.0.0.1:0"},
}
MAIN = "from moe_runtime.cli import main; main()"


@pytest.fixture
def make_head():
    """Starts the head of a cluster."""
    heads = []

    def make(**options):
        heads.append(RayHead(**options))
        return heads[-1]

    yield make
    for head in heads:
        head.end()


class Served:
    """``moe-runtime serve`` on a cluster, and where it serves."""

    def __init__(self, head, folder):
        path = folder / "config.yaml"
        path.write_text(json.dumps(CONFIG))
        command = [sys.executable, "-c", MAIN, "serve", str(path), "--ray-address", head.address]
        self._messages = (folder / "messages").open("w+")
        self.process = subprocess.Popen(command, env=head.env, stdout=subprocess.PIPE, stderr=self._messages, text=True)
        line = self.process.stdout.readline()
        assert " at " in line, self.messages()
        self.address = line.split(" at ")[1].strip()

    def messages(self):
        self._messages.seek(0)
        return self._messages.read()

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self._messages.close()


@pytest.fixture
def serve_on(tmp_path):
    """Serves on a cluster in a process of its own."""
    served = []

    def serve(head):
        served.append(Served(head, tmp_path))
        return served[-1]

    yield serve
    for each in served:
        each.end()


def replica_of(address):
    with MoEClient(address) as client:
        return client.describe()["layers"]["l"]["experts"][0]["replicas"][0]


def pause(clients, seconds):
    """Let requests go on for a time; how many were answered."""
    before, until = clients.num_answers, time.monotonic() + seconds
    while time.monotonic() < until and not clients.errors:
        time.sleep(0.05)
    return clients.num_answers - before


def test_with_a_persistent_store_an_outage_costs_no_request_and_the_runtime_is_supervised_afterwards(
    make_head, serve_on, eventually
):
    head = make_head(is_persistent=True)
    served = serve_on(head)
    eventually(lambda: not _is_dropping(served.address))
    with calling([served.address]) as clients:
        head.kill_gcs()
        assert pause(clients, 6.0) > 20
        head.restart_gcs()
        assert pause(clients, 5.0) > 20
    assert clients.errors == []
    assert "the head of the Ray cluster is back" in eventually(served.messages)
    killed = replica_of(served.address)["pid"]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: replica_of(served.address)["pid"] != killed, deadline_s=60.0)
    eventually(lambda: not _is_dropping(served.address))
    asked = [sys.executable, "-c", MAIN, "restart", "outage", "--experts-only", "--ray-address", head.address]
    done = subprocess.run(asked, env=head.env, capture_output=True, text=True, check=False)
    assert done.stdout == "restarted l/identity-0/0\nrestarted outage: expert hosts 1, routers 0\n", done.stderr
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60.0) == 0
    assert served.process.stdout.read().endswith("stopped\n")


def test_without_a_persistent_store_requests_are_served_on_until_a_clear_end(make_head, serve_on, eventually):
    head = make_head(is_persistent=False)
    served = serve_on(head)
    eventually(lambda: not _is_dropping(served.address))
    workers = head.workers()
    assert replica_of(served.address)["pid"] in workers
    with calling([served.address]) as clients:
        head.kill_gcs()
        killed_at = time.monotonic()
        # As long as Ray lets the processes live.
        assert pause(clients, 45.0) > 100
        assert clients.errors == []
    assert served.process.wait(30.0) == 1
    assert time.monotonic() - killed_at < 75.0
    message = re.compile(r"^error: runtime outage is lost: the head of the Ray cluster has not answered", re.M)
    assert message.search(served.messages())
    eventually(lambda: not any(map(is_alive, workers)), deadline_s=30.0)


def _is_dropping(address):
    with MoEClient(address) as client:
        return client.forward(TOKENS, layer="l", timeout_s=20.0).report.num_dropped_failure > 0
