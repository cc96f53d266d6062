"""Each preset beside Hugging Face's own router of its family: same gate, same tokens, same experts and weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DbrxConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    NllbMoeConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock, Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from fakes.weight_tables import weight_table
from moe_runtime.config.models import CapacityConfig, LayerConfig
from moe_runtime.config.policies import GShardPolicyConfig
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.gates import Gate, GateShape, build_gate
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo

HIDDEN_SIZE = 32
NUM_TOKENS = 200
SEEDS = (0, 1, 2)

OneRouter = Callable[[LayerConfig, Gate], Callable[[Tensor], tuple[Tensor, Tensor]]]


def preset_layer(name: str) -> LayerConfig:
    return LayerConfig.model_validate({"preset": name, "item_shape": [HIDDEN_SIZE]})


def preset_gate(layer: LayerConfig, *, seed: int) -> Gate:
    """The gate of a layer, with logits as far apart as those of a trained one, and a bias where it has one."""
    policy = build_policy(layer.policy, num_experts=layer.num_experts)
    num_shared = 0 if layer.shared_gate == "none" else len(layer.shared_experts)
    num_biases = policy.num_experts if policy.uses_bias else 0
    shape = GateShape(HIDDEN_SIZE, policy.num_logits, num_biases=num_biases, num_shared=num_shared)
    gate = build_gate(layer.gate, shape, seed=seed).eval()
    draw = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        gate.weight.mul_(5.0)
        for part, scale in ((gate.bias, 1.0), (gate.expert_bias, 0.2)):
            if part is not None:
                part.copy_(torch.randn(part.shape, generator=draw) * scale)
    return gate


def tokens_of(seed: int) -> Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def table(expert_ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """Weights as ``(num_tokens, num_experts)``, NaN where a token does not go."""
    empty = torch.full((expert_ids.shape[0], num_experts), torch.nan)
    return empty.scatter(1, expert_ids, weights.float())


def our_table(layer: LayerConfig, gate: Gate, tokens: Tensor, *, capacity: CapacityConfig | None = None) -> Tensor:
    policy = build_policy(layer.policy, num_experts=layer.num_experts)
    with torch.no_grad():
        assignments = policy.assign(gate(tokens), TokenInfo(expert_bias=gate.expert_bias))
        return weight_table(plan_dispatch(admit(assignments, capacity or layer.capacity)))


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan()), "other experts"
    assert torch.allclose(found, expected, rtol=0, atol=1e-6, equal_nan=True), "other weights"


def of_top_k_router(router: nn.Module, gate: Gate) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Ids and weights by a router that holds ``weight`` and gives logits, weights, ids."""
    with torch.no_grad():
        router.weight.copy_(gate.weight)
        if gate.bias is not None:
            router.bias.copy_(gate.bias)
        if gate.expert_bias is not None:
            router.e_score_correction_bias.copy_(gate.expert_bias)
    return lambda tokens: tuple(reversed(router.eval()(tokens)[1:]))


def mixtral(layer: LayerConfig, gate: Gate):
    config = MixtralConfig(
        hidden_size=HIDDEN_SIZE, num_local_experts=layer.num_experts, num_experts_per_tok=layer.policy.k
    )
    return of_top_k_router(MixtralTopKRouter(config), gate)


def dbrx(layer: LayerConfig, gate: Gate):
    config = DbrxConfig(
        d_model=HIDDEN_SIZE,
        ffn_config={
            "hidden_size": HIDDEN_SIZE,
            "ffn_hidden_size": 4,
            "moe_num_experts": layer.num_experts,
            "moe_top_k": layer.policy.k,
            "moe_normalize_expert_weights": layer.policy.norm_p,
        },
    )
    block = DbrxFFN(config).eval()
    with torch.no_grad():
        block.router.layer.weight.copy_(gate.weight)
    return lambda tokens: tuple(reversed(block.route_tokens_to_experts(block.router(tokens))))


def olmoe(layer: LayerConfig, gate: Gate):
    config = OlmoeConfig(hidden_size=HIDDEN_SIZE, num_experts=layer.num_experts, num_experts_per_tok=layer.policy.k)
    assert config.norm_topk_prob is False
    return of_top_k_router(OlmoeTopKRouter(config), gate)


def deepseek_moe(layer: LayerConfig, gate: Gate):
    config = DeepseekV2Config(
        hidden_size=HIDDEN_SIZE,
        n_routed_experts=layer.num_experts,
        num_experts_per_tok=layer.policy.k,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    )
    return of_top_k_router(DeepseekV2TopkRouter(config), gate)


def deepseek_v3(layer: LayerConfig, gate: Gate):
    config = DeepseekV3Config(hidden_size=HIDDEN_SIZE)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (layer.num_experts, layer.policy.k)
    assert (config.n_group, config.topk_group, config.routed_scaling_factor) == (8, 4, 2.5)
    return of_top_k_router(DeepseekV3TopkRouter(config), gate)


