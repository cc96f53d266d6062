"""What the benchmarks are to reach, and whether a run does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.router_tables import BALANCED, BARE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: A row as ``--json`` writes it.
JsonRow = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What a run found of an aim, in words, and whether that is enough."""

    text: str
    reached: bool


@dataclass(frozen=True)
class Aim:
    """One figure to reach.

    Attributes:
        figure: What is measured.
        bound: What is asked of it.
        suite: Where it is measured.
        judge: Finds it in the suite's rows; None where they lack the case, as a quick run's may.
    """

    figure: str
    bound: str
    suite: str
    judge: Callable[[Sequence[JsonRow]], Finding | None]


def _where(rows: Sequence[JsonRow], /, *, peer: str | None = None, **case: Any) -> list[JsonRow]:
    return [
        row
        for row in rows
        if (peer is None or row["peer"] == peer) and all(row["case"].get(key) == value for key, value in case.items())
    ]


def _ratio_at_most(bound: float, *, size: str, peer: str | None = None, **case: Any) -> Callable[..., Finding | None]:
    """Whether every ratio is small enough; names the largest, and the size at which it was found."""

    def judge(rows: Sequence[JsonRow]) -> Finding | None:
        found = _where(rows, peer=peer, **case)
        if not found:
            return None
        worst = max(found, key=lambda row: row["ratio"])
        parts = ", ".join(f"{row['ratio']:.2f} at {row['case'][size]}" for row in found)
        return Finding(parts, worst["ratio"] <= bound)

    return judge


def _times_faster(bound: float, **case: Any) -> Callable[..., Finding | None]:
    def judge(rows: Sequence[JsonRow]) -> Finding | None:
        found = _where(rows, **case)
        return Finding(f"{1 / found[0]['ratio']:.1f} times", found[0]["ratio"] <= 1 / bound) if found else None

    return judge


def _against_actor_calls(rows: Sequence[JsonRow]) -> Finding | None:
    calls = _where(rows, peer="ray actor calls", rows=16)
    echo = _where(rows, peer="zmq echo", rows=16)
    if not calls or not echo:
        return None
    by_calls, by_echo = calls[0]["ratio"], echo[0]["ratio"]
    return Finding(f"{by_calls:.2f} of the calls, {by_echo:.2f} of the echo", by_calls <= 0.1 or by_echo <= 1.3)


def _layer_mean(rows: Sequence[JsonRow]) -> Finding | None:
    ratios = [row["ratio"] for row in _where(rows, peer="best in-process") if row["case"]["tokens"] >= 16]
    if not ratios:
        return None
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return Finding(f"{mean:.2f} over {len(ratios)} cases", mean <= 1.0)


def _layer_of_one_token(rows: Sequence[JsonRow]) -> Finding | None:
    found = _where(rows, peer="best in-process", tokens=1)
    if not found:
        return None
    over_ms = {row["case"]["expert"]: row["ours_ms"] - row["peer_ms"] for row in found}
    return Finding(", ".join(f"{name} {ms:+.1f} ms" for name, ms in over_ms.items()), max(over_ms.values()) <= 0.5)


def _share_of_library_mode(rows: Sequence[JsonRow]) -> Finding | None:
    found = _where(rows, clients=16, tokens=16, routers=1)
    shares = {row["case"]["expert"]: 1 / row["ratio"] for row in found}
    if not shares:
        return None
    return Finding(", ".join(f"{name} {share:.0%}" for name, share in shares.items()), min(shares.values()) >= 0.8)


def _one_message_per_host(rows: Sequence[JsonRow]) -> Finding | None:
    counts = {row["case"]["actors"]: row["figures"]["messages_per_batch"] for row in rows}
    text = ", ".join(f"{count:g} to {actors}" for actors, count in counts.items())
    return Finding(text, all(count == actors for actors, count in counts.items())) if counts else None


def _router_time(rows: Sequence[JsonRow]) -> Finding | None:
    if not rows:
        return None
    excess = {_layout(row): row["ratio"] / row["figures"]["tokens_and_hosts_ratio"] for row in rows}
    worst = max(excess, key=lambda layout: excess[layout])
    return Finding(f"at most {excess[worst]:.2f} of that, with {worst}", excess[worst] <= 1.0)


