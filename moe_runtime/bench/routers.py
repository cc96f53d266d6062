"""Suite `routers`: what every policy costs, and how it spreads and drops tokens, beside the bare arithmetic."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from moe_runtime.bench.results import Row
from moe_runtime.bench.router import FEATURES, build_router, spread
from moe_runtime.bench.router_batches import NUM_TOKENS, make_batch
from moe_runtime.bench.router_cases import ROUTERS
from moe_runtime.bench.router_tables import BARE, BARE_WITHOUT_GATE, router_tables
from moe_runtime.bench.sampling import Contender, Effort, interleave, time_calls
from moe_runtime.bench.shapes import SHAPES
from moe_runtime.bench.suite import Suite
from moe_runtime.bench.tokens import tokens_with_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from moe_runtime.bench.router import Router
    from moe_runtime.bench.router_batches import RouterBatch
    from moe_runtime.bench.sampling import Sample
    from moe_runtime.bench.shapes import Shape
    from moe_runtime.bench.suite import BenchSettings

_SIZES = (8, 64, 256)
_QUICK_SIZES = (64,)
_QUICK_SHAPES = ("W0", "W2")
_BARE_K = 2
#: Of all contenders of a group together: a round has a turn for each.
_EFFORT = Effort(seconds=3.0, min_rounds=3)
#: The case that is timed without its gate as well.
_HEADLINE, _HEADLINE_WITHOUT_GATE = "top_k", "top_k without gate"


def _run(settings: BenchSettings) -> Iterator[Row]:
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    shapes = [shape for shape in SHAPES if not settings.quick or shape.name in _QUICK_SHAPES]
    measuring = settings.begin(f"Routing batches of {NUM_TOKENS:,} tokens")
    groups = [(num_experts, shape) for num_experts in sizes for shape in shapes]
    with _one_thread(), torch.inference_mode():
        for num_done, (num_experts, shape) in enumerate(groups, start=1):
            yield from _measure(shape, num_experts=num_experts)
            measuring.update(num_done, len(groups))


def _measure(shape: Shape, *, num_experts: int) -> Iterator[Row]:
    routers = [build_router(case, shape, num_experts=num_experts) for case in ROUTERS]
    samples = interleave(list(_contenders(routers, make_batch(shape, 0, num_experts=num_experts))), effort=_EFFORT)
    for router in routers:
        name = router.case.name
        case = {"policy": name, "experts": num_experts, "shape": shape.name}
        yield Row(
            "routers", case, BARE, samples[name], samples[BARE], {**_cost(samples[name]), **spread(router, shape)}
        )
        if name == _HEADLINE:
            ours, theirs = samples[_HEADLINE_WITHOUT_GATE], samples[BARE_WITHOUT_GATE]
            yield Row("routers", case, BARE_WITHOUT_GATE, ours, theirs, _cost(ours))


def _contenders(routers: Sequence[Router], batch: RouterBatch) -> Iterator[Contender]:
    """The routers, and the least that any top-2 must do: score, select, sort the choices by expert."""
    plain = next(router for router in routers if router.case.name == _HEADLINE)
    # Gates of one width are the same, and so are the tokens made for them.
    gates = {router.policy.num_logits: router for router in routers}
    tokens = {num_logits: _tokens(router, batch) for num_logits, router in gates.items()}
    weight = plain.gate.weight
    some = tokens[plain.policy.num_logits]
    yield _contender(BARE, lambda: _select_and_sort(some @ weight.T))
    yield _contender(BARE_WITHOUT_GATE, lambda: _select_and_sort(batch.logits))
    yield _contender(_HEADLINE_WITHOUT_GATE, lambda: plain.plan(batch.logits, batch.info))
    for router in routers:
        yield _contender(router.case.name, partial(router.route, tokens[router.policy.num_logits], batch.info))


def _contender(name: str, call: Callable[[], object]) -> Contender:
    return Contender(name, lambda num_calls: time_calls(call, num_calls))


def _select_and_sort(logits: Tensor) -> Tensor:
    return torch.argsort(torch.topk(logits, _BARE_K, dim=-1).indices.reshape(-1))


def _tokens(router: Router, batch: RouterBatch) -> Tensor:
    """Tokens of which the router's gate makes the batch's logits; any, where no gate is asked."""
    if router.policy.num_logits == 0:
        return torch.zeros(len(batch.logits), FEATURES)
    return tokens_with_logits(router.gate.weight, router.case.logits(batch.logits))


def _cost(sample: Sample) -> dict[str, float]:
    return {"us_per_token": sample.median_ms * 1e3 / NUM_TOKENS}


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


ROUTERS_SUITE = Suite(
    "routers",
    "every policy on every imbalance shape, beside a bare top-2; 4,096 tokens of 1,024 features, one thread",
    _run,
    tables=router_tables,
)
