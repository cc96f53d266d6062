"""Every preset, with the paper's number of experts, beside the slow oracle: one token and one number at a time."""

from __future__ import annotations

import pytest
import torch

from fakes.weight_tables import weight_table
from moe_runtime.config.models import LayerConfig
from moe_runtime.config.presets.catalogue import PRESETS
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import TokenInfo
from moe_runtime.routing.reference.choices import RoutingInputs
from moe_runtime.routing.reference.route import RoutingRules, route_reference

#: Tokens, and experts where not the paper's: the oracle of a balanced assignment tries them all.
SIZES = {"base_layers": (8, 3), "gshard": (6, None)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_does_what_the_oracle_does(name: str, training: bool) -> None:
    num_tokens, num_experts = SIZES.get(name, (24, None))
    layer = LayerConfig.model_validate({"preset": name, "item_shape": [8]})
    if num_experts is not None:
        layer = layer.model_copy(update={"experts": [layer.experts[0].model_copy(update={"count": num_experts})]})
    policy = build_policy(layer.policy, num_experts=layer.num_experts)
    draw = torch.Generator().manual_seed(7)
    # Scores fall with the expert's id, so that the first ones are full.
    slope = torch.linspace(2.0, 0.0, policy.num_logits)
    logits = torch.randn(num_tokens, policy.num_logits, generator=draw) + slope
    bias = torch.randn(layer.num_experts, generator=draw) * 0.2 if policy.uses_bias else None
    seeds, ids = torch.arange(100, 100 + num_tokens), torch.arange(num_tokens) % 7
    mask = torch.arange(num_tokens) % 5 != 0

    info = TokenInfo(mask=mask, row_seeds=seeds, token_ids=ids, expert_bias=bias, training=training)
    found = weight_table(plan_dispatch(admit(policy.assign(logits, info), layer.capacity, row_seeds=seeds)))

    inputs = RoutingInputs(
        # The oracle counts experts by the logits, even of a policy that asks for none.
        logits if policy.num_logits else torch.zeros(num_tokens, layer.num_experts),
        mask=mask.tolist(),
        row_seeds=seeds.tolist(),
        token_ids=ids.tolist(),
        expert_bias=None if bias is None else bias.tolist(),
        training=training,
    )
    rules = RoutingRules(policy=layer.policy, capacity=layer.capacity)
    expected = torch.full((num_tokens, layer.num_experts), torch.nan)
    for pair in route_reference(inputs, rules):
        if pair.outcome == "served":
            expected[pair.token, pair.expert] = pair.weight
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)
    assert found[mask].isfinite().any()
    assert not found[~mask].isfinite().any()
