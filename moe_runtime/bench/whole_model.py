"""A checkpoint's whole model in a process of its own, as transformers computes it: with `grouped_mm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_runtime.bench.children import Child

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path

    from torch import Tensor

    from moe_runtime.bench.generation import GenerationCase

_LOAD_WITHIN_S = 600.0


class WholeModel:
    """The peer's process, seen from ours."""

    def __init__(self, path: Path) -> None:
        """Start the process, which loads the model from a checkpoint."""
        self.child = Child(serve_whole_model, str(path))

    def wait_until_ready(self) -> None:
        """Return as soon as it computes."""
        self.child.answer(timeout_s=_LOAD_WITHIN_S)

    def generated(self, case: GenerationCase, num_tokens: int) -> Tensor:
        """What it generates with one thread."""
        return torch.tensor(self.child.ask("generate", case, num_tokens))

    def time_calls(self, case: GenerationCase, num_threads: int, num_calls: int) -> Sequence[float]:
        """Seconds of each of some calls."""
        times: Sequence[float] = self.child.ask("time", case, num_threads, num_calls)
        return times

    def close(self) -> None:
        """End the process."""
        self.child.close()


def serve_whole_model(connection: Connection, path: str) -> None:
    """Generate as it is asked to, until the parent closes the connection."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from moe_runtime.bench.generation import generated, time_generation

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="grouped_mm", dtype=torch.float32)
    model.eval().requires_grad_(False)
    connection.send(None)
    while True:
        command, case, *arguments = connection.recv()
        if command == "generate":
            torch.set_num_threads(1)
            connection.send(generated(model, case, *arguments).tolist())
        else:
            num_threads, num_calls = arguments
            connection.send(time_generation(model, case, num_calls, num_threads=num_threads))
