from __future__ import annotations

import pytest
import torch

from moe_runtime.config.balance import LossesConfig
from moe_runtime.config.gates import NoisyGateConfig
from moe_runtime.config.policies import TopKPolicyConfig
from moe_runtime.errors import InvalidRequestError
from moe_runtime.routing.auxiliary import LossInputs, auxiliary_loss
from moe_runtime.routing.gate import GateShape
from moe_runtime.routing.gates import build_gate
from moe_runtime.routing.losses import load_balancing_loss, load_loss, sequence_balance_loss, z_loss
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo

TOKENS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([True] * 5 + [False])
GROUPS = torch.tensor([0, 0, 1, 1, 1, 1])


def noisy_inputs(**changes):
    gate = build_gate(NoisyGateConfig(kind="noisy"), GateShape(3, 4), seed=0)
    logits = gate.noisy_logits(TOKENS, torch.Generator().manual_seed(1))
    assignments = build_policy(TopKPolicyConfig(k=2), num_experts=4).assign(logits.noisy, TokenInfo(mask=MASK))
    known = {"mask": MASK, "sequence_ids": GROUPS, "tasks": GROUPS, "noisy_logits": logits}
    return gate, LossInputs(router_logits=logits.noisy, assignments=assignments, **{**known, **changes})


def test_total_is_the_weighted_sum_of_the_losses_that_have_a_coefficient():
    _, inputs = noisy_inputs()
    loss = auxiliary_loss(LossesConfig(load_balancing=1e-2, z=1e-3, sequence=1e-4), inputs)
    balance = load_balancing_loss(inputs.router_logits, inputs.assignments, mask=MASK)
    z = z_loss(inputs.router_logits, mask=MASK)
    sequence = sequence_balance_loss(inputs.router_logits, inputs.assignments, sequence_ids=GROUPS, mask=MASK)
    assert {name: part.item() for name, part in loss.parts.items()} == {
        "load_balancing": balance.item(),
        "z": z.item(),
        "sequence": sequence.item(),
    }
    assert loss.total.item() == pytest.approx((1e-2 * balance + 1e-3 * z + 1e-4 * sequence).item())


def test_every_coefficient_has_its_loss_and_trains_the_gate():
    gate, inputs = noisy_inputs()
    everything = dict.fromkeys(LossesConfig.model_fields, 1.0)
    loss = auxiliary_loss(LossesConfig(**everything), inputs)
    loss.total.backward()
    assert set(loss.parts) == set(everything)
    assert gate.weight.grad.abs().sum() > 0
    assert gate.noise_weight.grad.abs().sum() > 0


def test_load_loss_takes_the_k_of_the_assignments():
    _, inputs = noisy_inputs()
    loss = auxiliary_loss(LossesConfig(load=1.0), inputs)
    assert loss.total.item() == load_loss(inputs.noisy_logits, k=2, mask=MASK).item()


def test_nothing_is_computed_without_a_coefficient():
    # Logits of a policy without a gate: any loss on them would be refused.
    policy = build_policy(TopKPolicyConfig(k=2), num_experts=4)
    inputs = LossInputs(router_logits=torch.zeros(6, 0), assignments=policy.assign(torch.zeros(6, 4)))
    loss = auxiliary_loss(LossesConfig(), inputs)
    assert (loss.total.item(), loss.total.dtype, dict(loss.parts)) == (0.0, torch.float32, {})


def test_batch_of_padding_alone_adds_nothing():
    gate, given = noisy_inputs(mask=torch.zeros(6, dtype=torch.bool))
    policy = build_policy(TopKPolicyConfig(k=2), num_experts=4)
    assignments = policy.assign(given.router_logits, TokenInfo(mask=given.mask))
    inputs = LossInputs(**{**vars(given), "assignments": assignments})
    loss = auxiliary_loss(LossesConfig(**dict.fromkeys(LossesConfig.model_fields, 1.0)), inputs)
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert gate.weight.grad.abs().sum() == 0.0


@pytest.mark.parametrize(
    ("name", "missing"), [("load", "noisy_logits"), ("sequence", "sequence_ids"), ("mutual_information", "tasks")]
)
def test_loss_that_lacks_what_it_is_made_of_is_refused_by_name(name, missing):
    _, inputs = noisy_inputs(**{missing: None})
    with pytest.raises(InvalidRequestError, match=f"losses.{name}: expected {missing}"):
        auxiliary_loss(LossesConfig(**{name: 1e-2}), inputs)
