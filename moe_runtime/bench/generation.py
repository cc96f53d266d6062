"""A Hugging Face model's `generate`, timed step by step; the same for ours and for the peer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from torch import Tensor

#: In front of what is decoded.
_PROMPT_TOKENS = 8
#: A turn has at least so many steps: before the first comes the prompt, which is not timed.
_MIN_STEPS = 4
#: The words of the prompts; every model has more.
_NUM_WORDS = 8000
_FIRST_WORD = 16


@dataclass(frozen=True)
class GenerationCase:
    """What is timed.

    Attributes:
        phase: ``decode``: one step of `generate`, which adds a token to each sequence; ``prefill``: `generate` of one
            token, of which nearly all is the prompt's.
        batch: Sequences.
        prompt_tokens: Tokens of each.
    """

    phase: Literal["decode", "prefill"]
    batch: int
    prompt_tokens: int = _PROMPT_TOKENS

    @property
    def num_tokens(self) -> int:
        """Tokens that one of the calls that are timed handles."""
        return self.batch * (self.prompt_tokens if self.phase == "prefill" else 1)

    def prompt(self) -> Tensor:
        """Words drawn at random, the same every time, int64 ``(batch, prompt_tokens)``."""
        generator = torch.Generator().manual_seed(self.batch)
        return torch.randint(_FIRST_WORD, _NUM_WORDS, (self.batch, self.prompt_tokens), generator=generator)


class _StepTimes(BaseStreamer):
    """Notes when each token comes; the prompt comes first."""

    def __init__(self) -> None:
        self.came_at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.came_at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back."""


def time_generation(model: Any, case: GenerationCase, num_calls: int, *, num_threads: int) -> list[float]:
    """Seconds of each of some calls, at least so many, with so many threads in this process."""
    torch.set_num_threads(num_threads)
    if case.phase == "decode":
        streamer = _StepTimes()
        # Of the first token, most of the time is the prompt's.
        generated(model, case, 1 + max(num_calls, _MIN_STEPS), streamer=streamer)
        steps = streamer.came_at[1:]
        return [after - before for before, after in pairwise(steps)]
    times = []
    for _ in range(num_calls):
        started = time.perf_counter()
        generated(model, case, 1)
        times.append(time.perf_counter() - started)
    return times


def generated(model: Any, case: GenerationCase, num_tokens: int, *, streamer: BaseStreamer | None = None) -> Tensor:
    """The prompts and so many tokens behind each, the likeliest every time, int64 ``(batch, tokens)``."""
    prompt = case.prompt()
    tokens: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=streamer,
    )
    return tokens
