"""What a request says of its rows reaches the policy and the gate, whatever the batches that its rows travel in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.service import FakeTransport, GivenLogits, make_layer, table_of, tokens_of
from moe_runtime.config.models import CapacityConfig
from moe_runtime.config.policies import (
    CallerPolicyConfig,
    GShardPolicyConfig,
    PolicyConfig,
    RandomPolicyConfig,
    ReinforcePolicyConfig,
    RoundRobinPolicyConfig,
    TopKPolicyConfig,
)
from moe_runtime.config.runtime import LimitsConfig, RouterConfig
from moe_runtime.errors import InvalidRequestError, RequestTooLargeError
from moe_runtime.routing.assignments import Assignments, Grid, WeightRule
from moe_runtime.routing.capacity import admit
from moe_runtime.routing.hashing import ids_of_rows
from moe_runtime.routing.plan import plan_dispatch
from moe_runtime.routing.policies.build import build_policy
from moe_runtime.routing.policy import Policy, TokenInfo
from moe_runtime.service.engine import RouterEngine
from moe_runtime.service.joining import BatchPart, build_batch
from moe_runtime.service.layer import RoutedLayer
from moe_runtime.service.requests import LayerRequest
from moe_runtime.service.validation import unused_options, validate_request
from moe_runtime.wire.messages import RequestOptions

NUM_EXPERTS = 4


class TaskLogits(GivenLogits):
    """A gate with a part per task: the second one prefers what the first likes least."""

    tasks = ("first", "second")

    def forward(self, gate_input: torch.Tensor, *, tasks: torch.Tensor | None = None) -> torch.Tensor:
        assert tasks is not None
        return gate_input * (1 - 2 * tasks)[:, None]


class TaskLogitsWithDefault(TaskLogits):
    default_task = "second"


@dataclass(frozen=True, kw_only=True)
class CuriousPolicy(Policy):
    """Two experts per token by everything that may be known of it; an expert's number is its score."""

    max_k: int = 2
    weight_rule: WeightRule = field(default_factory=WeightRule)

    def select(self, logits: torch.Tensor, info: TokenInfo) -> Assignments:
        facts = [info.token_ids, info.row_ids, info.row_seeds]
        sums = torch.stack([torch.zeros(len(logits), dtype=torch.int64) if f is None else f for f in facts])
        mixed = (sums * torch.tensor([[3], [7], [11]])).sum(0)
        experts = torch.stack([mixed % NUM_EXPERTS, (mixed + 1) % NUM_EXPERTS], 1)
        return Assignments(Grid(experts, experts.float()), None, len(logits), NUM_EXPERTS, self.weight_rule)


CURIOUS = CuriousPolicy(
    num_experts=NUM_EXPERTS, accepts_k=False, reads=frozenset({"token_ids", "row_ids", "row_seeds"})
)


def every_uncoupled_policy() -> list[Policy]:
    """One of each kind that there is, and the one above."""
    kinds = [kind for kind in get_args(get_args(PolicyConfig)[0]) if kind is not CallerPolicyConfig]
    configs = [kind(kind=kind.model_fields["kind"].annotation.__args__[0]) for kind in kinds]
    policies = [build_policy(config, num_experts=NUM_EXPERTS) for config in configs]
    return [CURIOUS, *(policy for policy in policies if not policy.batch_coupled)]


def layer_of(policy: Policy, **changes: Any) -> RoutedLayer:
    return make_layer(NUM_EXPERTS, policy=policy, **{"gate_features": policy.num_logits, **changes})


def whole(request: LayerRequest, offset: int = 0, start: int = 0, stop: int | None = None) -> BatchPart:
    stop = len(request.tokens) if stop is None else stop
    return BatchPart(0, start, stop, offset, 0.0, False, stop == len(request.tokens))


