from __future__ import annotations

from typing import Any

import pytest

from moe_runtime.bench.aims import AIMS, Finding
from moe_runtime.bench.tables import aim_table

BY_FIGURE = {aim.figure: aim for aim in AIMS}


def row(ratio: float = 1.0, *, peer: str = "", figures: dict[str, float] | None = None, **case: Any) -> dict[str, Any]:
    return {"case": case, "peer": peer, "ours_ms": ratio, "peer_ms": 1.0, "ratio": ratio, "figures": figures or {}}


def judge(start_of_figure: str, *rows: dict[str, Any]) -> Finding | None:
    (figure,) = [figure for figure in BY_FIGURE if figure.startswith(start_of_figure)]
    return BY_FIGURE[figure].judge(rows)


def test_every_aim_is_left_open_where_nothing_was_measured():
    assert [aim.judge([]) for aim in AIMS] == [None] * len(AIMS)
    assert aim_table(AIMS, {}).count("not measured") == len(AIMS)


@pytest.mark.parametrize(("calls", "echo", "reached"), [(0.1, 5.0, True), (0.5, 1.3, True), (0.5, 1.4, False)])
def test_the_exchange_is_to_reach_actor_calls_or_the_echo(calls: float, echo: float, reached: bool):
    rows = [row(calls, peer="ray actor calls", rows=16), row(echo, peer="zmq echo", rows=16)]
    assert judge("`exchange` ÷ actor", *rows) == Finding(f"{calls:.2f} of the calls, {echo:.2f} of the echo", reached)


def test_the_exchange_is_to_stay_near_the_echo_at_every_size():
    rows = [row(1.2, peer="zmq echo", rows=1), row(1.6, peer="zmq echo", rows=4), row(9.0, peer="other", rows=1)]
    assert judge("`exchange` ÷ bare", *rows) == Finding("1.20 at 1, 1.60 at 4", False)


def test_the_layers_mean_is_geometric_and_begins_at_16_tokens():
    rows = [row(r, peer="best in-process", tokens=n, expert="ffn") for r, n in ((9.0, 4), (0.5, 16), (2.0, 64))]
    assert judge("`layer` ÷", *rows) == Finding("1.00 over 2 cases", True)


def test_one_token_may_take_half_a_millisecond_more():
    rows = [row(1.4, peer="best in-process", tokens=1, expert="ffn"), row(1.6, peer="best in-process", tokens=1,
                                                                          expert="swiglu")]  # fmt: skip
    assert judge("`layer`, 1", *rows) == Finding("ffn +0.4 ms, swiglu +0.6 ms", False)


def test_hivemind_is_to_be_beaten_by_a_factor():
    assert judge("`peers`, gated, 64 tokens, `ffn`", row(0.1, kind="gated", expert="ffn", tokens=64)) == Finding(
        "10.0 times", True
    )


def test_the_share_of_the_library_mode_is_the_inverse_of_the_ratio():
    rows = [row(1.25, expert=expert, clients=16, tokens=16, routers=1) for expert in ("ffn",)]
    assert judge("`service`", *rows) == Finding("ffn 80%", True)


def test_messages_and_router_time_are_held_against_hosts_and_tokens():
    figures = {"messages_per_batch": 4.0, "tokens_and_hosts_ratio": 1.1}
    larger = row(1.32, figures=figures, tokens=16, experts=16, actors=4)
    assert judge("`scale`, messages", larger) == Finding("4 to 4", True)
    assert judge("`scale`, growth", larger) == Finding(
        "at most 1.20 of that, with 16 experts on 4 actors, 16 tokens", False
    )


def test_the_worst_of_the_killed_counts():
    killed = row(9.0, figures={"worst_ms": 101.0}, fault="killed")
    assert judge("`wire`", killed, row(fault="frozen")) == Finding("9 ms median, 101 ms at worst", False)


def test_generating_is_held_against_the_speed_of_one_process():
    rows = [
        row(1 / speed, phase="decode", batch=1, model=model)
        for speed, model in ((0.96, "a, 4 layers"), (0.9, "b, 30 layers"))
    ]
    assert judge("`transformers`, decoding at batch 1,", rows[0]) == Finding("0.96 a", True)
    assert judge("`transformers`, decoding at batch 1,", *rows) == Finding("0.96 a, 0.90 b", False)
    assert judge("`transformers`, prefill", row(1 / 1.25, phase="prefill", batch=1, model="a")) == Finding(
        "1.25 a", True
    )
