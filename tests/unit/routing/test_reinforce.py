from __future__ import annotations

import itertools
import math

import pytest
import torch

from moe_runtime.config.policies import ReinforcePolicyConfig
from moe_runtime.errors import ConfigError, InvalidRequestError, ShapeError
from moe_runtime.routing.assignments import Assignments, Grid, WeightRule
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reinforce import RunningBaseline, reinforce_loss, sampling_log_probs
from moe_runtime.routing.weights import requested_weights

PROBABILITIES = [0.5, 0.3, 0.2]
LOGITS = torch.tensor([PROBABILITIES], dtype=torch.float64).log()


def policy_of(num_experts, **options):
    return build_policy(ReinforcePolicyConfig(kind="reinforce", **options), num_experts=num_experts)


def chosen(expert_ids, num_experts=3):
    """What a policy would have sampled."""
    expert_ids = torch.tensor(expert_ids)
    grid = Grid(expert_ids, torch.ones(expert_ids.shape))
    return Assignments(grid, None, expert_ids.shape[0], num_experts, WeightRule())


def chance(ordered):
    """Of drawing these experts one after the other, without replacement."""
    product, left = 1.0, 1.0
    for expert in ordered:
        product *= PROBABILITIES[expert] / left
        left -= PROBABILITIES[expert]
    return product


def test_training_samples_ordered_experts_as_often_as_they_are_drawn_without_replacement():
    num_draws = 20000
    logits = LOGITS.expand(num_draws, 3)
    info = TokenInfo(row_seeds=torch.arange(num_draws), training=True)
    experts = policy_of(3, k=2).assign(logits, info).choices.expert_ids
    for pair in itertools.permutations(range(3), 2):
        share = float((experts == torch.tensor(pair)).all(dim=1).double().mean())
        expected = chance(pair)
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected / num_draws))


def test_evaluation_takes_the_most_likely_experts_and_needs_no_seeds():
    assignments = policy_of(3, k=2).assign(LOGITS)
    assert assignments.expert_ids.tolist() == [0, 1]
    assert assignments.scores.tolist() == pytest.approx([0.5, 0.3])
    assert requested_weights(assignments).tolist() == pytest.approx([5 / 8, 3 / 8])
    assert assignments.all_scores.flatten().tolist() == pytest.approx(PROBABILITIES)


def test_evaluation_may_sample_as_well():
    info = TokenInfo(row_seeds=torch.arange(200))
    logits = LOGITS.expand(200, 3)
    sampling = policy_of(3, k=1, evaluation="as_in_training").assign(logits, info)
    assert sampling.expert_ids.unique().tolist() == [0, 1, 2]
    training = policy_of(3, k=1).assign(logits, TokenInfo(row_seeds=torch.arange(200), training=True))
    assert torch.equal(sampling.expert_ids, training.expert_ids)


def test_what_is_sampled_depends_on_the_row_and_not_on_the_batch():
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(12) * 77
    policy = policy_of(5, k=3)
    whole = policy.assign(logits, TokenInfo(row_seeds=seeds, training=True)).choices.expert_ids
    part = torch.tensor([7, 2, 11])
    alone = policy.assign(logits[part], TokenInfo(row_seeds=seeds[part], training=True)).choices.expert_ids
    assert torch.equal(alone, whole[part])
    again = policy.assign(logits, TokenInfo(row_seeds=seeds + 1, training=True)).choices.expert_ids
    assert not torch.equal(again, whole)
    assert all(len(set(row)) == 3 for row in whole.tolist())


def test_sampling_without_seeds_is_refused():
    with pytest.raises(InvalidRequestError, match=r"^row_seeds: expected one integer per token, found none"):
        policy_of(3, k=1).assign(LOGITS, TokenInfo(training=True))


def test_the_service_is_told_what_it_reads():
    policy = policy_of(3, k=2)
    assert (policy.batch_coupled, policy.can_reroute, policy.reads) == (False, True, {"row_seeds"})


