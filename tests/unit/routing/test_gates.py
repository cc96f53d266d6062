from __future__ import annotations

import pytest
import torch

from moe_runtime.config.gates import (
    CosineGateConfig,
    LinearGateConfig,
    MLPGateConfig,
    MultiGateConfig,
    NoisyGateConfig,
)
from moe_runtime.errors import ShapeError
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate

CONFIGS = [
    LinearGateConfig(),
    LinearGateConfig(bias=True),
    MLPGateConfig(kind="mlp", hidden_features=7),
    MLPGateConfig(kind="mlp", hidden_features=7, bias=True),
    NoisyGateConfig(kind="noisy"),
    CosineGateConfig(kind="cosine"),
    CosineGateConfig(kind="cosine", bias=True),
    MultiGateConfig(kind="multi", tasks=["read", "write"], default_task="read"),
    MultiGateConfig(kind="multi", tasks=["read", "write"], default_task="read", bias=True),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def filled(gate, **values):
    for name, value in values.items():
        getattr(gate, name).data.copy_(torch.tensor(value))
    return gate


def test_linear_gate_scores_are_the_product_with_its_rows_plus_the_bias():
    gate = build_gate(LinearGateConfig(bias=True), GateShape(2, 3), seed=0)
    filled(gate, weight=[[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]], bias=[0.0, 0.5, 1.0])
    assert gate(torch.tensor([[3.0, 4.0]])).tolist() == [[3.0, 4.5, 3.0]]


def test_mlp_gate_is_linear_relu_linear():
    gate = build_gate(MLPGateConfig(kind="mlp", hidden_features=2), GateShape(2, 2), seed=0)
    filled(gate, hidden_weight=[[1.0, 0.0], [0.0, 1.0]], hidden_bias=[0.0, 1.0], weight=[[1.0, 1.0], [2.0, -1.0]])
    # Hidden: relu([-3, 4 + 1]) = [0, 5].
    assert gate(torch.tensor([[-3.0, 4.0]])).tolist() == [[5.0, -5.0]]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-bias={config.bias}")
def test_the_seed_alone_decides_the_initial_parameters(config):
    state = torch.random.get_rng_state()
    first, second, other = (build_gate(config, GateShape(4, 3), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(second.named_parameters())[name])
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-bias={config.bias}")
def test_logits_are_float32_whatever_the_tokens_are(config, dtype):
    gate = build_gate(config, GateShape(4, 3), seed=0)
    logits = gate(torch.ones(5, 4, dtype=dtype))
    assert (logits.dtype, logits.shape) == (torch.float32, (5, 3))


def test_logits_are_float32_under_autocast_too():
    gate = build_gate(LinearGateConfig(), GateShape(4, 3), seed=0).eval()
    tokens = torch.randn(5, 4, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = gate(tokens)
    assert torch.equal(logits, gate(tokens))


def test_empty_batch_gives_no_logits():
    gate = build_gate(LinearGateConfig(), GateShape(4, 3), seed=0)
    assert gate(torch.ones(0, 4)).shape == (0, 3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-bias={config.bias}")
def test_gate_that_no_policy_asks_has_no_logits_to_give(config):
    gate = build_gate(config, GateShape(4, 0, num_shared=1), seed=0)
    assert gate(torch.ones(5, 4)).shape == (5, 0)
    assert gate.shared_weights(torch.ones(5, 4)).shape == (5, 1)


@pytest.mark.parametrize("shape", [(4,), (5, 3), (2, 5, 4)])
def test_input_of_another_shape_is_refused(shape):
    gate = build_gate(LinearGateConfig(), GateShape(4, 3), seed=0)
    with pytest.raises(ShapeError, match=r"expected an input of shape \(num_tokens, 4\)"):
        gate(torch.ones(shape))


def test_jitter_scales_the_gates_copy_in_train_mode_only():
    gate = build_gate(LinearGateConfig(jitter_eps=0.5), GateShape(1, 1), seed=0)
    filled(gate, weight=[[1.0]])
    tokens = torch.full((1000, 1), 2.0)
    jittered = gate(tokens, generator())
    assert torch.equal(tokens, torch.full((1000, 1), 2.0))
    assert 1.0 <= jittered.min() < 1.1
    assert 2.9 < jittered.max() <= 3.0
    assert torch.equal(gate(tokens, generator()), jittered)
    assert torch.equal(gate.eval()(tokens), tokens)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-bias={config.bias}")
def test_jitter_applies_to_every_kind_and_leaves_the_callers_tensor(config):
    gate = build_gate(config.model_copy(update={"jitter_eps": 0.1}), GateShape(4, 3), seed=0)
    tokens = torch.randn(5, 4, generator=generator())
    kept = tokens.clone()
    jittered = gate(tokens, generator(1))
    assert torch.equal(jittered, gate(tokens, generator(1)))
    assert not torch.equal(jittered, gate(tokens, generator(2)))
    assert torch.equal(gate.eval()(tokens, generator(1)), gate(tokens))
    assert torch.equal(tokens, kept)


def test_noise_has_the_learned_deviation_in_train_mode_and_is_absent_in_eval_mode():
    gate = build_gate(NoisyGateConfig(kind="noisy"), GateShape(1, 2), seed=0)
    filled(gate, weight=[[0.0], [5.0]], noise_weight=[[0.0], [3.0]])
    tokens = torch.ones(20000, 1)
    noisy = gate(tokens, generator())
    # softplus(0) = log 2 = 0.693, softplus(3) = 3.049; each plus 0.01.
    assert noisy.std(0).tolist() == pytest.approx([0.703, 3.059], rel=0.03)
    assert noisy.mean(0).tolist() == pytest.approx([0.0, 5.0], abs=0.1)
    assert gate.eval()(tokens[:1]).tolist() == [[0.0, 5.0]]


def test_noisy_logits_come_with_their_parts_for_the_load_loss():
    gate = build_gate(NoisyGateConfig(kind="noisy"), GateShape(3, 4), seed=0)
    tokens = torch.randn(6, 3, generator=generator())
    logits = gate.noisy_logits(tokens, generator(5))
    assert torch.equal(logits.clean, gate.eval()(tokens))
    assert torch.equal(logits.noisy, gate.train()(tokens, generator(5)))
    assert logits.noise_std.flatten().tolist() == pytest.approx([0.7031472] * 24)


def test_gate_keeps_a_bias_of_zeros_for_policies_that_select_by_one():
    gate = build_gate(LinearGateConfig(), GateShape(4, 6, num_biases=3), seed=0)
    assert gate.expert_bias.tolist() == [0.0, 0.0, 0.0]
    assert "expert_bias" in gate.state_dict()
    assert "expert_bias" not in dict(gate.named_parameters())
    without = build_gate(LinearGateConfig(), GateShape(4, 3), seed=0)
    assert without.expert_bias is None
    assert set(without.state_dict()) == {"weight"}


def test_selection_bias_is_no_part_of_the_logits():
    gate = build_gate(LinearGateConfig(), GateShape(4, 3, num_biases=3), seed=0)
    tokens = torch.randn(5, 4, generator=generator())
    logits = gate(tokens)
    gate.expert_bias.copy_(torch.tensor([1.0, -1.0, 0.0]))
    assert torch.equal(gate(tokens), logits)


def test_shared_experts_are_weighted_by_a_sigmoid_of_their_own_score():
    gate = build_gate(LinearGateConfig(), GateShape(2, 3, num_shared=2), seed=0)
    filled(gate, shared_weight=[[1.0, 0.0], [0.0, -2.0]])
    # sigmoid(log 3) = 3/4, sigmoid(-2 * log 3) = 1/10.
    weights = gate.shared_weights(torch.tensor([[3.0, 3.0], [1.0, 1.0]]).log().double())
    assert weights.flatten().tolist() == pytest.approx([0.75, 0.1, 0.5, 0.5])
    assert weights.dtype == torch.float32


def test_gate_without_shared_experts_gives_no_weights():
    gate = build_gate(LinearGateConfig(), GateShape(2, 3), seed=0)
    assert gate.shared_weights(torch.ones(5, 2)).shape == (5, 0)
    with pytest.raises(ShapeError, match="expected an input of shape"):
        gate.shared_weights(torch.ones(5, 3))


def test_gates_for_one_task_have_no_tasks():
    gate = build_gate(LinearGateConfig(), GateShape(4, 3), seed=0)
    assert (gate.tasks, gate.default_task) == ((), None)
