"""Presets of systems that have no router in Hugging Face: each in a case worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fakes.weight_tables import weight_table
from moe_runtime.config.models import CapacityConfig, LayerConfig
from moe_runtime.config.presets.catalogue import PRESETS
from moe_runtime.routing.assignments import DispatchPlan
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.combine import combine
from moe_runtime.routing.gates import GateShape, build_gate
from moe_runtime.routing.losses import importance_loss, load_balancing_loss, z_loss
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo

NONE = math.nan


def layer_of(name: str, *, num_experts: int) -> LayerConfig:
    """The preset's layer with fewer experts than the paper's; everything else as it is."""
    *others, last = PRESETS[name].layer["experts"]
    blocks = [*others, {**last, "count": num_experts - len(others)}]
    return LayerConfig.model_validate({"preset": name, "item_shape": [2], "experts": blocks})


def plan_of(layer: LayerConfig, logits: Tensor, **facts: object) -> DispatchPlan:
    policy = build_policy(layer.policy, num_experts=layer.num_experts)
    return plan_dispatch(admit(policy.assign(logits, TokenInfo(**facts)), layer.capacity))


def assert_weights(plan: DispatchPlan, expected: list[list[float]]) -> None:
    torch.testing.assert_close(weight_table(plan), torch.tensor(expected), rtol=0, atol=1e-6, equal_nan=True)


def shares(*rows: list[float]) -> Tensor:
    """Logits whose softmax is in the ratio of the given numbers."""
    return torch.tensor(rows).log()


def outputs_of(layer: LayerConfig, plan: DispatchPlan, tokens: Tensor) -> Tensor:
    """The layer's answer where expert i multiplies by i + 1."""
    rows = tokens[plan.token_ids] * (plan.expert_ids[:, None] + 1.0)
    return combine(tokens, rows, plan, residual=layer.residual, weight_on=layer.weight_on).outputs


def test_jacobs_1991_asks_every_expert_and_sums_by_the_softmax():
    layer = layer_of("jacobs_1991", num_experts=4)
    plan = plan_of(layer, shares([4, 3, 2, 1]))
    assert_weights(plan, [[0.4, 0.3, 0.2, 0.1]])
    # 0.4 * 1 + 0.3 * 2 + 0.2 * 3 + 0.1 * 4 = 2.
    torch.testing.assert_close(outputs_of(layer, plan, torch.tensor([[1.0, 3.0]])), torch.tensor([[2.0, 6.0]]))


def test_eigen_2013_has_a_gate_with_a_hidden_layer():
    layer = layer_of("eigen_2013", num_experts=4)
    gate = build_gate(layer.gate, GateShape(2, 4), seed=0).eval()
    assert gate.hidden_weight.shape == (50, 2)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        # Two hidden units see one number each; ReLU silences the second, whatever it would say.
        gate.hidden_weight[0, 0] = gate.hidden_weight[1, 1] = 1.0
        gate.weight[:, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0]).log()
        gate.weight[:, 1] = 99.0
        logits = gate(torch.tensor([[1.0, -1.0]]))
    assert_weights(plan_of(layer, logits), [[0.4, 0.3, 0.2, 0.1]])


@pytest.mark.parametrize("name", ["shazeer_2017", "multimodel"])
def test_shazeers_layer_takes_the_softmax_over_the_four_best_and_drops_nobody(name: str):
    plan = plan_of(layer_of(name, num_experts=6), shares([8, 1, 4, 2, 2, 1]).expand(50, 6))
    assert_weights(plan, [[0.5, NONE, 0.25, 0.125, 0.125, NONE]] * 50)


@pytest.mark.parametrize("name", ["shazeer_2017", "multimodel", "vmoe"])
def test_a_noisy_gate_adds_noise_in_training_alone(name: str):
    gate = build_gate(layer_of(name, num_experts=6).gate, GateShape(2, 6), seed=0)
    tokens = torch.tensor([[1.0, 2.0]])
    clean = tokens @ gate.weight.T
    assert torch.equal(gate.eval()(tokens), clean)
    assert not torch.allclose(gate.train()(tokens), clean)


def test_mmoe_has_a_gate_of_its_own_for_each_task():
    layer = layer_of("mmoe", num_experts=4)
    gate = build_gate(layer.gate, GateShape(2, 4), seed=0).eval()
    assert gate.weight.shape == (2, 4, 2)
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[0, :, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0]).log()
        gate.weight[1, :, 0] = torch.tensor([1.0, 1.0, 1.0, 7.0]).log()
        logits = gate(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), tasks=torch.tensor([1, 0]))
    assert_weights(plan_of(layer, logits), [[0.1, 0.1, 0.1, 0.7], [0.4, 0.3, 0.2, 0.1]])


