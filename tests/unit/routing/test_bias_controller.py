from __future__ import annotations

import pytest
import torch

from moe_runtime.config.gates import LinearGateConfig
from moe_runtime.errors import ConfigError, ShapeError
from moe_runtime.routing.expert_bias import BiasController, bias_update, update_bias
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate

SCORES = {"sigmoid": torch.sigmoid, "softmax": lambda logits: torch.softmax(logits, dim=-1)}


def biased_gate(num_experts=3):
    return build_gate(LinearGateConfig(), GateShape(2, num_experts, num_biases=num_experts), seed=0)


def test_step_moves_the_gates_bias_by_the_rate_and_centres_it():
    gate = biased_gate()
    controller = BiasController(gate, rate=1e-3)
    controller.observe([10, 0, 2])
    controller.step()
    assert gate.expert_bias.tolist() == pytest.approx([-4e-3 / 3, 2e-3 / 3, 2e-3 / 3])


def test_loads_of_micro_batches_and_routers_are_summed():
    gate = biased_gate()
    controller = BiasController(gate, rate=0.5)
    # Expert 2 leads in the first micro-batch and is behind in the sum, [8, 5, 5].
    for load in ([0, 0, 4], [4, 2, 0], torch.tensor([4, 3, 1])):
        controller.observe(load)
    assert controller.counts == (8, 5, 5)
    controller.step()
    assert gate.expert_bias.tolist() == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    assert controller.counts == (0, 0, 0)


def test_without_any_load_nothing_moves_not_even_to_the_centre():
    gate = biased_gate()
    gate.expert_bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    controller = BiasController(gate)
    controller.step()
    controller.observe([0, 0, 0])
    controller.step()
    assert gate.expert_bias.tolist() == [1.0, 2.0, 3.0]


def test_experts_at_the_mean_stay_however_large_the_counts():
    counts = torch.full((3,), 16_777_217_000)
    assert bias_update(counts).tolist() == [0.0, 0.0, 0.0]
    assert update_bias(torch.tensor([0.5, 0.0, -0.5]), counts).tolist() == [0.5, 0.0, -0.5]


def test_checkpoint_between_two_steps_keeps_what_was_observed():
    first, second = biased_gate(), biased_gate()
    before, after = BiasController(first, rate=0.5), BiasController(second, rate=0.5)
    before.observe([3, 1, 0])
    after.observe([9, 9, 9])
    state = before.state_dict()
    before.observe([1, 1, 1])
    after.load_state_dict(state)
    assert after.counts == (3, 1, 0)
    after.observe([1, 1, 1])
    assert state["counts"].tolist() == [3, 1, 0]
    for controller in (before, after):
        controller.step()
    assert torch.equal(first.expert_bias, second.expert_bias)


def test_bias_is_the_gates_own_after_its_state_was_loaded_or_its_buffers_replaced():
    gate = biased_gate()
    controller = BiasController(gate, rate=0.3)
    gate.load_state_dict({**gate.state_dict(), "expert_bias": torch.tensor([0.0, 0.0, 3.0])})
    gate.double().float()
    controller.observe([6, 0, 0])
    controller.step()
    assert gate.expert_bias.tolist() == pytest.approx([-1.4, -0.8, 2.2])


def test_gate_without_a_bias_is_refused():
    with pytest.raises(ConfigError, match="expected one that keeps an expert_bias"):
        BiasController(build_gate(LinearGateConfig(), GateShape(2, 3), seed=0))


def test_load_of_another_number_of_experts_is_refused_and_changes_nothing():
    controller = BiasController(biased_gate())
    controller.observe([1, 0, 0])
    for refused in (lambda: controller.observe([1, 2]), lambda: controller.load_state_dict({"counts": torch.ones(4)})):
        with pytest.raises(ShapeError, match=r"load: expected one number per expert, shape \(3,\)"):
            refused()
    assert controller.counts == (1, 0, 0)


class SkewedTokens:
    """Batches whose mean logit falls by 2.1 from the first expert to the last, against a deviation of 1 per token."""

    def __init__(self, *, num_experts, k, score):
        self.num_experts, self.k, self.score = num_experts, k, SCORES[score]
        self.skew = torch.linspace(1.0, -1.1, num_experts)
        self.generator = torch.Generator().manual_seed(0)

    def load(self, bias, *, num_tokens):
        logits = torch.randn(num_tokens, self.num_experts, generator=self.generator) + self.skew
        chosen = torch.topk(self.score(logits) + bias, self.k).indices
        return torch.bincount(chosen.flatten(), minlength=self.num_experts)

    def max_over_mean(self, bias):
        load = self.load(bias, num_tokens=40_000).double()
        return (load.max() / load.mean()).item()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_controller_balances_a_skewed_gate_in_bounded_steps_and_keeps_it_so(score):
    gate, tokens = biased_gate(8), SkewedTokens(num_experts=8, k=2, score=score)
    controller = BiasController(gate, rate=1e-3)
    assert tokens.max_over_mean(gate.expert_bias) > 2.0
    for num_steps in (300, 20, 20):
        for _ in range(num_steps):
            for _micro_batch in range(2):
                controller.observe(tokens.load(gate.expert_bias, num_tokens=512))
            controller.step()
        assert tokens.max_over_mean(gate.expert_bias) < 1.1
    assert gate.expert_bias.mean().item() == pytest.approx(0.0, abs=1e-6)
    # The busiest by nature is the most handicapped.
    assert gate.expert_bias.argmin().item() == 0
