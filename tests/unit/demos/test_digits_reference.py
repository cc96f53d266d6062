from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_runtime.demos.digits.data import DigitsData
from moe_runtime.demos.digits.reference import Reference
from moe_runtime.demos.digits.traffic import Answer, Traffic
from moe_runtime.demos.digits.training import DigitsLayer
from moe_runtime.errors import InternalError
from moe_runtime.wire.messages import ForwardResult, Report


def with_outputs(answer: Answer, outputs: torch.Tensor) -> Answer:
    return replace(answer, result=replace(answer.result, outputs=outputs))


def test_served_answers_agree_with_the_reference(traffic: Traffic, reference: Reference) -> None:
    assert max(reference.difference(answer) for answer in traffic.answers) <= 1e-5


def test_a_wrong_number_in_an_answer_is_found(traffic: Traffic, reference: Reference) -> None:
    answer = traffic.answers[0]
    outputs = answer.result.outputs.clone()
    outputs[-1, 3] += 0.25

    assert reference.difference(with_outputs(answer, outputs)) == pytest.approx(0.25, abs=1e-5)


def test_nan_in_an_answer_is_no_agreement(traffic: Traffic, reference: Reference) -> None:
    answer = traffic.answers[0]
    outputs = answer.result.outputs.clone()
    outputs[0, 0] = math.nan

    assert math.isnan(reference.difference(with_outputs(answer, outputs)))


def test_a_dropped_assignment_counts_in_the_weights_and_not_in_the_sum(
    trained: DigitsLayer, data: DigitsData, reference: Reference
) -> None:
    """Image 7 asks for experts 1 and 4; 4 is full, so all that is left is expert 1's share."""
    pixels = data.held_out.pixels[[7]]
    with torch.inference_mode():
        scores = trained.gate(pixels).softmax(dim=1)[0]
        expected = scores[1] / (scores[1] + scores[4]) * trained.expert_logits(pixels)[1]
    report = Report(
        "",
        "digits",
        table_version=1,
        num_tokens=1,
        num_assignments=2,
        num_served=1,
        num_dropped_capacity=1,
        num_dropped_failure=0,
        num_rerouted=0,
        token_ids=np.array([0, 0]),
        expert_ids=np.array([1, 4]),
        expert_weights=np.array([0.0, 0.0], dtype=np.float32),
        outcomes=np.array([0, 1], dtype=np.uint8),
    )
    answer = Answer(torch.tensor([7]), ForwardResult(expected, report), latency_ms=1.0)

    assert reference.difference(answer) == pytest.approx(0.0, abs=1e-6)


def test_an_answer_without_its_routing_cannot_be_checked(traffic: Traffic, reference: Reference) -> None:
    answer = traffic.answers[0]
    bare = replace(answer.result, report=replace(answer.result.report, outcomes=None))

    with pytest.raises(InternalError, match="routing"):
        reference.difference(replace(answer, result=bare))


def test_an_image_is_right_where_its_own_digit_has_the_highest_logit(data: DigitsData, reference: Reference) -> None:
    image_ids = torch.tensor([0, 1, 2])
    digits = data.held_out.digits[image_ids]
    outputs = torch.nn.functional.one_hot(digits, 10).float()
    outputs[1] = outputs[1].roll(1)
    report = Report("", "digits", 1, 3, 0, 0, 0, 0, 0)

    assert reference.num_right(Answer(image_ids, ForwardResult(outputs, report), latency_ms=1.0)) == 2
