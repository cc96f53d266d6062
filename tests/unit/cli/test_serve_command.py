import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import moe_runtime as moe

CONFIG = """
name: small
layers:
  demo: {item_shape: [8], experts: [{kind: feed_forward, count: 2}, {kind: identity}]}
router: {address: "127.0.0.1:0", drain_notice_s: NOTICE}
"""
MAIN = "from moe_runtime.cli import main; main()"
STOP_TWICE = """
from queue import SimpleQueue
from moe_runtime.cli.serving import StopSignals
stop = StopSignals()
print("ready", flush=True)
print(stop.wait().name, flush=True)
SimpleQueue().get()
"""


@contextmanager
def started(*command: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", *map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def served(folder: Path, *, drain_notice_s: float = 0.0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("NOTICE", str(drain_notice_s)), encoding="utf-8")
    with started(MAIN, "serve", path, "--no-ray") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.fullmatch(r"serving demo at (\S+)\n", line):
                address = found[1]
            if line.startswith("  stop:"):
                yield process, address
                return
        raise AssertionError("serve ended before it served")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_ends_with_0(tmp_path: Path, number: signal.Signals) -> None:
    with served(tmp_path) as (process, address):
        with moe.MoEClient(address) as client:
            assert client.forward(np.ones((3, 8), np.float32), layer="demo", timeout_s=5.0).outputs.shape == (3, 8)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"{number.name}: draining" in rest
    assert rest.endswith("stopped\n")


def test_no_request_is_lost_when_a_signal_arrives_under_load(tmp_path: Path) -> None:
    rows = np.ones((64, 8), np.float32)

    def call(client: moe.MoEClient) -> str:
        try:
            client.forward(rows, layer="demo", timeout_s=20.0)
        except moe.UnavailableError:
            return "refused"
        return "answered"

    no_retries = moe.RetryPolicy(max_attempts=1)
    with served(tmp_path) as (process, address), moe.MoEClient(address, retry_policy=no_retries) as client:
        with ThreadPoolExecutor(8) as pool:
            outcomes = [pool.submit(call, client) for _ in range(400)]
            outcomes[20].result()
            process.send_signal(signal.SIGTERM)
            counts = [outcome.result() for outcome in outcomes]
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert counts.count("answered") >= 20
    assert set(counts) <= {"answered", "refused"}


def test_clients_of_two_runtimes_lose_nothing_when_one_is_ended_under_load(tmp_path: Path) -> None:
    rows = np.ones((64, 8), np.float32)
    ended = threading.Event()

    def call_until_ended(client: moe.MoEClient) -> int:
        num_calls = 0
        while not ended.is_set():
            client.forward(rows, layer="demo", timeout_s=20.0)
            num_calls += 1
        return num_calls

    with (
        served(tmp_path) as (ending, address),
        served(tmp_path) as (_, other),
        moe.MoEClient([address, other]) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        client.forward(rows, layer="demo", timeout_s=20.0)
        calls = [pool.submit(call_until_ended, client) for _ in range(8)]
        try:
            ending.send_signal(signal.SIGTERM)
            ending.communicate(timeout=30)
        finally:
            ended.set()
        assert all(call.result() > 0 for call in calls)
    assert ending.returncode == 0


def test_a_router_that_is_to_end_says_so_before_it_refuses_anything(tmp_path: Path) -> None:
    with served(tmp_path, drain_notice_s=3.0) as (process, address):
        with grpc.insecure_channel(address) as channel, moe.MoEClient(address) as client:
            updates = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
            assert next(updates).status == health_pb2.HealthCheckResponse.SERVING
            process.send_signal(signal.SIGTERM)
            assert next(updates).status == health_pb2.HealthCheckResponse.NOT_SERVING
            client.forward(np.ones((3, 8), np.float32), layer="demo", timeout_s=5.0)
            updates.cancel()
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_status_shows_a_running_router_as_json_and_as_tables(tmp_path: Path) -> None:
    with served(tmp_path) as (_, address):
        with moe.MoEClient(address) as client:
            client.forward(np.ones((3, 8), np.float32), layer="demo", timeout_s=5.0)
        ask = [sys.executable, "-c", MAIN, "status", "--address", address]
        document = json.loads(subprocess.run([*ask, "--json"], capture_output=True, check=True).stdout)
        tables = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    [router] = document["routers"]
    assert router["address"] == address
    assert router["load"]["layers"]["demo"]["num_tokens"] == 3
    assert [expert["kind"] for expert in router["description"]["layers"]["demo"]["experts"]] == [
        "feed_forward",
        "feed_forward",
        "identity",
    ]
    assert address in tables
    assert "layer demo" in tables


def test_a_second_signal_ends_the_process_at_once() -> None:
    with started(STOP_TWICE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM


def test_an_address_that_is_taken_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    with served(tmp_path) as (_, address):
        command = [sys.executable, "-c", MAIN, "serve", str(tmp_path / "config.yaml"), "--no-ray", "--address", address]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line == f"error: router.address {address}: expected a free port, found it taken by another process"