def qwen2_moe(layer: LayerConfig, gate: Gate):
    config = Qwen2MoeConfig(hidden_size=HIDDEN_SIZE, num_experts=layer.num_experts, num_experts_per_tok=layer.policy.k)
    assert config.norm_topk_prob is False
    return of_top_k_router(Qwen2MoeTopKRouter(config), gate)


def qwen3_moe(layer: LayerConfig, gate: Gate):
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN_SIZE,
        num_experts=layer.num_experts,
        num_experts_per_tok=layer.policy.k,
        norm_topk_prob=True,
    )
    return of_top_k_router(Qwen3MoeTopKRouter(config), gate)


def phi_moe(layer: LayerConfig, gate: Gate):
    config = PhimoeConfig(hidden_size=HIDDEN_SIZE)
    assert (config.num_local_experts, config.num_experts_per_tok) == (layer.num_experts, 2)
    assert config.router_jitter_noise == layer.policy.jitter_eps
    return of_top_k_router(PhimoeTopKRouter(config), gate)


def gpt_oss(layer: LayerConfig, gate: Gate):
    config = GptOssConfig(hidden_size=HIDDEN_SIZE)
    assert (config.num_local_experts, config.num_experts_per_tok) == (layer.num_experts, layer.policy.k)
    return of_top_k_router(GptOssTopKRouter(config), gate)


def llama4(layer: LayerConfig, gate: Gate):
    config = Llama4TextConfig(
        hidden_size=HIDDEN_SIZE, num_local_experts=layer.num_experts, num_experts_per_tok=layer.policy.k
    )
    router = Llama4Router(config).eval()
    with torch.no_grad():
        router.weight.copy_(gate.weight)

    def route(tokens: Tensor) -> tuple[Tensor, Tensor]:
        # The sigmoid of -inf is 0 where a token does not go.
        scores, _ = router(tokens)
        expert_ids = scores.argmax(dim=1, keepdim=True)
        assert torch.equal((scores > 0).sum(dim=1), torch.ones(len(tokens)))
        return expert_ids, scores.gather(1, expert_ids)

    return route


ROUTERS: dict[str, OneRouter] = {
    "mixtral": mixtral,
    "dbrx": dbrx,
    "olmoe": olmoe,
    "deepseek_moe": deepseek_moe,
    "deepseek_v3": deepseek_v3,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "phi_moe": phi_moe,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ROUTERS)
def test_the_preset_routes_like_the_router_of_its_family(name: str, seed: int) -> None:
    layer = preset_layer(name)
    gate = preset_gate(layer, seed=seed)
    tokens = tokens_of(seed)
    with torch.no_grad():
        expert_ids, weights = ROUTERS[name](layer, gate)(tokens)
    assert_same(our_table(layer, gate, tokens), table(expert_ids, weights, layer.num_experts))


