"""What a plug-in should test: it is found, it keeps its contract, it computes what it says, and it learns."""

from __future__ import annotations

from math import pi

import torch
from moe_runtime_example_expert import FOURIER, FourierFeatures, FourierOptions

from moe_runtime.experts.build import build_expert
from moe_runtime.experts.registry import check_plug_ins, resolve_kind
from moe_runtime.experts.spec import ExpertSpec, expert_contract

SPEC = ExpertSpec(
    layer="toy",
    expert_id=0,
    name="fourier-0",
    kind="fourier",
    item_shape=(2,),
    options={"out_features": 1, "length_scale": 0.5},
)


def test_kind_is_found_through_its_entry_point() -> None:
    check_plug_ins(["moe-runtime-example-expert==0.1.0"])
    assert resolve_kind("fourier") is FOURIER


def test_contract_is_known_before_anything_is_built() -> None:
    contract = expert_contract(SPEC)
    assert (contract.in_shape, contract.out_shape) == ((2,), (1,))


def test_output_is_the_linear_layer_over_scaled_cosines() -> None:
    expert = FourierFeatures((1,), FourierOptions(num_features=2, out_features=1))
    with torch.no_grad():
        expert.frequencies.copy_(torch.tensor([[pi], [2 * pi]]))
        expert.phases.zero_()
        expert.linear.weight.copy_(torch.tensor([[1.0, 10.0]]))
        expert.linear.bias.fill_(0.5)
        # The scale sqrt(2 / 2) is 1; the cosines are (1, 1), (0, -1) and (-1, 1).
        outputs = expert(torch.tensor([[0.0], [0.5], [1.0]]))
    torch.testing.assert_close(outputs, torch.tensor([[11.5], [-9.5], [9.5]]))


def test_dot_products_of_many_features_approximate_the_gaussian_kernel() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expert = FourierFeatures((2,), FourierOptions(num_features=20_000, length_scale=1.0, out_features=1))
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    features = expert.features(rows)
    expected = torch.exp(-torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 5.0], [4.0, 5.0, 0.0]]) / 2)
    torch.testing.assert_close(features @ features.T, expected, rtol=0, atol=0.03)


def test_learns_which_points_lie_inside_a_circle() -> None:
    points = torch.rand(512, 2, generator=torch.Generator().manual_seed(0))
    inside = ((points - 0.5).norm(dim=1) < 0.3).float()
    expert = build_expert(SPEC).module.train()
    optimizer = torch.optim.Adam(expert.parameters(), lr=0.03)
    for _ in range(100):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(expert(points).squeeze(1), inside)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # No linear model gets far beyond the share of the larger class, 72 %.
    assert ((expert(points).squeeze(1) > 0) == inside.bool()).float().mean() > 0.95