def routed(taken: list[tuple[LayerRequest, BatchPart]], layer: RoutedLayer) -> dict[tuple[str, int], Any]:
    """Experts and weights of each row, by request and row, best choice first."""
    batch = build_batch(taken, layer)
    assert batch.gate_input is not None
    assignments = layer.policy.assign(layer.gate(batch.gate_input, tasks=batch.tasks), batch.info)
    plan = plan_dispatch(admit(assignments, layer.capacity))
    owners = [(request.request_id, row) for request, part in taken for row in range(part.start, part.stop)]
    found: dict[tuple[str, int], list[tuple[int, int, Any]]] = {owner: [] for owner in owners}
    ranks = plan.admission.assignments.ranks[plan.assignment_ids]
    columns = (plan.token_ids, ranks, plan.expert_ids, plan.weights)
    for token, rank, expert, weight in zip(*(column.tolist() for column in columns), strict=True):
        found[owners[token]].append((rank, expert, pytest.approx(weight, rel=1e-5)))
    return {owner: sorted(pairs, key=lambda pair: pair[0]) for owner, pairs in found.items()}


def in_batches(requests: list[LayerRequest], size: int) -> list[list[tuple[LayerRequest, BatchPart]]]:
    """The rows of all requests, one after the other, cut into batches of one size."""
    rows = [(request, row) for request in requests for row in range(len(request.tokens))]
    batches = []
    for first in range(0, len(rows), size):
        taken: list[tuple[LayerRequest, BatchPart]] = []
        for offset, (request, row) in enumerate(rows[first : first + size]):
            if taken and taken[-1][0] is request:
                taken[-1] = request, replace(taken[-1][1], stop=row + 1)
            else:
                taken.append((request, whole(request, offset, row, row + 1)))
        batches.append(taken)
    return batches


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    size=st.integers(1, 9),
    given_options=st.lists(
        st.sets(st.sampled_from(["token_ids", "task", "k", "seed", "mask"])), min_size=4, max_size=4
    ),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("policy", every_uncoupled_policy(), ids=lambda policy: type(policy).__name__)
