"""Asks every node of the connected cluster at once: small tasks, each pinned to its node."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_runtime.ray_backend import node_probe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moe_runtime.ray_backend.placer import NodeShape

#: Beyond what pip may take: for a worker process to start.
_SPARE_S = 30.0

# The probe's functions have to run where this package is not installed.
ray.cloudpickle.register_pickle_by_value(node_probe)


@dataclass(frozen=True)
class NodeAnswer:
    """What one node answered: a value, or in words why there is none."""

    node: NodeShape
    value: Any = None
    error: str | None = None


def ask_nodes(
    function: Callable[..., Any], *arguments: Any, nodes: Sequence[NodeShape], timeout_s: float
) -> tuple[NodeAnswer, ...]:
    """What a function gives on each node, in the nodes' order.

    Args:
        function: Found on the node by its import path, or of ``node_probe``.
        arguments: For all nodes alike.
        nodes: Where it runs.
        timeout_s: For all of them together; a node that has not answered by then has an error.
    """
    task = ray.remote(function)
    deadline = time.monotonic() + timeout_s
    answers = []
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": pinned}
        answers.append(task.options(**options).remote(*arguments))
    return tuple(_answer(node, answer, deadline, timeout_s) for node, answer in zip(nodes, answers, strict=True))


def _answer(node: NodeShape, answer: Any, deadline: float, timeout_s: float) -> NodeAnswer:
    try:
        return NodeAnswer(node, ray.get(answer, timeout=max(0.0, deadline - time.monotonic())))
    except GetTimeoutError:
        ray.cancel(answer, force=True)
        return NodeAnswer(node, error=f"no answer within {timeout_s:g} s")
    except RayTaskError as exc:
        return NodeAnswer(node, error=f"{type(exc.cause).__name__}: {exc.cause}")
    except RayError as exc:
        return NodeAnswer(node, error=type(exc).__name__)


def installed_on(
    nodes: Sequence[NodeShape], distributions: Sequence[str], *, timeout_s: float
) -> tuple[NodeAnswer, ...]:
    """Per node, the version of ``python`` and of each distribution; None where one is missing."""
    return ask_nodes(node_probe.installed, list(distributions), nodes=nodes, timeout_s=timeout_s)


def install_on(
    nodes: Sequence[NodeShape], requirements: Sequence[str], *, wheels: Mapping[str, bytes], timeout_s: float
) -> tuple[NodeAnswer, ...]:
    """Install with pip on every node; each answers None, or what pip said."""
    given = ray.put(dict(wheels))
    return ask_nodes(
        node_probe.install, list(requirements), given, timeout_s, nodes=nodes, timeout_s=timeout_s + _SPARE_S
    )
