"""Callers in closed loops against a runtime that is changed, killed or restarted meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from moe_runtime.rpc.client import MoEClient

TOKENS = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))


class Clients:
    """Callers in closed loops, who keep every distinct answer, and whatever went wrong."""

    def __init__(self, addresses, *, num_callers=3, allows_drops=False):
        self._allows_drops = allows_drops
        self.errors = []
        self.answers = []
        self.num_answers = 0
        self._addresses = list(addresses)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(num_callers)
        self._calls = [self._pool.submit(self._call) for _ in range(num_callers)]

    def _call(self):
        with MoEClient(self._addresses) as client:
            while not self._stop.is_set():
                try:
                    answer = client.forward(TOKENS, layer="l", timeout_s=60.0)
                except Exception as exc:
                    self.errors.append(exc)
                    return
                with self._lock:
                    self.num_answers += 1
                    if answer.report.num_dropped_failure and not self._allows_drops:
                        self.errors.append(answer.report)
                    if not any(torch.allclose(answer.outputs, known, atol=1e-5) for known in self.answers):
                        self.answers.append(answer.outputs)

    def stop(self):
        self._stop.set()
        for call in self._calls:
            call.result(60.0)
        self._pool.shutdown()


@contextmanager
def calling(addresses, **options):
    clients = Clients(addresses, **options)
    try:
        yield clients
    finally:
        clients.stop()
