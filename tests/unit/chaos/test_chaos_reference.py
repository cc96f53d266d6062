"""The reference against hand-made layers, and against the runtime's own slow oracle in one process."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import linear, relu

from moe_runtime.chaos.layer import NUM_EXPERTS, NUM_FEATURES, LayerWeights, draw_weights
from moe_runtime.chaos.reference import Reference, Routing


def tiny() -> Reference:
    """Two features, two experts: the first doubles what is positive, the second adds 10."""
    eye = np.eye(2, dtype=np.float32)
    zeros = np.zeros(2, np.float32)
    return Reference(
        LayerWeights(
            gate=eye,
            up=np.stack([eye, eye]),
            up_bias=np.stack([zeros, zeros]),
            down=np.stack([2 * eye, eye]),
            down_bias=np.stack([zeros, zeros + 10]),
        )
    )


def routing(token_ids: list[int], expert_ids: list[int], weights: list[float]) -> Routing:
    return Routing(np.array(token_ids, np.int64), np.array(expert_ids, np.int64), np.array(weights))


def test_outputs_are_weighted_sums_of_the_experts_that_served():
    rows = np.array([[1, -1], [3, 4]], np.float32)
    outputs = tiny().outputs(rows, routing([0, 0, 1], [0, 1, 1], [0.5, 0.25, 1.0]))
    # Row 0: 0.5 * [2, 0] + 0.25 * [11, 10]. Row 1: [13, 14].
    np.testing.assert_array_equal(outputs, [[3.75, 2.5], [13.0, 14.0]])


def test_a_row_that_nobody_served_is_its_input():
    rows = np.array([[1, -1], [3, 4]], np.float32)
    outputs = tiny().outputs(rows, routing([1], [0], [1.0]))
    np.testing.assert_array_equal(outputs, [[1, -1], [6, 8]])


def test_routing_takes_the_largest_logits_and_normalises_over_the_chosen():
    rows = np.array([[np.log(3), 0], [0, 5], [1, 2]], np.float32)
    found, is_clear = tiny().routing(rows, np.array([2, 1, 0]))
    assert found.token_ids.tolist() == [0, 0, 1]
    assert found.expert_ids.tolist() == [0, 1, 1]
    np.testing.assert_allclose(found.weights, [0.75, 0.25, 1.0], rtol=1e-6)
    assert is_clear.all()


def test_a_choice_between_equal_logits_is_not_clear():
    rows = np.array([[1, 1.00001], [1, 2]], np.float32)
    _, is_clear = tiny().routing(rows, np.array([1, 1]))
    assert is_clear.tolist() == [False, True]
    _, is_clear = tiny().routing(rows, np.array([2, 2]))
    assert is_clear.all()


def test_the_drawn_layer_is_what_torch_makes_of_it():
    weights = draw_weights(3)
    rows = np.random.default_rng(0).standard_normal((8, NUM_FEATURES)).astype(np.float32)
    reference = Reference(weights)
    for expert_id in range(NUM_EXPERTS):
        hidden = relu(
            linear(*(torch.from_numpy(each) for each in (rows, weights.up[expert_id], weights.up_bias[expert_id])))
        )
        expected = linear(
            hidden, torch.from_numpy(weights.down[expert_id]), torch.from_numpy(weights.down_bias[expert_id])
        )
        alone = routing([*range(8)], [expert_id] * 8, [1.0] * 8)
        np.testing.assert_allclose(reference.outputs(rows, alone), expected.numpy(), atol=1e-5)


def test_one_seed_draws_one_layer():
    assert all(
        np.array_equal(*pair)
        for pair in zip(vars(draw_weights(1)).values(), vars(draw_weights(1)).values(), strict=True)
    )
    assert not np.array_equal(draw_weights(1).gate, draw_weights(2).gate)
