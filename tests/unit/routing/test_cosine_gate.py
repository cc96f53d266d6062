from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.config.gates import CosineGateConfig
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate

EXAMPLES = settings(max_examples=50)


def cosine_gate(in_features, num_logits, **options):
    return build_gate(CosineGateConfig(kind="cosine", **options), GateShape(in_features, num_logits), seed=0)


class Scored(torch.nn.Module):
    """The gate's logits in the dtype of its parameters."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, features):
        return self.gate.score(features, generator=None, tasks=None)


def random_tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_logits_are_cosines_over_the_temperature_plus_the_bias():
    gate = cosine_gate(2, 3, temperature=0.5, bias=True)
    gate.weight.data.copy_(torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, -1.0]]))
    gate.bias.data.copy_(torch.tensor([0.0, 0.0, 1.0]))
    # The cosines of (4, 3) with (1, 0), (3/5, 4/5) and (0, -1) are 0.8, 0.96 and -0.6.
    assert gate(torch.tensor([[4.0, 3.0]])).flatten().tolist() == pytest.approx([1.6, 1.92, -0.2])


def test_temperature_is_that_of_x_moe_unless_given():
    gate = cosine_gate(2, 1)
    gate.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    assert gate(torch.tensor([[5.0, 0.0]])).item() == pytest.approx(1 / 0.07)


def test_zeros_are_similar_to_no_expert_and_train_without_nan():
    gate = cosine_gate(3, 4)
    gate.weight.data[2] = 0.0
    tokens = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [1e-45, 0.0, 0.0]], requires_grad=True)
    logits = gate(tokens)
    logits.sum().backward()
    assert logits[0].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert logits[1, 2].item() == 0.0
    assert logits[2].abs().max() < 1e-30
    assert tokens.grad.isfinite().all()
    assert gate.weight.grad.isfinite().all()


@EXAMPLES
@given(exponent=st.integers(-37, 37), sign=st.sampled_from([1, -1]))
def test_length_of_a_token_does_not_count_however_large_or_small(exponent, sign):
    gate = cosine_gate(5, 3).eval()
    tokens = random_tokens(4, 5).clamp(0.1, 3.0)
    assert torch.allclose(gate(sign * tokens * 10.0**exponent), sign * gate(tokens), rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(
    num_experts=st.sampled_from([1, 2, 7, 15, 16, 31, 32, 33, 63, 64, 100]),
    num_tokens=st.sampled_from([1, 2, 7, 64, 257]),
    in_features=st.sampled_from([1, 3, 16, 64, 300]),
    num_joining=st.integers(1, 3),
)
def test_expert_joins_without_changing_a_bit_of_the_others_logits(num_experts, num_tokens, in_features, num_joining):
    before = cosine_gate(in_features, num_experts, bias=True).eval()
    after = cosine_gate(in_features, num_experts + num_joining, bias=True).eval()
    after.weight.data[:num_experts] = before.weight.data
    after.bias.data[:num_experts] = before.bias.data
    tokens = random_tokens(num_tokens, in_features)
    assert torch.equal(after(tokens)[:, :num_experts], before(tokens))


def test_gradient_is_that_of_finite_differences():
    gate = cosine_gate(3, 4, bias=True, temperature=0.5).double()
    tokens = random_tokens(5, 3).double().requires_grad_()
    parameters = (tokens, gate.weight, gate.bias)

    def logits_of(features, weight, bias):
        # Not by ``forward``, which takes what it is given to float32.
        given = {"weight": weight, "bias": bias}
        return torch.func.functional_call(
            Scored(gate), {f"gate.{name}": value for name, value in given.items()}, features
        )

    assert torch.autograd.gradcheck(logits_of, parameters)


def test_gradient_pulls_the_prototype_towards_its_tokens():
    gate = cosine_gate(2, 2)
    gate.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    gate(torch.tensor([[1.0, 1.0]]))[0, 0].backward()
    # d cos / d prototype = (direction - cos * prototype) / |prototype| = (0, sqrt(1/2)), over the temperature.
    assert gate.weight.grad.flatten().tolist() == pytest.approx([0.0, 0.5**0.5 / 0.07, 0.0, 0.0], abs=1e-5)
