from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.metrics import (
    coefficient_of_variation,
    drop_rate,
    gate_confidence,
    gini,
    idle_experts,
    load_entropy,
    max_over_mean,
    routing_metrics,
    specialisation,
)
from moe_runtime.routing.tally import RoutingTally

EXAMPLES = settings(max_examples=50)

LOADS = st.lists(st.integers(0, 10**9), min_size=1, max_size=12)
FIGURES = [max_over_mean, coefficient_of_variation, load_entropy, gini]

# Zipf(1.0) over four experts, of 25 assignments: shares 0.48, 0.24, 0.16 and 0.12.
ZIPF = [12, 6, 4, 3]
# The mean is 6.25, the variance (5.75**2 + 0.25**2 + 2.25**2 + 3.25**2) / 4 = 12.1875.
ZIPF_VARIATION = math.sqrt(12.1875) / 6.25
# Minus the sum of share * log(share) is 1.242457, and log(4) is 1.386294.
ZIPF_ENTROPY = 1.242457 / 1.386294
# Twice (1 * 3 + 2 * 4 + 3 * 6 + 4 * 12) / (4 * 25), less 5 / 4.
ZIPF_GINI = 0.29


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([5, 5, 5, 5], (1.0, 0.0, 1.0, 0.0)),
        ([0, 8, 0, 0], (4.0, math.sqrt(3), 0.0, 0.75)),
        (ZIPF, (1.92, ZIPF_VARIATION, ZIPF_ENTROPY, ZIPF_GINI)),
        # Half of them idle: mean 1, variance 1, half the entropy, mean absolute difference 1.
        ([2, 0, 2, 0], (2.0, 1.0, 0.5, 0.5)),
        ([0, 0, 0], (1.0, 0.0, 1.0, 0.0)),
        ([7], (1.0, 0.0, 1.0, 0.0)),
    ],
    ids=["uniform", "one_hot", "zipf", "half_idle", "nothing", "one_expert"],
)
def test_figures_of_a_load_by_hand(load, expected):
    for given_load in (load, tuple(load), torch.tensor(load)):
        assert [figure(given_load) for figure in FIGURES] == pytest.approx(expected, abs=1e-6)


def test_experts_that_never_fire_are_named():
    assert idle_experts([0, 3, 0, 1]) == (0, 2)
    assert idle_experts([1, 1]) == ()
    assert idle_experts(torch.zeros(3)) == (0, 1, 2)


def test_drop_rate_is_the_share_of_what_was_requested():
    assert drop_rate(num_dropped=3, num_requested=12) == 0.25
    assert drop_rate(num_dropped=0, num_requested=0) == 0.0


@pytest.mark.parametrize("num_dropped", [-1, 13])
def test_more_drops_than_requests_are_refused(num_dropped):
    with pytest.raises(InvalidRequestError, match="num_dropped: expected 0 to 12, all requested"):
        drop_rate(num_dropped=num_dropped, num_requested=12)


@pytest.mark.parametrize("load", [[], [1, -1], [[1, 2]], [math.nan]])
@pytest.mark.parametrize("figure", [*FIGURES, idle_experts])
def test_load_that_is_none_is_refused(figure, load):
    with pytest.raises(InvalidRequestError, match="load: expected one count of at least 0 per expert"):
        figure(load)


@EXAMPLES
@given(LOADS)
def test_figures_stay_in_their_ranges(load):
    n = len(load)
    assert 1.0 <= max_over_mean(load) <= n + 1e-9
    assert 0.0 <= coefficient_of_variation(load) <= math.sqrt(n - 1) + 1e-9
    assert 0.0 <= load_entropy(load) <= 1.0
    assert 0.0 <= gini(load) <= 1.0 - 1.0 / n + 1e-9
    assert gini(load) < 1.0


@EXAMPLES
@given(LOADS, st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(load, random):
    shuffled = random.sample(load, len(load))
    for figure in FIGURES:
        assert figure(shuffled) == pytest.approx(figure(load), abs=1e-12)


@EXAMPLES
@given(LOADS, st.integers(1, 1000))
def test_figures_do_not_depend_on_the_number_of_assignments(load, times):
    for figure in FIGURES:
        assert figure([times * each for each in load]) == pytest.approx(figure(load), abs=1e-9)


@EXAMPLES
@given(LOADS)
def test_gini_is_half_the_mean_absolute_difference_over_the_mean(load):
    assume(any(load))
    differences = sum(abs(one - other) for one in load for other in load) / len(load) ** 2
    assert gini(load) == pytest.approx(differences / 2 / (sum(load) / len(load)), abs=1e-9)


@EXAMPLES
@given(load=LOADS, share=st.floats(0, 1))
def test_moving_load_from_the_busiest_to_the_idlest_expert_is_seen_by_every_figure(load, share):
    source, target = load.index(max(load)), load.index(min(load))
    moved = int(share * ((max(load) - min(load)) // 2))
    fairer = list(load)
    fairer[source] -= moved
    fairer[target] += moved
    assert max_over_mean(fairer) <= max_over_mean(load)
    assert coefficient_of_variation(fairer) <= coefficient_of_variation(load) + 1e-12
    assert gini(fairer) <= gini(load) + 1e-12
    assert load_entropy(fairer) >= load_entropy(load) - 1e-12


def test_confidence_of_a_gate_by_hand():
    # Probabilities [3/4, 1/4] and [1/2, 1/2]: entropies 0.562335 and 0.693147, the maximum; the third is padding.
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0], [9.0, 1.0]]).log()
    confidence = gate_confidence(logits, mask=torch.tensor([True, True, False]))
    assert confidence.num_tokens == 2
    assert confidence.top1 == pytest.approx(0.625)
    assert confidence.entropy == pytest.approx((0.562335 / 0.693147 + 1.0) / 2, abs=1e-6)


