from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_runtime.bench.aims import AIMS
from moe_runtime.bench.router import build_router, spread
from moe_runtime.bench.router_batches import NUM_TOKENS, batches, make_batch
from moe_runtime.bench.router_cases import ROUTERS
from moe_runtime.bench.router_plots import plot_routers, spread_of_tokens
from moe_runtime.bench.router_tables import BALANCED, BARE, BARE_WITHOUT_GATE, router_tables
from moe_runtime.bench.shapes import SHAPES
from moe_runtime.bench.suites import SUITES
from moe_runtime.config.policies import PolicyConfig
from moe_runtime.routing.policy import TokenInfo

CASES = {case.name: case for case in ROUTERS}
SHAPE = {shape.name: shape for shape in SHAPES}


def row(policy: str, shape: str, ratio: float, *, experts: int = 64, peer: str = BARE) -> dict[str, Any]:
    return {
        "suite": "routers",
        "case": {"policy": policy, "experts": experts, "shape": shape},
        "peer": peer,
        "ratio": ratio,
        "figures": {"us_per_token": 10 * ratio, "max_over_mean": 2 * ratio, "dropped": 0.25},
    }


def judged(start: str, *rows: dict[str, Any]) -> tuple[str, bool]:
    (aim,) = (aim for aim in AIMS if aim.figure.startswith(start))
    finding = aim.judge(rows)
    assert finding is not None
    return finding.text, finding.reached


def test_every_kind_of_policy_is_compared():
    blocks = PolicyConfig.__origin__.__args__  # type: ignore[attr-defined]
    kinds = {block.model_fields["kind"].annotation.__args__[0] for block in blocks}
    # Whose caller routes, has no costs of its own.
    assert {case.kind for case in ROUTERS} == kinds - {"caller"}
    assert set(BALANCED) < set(CASES)


@pytest.mark.parametrize("name", ["W0", "W1", "W2", "W4", "W7"])
def test_first_choices_follow_the_shape(name: str):
    batch = make_batch(SHAPE[name], 0, num_experts=8)
    found = torch.bincount(batch.logits.argmax(1), minlength=8) / NUM_TOKENS
    assert torch.allclose(found, SHAPE[name].shares(0, 8), atol=0.03)


