from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import SwitchPolicyConfig, TopKPolicyConfig
from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.metrics import gate_confidence, routing_metrics
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.tally import RoutingTally, tally_routing

EXAMPLES = settings(max_examples=50)

# Three tokens want expert 0 of two and one wants expert 1, of which capacity 1.0 grants two each.
LOGITS = torch.tensor([[9.0, 1.0], [8.0, 2.0], [7.0, 3.0], [1.0, 9.0]]).log()
TIGHT = {"factor": 1.0, "min": 1}


def admitted(logits=LOGITS, *, policy=SwitchPolicyConfig(kind="switch"), mask=None, **capacity):  # noqa: B008 - frozen
    assignments = build_policy(policy, num_experts=logits.shape[1]).assign(logits, TokenInfo(mask=mask))
    return admit(assignments, CapacityConfig(**capacity))


def test_load_is_what_was_asked_for_and_drops_are_what_found_no_place():
    tally = tally_routing(admitted(**TIGHT))
    assert tally == RoutingTally(load=(3, 1), num_dropped=1)
    assert routing_metrics(tally).drop_rate == 0.25


def test_rerouted_assignment_counts_where_it_was_asked_for_and_is_not_dropped():
    tally = tally_routing(admitted(**TIGHT, overflow="reroute"), labels=torch.tensor([0, 0, 1, 1]))
    assert (tally.load, tally.num_dropped) == ((3, 1), 0)
    assert tally.label_load.tolist() == [[2, 0], [1, 1]]


def test_padding_counts_nowhere():
    mask = torch.tensor([True, False, True, True])
    tally = tally_routing(admitted(mask=mask), router_logits=LOGITS, mask=mask, labels=torch.tensor([0, 2, 1, 1]))
    assert tally.load == (2, 1)
    assert tally.label_load.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert tally.confidence == gate_confidence(LOGITS[mask])
    # Probabilities of the best: 0.9, 0.7 and 0.9.
    assert routing_metrics(tally).confidence.top1 == pytest.approx(2.5 / 3)


def test_expert_per_label_is_full_specialisation():
    tally = tally_routing(admitted(), labels=torch.tensor([4, 4, 4, 7]))
    assert routing_metrics(tally).specialisation.share == pytest.approx(1.0)


@EXAMPLES
@given(cut=st.integers(0, 12), seed=st.integers(0, 100))
def test_tallies_of_parts_add_up_to_that_of_the_whole(cut, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 5, generator=generator)
    labels = torch.randint(0, 6, (12,), generator=generator)

    def tally_of(rows):
        admission = admitted(logits[rows], policy=TopKPolicyConfig(k=2))
        return tally_routing(admission, router_logits=logits[rows], labels=labels[rows])

    whole, added = tally_of(slice(None)), tally_of(slice(cut)) + tally_of(slice(cut, None))
    assert (added.load, added.num_dropped) == (whole.load, whole.num_dropped)
    assert torch.equal(added.label_load, whole.label_load)
    assert added.confidence.num_tokens == 12
    assert added.confidence.top1 == pytest.approx(whole.confidence.top1, abs=1e-6)
    assert added.confidence.entropy == pytest.approx(whole.confidence.entropy, abs=1e-6)


def test_what_only_one_of_two_batches_knows_is_lost():
    known = tally_routing(admitted(), router_logits=LOGITS, labels=torch.zeros(4, dtype=torch.int64))
    added = known + RoutingTally(load=(1, 0))
    assert added == RoutingTally(load=(4, 1))


def test_tallies_of_different_layers_do_not_add():
    with pytest.raises(ShapeError, match="expected another of 2 experts, found one of 3"):
        RoutingTally(load=(1, 2)) + RoutingTally(load=(1, 2, 3))


def test_labels_that_are_none_are_refused():
    with pytest.raises(ShapeError, match=r"labels: expected one per token, shape \(4,\), found \(3,\)"):
        tally_routing(admitted(), labels=torch.zeros(3))
    with pytest.raises(InvalidRequestError, match="labels: expected integers of at least 0, found -2"):
        tally_routing(admitted(), labels=torch.tensor([0, -2, 1, 1]))