@pytest.mark.parametrize("name", ["gshard", "glam"])
def test_two_experts_share_the_pairs_weight_and_overflow_is_dropped_by_position(name: str):
    # 16 assignments to 4 experts: 4 places each. Dropped rows keep a weight of nothing, not of the lone survivor.
    plan = plan_of(layer_of(name, num_experts=4), shares([6, 3, 0.5, 0.5]).expand(8, 4))
    assert plan.admission.capacity == 4
    assert_weights(plan, [[2 / 3, 1 / 3, NONE, NONE]] * 4 + [[NONE] * 4] * 4)


def test_gshard_attenuates_a_token_of_which_one_half_was_dropped():
    logits = shares(*[[6, 3, 0.5, 0.5]] * 4, *[[6, 0.5, 3, 0.5]] * 4)
    plan = plan_of(layer_of("gshard", num_experts=4), logits)
    assert_weights(plan, [[2 / 3, 1 / 3, NONE, NONE]] * 4 + [[NONE, NONE, 1 / 3, NONE]] * 4)


@pytest.mark.parametrize(("name", "share"), [("gshard", 0.5), ("st_moe", 0.2)])
def test_the_second_expert_is_kept_surely_from_a_share_on_and_by_chance_below_it(name: str, share: float):
    layer = layer_of(name, num_experts=4).model_copy(update={"capacity": CapacityConfig()})
    seeds = torch.arange(2000)

    def second_kept(first: float, second: float) -> float:
        logits = shares([first, second, 1e-6, 1e-6]).expand(2000, 4)
        plan = plan_of(layer, logits, row_seeds=seeds, training=True)
        return float(weight_table(plan)[:, 1].isfinite().float().mean())

    assert second_kept(1.0 - share, share) == 1.0
    # Half of the share above: every second time, give or take four standard deviations.
    assert second_kept(1.0 - share / 2, share / 2) == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)
    assert second_kept(1.0 - share / 10, share / 10) == pytest.approx(0.1, abs=4 * 0.3 / 2000**0.5)


def test_st_moe_has_twice_the_places_and_a_loss_on_large_logits():
    layer = layer_of("st_moe", num_experts=8)
    # 16 assignments to 8 experts, twice: 4 places.
    plan = plan_of(layer, shares([6, 3, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1]).expand(8, 8))
    assert plan.admission.capacity == 4
    assert_weights(plan, [[2 / 3, 1 / 3, *[NONE] * 6]] * 4 + [[NONE] * 8] * 4)
    # logsumexp of 8 zeros is log 8.
    assert layer.losses.z * float(z_loss(torch.zeros(3, 8))) == pytest.approx(1e-3 * math.log(8) ** 2)


def test_vmoe_drops_the_tokens_of_the_lowest_scores_and_leaves_weights_as_they_are():
    layer = layer_of("vmoe", num_experts=4)
    best = [50, 90, 60, 80, 55, 70]
    logits = shares(*[[each, 6, 2, 2] for each in best])
    # ceil(1.05 * 12 / 4) = 4 places: first and second choices of the two least sure are dropped.
    plan = plan_of(layer, logits)
    assert plan.admission.capacity == 4
    kept = {90, 60, 80, 70}
    assert_weights(
        plan,
        [[each / (each + 10), 6 / (each + 10), NONE, NONE] if each in kept else [NONE] * 4 for each in best],
    )


def test_vmoe_halves_its_coefficient_between_importance_and_load():
    losses = layer_of("vmoe", num_experts=4).losses
    assert losses.importance + losses.load == pytest.approx(1e-2)


def test_base_layers_take_the_best_expert_in_evaluation_and_blend_it_with_the_token():
    layer = layer_of("base_layers", num_experts=2)
    logits = torch.tensor([[2.0, -1.0], [3.0, 0.5], [0.0, 1.0]])
    plan = plan_of(layer, logits)
    first, second, third = torch.sigmoid(torch.tensor([2.0, 3.0, 1.0])).tolist()
    assert_weights(plan, [[first, NONE], [second, NONE], [NONE, third]])
    # Expert 0 is the identity, so blending it in changes nothing; expert 1 doubles.
    outputs = outputs_of(layer, plan, torch.ones(3, 2))
    torch.testing.assert_close(outputs, torch.tensor([[1.0], [1.0], [1.0 + third]]).expand(3, 2))


