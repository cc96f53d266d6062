"""Run on the clients' host: threads that send one request after the other, and a ledger with one line for each.

Its one argument is a JSON object with the fields of ``LoadPlan``. It ends when the file ``stop`` appears.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime import MoEClient
from moe_runtime.errors import MoERuntimeError
from moe_runtime.wire.messages import SERVED, ForwardResult

TOLERANCE = 1e-4


@dataclass(frozen=True)
class LoadPlan:
    """What to send and where to write what became of it.

    Attributes:
        addresses: Of the routers.
        layer: The layer.
        tokens: File of the tokens, ``(num_tokens, features)``.
        outputs: File of what each expert makes of each token, ``(num_experts, num_tokens, features)``.
        ledger: File of the ledger.
        stop: File whose appearance ends the load.
        num_threads: Requests under way at once.
        request_tokens: Consecutive tokens of one request.
        deadline_s: Of each request.
        max_requests: Of each thread; 0 is any number.
    """

    addresses: tuple[str, ...]
    layer: str
    tokens: str
    outputs: str
    ledger: str
    stop: str
    num_threads: int = 4
    request_tokens: int = 16
    deadline_s: float = 5.0
    max_requests: int = 0


class Load:
    """The threads of one plan. Each request has exactly one line in the ledger, also if it failed."""

    def __init__(self, plan: LoadPlan, ledger: IO[str]) -> None:
        self._plan = plan
        self._ledger = ledger
        self._lock = threading.Lock()
        self._tokens, self._outputs = np.load(plan.tokens), np.load(plan.outputs)
        self._stop = Path(plan.stop)
        self._client = MoEClient(plan.addresses)

    def run(self) -> None:
        """Send until told to stop."""
        num_threads = self._plan.num_threads
        with self._client, ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(self._send_all, range(num_threads)))

    def _send_all(self, thread: int) -> None:
        plan = self._plan
        number = 0
        while not self._stop.exists() and (number < plan.max_requests or not plan.max_requests):
            first = (thread + number * plan.num_threads) * plan.request_tokens % len(self._tokens)
            self._send(f"{thread}-{number}", np.arange(first, first + plan.request_tokens) % len(self._tokens))
            number += 1

    def _send(self, name: str, ids: NDArray[Any]) -> None:
        began = time.monotonic()
        line: dict[str, Any] = {"name": name, "began": began}
        try:
            result = self._client.forward(
                self._tokens[ids], layer=self._plan.layer, timeout_s=self._plan.deadline_s, return_routing=True
            )
        except MoERuntimeError as exc:
            line |= {"ended": time.monotonic(), "error": f"{type(exc).__name__}: {exc}"}
        else:
            line |= {"ended": time.monotonic(), "error": None, **self._account(result, ids)}
        with self._lock:
            self._ledger.write(json.dumps(line) + "\n")
            self._ledger.flush()

    def _account(self, result: ForwardResult, ids: NDArray[Any]) -> dict[str, Any]:
        report = result.report
        routing = (report.token_ids, report.expert_ids, report.expert_weights, report.outcomes)
        if any(part is None for part in routing):
            raise RuntimeError("the routing was asked for, and is not there")
        token_ids, expert_ids, weights, outcomes = map(np.asarray, routing)
        tokens, outputs = self._tokens[ids], self._outputs[:, ids]
        expected = np.zeros_like(tokens)
        is_served = outcomes == SERVED
        rows, experts = token_ids[is_served], expert_ids[is_served]
        np.add.at(expected, rows, weights[is_served, None] * outputs[experts, rows])
        untouched = np.setdiff1d(np.arange(len(ids)), rows)
        expected[untouched] = tokens[untouched]
        answered = np.asarray(result.outputs)
        return {
            "request_id": report.request_id,
            "table_version": report.table_version,
            "assignments": report.num_assignments,
            "served": report.num_served,
            "dropped_capacity": report.num_dropped_capacity,
            "dropped_failure": report.num_dropped_failure,
            "rerouted": report.num_rerouted,
            "retried": report.num_retried,
            "experts": np.bincount(experts, minlength=len(outputs)).tolist(),
            "warnings": list(report.warnings),
            "batch_tokens": list(report.batch_tokens),
            "is_right": bool(np.allclose(answered, expected, atol=TOLERANCE)),
            "is_untouched": bool((answered[untouched] == tokens[untouched]).all()),
        }


def main() -> None:
    fields = json.loads(sys.argv[1])
    plan = LoadPlan(**{**fields, "addresses": tuple(fields["addresses"])})
    with Path(plan.ledger).open("w", encoding="utf-8") as ledger:
        Load(plan, ledger).run()


if __name__ == "__main__":
    main()