@pytest.mark.parametrize("norm_p", [1.0, 2.0, 3.0])
def test_dbrx_divides_by_any_p_norm_alike(norm_p: float) -> None:
    layer = LayerConfig.model_validate({"preset": "dbrx", "item_shape": [HIDDEN_SIZE], "policy": {"norm_p": norm_p}})
    gate = preset_gate(layer, seed=0)
    tokens = tokens_of(0)
    with torch.no_grad():
        expert_ids, weights = dbrx(layer, gate)(tokens)
    assert_same(our_table(layer, gate, tokens), table(expert_ids, weights, layer.num_experts))


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_without_a_bias_route_like_deepseek_v2(seed: int) -> None:
    layer = LayerConfig.model_validate(
        {
            "preset": "deepseek_moe",
            "item_shape": [HIDDEN_SIZE],
            "policy": {"groups": {"count": 8, "keep": 3}, "scaling_factor": 16.0},
        }
    )
    gate = preset_gate(layer, seed=seed)
    tokens = tokens_of(seed)
    config = DeepseekV2Config(
        hidden_size=HIDDEN_SIZE,
        n_routed_experts=64,
        num_experts_per_tok=6,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        routed_scaling_factor=16.0,
    )
    with torch.no_grad():
        expert_ids, weights = of_top_k_router(DeepseekV2TopkRouter(config), gate)(tokens)
    # Weights of up to 16 are exact to as many digits as those of up to 1.
    found, expected = our_table(layer, gate, tokens), table(expert_ids, weights, 64)
    assert_same(found / 16.0, expected / 16.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_shared_expert_of_qwen2_weighs_as_much(seed: int) -> None:
    layer = preset_layer("qwen2_moe")
    gate = preset_gate(layer, seed=seed)
    tokens = tokens_of(seed)
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN_SIZE, num_experts=4, moe_intermediate_size=4, shared_expert_intermediate_size=4
    )
    block = Qwen2MoeSparseMoeBlock(config)
    with torch.no_grad():
        block.shared_expert_gate.weight.copy_(gate.shared_weight)
        expected = torch.sigmoid(block.shared_expert_gate(tokens))
        assert torch.allclose(gate.shared_weights(tokens), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
@pytest.mark.parametrize("seed", SEEDS)
def test_switch_routes_and_drops_alike_where_the_batch_is_one_sequence(seed: int, factor: float) -> None:
    layer = preset_layer("switch")
    # Fewer experts than the paper's, so that some of them are full.
    layer = layer.model_copy(update={"experts": [layer.experts[0].model_copy(update={"count": 8})]})
    gate = preset_gate(layer, seed=seed)
    tokens = tokens_of(seed)
    places = math.ceil(factor * NUM_TOKENS / 8)
    config = SwitchTransformersConfig(d_model=HIDDEN_SIZE, num_experts=8, expert_capacity=places)
    router = SwitchTransformersTop1Router(config).eval()
    with torch.no_grad():
        router.classifier.weight.copy_(gate.weight)
        dispatched, probabilities, _ = router(tokens[None])
    expected = torch.where(dispatched[0] > 0, probabilities[0], torch.nan)
    found = our_table(layer, gate, tokens, capacity=layer.capacity.model_copy(update={"factor": factor}))
    assert_same(found, expected)
    wanted = our_table(layer, gate, tokens, capacity=CapacityConfig()).isfinite().sum(dim=0)
    assert int(found.isfinite().sum()) == int(wanted.clamp(max=places).sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_experts_of_switch_are_those_of_the_paper_in_number(seed: int) -> None:
    layer = preset_layer("switch")
    gate = preset_gate(layer, seed=seed)
    tokens = tokens_of(seed)
    config = SwitchTransformersConfig(d_model=HIDDEN_SIZE, num_experts=layer.num_experts, expert_capacity=NUM_TOKENS)
    router = SwitchTransformersTop1Router(config).eval()
    with torch.no_grad():
        router.classifier.weight.copy_(gate.weight)
        dispatched, probabilities, _ = router(tokens[None])
    expected = torch.where(dispatched[0] > 0, probabilities[0], torch.nan)
    assert_same(our_table(layer, gate, tokens, capacity=CapacityConfig()), expected)


def nllb_router(gate: Gate, **options: object) -> NllbMoeTop2Router:
    num_experts = gate.weight.shape[0]
    router = NllbMoeTop2Router(NllbMoeConfig(d_model=HIDDEN_SIZE, num_experts=num_experts, **options)).eval()
    with torch.no_grad():
        router.classifier.weight.copy_(gate.weight)
    return router


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("drop", ["position", "priority"])
@pytest.mark.parametrize("seed", SEEDS)
def test_top_two_with_capacity_normalises_and_drops_like_nllb(seed: int, drop: str, before: bool) -> None:
    num_experts, fraction = 16, 0.125
    policy = GShardPolicyConfig(kind="gshard_top2", normalize="before_drop" if before else "after_drop")
    layer = preset_layer("gshard").model_copy(update={"policy": policy})
    layer = layer.model_copy(update={"experts": [layer.experts[0].model_copy(update={"count": num_experts})]})
    gate = preset_gate(layer, seed=seed)
    tokens = tokens_of(seed)
    router = nllb_router(
        gate,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=before,
        batch_prioritized_routing=drop == "priority",
        moe_eval_capacity_token_fraction=fraction,
    )
    with torch.no_grad():
        _, combined, _ = router(tokens)
    # Of 2 T assignments, T x fraction = 2 T / E x (fraction x E / 2).
    capacity = CapacityConfig(factor=fraction * num_experts / 2, drop=drop)
    found = our_table(layer, gate, tokens, capacity=capacity)
    assert int(found.isfinite().sum()) < 2 * NUM_TOKENS, "nothing was dropped"
    assert_same(found, torch.where(combined > 0, combined, torch.nan))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_experts_of_nllb_are_the_two_best_of_its_router(seed: int) -> None:
    layer = preset_layer("nllb")
    num_experts = layer.num_experts - 1
    draw = torch.Generator().manual_seed(seed)
    policy = build_policy(layer.policy, num_experts=layer.num_experts)
    logits = torch.randn(NUM_TOKENS, policy.num_logits, generator=draw) * 2.0
    assignments = policy.assign(logits)
    chosen = torch.full((NUM_TOKENS, layer.num_experts), torch.nan)
    chosen[assignments.token_ids, assignments.expert_ids] = assignments.scores
    goes_to_experts = chosen[:, 0].isnan()
    assert 0 < int(goes_to_experts.sum()) < NUM_TOKENS
    within = logits[:, -num_experts:]
    router = NllbMoeTop2Router(NllbMoeConfig(d_model=HIDDEN_SIZE, num_experts=num_experts)).eval()
    _, combined = router.route_tokens(within.clone())
    # Both normalised over the pair, since the first level scales both alike.
    found = chosen[goes_to_experts, 1:]
    found = found / found.nansum(dim=1, keepdim=True)
    assert_same(found, torch.where(combined > 0, combined, torch.nan)[goes_to_experts])
