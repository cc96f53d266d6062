"""A whole runtime in this process, scraped as Prometheus scrapes."""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from moe_runtime.errors import InvalidRequestError, StartError
from moe_runtime.launch.runtime import Runtime, serve
from moe_runtime.metrics.catalogue import CATALOGUE
from moe_runtime.metrics.server import MetricsServer
from moe_runtime.rpc.client import MoEClient

EXPERTS = [{"kind": "feed_forward", "count": 4, "options": {"hidden_features": 8, "out_features": 4}}]


def config(**changes: Any) -> dict[str, Any]:
    layer = {"item_shape": [6], "experts": EXPERTS, "capacity": {"factor": 0.75}}
    return {
        "name": "seen",
        "device": "cpu",
        "layers": {"l": layer},
        "router": {"address": "127.0.0.1:0", **changes.pop("router", {})},
        "metrics": {"address": "127.0.0.1:0", "hottest_experts": 2, **changes.pop("metrics", {})},
        **changes,
    }


def read(address: str, path: str = "/metrics", **headers: str) -> str:
    request = urllib.request.Request(f"http://{address}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10.0) as answer:
        return answer.read().decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(text: str, name: str, **labels: str) -> float:
    """Sum of the series of a sample that have these labels, and maybe others."""
    return sum(
        value for (each, own), value in samples(text).items() if each == name and labels.items() <= dict(own).items()
    )


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with serve(config(), ray=False) as runtime:
        yield runtime


def metrics_address(runtime: Runtime, index: int = 0) -> str:
    return str(runtime.describe()["routers"][index]["metrics_address"])


def test_counters_equal_the_sums_of_the_reports(runtime: Runtime) -> None:
    generator = torch.Generator().manual_seed(0)
    with MoEClient(runtime.address) as client:
        tokens = [torch.randn(n, 6, generator=generator) for n in (3, 17, 64)]
        reports = [client.forward(each, layer="l", timeout_s=20.0).report for each in tokens]
        with pytest.raises(InvalidRequestError):
            client.forward(torch.randn(2, 5), layer="l", timeout_s=20.0)
    text = read(metrics_address(runtime))
    assert sum(report.num_dropped_capacity for report in reports) > 0
    for outcome in ("served", "dropped_capacity", "dropped_failure"):
        expected = sum(getattr(report, f"num_{outcome}") for report in reports)
        assert total(text, "moe_assignments_total", outcome=outcome) == expected
        assert total(text, "moe_expert_assignments_total", outcome=outcome) == expected
    num_batches = sum(len(report.batch_tokens) for report in reports)
    assert total(text, "moe_tokens_total", layer="l") == 84
    assert total(text, "moe_batches_total", layer="l") == num_batches
    assert total(text, "moe_batch_tokens_count") == num_batches
    assert total(text, "moe_batch_tokens_sum") == 84
    assert total(text, "moe_requests_total", outcome="answered") == 3
    assert total(text, "moe_build_info", runtime="seen", address=runtime.address) == 1
    assert total(text, "moe_rpc_errors_total", error="ShapeError") == 1
    assert total(text, "moe_replicas", state="ready") == 4
    assert total(text, "moe_host_bytes_total", direction="sent") == 24 * sum(report.num_served for report in reports)


def test_stage_times_equal_those_of_the_reports(runtime: Runtime) -> None:
    with MoEClient(runtime.address) as client:
        timings = [client.forward(torch.zeros(4, 6), layer="l", timeout_s=20.0).report.timings for _ in range(3)]
    text = read(metrics_address(runtime))
    for stage in ("queue", "gate", "experts", "combine"):
        expected = sum(getattr(each, f"{stage}_ms") for each in timings) / 1000
        assert total(text, "moe_stage_seconds_sum", stage=stage) == pytest.approx(expected)
        assert total(text, "moe_stage_seconds_count", stage=stage) == 3


def test_experts_beyond_the_hottest_are_one_series(runtime: Runtime) -> None:
    text = read(metrics_address(runtime))
    series = {dict(own)["expert"] for name, own in samples(text) if name == "moe_expert_assignments_total"}
    assert len(series) == 3
    assert "other" in series


def test_every_metric_of_the_catalogue_is_scraped_and_no_other_of_ours(runtime: Runtime) -> None:
    with MoEClient(runtime.address) as client:
        client.forward(torch.zeros(4, 6), layer="l", timeout_s=20.0)
    families = {family.name: family for family in text_string_to_metric_families(read(metrics_address(runtime)))}
    ours = {name: family for name, family in families.items() if name.startswith("moe_")}
    assert {metric.name.removesuffix("_total") for metric in CATALOGUE} == set(ours)
    for metric in CATALOGUE:
        family = ours[metric.name.removesuffix("_total")]
        assert family.type == metric.type
        assert family.documentation == metric.meaning
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert labels <= set(metric.labels)
    assert "process_resident_memory_bytes" in families


def test_buckets_are_cumulative_and_end_with_all(runtime: Runtime) -> None:
    with MoEClient(runtime.address) as client:
        client.forward(torch.zeros(5, 6), layer="l", timeout_s=20.0)
    family = next(
        f for f in text_string_to_metric_families(read(metrics_address(runtime))) if f.name == "moe_batch_tokens"
    )
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert buckets["4.0"] == 0
    assert buckets["8.0"] == 1
    assert buckets["+Inf"] == 1


def test_openmetrics_is_given_to_a_scraper_that_asks_for_it(runtime: Runtime) -> None:
    text = read(metrics_address(runtime), Accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


def test_there_is_nothing_but_the_metrics(runtime: Runtime) -> None:
    address = metrics_address(runtime)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        read(address, "/")
    connection = http.client.HTTPConnection(address, timeout=10.0)
    connection.request("POST", "/metrics", body=b"x")
    assert connection.getresponse().status == 501
    connection.close()


def test_each_router_has_a_port_of_its_own_counted_from_the_first() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics = {"address": f"127.0.0.1:{port}"}
    with serve(config(router={"replicas": 2}, metrics=metrics), ray=False) as runtime:
        assert [metrics_address(runtime, index) for index in (0, 1)] == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]


def test_without_an_address_there_are_no_metrics() -> None:
    with serve(config(metrics={"address": None}), ray=False) as runtime:
        assert runtime.describe()["routers"][0]["metrics_address"] is None


def test_a_port_that_is_taken_fails_the_start_and_leaves_nothing(runtime: Runtime) -> None:
    address = metrics_address(runtime)
    with pytest.raises(StartError, match=f"metrics.address: expected to bind {address}, found it taken"):
        serve(config(metrics={"address": address}), ray=False)
    assert "moe_build_info" in read(address)


def test_a_scrape_shows_a_token_where_one_is_asked_for() -> None:
    class Nothing:
        def collect(self) -> Iterator[Any]:
            return iter(())

    server = MetricsServer(Nothing(), address="127.0.0.1:0", authorize=lambda token: token == "secret")  # type: ignore[arg-type]
    address = server.start()
    try:
        assert "process_" in read(address, Authorization="Bearer secret")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                read(address, **headers)
    finally:
        server.stop()
        server.stop()


def test_tokens_of_the_right_scope_may_scrape(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    scopes = {"metrics": "m" * 16, "admin": "a" * 16, "infer": "i" * 16}
    entries = [f"- {{name: {scope}, token: {token}, scopes: [{scope}]}}" for scope, token in scopes.items()]
    path.write_text("\n".join(entries), encoding="utf-8")
    path.chmod(0o600)
    security = {"tokens": str(path)}
    with serve(config(metrics={"token": True}, security=security), ray=False) as runtime:
        address = metrics_address(runtime)
        for scope in ("metrics", "admin"):
            assert "moe_uptime_seconds" in read(address, Authorization=f"Bearer {scopes[scope]}")
        for headers in ({}, {"Authorization": f"Bearer {scopes['infer']}"}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                read(address, **headers)


def test_scrapers_that_say_nothing_do_not_keep_others_out(runtime: Runtime) -> None:
    host, _, port = metrics_address(runtime).rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(3)]
    assert "moe_uptime_seconds" in read(f"{host}:{port}")
    for each in silent:
        each.close()
