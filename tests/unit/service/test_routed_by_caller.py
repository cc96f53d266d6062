"""A batch whose caller has routed it comes back as the experts' rows, unweighted, by token and choice."""

from __future__ import annotations

import pytest
import torch

from fakes.service import FakeClock, FakeTransport, endpoint, make_layer, table_of, tokens_of
from moe_runtime.config.models import CapacityConfig, OnFailureConfig
from moe_runtime.config.policies import CallerPolicyConfig
from moe_runtime.errors import InvalidRequestError, ShapeError
from moe_runtime.routing.assignments import Assignments, Grid, Pairs, WeightRule
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.service.batch import Batch
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.ports import HostLost, HostReply, SegmentResult

POLICY = build_policy(CallerPolicyConfig(kind="caller"), num_experts=3)


class Bench:
    """An engine with a layer of three experts at hosts 10, 10 and 12, which its caller routes."""

    def __init__(self, **changes: object) -> None:
        self.transport = FakeTransport()
        self.layer = make_layer(3, **{"policy": POLICY, **changes})
        self.engine = RouterEngine({"layer": self.layer}, self.transport, node="here", clock=FakeClock())
        self.engine.set_table(table_of(1, 10, 10, 12))

    def submit(self, choices: Grid | Pairs, tokens: torch.Tensor) -> None:
        assignments = Assignments(choices, None, tokens.shape[0], 3, WeightRule(normalize="none"))
        self.submit_assignments(assignments, tokens)

    def submit_assignments(self, assignments: Assignments, tokens: torch.Tensor) -> None:
        self.engine.submit(Batch("layer", tokens, assignments=assignments))

    def answer_by_expert(self) -> None:
        """Expert e multiplies its rows by ``e + 1``."""
        for _, request in self.transport.sent:
            times = torch.cat(
                [torch.full((s.num_rows, 1), int(s.replica_id.split("/")[1]) + 1.0) for s in request.segments]
            )
            results = tuple(SegmentResult(s.replica_id, s.num_rows, compute_ms=1.0) for s in request.segments)
            self.transport.arrivals.append(HostReply(request.ticket, results, request.rows * times))
        self.transport.sent.clear()


def grid(*rows: tuple[int, ...]) -> Grid:
    ids = torch.tensor(rows)
    # Whatever the scores are: the caller weighs.
    return Grid(ids, torch.full(ids.shape, 0.25))


def test_rows_come_back_unweighted_by_token_then_by_choice() -> None:
    bench = Bench(capacity=CapacityConfig(factor=0.01, min=1), residual="add")
    tokens = tokens_of(3)
    bench.submit(grid((2, 0), (0, 1), (1, 2)), tokens)
    assert len(bench.transport.sent) == 2
    bench.answer_by_expert()
    (result,) = bench.engine.poll(0.0)
    expected = torch.stack([tokens[0] * 3, tokens[0], tokens[1], tokens[1] * 2, tokens[2] * 2, tokens[2] * 3])
    assert torch.equal(result.outputs, expected)
    assert result.failures is None
    assert [expert.num_asked for expert in bench.engine.stats.layers["layer"].experts] == [2, 2, 2]


def test_tokens_may_ask_for_different_numbers_of_experts() -> None:
    bench = Bench()
    tokens = tokens_of(3)
    # Choices of tokens 0 and 2, then the second choice of token 2; token 1 asks for nothing.
    pairs = Pairs(torch.tensor([0, 2, 2]), torch.tensor([1, 2, 0]), torch.ones(3), torch.tensor([0, 0, 1]))
    bench.submit(pairs, tokens)
    bench.answer_by_expert()
    (result,) = bench.engine.poll(0.0)
    assert torch.equal(result.outputs, torch.stack([tokens[0] * 2, tokens[2] * 3, tokens[2]]))


def test_what_nobody_serves_is_zero_and_told() -> None:
    bench = Bench(on_failure=OnFailureConfig(order=("replica", "drop")))
    tokens = tokens_of(2)
    bench.submit(grid((0, 2), (2, 1)), tokens)
    (near, far) = bench.transport.sent
    assert far[0] == endpoint(12)
    bench.transport.sent.remove(far)
    bench.answer_by_expert()
    bench.transport.arrivals.append(HostLost(endpoint(12), "it died"))
    assert near[1].ticket != far[1].ticket
    (result,) = bench.engine.poll(0.0)
    assert torch.equal(result.outputs, torch.stack([tokens[0], 0 * tokens[0], 0 * tokens[1], tokens[1] * 2]))
    assert result.served[result.plan.rows_by_token].tolist() == [True, False, False, True]
    assert {each.expert_id for each in result.failures.attempts} == {2}


def test_a_layer_that_its_caller_routes_refuses_a_batch_that_nobody_has_routed() -> None:
    with pytest.raises(InvalidRequestError, match="expected a batch with assignments of its own, found none"):
        POLICY.assign(torch.empty(2, 0))


@pytest.mark.parametrize("choice", [(2, 0), (1, 0), (0, 2, 1), (1,)])
def test_the_rows_of_a_single_token_come_back_by_choice_wherever_its_experts_are(choice: tuple[int, ...]) -> None:
    bench = Bench()
    token = tokens_of(1)
    bench.submit(grid(choice), token)
    bench.answer_by_expert()
    (result,) = bench.engine.poll(0.0)
    assert torch.equal(result.outputs, torch.cat([token * (expert_id + 1) for expert_id in choice]))


def test_a_single_token_whose_assignments_are_of_two_is_refused() -> None:
    with pytest.raises(ShapeError, match="made for 2 rows"):
        Bench().submit_assignments(
            Assignments(grid((0,), (1,)), None, 2, 3, WeightRule(normalize="none")), tokens_of(1)
        )


def test_rows_are_ordinary_tensors_where_gradients_are_off_already() -> None:
    bench = Bench()
    with torch.no_grad():
        bench.submit(grid((0, 1)), tokens_of(1))
        bench.answer_by_expert()
        (result,) = bench.engine.poll(0.0)
    assert not result.outputs.is_inference()
