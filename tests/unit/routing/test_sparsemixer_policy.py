"""Sparsemixer, by hand and against Hugging Face's own."""

from __future__ import annotations

import math

import pytest
import torch

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import SparseMixerPolicyConfig
from moe_runtime.errors import ConfigError
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules
from moe_runtime.routing.weights import requested_weights

IDENTITIES = [lambda x: x] * 4


def assign(logits, *, jitter_eps=0.05, **options):
    config = SparseMixerPolicyConfig(kind="sparsemixer", jitter_eps=jitter_eps)
    return build_policy(config, num_experts=logits.shape[1]).assign(logits, TokenInfo(**options))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("logits", "experts", "weights"),
    [
        # 1.9 is within 0.1 of 2.0, relatively; 1.0 is far from both.
        ([1.9, 1.0, 2.0], [2, 0], [sigmoid(0.1), 1.0]),
        # Sizes, not signs: -1.05 is within 0.1 / 1.05 of -1.0, -1.2 within 0.15 / 1.2 of -1.05, which is too far.
        ([-1.0, -1.2, -1.05], [0, 2], [sigmoid(0.05), 1.0]),
        # Nothing is near 0 but 0 itself.
        ([0.0, -1e-6, 0.0], [0, 2], [0.5, 1.0]),
        # Of equal ones the first is taken first, and masked for the second.
        ([0.0, 0.0, 0.0], [0, 1], [1 / 3, 1 / 2]),
        ([3.0, -3.0, 1.0], [0, 2], [1.0, 1.0]),
    ],
)
def test_each_of_two_experts_is_weighed_against_those_near_it(logits, experts, weights):
    assignments = assign(torch.tensor([logits]))
    assert assignments.expert_ids.tolist() == experts
    assert requested_weights(assignments).tolist() == pytest.approx(weights)


@pytest.mark.parametrize("jitter_eps", [0.01, 0.1, 0.4, 0.9])
def test_experts_and_weights_are_those_of_hugging_face(jitter_eps):
    phimoe = pytest.importorskip(
        "transformers.models.phimoe.modeling_phimoe", reason="transformers is not installed", exc_type=ImportError
    )
    logits = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    logits[400:] = logits[400:].round()
    weights, experts = phimoe.sparsemixer(logits, jitter_eps=jitter_eps, training=False)
    assignments = assign(logits, jitter_eps=jitter_eps)
    assert torch.equal(assignments.grid.expert_ids, experts)
    torch.testing.assert_close(assignments.grid.scores, weights, rtol=0, atol=1e-6)


def test_a_request_for_one_expert_gets_the_best():
    assignments = assign(torch.tensor([[1.9, 1.0, 2.0]] * 3), k=torch.tensor([1, 0, 2]))
    assert assignments.token_ids.tolist() == [0, 2, 2]
    assert assignments.scores.tolist() == pytest.approx([sigmoid(0.1), sigmoid(0.1), 1.0])
    assert assign(torch.tensor([[1.9, 1.0, 2.0]]), k=1).expert_ids.tolist() == [2]


def test_a_third_expert_weighs_what_it_would_with_the_full_one_masked(route):
    # One place each, ceil(0.5 * 4 / 4), and tokens 0 and 1 want experts 0 and 1.
    row = [2.0, 1.9, 1.85, 1.8]
    policy = SparseMixerPolicyConfig(kind="sparsemixer", jitter_eps=0.05)
    rules = RoutingRules(policy, CapacityConfig(factor=0.5, min=1, overflow="reroute"))
    routed = route(torch.ones(2, 1), RoutingInputs(torch.tensor([row] * 2)), rules, IDENTITIES)
    first, second = assign(torch.tensor([[-1e4, -1e4, *row[2:]]])).scores.tolist()
    assert (first, second) == (pytest.approx(sigmoid(0.05)), 1.0)
    assert [pair[2:] for pair in routed.pairs() if pair[0] == 1] == [
        (2, True, "served", pytest.approx(first)),
        (3, True, "served", pytest.approx(second)),
    ]


def test_gradients_flow_through_the_weights_before_and_after_rerouting():
    logits = torch.tensor([[2.0, 1.9, 1.85]] * 2, requires_grad=True)
    admission = admit(assign(logits, k=1), CapacityConfig(factor=1.0, min=1, overflow="reroute"))
    assert admission.assignments.expert_ids.tolist() == [0, 1]
    admission.assignments.scores[1].backward()
    slope = sigmoid(0.05) * (1 - sigmoid(0.05))
    assert logits.grad[1].tolist() == pytest.approx([0.0, slope, -slope], abs=1e-6)


def test_a_layer_of_one_expert_is_refused_at_load():
    config = SparseMixerPolicyConfig(kind="sparsemixer")
    with pytest.raises(ConfigError, match=r"policy\.kind: sparsemixer expected a layer of at least 2 experts, found 1"):
        build_policy(config, num_experts=1)
