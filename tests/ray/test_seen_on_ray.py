"""What actors of their own processes show: metrics on the routers' ports, and one request's lines in several logs."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient


def lines_about(request_id: str) -> list[dict[str, Any]]:
    """What the workers of this session have logged of a request."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    logged = [line for path in folder.glob("worker-*.err") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in logged if line.startswith("{") and request_id in line]
    return sorted(found, key=lambda line: str(line["time"]))


def test_one_request_is_found_in_the_logs_of_its_router_and_its_experts(
    make_config: Callable[..., dict[str, Any]], eventually: Callable[..., Any]
) -> None:
    config = {**make_config("seen"), "logging": {"format": "json", "level": "debug"}}
    config["metrics"] = {"address": "127.0.0.1:0"}
    with serve(config) as runtime, MoEClient(runtime.address) as client:
        result = client.forward(torch.ones(3, 8), layer="l", timeout_s=20.0)
        request_id = result.report.request_id
        roles = eventually(lambda: (found := [line["role"] for line in lines_about(request_id)])[2:] and found)
        lines = lines_about(request_id)
        description = runtime.describe()
        [router] = description["routers"]
        with urllib.request.urlopen(f"http://{router['metrics_address']}/metrics", timeout=10.0) as answer:
            scraped = answer.read().decode()
    assert set(roles) == {"router", "expert"}
    hosts = {host["pid"] for host in description["hosts"]}
    assert {line["pid"] for line in lines if line["role"] == "expert"} == hosts
    assert {line["pid"] for line in lines if line["role"] == "router"} == {router["pid"]}
    assert {line["runtime"] for line in lines} == {"seen"}
    assert {line["node"] for line in lines} == {router["node"]}
    assert 'moe_assignments_total{layer="l",outcome="served"} 6.0' in scraped
    assert 'moe_replica_restarts_total{layer="l"} 0.0' in scraped