def test_base_layers_give_every_expert_as_many_tokens_in_training():
    layer = layer_of("base_layers", num_experts=2)
    # All prefer expert 0. The pairs lose 4, 1, 3 and 2 at expert 1: the second and the fourth go.
    logits = torch.tensor([[4.0, 0.0], [1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    plan = plan_of(layer, logits, training=True)
    assert weight_table(plan).isfinite().tolist() == [[True, False], [False, True], [True, False], [False, True]]


def test_hash_layers_ask_no_gate_and_send_an_id_to_the_same_expert_always():
    layer = layer_of("hash_layers", num_experts=8)
    ids = torch.tensor([5, 9, 5, 7, 9])
    policy = build_policy(layer.policy, num_experts=8)
    assert policy.num_logits == 0
    together = plan_of(layer, torch.empty(5, 0), token_ids=ids)
    table = weight_table(together)
    assert torch.equal(table[0].isnan(), table[2].isnan())
    assert torch.equal(table[1].isnan(), table[4].isnan())
    assert table.nansum(dim=1).tolist() == [1.0] * 5
    alone = weight_table(plan_of(layer, torch.empty(1, 0), token_ids=ids[3:4]))
    assert torch.equal(alone[0].isnan(), table[3].isnan())
    many = plan_of(layer, torch.empty(8000, 0), token_ids=torch.arange(8000))
    # Binomial: 1000 ids each, give or take five standard deviations.
    assert all(abs(load - 1000) < 5 * (8000 / 8 * 7 / 8) ** 0.5 for load in many.rows_per_expert)


@pytest.mark.parametrize("name", ["expert_choice", "diffusion_moe"])
def test_each_expert_takes_its_two_best_tokens_of_four(name: str):
    logits = shares([6, 1, 2, 1], [4, 4, 1, 1], [1, 1, 4, 4], [1, 6, 1, 2])
    plan = plan_of(layer_of(name, num_experts=4), logits)
    assert_weights(
        plan,
        [
            [0.6, NONE, 0.2, NONE],
            [0.4, 0.4, NONE, NONE],
            [NONE, NONE, 0.4, 0.4],
            [NONE, 0.6, NONE, 0.2],
        ],
    )


def test_diffusion_moe_moves_its_experts_with_the_time_step():
    layer = layer_of("diffusion_moe", num_experts=2)
    gate = build_gate(layer.gate, GateShape(3, 2), seed=0).eval()
    with torch.no_grad():
        # The third feature is the time step: early, expert 0 likes patches with a high first feature; late, all.
        gate.weight.copy_(torch.tensor([[1.0, 0.0, 4.0], [0.0, 1.0, 0.0]]))
        patches = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        early, late = (gate(torch.cat([patches, torch.full((2, 1), time)], dim=1)) for time in (0.0, 1.0))
    before, after = weight_table(plan_of(layer, early)), weight_table(plan_of(layer, late))
    # c = 2 = E: both experts take both patches, with a softmax over them.
    p = math.e / (math.e + 1)
    torch.testing.assert_close(before, torch.tensor([[p, 1 - p], [1 - p, p]]))
    assert (after[:, 0] > before[:, 0]).all()


def test_nllb_sends_a_token_to_the_shared_expert_or_to_its_two_best_of_the_others():
    layer = layer_of("nllb", num_experts=5)
    # The first two logits decide; the others are experts 1 to 4.
    logits = shares([3, 1, 5, 3, 1, 1], [1, 4, 5, 3, 1, 1])
    plan = plan_of(layer, logits)
    assert_weights(plan, [[0.75, NONE, NONE, NONE, NONE], [NONE, 0.8 * 0.5, 0.8 * 0.3, NONE, NONE]])


def test_megablocks_drops_nobody_and_leaves_the_probability_as_it_is():
    plan = plan_of(layer_of("megablocks", num_experts=3), shares([6, 3, 1]).expand(100, 3))
    assert_weights(plan, [[0.6, NONE, NONE]] * 100)


def test_openmoe_does_not_renormalise_and_has_twice_the_places():
    plan = plan_of(layer_of("openmoe", num_experts=8), shares([6, 3, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1]).expand(8, 8))
    assert plan.admission.capacity == 4
    assert_weights(plan, [[0.6, 0.3, *[NONE] * 6]] * 4 + [[NONE] * 8] * 4)


@pytest.mark.parametrize("name", ["gshard", "switch", "glam", "mixtral", "dbrx"])
def test_the_load_balancing_loss_of_an_even_batch_is_the_presets_coefficient(name: str):
    layer = layer_of(name, num_experts=8)
    # Each token prefers the next expert; the probabilities of all tokens together are even.
    logits = torch.stack([torch.arange(8.0).roll(shift) for shift in range(8)])
    policy = build_policy(layer.policy, num_experts=8)
    loss = layer.losses.load_balancing * float(load_balancing_loss(logits, policy.assign(logits)))
    assert loss == pytest.approx(PRESETS[name].layer["losses"]["load_balancing"])


def test_the_importance_loss_of_shazeers_layer_is_nothing_where_experts_weigh_alike():
    layer = layer_of("shazeer_2017", num_experts=8)
    logits = torch.stack([torch.arange(8.0).roll(shift) for shift in range(8)])
    policy = build_policy(layer.policy, num_experts=8)
    assert float(importance_loss(policy.assign(logits))) == pytest.approx(0.0, abs=1e-6)
    assert layer.losses.importance == layer.losses.load == 0.01