def test_confidence_of_sigmoid_scores_is_of_their_shares():
    # Sigmoids 0.9 and 0.3 are shares 0.75 and 0.25.
    assert gate_confidence(torch.tensor([[0.9, 0.3]]).logit(), score="sigmoid").top1 == pytest.approx(0.75)


@pytest.mark.parametrize("num_experts", [2, 8, 256])
def test_gate_that_knows_nothing_has_all_the_entropy_and_one_that_is_sure_has_none(num_experts):
    unsure = gate_confidence(torch.zeros(3, num_experts))
    assert (unsure.top1, unsure.entropy) == pytest.approx((1 / num_experts, 1.0))
    sure = gate_confidence(torch.eye(num_experts) * 1000)
    assert (sure.top1, sure.entropy) == pytest.approx((1.0, 0.0))


def test_gate_of_one_expert_is_sure():
    confidence = gate_confidence(torch.zeros(3, 1))
    assert (confidence.top1, confidence.entropy) == (1.0, 0.0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_be_sure_of_is_no_confidence(shape):
    assert gate_confidence(torch.zeros(shape)).num_tokens == 0


def test_confidence_of_two_batches_is_the_mean_over_their_tokens():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    added = gate_confidence(logits[:2]) + gate_confidence(logits[2:]) + gate_confidence(logits[:0])
    whole = gate_confidence(logits)
    assert added.num_tokens == 7
    assert (added.top1, added.entropy) == pytest.approx((whole.top1, whole.entropy))


def test_information_of_expert_and_label_by_hand():
    # Joint [[3, 1], [1, 3]] / 8, marginals 1/2: 3/4 log(3/2) + 1/4 log(1/2) = 0.130812 nats, 0.188722 bits.
    known = specialisation(torch.tensor([[3, 1], [1, 3]]))
    assert known.information == pytest.approx(0.130812, abs=1e-6)
    assert known.bits == pytest.approx(0.188722, abs=1e-6)
    assert known.label_entropy == pytest.approx(math.log(2))
    assert known.share == pytest.approx(0.188722, abs=1e-6)


def test_one_label_or_no_assignment_tells_nothing():
    for label_load in (torch.tensor([[3, 5]]), torch.zeros(2, 3), torch.zeros(0, 3)):
        known = specialisation(label_load)
        assert (known.information, known.bits, known.share) == (0.0, 0.0, 0.0)


@EXAMPLES
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_labels_that_use_experts_alike_have_no_information(labels, experts):
    known = specialisation(torch.outer(torch.tensor(labels), torch.tensor(experts)))
    assert known.information == pytest.approx(0.0, abs=1e-12)
    assert known.share == pytest.approx(0.0, abs=1e-9)


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50)), min_size=1, max_size=8))
def test_expert_that_gives_the_label_away_has_all_its_entropy(experts):
    label_load = torch.zeros(5, len(experts))
    for expert, (label, count) in enumerate(experts):
        label_load[label, expert] = count
    known = specialisation(label_load)
    shares = (label_load.sum(1) / label_load.sum()).tolist()
    assert known.label_entropy == pytest.approx(-sum(p * math.log(p) for p in shares if p), abs=1e-6)
    assert known.information == pytest.approx(known.label_entropy)


@EXAMPLES
@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=5))
def test_information_is_at_most_either_entropy_and_the_same_both_ways(rows):
    label_load = torch.tensor(rows)
    one, other = specialisation(label_load), specialisation(label_load.t())
    assert one.information == pytest.approx(other.information, abs=1e-9)
    assert 0.0 <= one.information <= min(one.label_entropy, other.label_entropy) + 1e-9
    assert 0.0 <= one.share <= 1.0


def test_counts_of_labels_that_are_none_are_refused():
    with pytest.raises(ShapeError, match=r"label_load: expected shape \(num_labels, num_experts\), found \(3,\)"):
        specialisation(torch.ones(3))
    with pytest.raises(InvalidRequestError, match=r"label_load: expected counts of at least 0, found -1\.0"):
        specialisation(torch.tensor([[1, -1]]))


def test_metrics_of_counters_hold_every_figure_of_the_load():
    metrics = routing_metrics(RoutingTally(load=(12, 6, 4, 3, 0), num_dropped=5))
    assert metrics.load == (12, 6, 4, 3, 0)
    assert metrics.max_over_mean == 12 / 5
    assert metrics.coefficient_of_variation == coefficient_of_variation([12, 6, 4, 3, 0])
    assert metrics.entropy == load_entropy([12, 6, 4, 3, 0])
    assert metrics.gini == gini([12, 6, 4, 3, 0])
    assert metrics.drop_rate == 0.2
    assert metrics.idle_experts == (4,)
    assert (metrics.confidence, metrics.specialisation) == (None, None)
