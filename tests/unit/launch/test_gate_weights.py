from __future__ import annotations

import pytest
import torch

from moe_runtime.config.gates import CosineGateConfig, LinearGateConfig, MLPGateConfig, MultiGateConfig, NoisyGateConfig
from moe_runtime.errors import WeightsError
from moe_runtime.experts.weights import save_weights
from moe_runtime.launch.gates import check_gate_weights, load_gate
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate

CONFIGS = [
    LinearGateConfig(bias=True),
    MLPGateConfig(kind="mlp", hidden_features=7),
    NoisyGateConfig(kind="noisy"),
    CosineGateConfig(kind="cosine", bias=True),
    MultiGateConfig(kind="multi", tasks=["read", "write"], default_task="write", bias=True),
]
SHAPE = GateShape(4, 3, num_biases=3, num_shared=2)


def saved(tmp_path, tensors):
    save_weights(tmp_path / "gate.safetensors", tensors)
    return str(tmp_path / "gate.safetensors")


def without(gate, name):
    return {key: tensor for key, tensor in gate.state_dict().items() if key != name}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_gate_comes_back_from_its_file_with_biases_and_shared_weights(tmp_path, config):
    gate = build_gate(config, SHAPE, seed=1).eval()
    gate.expert_bias.copy_(torch.tensor([0.5, -0.5, 0.0]))
    path = saved(tmp_path, gate.state_dict())
    check_gate_weights(config, SHAPE, weights=path)
    loaded = load_gate(config, SHAPE, weights=path, seed=2)
    tokens = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(tokens), gate(tokens))
    assert torch.equal(loaded.shared_weights(tokens), gate.shared_weights(tokens))
    assert loaded.expert_bias.tolist() == [0.5, -0.5, 0.0]


def test_file_without_a_selection_bias_means_zeros(tmp_path):
    config = LinearGateConfig()
    path = saved(tmp_path, without(build_gate(config, SHAPE, seed=1), "expert_bias"))
    check_gate_weights(config, SHAPE, weights=path)
    assert load_gate(config, SHAPE, weights=path, seed=2).expert_bias.tolist() == [0.0, 0.0, 0.0]


def test_file_without_the_weight_of_shared_experts_is_refused(tmp_path):
    config = LinearGateConfig()
    path = saved(tmp_path, without(build_gate(config, SHAPE, seed=1), "shared_weight"))
    for read in (lambda: check_gate_weights(config, SHAPE, weights=path), lambda: load(config, SHAPE, path)):
        with pytest.raises(WeightsError, match="expected the tensor 'shared_weight', found none"):
            read()


def test_bias_for_a_policy_that_does_not_select_by_one_is_refused(tmp_path):
    config, shape = LinearGateConfig(), GateShape(4, 3)
    path = saved(tmp_path, {"weight": torch.ones(3, 4), "expert_bias": torch.zeros(3)})
    for read in (lambda: check_gate_weights(config, shape, weights=path), lambda: load(config, shape, path)):
        with pytest.raises(WeightsError, match="found the tensor 'expert_bias', which the module does not have"):
            read()


def test_tensor_that_no_gate_has_is_refused(tmp_path):
    config = LinearGateConfig()
    path = saved(tmp_path, {**build_gate(config, SHAPE, seed=1).state_dict(), "prototypes": torch.ones(1)})
    with pytest.raises(WeightsError, match="found the tensor 'prototypes', which the module does not have"):
        load(config, SHAPE, path)


def test_bias_of_another_number_of_experts_is_refused(tmp_path):
    config = LinearGateConfig()
    path = saved(tmp_path, {**build_gate(config, SHAPE, seed=1).state_dict(), "expert_bias": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"expert_bias: expected shape \[3\], found \[2\]"):
        load(config, SHAPE, path)


def load(config, shape, path):
    return load_gate(config, shape, weights=path, seed=0)
