"""One lab and one Ray cluster on it, which all tests of this folder share."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before ray is imported, which reads it once: tests/ray may follow in this process.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest

from cluster.lab import Lab, missing
from cluster.ray_cluster import RayCluster, prepare, set_labels
from cluster.served import Served, serve

#: A head, two workers, and the machine of the operator and the clients.
NUM_HOSTS = 4
#: The first test waits for the cluster.
TIMEOUT_S = 300
#: Names a file for the seconds that each step took, as JSON.
FIGURES_VARIABLE = "CLUSTER_FIGURES"
LAST = "test_cluster_down.py"
_SECONDS = pytest.StashKey[dict[str, float]]()
_FIGURES = pytest.StashKey[dict[str, Any]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [index for index, item in enumerate(items) if Path(__file__).parent in item.path.parents]
    # Whoever comes after the last one has no cluster.
    ordered = sorted((items[index] for index in ours), key=lambda item: item.path.name == LAST)
    for index, item in zip(ours, ordered, strict=True):
        items[index] = item
        needs_lab = {"lab", "ray_cluster", "served"} & set(getattr(item, "fixturenames", ()))
        if needs_lab:
            item.add_marker("cluster")
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if seconds := config.stash.get(_SECONDS, {}):
        steps = ", ".join(f"{step} {value:.1f} s" for step, value in seconds.items())
        terminalreporter.write_line(f"cluster: {steps}")
    if figures := config.stash.get(_FIGURES, {}):
        terminalreporter.write_line(f"cluster figures: {json.dumps(figures, indent=1)}")
    if (file := os.environ.get(FIGURES_VARIABLE)) and seconds:
        Path(file).write_text(json.dumps({"seconds": seconds, "figures": figures}, indent=1) + "\n")


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Four hosts that are on."""
    if reason := missing():
        pytest.skip(reason)
    began = time.monotonic()
    with Lab(num_hosts=NUM_HOSTS) as lab:
        request.config.stash[_SECONDS] = {"hosts": time.monotonic() - began}
        yield lab


@pytest.fixture(scope="session")
def ray_cluster(lab: Lab, request: pytest.FixtureRequest) -> Iterator[RayCluster]:
    """``ray up cluster/local.yaml`` on these hosts; tests leave it with all its nodes alive."""
    cluster = prepare(lab)
    cluster.seconds = request.config.stash[_SECONDS]
    set_labels(cluster.workers[0], {"ray.io/accelerator-type": "A100"})
    set_labels(cluster.workers[1], {"ray.io/accelerator-type": "L4"})
    cluster.up()
    yield cluster
    if cluster.is_up:
        cluster.down()


@pytest.fixture(scope="session")
def served(ray_cluster: RayCluster, request: pytest.FixtureRequest) -> Iterator[Served]:
    """A runtime with two routers and six experts on these nodes; tests leave it healthy, and may move it."""
    served = serve(ray_cluster)
    request.config.stash[_FIGURES] = served.figures
    yield served
    if ray_cluster.is_up:
        served.stop()
