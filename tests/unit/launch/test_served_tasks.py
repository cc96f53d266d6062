"""A layer with one gate per task, asked over gRPC: a request names its task, and tasks share batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import moe_runtime as moe
from moe_runtime.config.load import load_config
from moe_runtime.launch.build import build_layers
from moe_runtime.launch.router_process import build_routed_layer

WIDTH, NUM_EXPERTS = 8, 4
TASKS = ("translate", "caption", "label")


def config(**gate: Any) -> dict[str, Any]:
    return {
        "name": "tasks",
        "device": "cpu",
        "router": {"address": "127.0.0.1:0"},
        "layers": {
            "layer": {
                "item_shape": [WIDTH],
                "gate": {"kind": "multi", "tasks": TASKS, **gate},
                "policy": {"kind": "top_k", "k": 1},
                "experts": [{"kind": "identity", "count": NUM_EXPERTS}],
            }
        },
    }


def best_experts(served: dict[str, Any], tokens: torch.Tensor, task: str) -> list[int]:
    """The expert of the highest logit of a task's own gate, worked out from its weights."""
    (recipe,) = build_layers(load_config(served))
    weight = build_routed_layer(recipe).gate.get_parameter("weight")[TASKS.index(task)]
    return (tokens @ weight.T).argmax(1).tolist()


def test_each_request_is_routed_by_the_gate_of_its_task_whoever_it_shares_a_batch_with() -> None:
    served = config(default_task="caption")
    tokens = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))
    asked = [None, *TASKS] * 6
    with (
        moe.serve(served, ray=False) as runtime,
        moe.MoEClient(runtime.address) as client,
        ThreadPoolExecutor(6) as pool,
    ):

        def ask(task: str | None) -> moe.ForwardResult:
            options = moe.RequestOptions(task=task)
            return client.forward(tokens, layer="layer", options=options, timeout_s=30.0, return_routing=True)

        results = list(pool.map(ask, asked))
        described = client.describe()["layers"]["layer"]
    for task, result in zip(asked, results, strict=True):
        assert result.report.expert_ids.tolist() == best_experts(served, tokens, task or "caption")
        assert result.report.warnings == ()
    assert len({tuple(best_experts(served, tokens, task)) for task in TASKS}) == len(TASKS)
    assert (described["tasks"], described["default_task"]) == ([*TASKS], "caption")


def test_a_task_that_is_missing_or_unknown_is_refused_with_the_names_of_those_that_there_are() -> None:
    tokens = torch.ones(1, WIDTH)
    with moe.serve(config(), ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        for task, found in ((None, "none"), ("sing", "'sing'")):
            with pytest.raises(moe.InvalidRequestError, match=f"one of translate, caption, label, found {found}"):
                client.forward(tokens, layer="layer", options=moe.RequestOptions(task=task), timeout_s=30.0)