@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
def test_extreme_logits_are_sampled_without_nan(value):
    logits = torch.zeros(4, 3)
    logits[:, 0] = value
    logits[2:, 1] = -value
    info = TokenInfo(row_seeds=torch.arange(4), training=True)
    assignments = policy_of(3, k=3).assign(logits, info)
    assert all(sorted(row) == [0, 1, 2] for row in assignments.choices.expert_ids.tolist())
    assert requested_weights(assignments).isfinite().all()


def test_no_tokens_and_one_expert():
    info = TokenInfo(row_seeds=torch.zeros(0, dtype=torch.int64), training=True)
    nothing = policy_of(3, k=2).assign(torch.zeros(0, 3), info)
    assert nothing.num_assignments == 0
    assert float(reinforce_loss(torch.zeros(0, 3), nothing, torch.zeros(0), entropy_bonus=1.0)) == 0.0
    one = policy_of(1, k=1).assign(torch.randn(2, 1), TokenInfo(row_seeds=torch.arange(2), training=True))
    assert one.expert_ids.tolist() == [0, 0]


def test_the_log_probability_is_that_of_the_ordered_experts():
    # 0.3 * 0.5 / 0.7, and 0.2.
    logits = LOGITS.expand(2, 3)
    assert sampling_log_probs(logits, chosen([[1, 0], [2, 1]])).exp().tolist() == pytest.approx(
        [0.3 * 0.5 / 0.7, 0.2 * 0.3 / 0.8]
    )
    rows = policy_of(3, k=2).assign(logits, TokenInfo(k=torch.tensor([1, 0])))
    assert sampling_log_probs(logits, rows).tolist() == pytest.approx([math.log(0.5), 0.0])


@pytest.mark.parametrize("baseline", [0.0, 1.7])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_gradient_is_that_of_the_expected_reward_whatever_the_baseline(k, baseline):
    ordered_sets = list(itertools.permutations(range(3), k))
    rewards = {experts: 1.0 + 2.0 * experts[0] - 0.5 * experts[-1] ** 2 for experts in ordered_sets}
    logits = LOGITS.clone().requires_grad_()
    expected_reward = torch.zeros((), dtype=torch.float64)
    for experts in ordered_sets:
        probability, left = 1.0, torch.softmax(logits[0], dim=-1)
        for expert in experts:
            probability = probability * left[expert] / left.sum()
            left = left * (torch.arange(3) != expert)
        expected_reward = expected_reward + probability * rewards[experts]
    (expected,) = torch.autograd.grad(expected_reward, logits)

    mean = torch.zeros_like(LOGITS)
    for experts in ordered_sets:
        reward = torch.tensor([rewards[experts]], dtype=torch.float64)
        loss = reinforce_loss(logits, chosen([experts]), reward, baseline)
        mean += chance(experts) * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(-mean, expected)


def test_the_loss_is_a_mean_over_tokens_that_have_experts():
    logits = LOGITS.expand(3, 3).clone().requires_grad_()
    sampled = policy_of(3, k=1).assign(logits, TokenInfo(mask=torch.tensor([True, False, True])))
    rewards = torch.tensor([3.0, math.nan, 1.0])
    loss = reinforce_loss(logits, sampled, rewards, 1.0, entropy_bonus=0.0)
    assert loss.item() == pytest.approx(-(2.0 * math.log(0.5) + 0.0) / 2)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1].tolist() == [0.0, 0.0, 0.0]


def test_the_bonus_is_the_entropy():
    logits = torch.zeros(2, 4, requires_grad=True)
    sampled = policy_of(4, k=1).assign(logits)
    loss = reinforce_loss(logits, sampled, torch.ones(2), 1.0, entropy_bonus=0.1)
    assert loss.item() == pytest.approx(-0.1 * math.log(4))
    sharp = torch.tensor([[3.0, 0.0]], requires_grad=True)
    reinforce_loss(sharp, policy_of(2, k=1).assign(sharp), torch.ones(1), 1.0, entropy_bonus=0.1).backward()
    assert sharp.grad[0, 0] > 0 > sharp.grad[0, 1]


