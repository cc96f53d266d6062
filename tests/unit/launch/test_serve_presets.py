"""Every system of the literature runs through the same router and hosts, and answers what its policy says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import moe_runtime as moe
from fakes.weight_tables import weight_table
from moe_runtime.config.load import load_config
from moe_runtime.config.presets.catalogue import PRESETS
from moe_runtime.config.runtime import RuntimeConfig
from moe_runtime.launch.gates import gate_seed, gate_shape, load_gate
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.wire.messages import RequestOptions

HIDDEN_SIZE = 12
NUM_TOKENS = 40
TOKEN_IDS = torch.arange(NUM_TOKENS) % 9


def layer_of(name: str) -> dict[str, object]:
    """The preset's layer with sixteen experts that give back what they get, in one actor."""
    preset = PRESETS[name].layer
    num_experts = 16 + len(preset["experts"]) - 1
    layer = {
        "preset": name,
        "item_shape": [HIDDEN_SIZE],
        "experts": [{"kind": "identity", "count": num_experts}],
        "experts_per_actor": 32,
    }
    if "shared_experts" in preset:
        layer["shared_experts"] = [
            {"kind": "identity", "name": "shared", "count": block.get("count", 1)} for block in preset["shared_experts"]
        ]
    return layer


@pytest.fixture(scope="module")
def config() -> RuntimeConfig:
    layers = {name: layer_of(name) for name in PRESETS}
    return load_config({"layers": layers, "router": {"address": "127.0.0.1:0"}}).config


@pytest.fixture(scope="module")
def client(config: RuntimeConfig) -> Iterator[moe.MoEClient]:
    with moe.serve(config, ray=False) as runtime, moe.MoEClient(runtime.address) as client:
        yield client


def expected_outputs(config: RuntimeConfig, name: str, tokens: torch.Tensor) -> torch.Tensor:
    layer = config.layers[name]
    policy = build_policy(layer.policy, num_experts=layer.num_experts)
    num_shared = sum(block.count for block in layer.shared_experts)
    shape = gate_shape(policy, in_features=HIDDEN_SIZE, num_shared=num_shared, shared_gate=layer.shared_gate)
    gate = load_gate(layer.gate, shape, weights=None, seed=gate_seed(config.seed, name))
    with torch.no_grad():
        tasks = torch.zeros(len(tokens), dtype=torch.int64) if name == "mmoe" else None
        logits = gate(tokens, tasks=tasks) if policy.num_logits else torch.empty(len(tokens), 0)
        shared = gate.shared_weights(tokens).sum(dim=1) if layer.shared_gate == "sigmoid" else num_shared
    info = TokenInfo(token_ids=TOKEN_IDS, expert_bias=gate.expert_bias)
    weights = weight_table(plan_dispatch(admit(policy.assign(logits, info), layer.capacity)))
    if layer.residual == "blend":
        return tokens
    if layer.weight_on == "input":
        assert num_shared == 1
    return (weights.nansum(dim=1) + shared)[:, None] * tokens


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_answers_what_its_policy_says(name: str, config: RuntimeConfig, client: moe.MoEClient) -> None:
    tokens = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))
    options = RequestOptions(
        token_ids=TOKEN_IDS if name == "hash_layers" else None,
        task="income" if name == "mmoe" else None,
        isolated=True,
    )
    result = client.forward(tokens, layer=name, options=options, timeout_s=30.0)
    torch.testing.assert_close(result.outputs, expected_outputs(config, name, tokens), rtol=1e-5, atol=1e-5)
    assert result.report.warnings == ()
