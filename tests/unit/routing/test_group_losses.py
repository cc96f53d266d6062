from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.config.policies import SwitchPolicyConfig, TopKPolicyConfig
from moe_runtime.errors import ShapeError
from moe_runtime.routing.assignments import Assignments, Pairs, WeightRule
from moe_runtime.routing.gates import NoisyLogits
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

EXAMPLES = settings(max_examples=50)

# Probabilities [0.75, 0.25] twice and [0.25, 0.75] once; the last row is padding.
LOGITS = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1.0, 9.0]]).log()
MASK = torch.tensor([True, True, True, False])


def switch_assignments():
    return build_policy(SwitchPolicyConfig(kind="switch"), num_experts=2).assign(LOGITS, TokenInfo(mask=MASK))


def assignments_of(pairs, *, num_tokens, num_experts):
    """Any set of (token, expert) pairs, as expert choice may ask for them."""
    columns = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    choices = Pairs(columns[:, 0], columns[:, 1], torch.ones(len(pairs)), torch.zeros(len(pairs), dtype=torch.int64))
    return Assignments(choices, None, num_tokens, num_experts, WeightRule())


@pytest.mark.parametrize(
    ("sequence_ids", "expected"),
    [
        # Each of [0, 1] and [2] goes to one expert with probability 0.75: 2 * 0.75.
        ([0, 0, 1, 1], 1.5),
        # [0, 2] is uniform in both; [1] is not; the padding is a sequence of its own, and none.
        ([7, -2, 7, 3], (1.0 + 1.5) / 2),
        # One sequence: the loss of the batch.
        ([5, 5, 5, 5], 9.5 / 9),
    ],
)
def test_sequence_balance_loss_by_hand(sequence_ids, expected):
    loss = sequence_balance_loss(LOGITS, switch_assignments(), sequence_ids=torch.tensor(sequence_ids), mask=MASK)
    assert loss.item() == pytest.approx(expected)


def test_sequence_whose_tokens_ask_for_nothing_counts_as_zero():
    assignments = assignments_of([(0, 0)], num_tokens=2, num_experts=2)
    # The first: 2 * 1 * 0.75; the second has no shares.
    loss = sequence_balance_loss(LOGITS[:2], assignments, sequence_ids=torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(0.75)


def test_sequence_balance_loss_of_sigmoid_scores_takes_their_shares_as_probabilities():
    logits = torch.tensor([[0.9, 0.3]]).logit()
    assignments = assignments_of([(0, 0)], num_tokens=1, num_experts=2)
    loss = sequence_balance_loss(logits, assignments, sequence_ids=torch.tensor([0]), score="sigmoid")
    assert loss.item() == pytest.approx(1.5)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 8])
def test_sequence_balance_loss_of_uniform_routing_is_one_for_every_k(num_experts):
    for k in range(1, num_experts + 1):
        # In each of two sequences token t asks for experts t, t + 1, ... , and all probabilities are alike.
        order = torch.stack([torch.arange(num_experts).roll(shift) for shift in range(num_experts)]).repeat(2, 1)
        assignments = build_policy(TopKPolicyConfig(k=k), num_experts=num_experts).assign(-order.float())
        sequence_ids = torch.arange(2).repeat_interleave(num_experts)
        loss = sequence_balance_loss(torch.zeros(order.shape), assignments, sequence_ids=sequence_ids)
        assert loss.item() == pytest.approx(1.0, abs=1e-6)


@st.composite
def batches(draw):
    num_tokens, num_experts = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    every = [(token, expert) for token in range(num_tokens) for expert in range(num_experts)]
    return (
        torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))),
        draw(st.lists(st.sampled_from(every), unique=True)),
        draw(st.lists(st.integers(-1, 2), min_size=num_tokens, max_size=num_tokens)),
        draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)),
        draw(st.sampled_from(["softmax", "sigmoid"])),
    )


@EXAMPLES
@given(batches())
def test_sequence_balance_loss_is_the_mean_of_each_sequences_own(batch):
    logits, pairs, sequence_ids, mask, score = batch
    pairs = [pair for pair in pairs if mask[pair[0]]]
    losses = []
    for sequence in {own for own, is_valid in zip(sequence_ids, mask, strict=True) if is_valid}:
        rows = [row for row, own in enumerate(sequence_ids) if own == sequence and mask[row]]
        own_pairs = [(rows.index(token), expert) for token, expert in pairs if token in rows]
        own = assignments_of(own_pairs, num_tokens=len(rows), num_experts=logits.shape[1])
        losses.append(load_balancing_loss(logits[rows], own, score=score).item())
    loss = sequence_balance_loss(
        logits,
        assignments_of(pairs, num_tokens=len(logits), num_experts=logits.shape[1]),
        sequence_ids=torch.tensor(sequence_ids),
        mask=torch.tensor(mask),
        score=score,
    )
    assert loss.item() == pytest.approx(sum(losses) / max(len(losses), 1), abs=1e-5)