def _layout(row: JsonRow) -> str:
    case = row["case"]
    return f"{case['experts']} experts on {case['actors']} actors, {case['tokens']} tokens"


def _killed(rows: Sequence[JsonRow]) -> Finding | None:
    found = [row for row in rows if row["case"].get("fault") == "killed"]
    if not found:
        return None
    worst_ms = max(row["figures"]["worst_ms"] for row in found)
    median_ms = max(row["ours_ms"] for row in found)
    return Finding(f"{median_ms:.3g} ms median, {worst_ms:.3g} ms at worst", worst_ms < 100)


def _speed_at_least(bound: float, **case: Any) -> Callable[..., Finding | None]:
    """Whether every model generates fast enough."""

    def judge(rows: Sequence[JsonRow]) -> Finding | None:
        speeds = {row["case"]["model"]: 1 / row["ratio"] for row in _where(rows, **case)}
        if not speeds:
            return None
        text = ", ".join(f"{speed:.2f} {model.split(',')[0]}" for model, speed in speeds.items())
        return Finding(text, min(speeds.values()) >= bound)

    return judge


def _cheap_routers(rows: Sequence[JsonRow]) -> Finding | None:
    """Every policy but the one that solves an assignment problem over the batch."""
    found = [row for row in _where(rows, peer=BARE) if row["case"]["policy"] not in BALANCED]
    if not found:
        return None
    worst = max(found, key=lambda row: row["ratio"])
    case = worst["case"]
    return Finding(
        f"at most {worst['ratio']:.1f}: {case['policy']}, {case['experts']} experts, {case['shape']}",
        worst["ratio"] <= 10.0,
    )


AIMS = (
    Aim("`exchange` ÷ actor calls, 16 rows", "at most 0.1, or 1.3 of the echo", "exchange", _against_actor_calls),
    Aim("`exchange` ÷ bare echo", "at most 1.5 at every size", "exchange",
        _ratio_at_most(1.5, size="rows", peer="zmq echo")),
    Aim("`layer` ÷ best in one process, geometric mean from 16 tokens on", "at most 1.0", "layer", _layer_mean),
    Aim("`layer`, 1 token, over the best in one process", "at most 0.5 ms", "layer", _layer_of_one_token),
    Aim("`peers`, gated, 64 tokens, `small`", "20 times faster", "peers",
        _times_faster(20, kind="gated", expert="small", tokens=64)),
    Aim("`peers`, gated, 64 tokens, `ffn`", "8 times faster", "peers",
        _times_faster(8, kind="gated", expert="ffn", tokens=64)),
    Aim("`peers`, direct, 256 tokens, `ffn`", "2 times faster", "peers",
        _times_faster(2, kind="direct", expert="ffn", tokens=256)),
    Aim("`routers`, top-2 of 64 ÷ matmul + topk + sort", "at most 2 on every shape", "routers",
        _ratio_at_most(2.0, size="shape", peer=BARE, policy="top_k", experts=64)),
    Aim("`routers`, any policy but balanced assignment ÷ the same", "at most 10", "routers", _cheap_routers),
    Aim("`service`, 16 clients of 16 tokens, share of the library mode", "80 %", "service", _share_of_library_mode),
    Aim("`scale`, messages per batch", "one per host", "scale", _one_message_per_host),
    Aim("`scale`, growth of the router's time", "that of tokens + hosts", "scale", _router_time),
    Aim("`transformers`, decoding at batch 1, share of one process's speed", "0.95", "transformers",
        _speed_at_least(0.95, phase="decode", batch=1)),
    Aim("`transformers`, decoding at batch 16, times one process's speed", "1.2", "transformers",
        _speed_at_least(1.2, phase="decode", batch=16)),
    Aim("`transformers`, prefill, times one process's speed", "1.2", "transformers",
        _speed_at_least(1.2, phase="prefill")),
    Aim("`wire`, killed process known", "under 100 ms", "wire", _killed),
)  # fmt: skip