def test_a_split_or_joined_request_is_routed_as_if_it_were_alone(
    policy: Policy, sizes: list[int], size: int, given_options: list[set[str]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = layer_of(policy, gate=TaskLogitsWithDefault())
    requests = []
    for number, (num_rows, names) in enumerate(zip(sizes, given_options, strict=False)):
        options = {
            "token_ids": torch.randint(0, 99, (num_rows,), generator=generator, dtype=torch.int32),
            "task": "first",
            "k": torch.randint(1, policy.max_k + 1, (num_rows,), generator=generator),
            "seed": number,
            "mask": torch.rand(num_rows, generator=generator) > 0.3,
        }
        asked = {name: options[name] for name in names if name != "k" or policy.accepts_k}
        logits = torch.randn(num_rows, policy.num_logits, generator=generator)
        tokens = torch.randn(num_rows, 3, generator=generator)
        requests.append(LayerRequest(f"r{number}", "layer", tokens, RequestOptions(gate_input=logits, **asked)))
        validate_request(requests[-1], layer, limits=LimitsConfig(), router=RouterConfig())
    alone = {owner: pairs for each in requests for owner, pairs in routed([(each, whole(each))], layer).items()}
    together = {owner: pairs for taken in in_batches(requests, size) for owner, pairs in routed(taken, layer).items()}
    assert together == alone
    assert len(alone) == sum(sizes)


def batch_of(layer: RoutedLayer, *options: RequestOptions[torch.Tensor]) -> Any:
    """One batch of a request of two rows per options."""
    requests = [LayerRequest(f"r{n}", "layer", tokens_of(2), each) for n, each in enumerate(options)]
    return build_batch([(request, whole(request, 2 * n)) for n, request in enumerate(requests)], layer)


def test_ids_come_from_the_request_or_from_the_bytes_of_its_rows() -> None:
    batch = batch_of(
        layer_of(CURIOUS), RequestOptions(token_ids=torch.tensor([7, 9], dtype=torch.uint8)), RequestOptions()
    )
    assert batch.info.token_ids.dtype == torch.int64
    assert batch.info.token_ids.tolist() == [7, 9, *ids_of_rows(tokens_of(2)).tolist()]
    assert batch.info.row_ids.tolist() == [0, 1, 0, 1]


def test_a_policy_that_reads_nothing_is_told_nothing() -> None:
    layer = layer_of(build_policy(TopKPolicyConfig(k=1), num_experts=NUM_EXPERTS))
    batch = batch_of(layer, RequestOptions(token_ids=torch.tensor([7, 9]), seed=3, task="x"))
    assert batch.info == TokenInfo()
    assert batch.tasks is None


def test_tasks_are_mixed_in_one_batch_by_their_places_in_the_gate() -> None:
    layer = make_layer(NUM_EXPERTS, gate=TaskLogitsWithDefault())
    batch = batch_of(layer, RequestOptions(task="first"), RequestOptions(), RequestOptions(task="second"))
    assert batch.tasks.tolist() == [0, 0, 1, 1, 1, 1]


def test_the_engine_asks_the_gate_by_task_and_the_policy_with_the_gates_bias() -> None:
    class Biased(TaskLogits):
        expert_bias = torch.tensor([0.0, 0.0, 5.0, 0.0])

    @dataclass(frozen=True, kw_only=True)
    class ByBias(CuriousPolicy):
        max_k: int = 1

        def select(self, logits: torch.Tensor, info: TokenInfo) -> Assignments:
            assert info.expert_bias is not None
            scores, experts = (logits + info.expert_bias).topk(1)
            return Assignments(Grid(experts, scores), None, len(logits), NUM_EXPERTS, self.weight_rule)

    layer = layer_of(ByBias(num_experts=NUM_EXPERTS, uses_bias=True), gate=Biased())
    transport = FakeTransport()
    engine = RouterEngine({"layer": layer}, transport)
    engine.set_table(table_of(1, 10, 11, 12, 13))
    logits = torch.tensor([[9.0, 1, 1, -9]]).expand(4, -1)
    requests = [
        LayerRequest(task, "layer", tokens_of(2), RequestOptions(gate_input=logits[:2], task=task))
        for task in ("first", "second")
    ]
    engine.submit(build_batch([(request, whole(request, 2 * n)) for n, request in enumerate(requests)], layer))
    # By the first task expert 0 leads by more than the bias; by the second, expert 3 does.
    assert [(where.incarnation, request.rows.shape[0]) for where, request in transport.sent] == [(10, 2), (13, 2)]


def check(layer: RoutedLayer, num_rows: int = 2, **options: Any) -> None:
    request = LayerRequest("r", "layer", tokens_of(num_rows), RequestOptions(**options))
    validate_request(request, layer, limits=LimitsConfig(), router=RouterConfig(max_batch_tokens=8))


def test_a_task_that_the_gate_does_not_have_is_refused_with_those_that_it_has() -> None:
    layer = make_layer(3, gate_features=3, gate=TaskLogits())
    check(layer, task="second")
    for options, found in (({"task": "third"}, "'third'"), ({"task": ""}, "''"), ({}, "none")):
        with pytest.raises(InvalidRequestError, match=rf"^layer layer: .*task, one of first, second, found {found}$"):
            check(layer, **options)


def test_a_request_without_a_task_is_of_the_gates_default() -> None:
    layer = make_layer(3, gate_features=3, gate=TaskLogitsWithDefault())
    check(layer)
    with pytest.raises(InvalidRequestError, match="found 'third'"):
        check(layer, task="third")


@pytest.mark.parametrize("k", [1, 2, torch.tensor([2, 2])])
def test_k_is_refused_where_the_policy_does_not_let_a_token_choose(k: Any) -> None:
    layer = layer_of(CURIOUS, policy_kind="curious", gate_features=3)
    with pytest.raises(
        InvalidRequestError, match="layer layer: expected no k, found one: its policy, curious, does not"
    ):
        check(layer, k=k)


COUPLED = replace(CURIOUS, batch_coupled=True)


@pytest.mark.parametrize("allow", [False, True])
def test_a_request_to_a_policy_that_couples_tokens_is_one_batch(allow: bool) -> None:
    layer = layer_of(COUPLED, policy_kind="curious", gate_features=3, allow_batch_coupled=allow)
    assert layer.isolates_requests is not allow
    check(layer, num_rows=8)
    with pytest.raises(
        RequestTooLargeError, match="one batch of at most 8 tokens, found 9: what its policy, curious, gives"
    ):
        check(layer, num_rows=9)


def unused(layer: RoutedLayer, **options: Any) -> list[str]:
    """Names of the options that a warning is about."""
    request = LayerRequest("r", "layer", tokens_of(2), RequestOptions(**options))
    return [warning.split()[1] for warning in unused_options(request, layer)]


EVERYTHING = {
    "token_ids": torch.tensor([1, 2]),
    "task": "first",
    "seed": 1,
    "gate_input": torch.zeros(2, 3),
    "k": 1,
    "mask": torch.ones(2, dtype=torch.bool),
    "isolated": True,
}


def test_only_options_without_effect_are_warned_about() -> None:
    plain = make_layer(3, gate_features=3)
    assert unused(plain, **EVERYTHING) == ["token_ids", "task", "seed"]
    assert unused(plain) == []
    assert unused(replace(plain, gate=TaskLogits()), **EVERYTHING) == ["token_ids", "seed"]
    assert unused(layer_of(CURIOUS), **EVERYTHING) == ["task"]
    assert unused(layer_of(replace(CURIOUS, reads=frozenset({"row_ids"}))), **EVERYTHING) == [
        "token_ids",
        "task",
        "seed",
    ]


def test_a_seed_has_an_effect_where_an_expert_may_be_full_and_drops_at_random() -> None:
    dropless, limited = CapacityConfig(drop="random"), CapacityConfig(drop="random", factor=1.0)
    assert unused(make_layer(3, capacity=dropless), seed=1) == ["seed"]
    assert unused(make_layer(3, capacity=limited), seed=1) == []
    assert batch_of(make_layer(3, capacity=dropless), RequestOptions(seed=1)).info.row_seeds is None
    assert batch_of(make_layer(3, capacity=limited), RequestOptions(seed=1)).info.row_seeds is not None


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        (GShardPolicyConfig(kind="gshard_top2", second_in_evaluation="always"), ["seed"]),
        (GShardPolicyConfig(kind="gshard_top2", second_in_evaluation="never"), ["seed"]),
        (GShardPolicyConfig(kind="gshard_top2", second_in_evaluation="threshold"), []),
        (ReinforcePolicyConfig(kind="reinforce", evaluation="greedy"), ["seed"]),
        (ReinforcePolicyConfig(kind="reinforce", evaluation="as_in_training"), []),
        (RandomPolicyConfig(kind="random"), []),
        (RoundRobinPolicyConfig(kind="round_robin"), ["seed"]),
    ],
)
def test_a_seed_has_an_effect_where_something_is_drawn_outside_training(
    config: PolicyConfig, warned: list[str]
) -> None:
    assert unused(layer_of(build_policy(config, num_experts=NUM_EXPERTS)), seed=1) == warned


def test_a_gate_input_has_no_effect_where_nothing_asks_the_gate() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Blind(CuriousPolicy):
        @property
        def num_logits(self) -> int:
            return 0

    class GatesShared(GivenLogits):
        shared_weight = torch.zeros(1, 3)

    layer = layer_of(Blind(num_experts=NUM_EXPERTS), gate_features=3)
    assert unused(layer, gate_input=torch.zeros(2, 3)) == ["gate_input"]
    assert unused(replace(layer, gate=GatesShared()), gate_input=torch.zeros(2, 3)) == []
