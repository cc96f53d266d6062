from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from moe_runtime.cli.router_views import RouterView, Silence, ask_each
from moe_runtime.cli.status_rates import Rates
from moe_runtime.cli.status_tables import status_tables
from moe_runtime.cli.watch import Look, looks, page, show
from moe_runtime.launch.runtime import serve

NOWHERE = "127.0.0.1:1"


def view(
    address: str = "h:1", *, uptime_s: float = 10.0, requests: int = 1, tokens: int = 8, **expert: Any
) -> RouterView:
    counters = {
        "num_served": 2 * tokens,
        "num_dropped_capacity": 0,
        "num_dropped_failure": 0,
        "num_products": 1,
        "compute_ms": 1.0,
        **expert.pop("counters", {}),
    }
    replica = {
        "replica_id": "l/conv-0/0", "state": "ready", "node": "n", "device": "cpu", "pid": 7, "weights_version": "ab"
    }  # fmt: skip
    experts = [{"name": "conv-0", "kind": "conv", "replicas": [{**replica, **expert}]}]
    layer = {"item_shape": [8], "out_shape": [8], "dtype": "float32", "policy": "top_k", "experts": experts}
    load = {
        "uptime_s": uptime_s,
        "num_requests": requests,
        "open_requests": 0,
        "num_refused": 0,
        "num_failed": 0,
        "table_version": 3,
        "layers": {
            "l": {
                "num_batches": 1,
                "num_tokens": tokens,
                "queued_tokens": 0,
                "batches_in_flight": 0,
                "experts": [counters],
            }
        },
    }
    return RouterView(address, {"layers": {"l": layer}}, load)


def text_of(*renderables: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for each in renderables:
        console.print(each)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rates_are_what_has_come_since_the_look_before_over_the_time() -> None:
    before, now = view(tokens=100, requests=10), view(uptime_s=12.0, tokens=300, requests=20)
    assert Rates.between([before], [now], seconds=2.0) == Rates(5.0, 100.0, 200.0)


def test_a_router_that_is_new_or_was_restarted_adds_nothing_to_the_rates() -> None:
    restarted = view("h:1", uptime_s=1.0, tokens=50)
    new = view("h:2", tokens=50)
    assert Rates.between([view("h:1", tokens=100)], [restarted, new], seconds=2.0) == Rates(0.0, 0.0, 0.0)


def test_a_page_has_rates_from_the_second_look_on() -> None:
    first, second = Look(5.0, (view(tokens=100),)), Look(7.0, (view(uptime_s=12.0, tokens=3100),))
    assert "tokens/s" not in text_of(page(first, None))
    assert "1,500 tokens/s  3,000 assignments/s  0 requests/s" in text_of(page(second, first))


def test_a_router_that_does_not_answer_is_a_row_and_the_others_are_shown() -> None:
    text = text_of(*status_tables([Silence("h:9", "no answer"), view()]))
    assert re.search(r"h:9 +│ no answer", text)
    assert "conv-0" in text


def test_a_page_without_any_router_that_answers_has_no_layers() -> None:
    assert "layer" not in text_of(*status_tables([Silence("h:9", "no answer")]))


def test_a_replica_says_why_it_is_in_its_state() -> None:
    text = text_of(*status_tables([view(state="suspect", reason="no answer for 2 s")]))
    assert "l/conv-0/0 is suspect: no answer for 2 s" in text
    assert " is " not in text_of(*status_tables([view()]))


def test_more_than_one_attempt_is_told_per_expert_where_there_was_one() -> None:
    counters = {"num_retried": 3, "num_hedged": 0, "num_timed_out": 2}
    text = text_of(*status_tables([view(counters=counters), view("h:2", counters=counters)]))
    assert "conv-0: retried 6, timed out 4" in text
    assert "retried" not in text_of(*status_tables([view()]))


def test_without_a_terminal_each_look_is_printed_after_the_other() -> None:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    show(iter([Look(1.0, (view(),)), Look(2.0, (view(uptime_s=11.0),))]), console=console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("layer l:") == 2


def test_routers_are_looked_at_every_so_often() -> None:
    waited: list[float] = []
    each = looks(lambda: ask_each((NOWHERE,), timeout_s=0.2), every_s=30.0, wait=waited.append)
    first, second = next(each), next(each)
    assert first.routers == second.routers == (Silence(NOWHERE, "no answer"),)
    assert len(waited) == 1
    assert 20.0 < waited[0] <= 30.0


def test_one_router_may_be_silent_while_another_answers() -> None:
    experts = [{"kind": "identity", "count": 2}]
    config = {"layers": {"l": {"item_shape": [4], "experts": experts}}, "router": {"address": "127.0.0.1:0"}}
    with serve(config, ray=False) as runtime:
        routers = ask_each((runtime.address, NOWHERE), timeout_s=5.0)
    assert isinstance(routers[0], RouterView)
    assert routers[1] == Silence(NOWHERE, "no answer")
    assert routers[0].load["transport"]["num_sent"] == 0


@pytest.mark.timeout(120)
def test_ctrl_c_ends_a_watch_with_exit_code_0() -> None:
    command = [sys.executable, "-c", "from moe_runtime.cli import main; main()"]
    options = ["status", "--watch", "--every", "60", "--timeout-s", "0.2", "--address", NOWHERE]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "no answer" in line:
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors == ""