def test_a_batch_is_the_same_whenever_it_is_made():
    first, second = (make_batch(SHAPE["W2"], 3, num_tokens=16, num_experts=8) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert first.info.token_ids is not None
    assert second.info.token_ids is not None
    assert torch.equal(first.info.token_ids, second.info.token_ids)


def test_bursts_have_small_batches_between_them():
    assert [len(batch.logits) for batch in batches(SHAPE["W1"], num_experts=8)] == [4096, 4096]
    assert [len(batch.logits) for batch in batches(SHAPE["W6"], num_experts=8)] == [4096, 256, 4096, 256]


def test_the_logits_of_a_tree_are_those_of_its_groups_then_its_experts():
    logits = torch.log(torch.tensor([[1.0, 3.0, 2.0, 2.0, 5.0, 1.0, 4.0, 6.0]]))
    found = CASES["hierarchical, tree"].logits(logits)
    assert torch.allclose(found.exp(), torch.tensor([[4.0, 4.0, 6.0, 10.0, 1.0, 3.0, 2.0, 2.0, 5.0, 1.0, 4.0, 6.0]]))


def test_the_first_level_prefers_the_shared_expert_where_it_is_the_best():
    logits = torch.arange(8.0).flip(0)[None]
    assert CASES["hierarchical, shared_first"].logits(logits).tolist() == [
        [7.0, 6.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    ]


@pytest.mark.parametrize("case", ROUTERS, ids=lambda case: case.name)
def test_every_router_plans_a_batch(case):
    router = build_router(case, SHAPE["W0"], num_experts=8)
    batch = make_batch(SHAPE["W0"], 0, num_tokens=64, num_experts=8)
    plan = router.plan(case.logits(batch.logits), batch.info)
    assert 0 < plan.num_planned <= 8 * 64


def test_all_tokens_to_one_expert_drop_what_is_over_its_capacity():
    """Of 4,096 assignments to 8 experts one takes 1.25 / 8."""
    found = spread(build_router(CASES["switch"], SHAPE["W7"], num_experts=8), SHAPE["W7"])
    assert found == pytest.approx({"max_over_mean": 8.0, "dropped": 1 - 1.25 / 8, "unserved": 1 - 1.25 / 8})


def test_the_selection_bias_evens_out_what_is_skewed():
    plain, biased = (
        spread(build_router(CASES[n], SHAPE["W2"], num_experts=8), SHAPE["W2"]) for n in ("top_k", "top_k, bias")
    )
    assert plain["max_over_mean"] > 1.9
    assert biased["max_over_mean"] < 1.25


def test_a_policy_may_know_ids_rows_and_seeds_of_a_batch():
    info = make_batch(SHAPE["W7"], 0, num_tokens=5, num_experts=8).info
    assert isinstance(info, TokenInfo)
    assert info.row_ids is not None
    assert info.row_ids.tolist() == [0, 1, 2, 3, 4]
    assert info.token_ids is not None
    assert info.token_ids.tolist() == [0] * 5
    assert info.row_seeds is not None
    assert len(set(info.row_seeds.tolist())) == 5


def test_the_grid_of_rows_becomes_tables_that_can_be_read():
    rows = [
        row("top_k", "W0", 1.25), row("top_k", "W0", 1.5, peer=BARE_WITHOUT_GATE), row("top_k", "W1", 1.75),
        row("dense", "W0", 2.0), row("dense", "W1", 3.0),
    ]  # fmt: skip
    headline, costs, spreads = router_tables(rows)
    assert headline.lines == [["64", BARE, "1.25 to 1.75"], ["64", BARE_WITHOUT_GATE, "1.50 to 1.50"]]
    assert costs.lines == [["top_k", "12 (1.2), W0", "18 (1.8), W1"], ["dense", "20 (2), W0", "30 (3), W1"]]
    assert spreads.header == ["policy", "W0", "W1"]
    assert spreads.lines == [["top_k", "2.5, 25 %", "3.5, 25 %"], ["dense", "4, 25 %", "6, 25 %"]]
    assert spreads.as_markdown().splitlines()[2:5] == [
        "| policy | W0 | W1 |", "| --- | --- | --- |", "| top_k | 2.5, 25 % | 3.5, 25 % |"
    ]  # fmt: skip
    assert SUITES["routers"].tables is router_tables


def test_top_2_of_64_is_to_take_twice_the_bare_arithmetic_at_most():
    rows = [
        row("top_k", "W0", 1.2),
        row("top_k", "W7", 2.1),
        row("top_k", "W7", 9.0, experts=8),
        row("dense", "W0", 9.0),
    ]
    assert judged("`routers`, top-2 of 64", *rows[:1]) == ("1.20 at W0", True)
    assert judged("`routers`, top-2 of 64", *rows) == ("1.20 at W0, 2.10 at W7", False)


def test_no_policy_but_balanced_assignment_is_to_take_ten_times_as_long():
    fine = [row("dense", "W1", 9.9, experts=256), row(*BALANCED, "W0", 15.0), row("top_k", "W0", 11, peer="other")]
    assert judged("`routers`, any policy", *fine) == ("at most 9.9: dense, 256 experts, W1", True)
    assert not judged("`routers`, any policy", *fine, row("hash", "W0", 10.1))[1]


def test_every_kind_of_policy_has_a_plot_in_the_docs():
    folder = Path(__file__).parents[3] / "docs" / "img"
    assert [kind for kind in {case.kind for case in ROUTERS} if not (folder / f"routers-{kind}.svg").exists()] == []


def test_a_plot_is_the_same_whenever_it_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which only the benchmarks install")
    (path,) = plot_routers(tmp_path, [CASES["hash"]])
    once = path.read_bytes()
    plot_routers(tmp_path, [CASES["hash"]])
    assert path.name == "routers-hash.svg"
    assert path.read_bytes() == once


def test_the_spread_of_a_skewed_batch_accounts_for_every_assignment():
    found = spread_of_tokens(CASES["switch"])
    assert found.capacity == 80
    assert max(found.admitted) == 80
    assert sum(found.admitted) + sum(found.dropped) == NUM_TOKENS
