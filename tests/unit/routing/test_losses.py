from __future__ import annotations

import pytest
import torch

from moe_runtime.config.gates import NoisyGateConfig
from moe_runtime.config.policies import SwitchPolicyConfig, TopKPolicyConfig
from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import NoisyLogits, build_gate
from moe_runtime.routing.losses import (
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    mutual_information_loss,
    sequence_balance_loss,
    z_loss,
)
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo

# Probabilities [0.75, 0.25] twice and [0.25, 0.75] once; the last row is padding.
LOGITS = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1.0, 9.0]]).log()
MASK = torch.tensor([True, True, True, False])


def assign(config, logits=LOGITS, mask=MASK):
    return build_policy(config, num_experts=logits.shape[1]).assign(logits, TokenInfo(mask=mask))


def test_load_balancing_loss_by_hand():
    # f = [2/3, 1/3], P = [1.75/3, 1.25/3]: 2 * (3.5 + 1.25) / 9.
    loss = load_balancing_loss(LOGITS, assign(SwitchPolicyConfig(kind="switch")), mask=MASK)
    assert loss.item() == pytest.approx(9.5 / 9)


def test_load_balancing_loss_is_worst_when_all_go_to_one_expert():
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 5)
    loss = load_balancing_loss(logits, assign(SwitchPolicyConfig(kind="switch"), logits, None))
    assert loss.item() == pytest.approx(4.0)


def test_load_balancing_loss_may_go_below_one_when_probabilities_and_choices_differ():
    logits = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.0001, 0.9999]]).log()
    assert load_balancing_loss(logits, assign(SwitchPolicyConfig(kind="switch"), logits, None)).item() < 1.0


def test_load_balancing_loss_of_sigmoid_scores_takes_their_shares_as_probabilities():
    # Sigmoids 0.9 and 0.3 are shares 0.75 and 0.25: 2 * (1 * 0.75 + 0 * 0.25).
    logits = torch.tensor([[0.9, 0.3]]).logit()
    assignments = assign(TopKPolicyConfig(k=1, score="sigmoid"), logits, None)
    assert load_balancing_loss(logits, assignments, score="sigmoid").item() == pytest.approx(1.5)


def test_load_balancing_loss_of_tokens_that_ask_for_different_numbers_of_experts():
    # Token 0 asks for both experts, token 1 for its best, token 2 for none: f = [2/3, 1/3]; P is over all three.
    policy = build_policy(TopKPolicyConfig(k=2), num_experts=2)
    assignments = policy.assign(LOGITS[:3], TokenInfo(k=torch.tensor([2, 1, 0])))
    assert load_balancing_loss(LOGITS[:3], assignments).item() == pytest.approx(9.5 / 9)


@pytest.mark.parametrize("loss", [load_balancing_loss, sequence_balance_loss])
def test_logits_of_another_width_than_the_experts_are_refused(loss):
    assignments = assign(SwitchPolicyConfig(kind="switch"))
    named = {} if loss is load_balancing_loss else {"sequence_ids": torch.zeros(4)}
    with pytest.raises(ShapeError, match=r"expected router_logits of shape \(4, 2\).*found \(4, 3\)"):
        loss(torch.zeros(4, 3), assignments, **named)


def test_importance_loss_by_hand():
    # Summed weights [1.5, 0.75]: mean 1.125, variance 0.140625.
    loss = importance_loss(assign(SwitchPolicyConfig(kind="switch")))
    assert loss.item() == pytest.approx(0.140625 / 1.125**2)


def test_importance_loss_is_zero_when_experts_are_used_alike():
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    assert importance_loss(assign(TopKPolicyConfig(k=2), logits, None)).item() == pytest.approx(0.0, abs=1e-7)


def test_load_loss_by_hand():
    # k = 1, no difference between clean and noisy: each expert must beat the other, by 1 either way, with
    # deviation 1. Loads are 2 * Phi(1) + Phi(-1) and Phi(1) + 2 * Phi(-1), with Phi(1) = 0.841345.
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 9.0]])
    loads = torch.tensor([2 * 0.841345 + 0.158655, 0.841345 + 2 * 0.158655])
    expected = loads.var(correction=0) / loads.mean() ** 2
    loss = load_loss(NoisyLogits(logits, logits, torch.ones(4, 2)), k=1, mask=MASK)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_load_loss_compares_an_expert_with_the_best_of_the_others():
    # k = 2 of 3: experts 0 and 1 are in and must beat 1.0, the third; expert 2 must beat 2.0, the second.
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    chances = torch.tensor([0.9772499, 0.8413447, 0.1586553])
    expected = chances.var(correction=0) / chances.mean() ** 2
    loss = load_loss(NoisyLogits(logits, logits, torch.ones(1, 3)), k=2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_load_is_the_same_for_all_when_every_expert_serves_every_token():
    logits = LOGITS.clone().requires_grad_()
    loss = load_loss(NoisyLogits(logits, logits, torch.ones(4, 2)), k=2)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().max() == 0.0


def test_load_loss_trains_the_noise_of_a_gate():
    gate = build_gate(NoisyGateConfig(kind="noisy"), GateShape(3, 4), seed=0)
    generator = torch.Generator().manual_seed(0)
    load_loss(gate.noisy_logits(torch.randn(6, 3, generator=generator), generator), k=2).backward()
    assert gate.noise_weight.grad.abs().sum() > 0
    assert gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("k", [0, 3])
def test_load_loss_refuses_a_k_that_cannot_be(k):
    with pytest.raises(InvalidRequestError, match=f"load_loss: expected k of 1 to 2, found {k}"):
        load_loss(NoisyLogits(LOGITS, LOGITS, LOGITS), k=k)


def test_z_loss_by_hand():
    # logsumexp of the valid rows is log 4 each.
    assert z_loss(LOGITS, mask=MASK).item() == pytest.approx(1.3862944**2)
    assert z_loss(LOGITS[:3]).item() == pytest.approx(1.3862944**2)


def test_batch_of_padding_alone_costs_nothing():
    mask = torch.zeros(4, dtype=torch.bool)
    assignments = assign(TopKPolicyConfig(k=2), mask=mask)
    losses = [
        load_balancing_loss(LOGITS, assignments, mask=mask),
        importance_loss(assignments),
        load_loss(NoisyLogits(LOGITS, LOGITS, torch.ones(4, 2)), k=1, mask=mask),
        z_loss(LOGITS, mask=mask),
        sequence_balance_loss(LOGITS, assignments, sequence_ids=torch.arange(4), mask=mask),
        entropy_loss(LOGITS, mask=mask),
        mutual_information_loss(LOGITS, torch.arange(4), mask=mask),
    ]
    assert [loss.item() for loss in losses] == [0.0] * 7


def test_half_precision_logits_are_summed_in_float32():
    assert z_loss(LOGITS.bfloat16()).dtype == torch.float32
    assert load_balancing_loss(LOGITS.half(), assign(TopKPolicyConfig(), mask=None)).dtype == torch.float32