def test_entropy_loss_by_hand():
    # All three valid rows have an entropy of -(3/4 log 3/4 + 1/4 log 1/4) = 0.562335.
    assert entropy_loss(LOGITS, mask=MASK).item() == pytest.approx(-0.562335, abs=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_entropy_loss_runs_from_minus_the_log_of_the_experts_to_zero(score):
    assert entropy_loss(torch.zeros(2, 8), score=score).item() == pytest.approx(-math.log(8))
    sure = torch.full((2, 8), -100.0).index_fill(1, torch.tensor([3]), 100.0)
    assert entropy_loss(sure, score=score).item() == pytest.approx(0.0)


def test_entropy_of_logits_as_far_apart_as_numbers_go_is_zero_and_has_a_gradient():
    logits = torch.tensor([[3e38, -3e38, 0.0]], requires_grad=True)
    loss = entropy_loss(logits)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_mutual_information_loss_by_hand():
    # P(T, E) = [[3, 1], [1, 3]] / 8, marginals 1/2: 3/4 log(3/2) + 1/4 log(1/2) = 0.130812.
    loss = mutual_information_loss(LOGITS[1:], torch.tensor([4, 9, 0]), mask=MASK[1:])
    assert loss.item() == pytest.approx(-0.130812, abs=1e-6)


def test_tasks_with_an_expert_each_have_all_the_information():
    logits = torch.eye(3).repeat(2, 1) * 200.0
    loss = mutual_information_loss(logits, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert loss.item() == pytest.approx(-math.log(3))


def test_tasks_that_use_experts_alike_have_no_information():
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]).repeat_interleave(2, 0)
    assert mutual_information_loss(logits, torch.tensor([0, 1, 0, 1])).item() == pytest.approx(0.0, abs=1e-6)


def test_mutual_information_weighs_tasks_by_their_tokens():
    # Three tokens of task 0 at expert 0 and one of task 1 at expert 1: the entropy of [3/4, 1/4].
    logits = torch.tensor([[99.0, -99.0]] * 3 + [[-99.0, 99.0]])
    loss = mutual_information_loss(logits, torch.tensor([0, 0, 0, 1]))
    assert loss.item() == pytest.approx(-0.562335, abs=1e-6)


def test_group_of_another_number_of_tokens_is_refused():
    with pytest.raises(ShapeError, match=r"tasks: expected one per token, shape \(4,\), found \(3,\)"):
        mutual_information_loss(LOGITS, torch.zeros(3))
    with pytest.raises(ShapeError, match=r"sequence_ids: expected one per token, shape \(4,\), found \(5,\)"):
        sequence_balance_loss(LOGITS, switch_assignments(), sequence_ids=torch.zeros(5))


GROUPS = torch.tensor([0, 1, 0, 2, 1, 0])
VALID = torch.tensor([True, True, False, True, True, True])


def importance_of_valid(logits):
    return importance_loss(build_policy(TopKPolicyConfig(k=2), num_experts=4).assign(logits, TokenInfo(mask=VALID)))


def switch_of_valid(logits):
    return build_policy(SwitchPolicyConfig(kind="switch"), num_experts=4).assign(logits, TokenInfo(mask=VALID))


LOSSES = {
    "load_balancing": lambda x: load_balancing_loss(x, switch_of_valid(x), mask=VALID),
    "load_balancing_sigmoid": lambda x: load_balancing_loss(x, switch_of_valid(x), mask=VALID, score="sigmoid"),
    "sequence": lambda x: sequence_balance_loss(x, switch_of_valid(x), sequence_ids=GROUPS, mask=VALID),
    "importance": importance_of_valid,
    "load": lambda x: load_loss(NoisyLogits(x, x + 0.1 * x.detach().cos(), torch.ones_like(x)), k=2, mask=VALID),
    "z": lambda x: z_loss(x, mask=VALID),
    "entropy": lambda x: entropy_loss(x, mask=VALID),
    "entropy_sigmoid": lambda x: entropy_loss(x, mask=VALID, score="sigmoid"),
    "mutual_information": lambda x: mutual_information_loss(x, GROUPS, mask=VALID),
}


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"load"}))
def test_gradient_is_that_of_finite_differences(name):
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], (logits,))


def test_gradient_of_the_load_is_that_of_finite_differences_in_all_it_is_made_of():
    generator = torch.Generator().manual_seed(1)
    clean, noisy = (torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    stds = (torch.rand(6, 4, dtype=torch.float64, generator=generator) + 0.5).requires_grad_()
    parts = (clean, noisy, stds)
    assert torch.autograd.gradcheck(lambda *logits: load_loss(NoisyLogits(*logits), k=2, mask=VALID), parts)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_padding_gets_no_gradient(name):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    LOSSES[name](logits).backward()
    assert logits.grad[2].tolist() == [0.0] * 4
    assert logits.grad[VALID].abs().sum() > 0


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"z"}))
def test_hidden_experts_leave_loss_and_gradient_finite(name):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    logits[:, 3] = torch.finfo(torch.float32).min
    logits[0, 1:] = -200.0
    logits.requires_grad_()
    loss = LOSSES[name](logits)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
