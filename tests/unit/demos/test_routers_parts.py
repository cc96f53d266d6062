"""The demo's pure parts: gates made from the trained one, loads as bars, and how an answer is judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_runtime.demos.routers.policies import POLICIES, TrainedGate, two_level_logits, with_bias
from moe_runtime.demos.routers.render import load_bars
from moe_runtime.demos.routers.serving import Answer
from moe_runtime.demos.routers.summary import Truth, summarise
from moe_runtime.errors import InternalError
from moe_runtime.wire.messages import DROPPED_CAPACITY, SERVED, ForwardResult, Report


def logits_of(*digits: int, height: float = 1.0) -> torch.Tensor:
    """Logits of some images, highest for these digits."""
    return height * torch.nn.functional.one_hot(torch.tensor(digits), 10).float()


def report(**routing: np.ndarray) -> Report:
    return Report("r", "digits", 1, 3, 4, 2, 2, 0, 0, **routing)


#: The first image goes to both experts, the second to a full one and to one that serves it, the third to a full one.
ROUTED = report(
    token_ids=np.array([0, 0, 1, 2]),
    expert_ids=np.array([0, 1, 1, 1]),
    expert_weights=np.array([0.5, 0.5, 1.0, 0.0], dtype=np.float32),
    outcomes=np.array([SERVED, SERVED, SERVED, DROPPED_CAPACITY], dtype=np.uint8),
)


def test_an_image_that_no_expert_answered_is_wrong_whatever_the_highest_logit_is() -> None:
    expert_logits = torch.stack([logits_of(3, 1, 0), logits_of(3, 2, 0)])
    outputs = torch.stack([expert_logits[0, 0], expert_logits[1, 1], torch.zeros(10)])
    answer = Answer(POLICIES[1], ForwardResult(outputs, ROUTED), (1, 2), rolling_s=0.5)

    found = summarise(answer, dense=logits_of(3, 1, 0), truth=Truth(torch.tensor([3, 2, 0]), expert_logits))

    assert (found.loads, found.num_dropped, found.num_unserved) == ((1, 3), 2, 1)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.agreement == pytest.approx(1 / 3)
    assert found.mean_difference == pytest.approx(3 / 30)
    assert found.max_difference == 0.0
    assert (found.max_over_mean, found.dropped_share) == (1.5, 0.5)


def test_an_answer_that_its_experts_do_not_come_to_is_found_out() -> None:
    expert_logits = torch.stack([logits_of(3, 1, 0), logits_of(3, 2, 0)])
    answer = Answer(POLICIES[1], ForwardResult(torch.zeros(3, 10), ROUTED), (1, 2), rolling_s=0.5)

    found = summarise(answer, dense=logits_of(3, 1, 0), truth=Truth(torch.tensor([3, 2, 0]), expert_logits))

    assert found.max_difference == 1.0


def test_a_report_without_routing_is_an_error() -> None:
    answer = Answer(POLICIES[0], ForwardResult(torch.zeros(3, 10), report()), (1, 2), rolling_s=0.5)
    with pytest.raises(InternalError, match="expected its routing"):
        summarise(answer, dense=torch.zeros(3, 10), truth=Truth(torch.zeros(3).long(), torch.zeros(2, 3, 10)))


@pytest.mark.parametrize(("loads", "bars"), [((8, 4, 1, 0), "█▄▁ "), ((450, 1), "█▁"), ((0, 0), "  ")])
def test_loads_become_bars_and_only_an_idle_expert_has_none(loads: tuple[int, ...], bars: str) -> None:
    assert load_bars(loads) == bars


def test_the_first_level_prefers_the_shared_expert_where_the_trained_gate_likes_it_best() -> None:
    assert two_level_logits(torch.tensor([[1.0, 3.0, 2.0]])).tolist() == [[1.0, 3.0, 3.0, 2.0]]


def test_the_selection_bias_evens_out_a_gate_that_prefers_some_experts() -> None:
    draw = torch.Generator().manual_seed(0)
    pixels, weight = torch.rand(512, 64, generator=draw), 0.1 * torch.randn(5, 64, generator=draw)
    gate = TrainedGate(weight, pixels)
    scores = torch.sigmoid(gate.logits(pixels))

    bias = with_bias(gate).tensors["expert_bias"]

    before, after = (torch.bincount(torch.topk(s, 2).indices.flatten(), minlength=5) for s in (scores, scores + bias))
    assert before.max() > 1.3 * before.float().mean()
    assert after.max() < 1.1 * after.float().mean()