@pytest.mark.parametrize("value", [1e30, -1e30, float("inf")])
def test_the_bonus_of_extreme_logits_is_not_nan(value):
    logits = torch.tensor([[value, 0.0, -value]], requires_grad=True)
    sampled = policy_of(3, k=1).assign(logits)
    loss = reinforce_loss(logits, sampled, torch.ones(1), 0.5, entropy_bonus=0.1)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_rewards_of_another_number_are_refused():
    with pytest.raises(ShapeError, match=r"^rewards: expected one per token, shape \(1,\), found \(2,\)"):
        reinforce_loss(LOGITS, chosen([[0]]), torch.ones(2))


def test_a_baseline_is_the_mean_of_the_rewards_so_far():
    baseline = RunningBaseline(decay=1.0)
    assert float(baseline.value) == 0.0
    baseline.update(torch.tensor([1.0, 3.0]))
    assert float(baseline.value) == 2.0
    baseline.update(torch.tensor([5.0]))
    baseline.update(torch.zeros(0))
    assert float(baseline.value) == 3.5
    recent = RunningBaseline(decay=0.5)
    for reward in (2.0, 5.0):
        recent.update(torch.tensor([reward]))
    # (2 / 2 + 5) / (1 / 2 + 1)
    assert float(recent.value) == 4.0


def test_a_baseline_is_kept_by_a_checkpoint():
    baseline = RunningBaseline()
    baseline.update(torch.tensor([2.0]))
    restored = RunningBaseline()
    restored.load_state_dict(baseline.state_dict())
    restored.update(torch.tensor([4.0]))
    baseline.update(torch.tensor([4.0]))
    assert float(restored.value) == float(baseline.value)


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_baseline_refuses_a_decay_outside_0_and_1(decay):
    with pytest.raises(ConfigError, match=r"^decay: expected 0 to 1, found"):
        RunningBaseline(decay=decay)


class Bandit:
    """Four contexts, four experts, of which one is right; rewards are 5 or 6, and so far from 0."""

    def __init__(self):
        self.contexts = torch.eye(4).repeat(16, 1)
        self.right = (torch.arange(4).repeat(16) + 1) % 4

    def rewards(self, assignments):
        return 5.0 + (assignments.expert_ids == self.right).float()

    def sample(self, weight, *, step):
        seeds = torch.arange(64) + 64 * step
        return policy_of(4, k=1).assign(self.contexts @ weight.T, TokenInfo(row_seeds=seeds, training=True))


def test_a_gate_learns_from_the_callers_reward():
    bandit, baseline = Bandit(), RunningBaseline(decay=0.9)
    weight = torch.zeros(4, 4, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    before = after = 0.0
    for step in range(150):
        assignments = bandit.sample(weight, step=step)
        rewards = bandit.rewards(assignments)
        loss = reinforce_loss(bandit.contexts @ weight.T, assignments, rewards, baseline.value, entropy_bonus=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline.update(rewards)
        before, after = (float(rewards.mean()), 0.0) if step == 0 else (before, float(rewards.mean()))
    assert before < 5.5
    assert after > 5.9
    greedy = policy_of(4, k=1).assign(torch.eye(4) @ weight.detach().T)
    assert greedy.expert_ids.tolist() == [1, 2, 3, 0]


def test_a_baseline_makes_the_gradient_vary_less():
    bandit = Bandit()
    weight = torch.zeros(4, 4, requires_grad=True)

    def variance(baseline):
        gradients = []
        for step in range(100):
            assignments = bandit.sample(weight, step=step)
            rewards = bandit.rewards(assignments)
            loss = reinforce_loss(bandit.contexts @ weight.T, assignments, rewards, baseline.value)
            gradients.append(torch.autograd.grad(loss, weight)[0].flatten())
        return float(torch.stack(gradients).var(dim=0).sum())

    warm = RunningBaseline()
    for step in range(100, 150):
        warm.update(bandit.rewards(bandit.sample(weight, step=step)))
    assert float(warm.value) == pytest.approx(5.25, abs=0.1)
    assert variance(warm) < 0.05 * variance(RunningBaseline())
