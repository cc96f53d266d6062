"""The page, the dashboard and the alerts say what the code does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from moe_runtime.metrics.catalogue import CATALOGUE
from moe_runtime.metrics.page import with_table

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "observability.md"
DASHBOARD = ROOT / "cluster" / "grafana-dashboard.json"
ALERTS = ROOT / "cluster" / "moe-alerts.yaml"
LABELS = {metric.name: set(metric.labels) for metric in CATALOGUE}
HISTOGRAMS = {metric.name for metric in CATALOGUE if metric.type == "histogram"}
#: Of Prometheus itself, and of the process's own metrics.
FROM_PROMETHEUS = {"job", "instance", "le"}
FOREIGN = {"up", "process_resident_memory_bytes"}


def expressions() -> Iterator[str]:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (variable["query"]["query"] for variable in dashboard["templating"]["list"][1:])
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:moe|process)_[a-z_]+|\bup\b", expression))


def labels_in(expression: str) -> set[str]:
    selected = re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", expression)
    grouped = [label for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")]
    return {label.strip() for label in [*selected, *grouped]}


def base_of(name: str) -> str:
    for histogram in HISTOGRAMS:
        if name in (f"{histogram}_bucket", f"{histogram}_sum", f"{histogram}_count"):
            return histogram
    return name


def test_the_page_has_every_metric_as_the_code_has_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text, "run `make docs`"


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_dashboard_and_alerts_use_metrics_and_labels_that_exist(expression: str) -> None:
    for name in names_in(expression):
        base = base_of(name)
        assert base in LABELS or base in FOREIGN
        assert base not in HISTOGRAMS or name != base, "a histogram has no series of its bare name"
    known = set().union(*(LABELS.get(base_of(name), set()) for name in names_in(expression))) | FROM_PROMETHEUS
    assert labels_in(expression) <= known


def test_every_metric_is_on_the_dashboard() -> None:
    used = {base_of(name) for expression in expressions() for name in names_in(expression)}
    assert set(LABELS) - used == {"moe_requests_accepted_total", "moe_rpc_calls_total"}


def test_panels_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_alert_is_explained() -> None:
    text = PAGE.read_text(encoding="utf-8")
    [group] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    assert [rule["alert"] for rule in group["rules"] if f"| `{rule['alert']}` |" not in text] == []


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_names_follow_the_conventions_of_prometheus(metric) -> None:
    assert re.fullmatch(r"moe_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.type == "counter")
    assert metric.meaning.endswith(".")
    # Base units, never part of them.
    assert not re.search(r"_(ms|milliseconds|us|kilobytes|kb|mb|megabytes|minutes|percent)(_|$)", metric.name)
    assert not set(metric.labels) & {"le", "quantile", "job", "instance"}
