"""One answer: ``generate()`` in a thread of its own, its words as they come, and what it came to.

The thread is what makes Ctrl-C safe: it reaches whoever reads the words, and the model ends after its present token.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_runtime.demos.chat.settings import Sampling

Ending = Literal["end", "length", "stopped"]


@dataclass(frozen=True)
class Answer:
    """What a question was answered with.

    Attributes:
        question: As it was asked.
        text: The answer, without special tokens.
        token_ids: Of the answer, the one that ends it included.
        num_prompt_tokens: Tokens that it continues: what was said before, and the question.
        seconds: From the question to the last token.
        first_token_s: From the question to the first token.
        ending: Whether the model ended it, ``max_new_tokens`` did, or something else: Ctrl-C, or an error.
    """

    question: str
    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    seconds: float
    first_token_s: float
    ending: Ending

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first, per second after it; of an answer of one token, over all of its time."""
        if self.num_tokens > 1:
            return (self.num_tokens - 1) / max(self.seconds - self.first_token_s, 1e-9)
        return self.num_tokens / max(self.seconds, 1e-9)


class AnswerUnderWay:
    """An answer that is being generated; read its words, then take the answer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, question: str) -> None:
        """Get ready; ``start`` begins."""
        self._model = model
        self._tokenizer = tokenizer
        self._question = question
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._watch = _Watch()
        self._max_new_tokens = 0
        self._pieces: list[str] = []
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, ids: Tensor, sampling: Sampling, *, context: int) -> None:
        """Begin to generate in a thread.

        Args:
            ids: What to continue, ``(1, num_tokens)``.
            sampling: How.
            context: Tokens of question and answer that the model can look back on.
        """
        self._max_new_tokens = max(1, min(sampling.max_new_tokens, context - ids.shape[1]))
        options = generate_options(
            self._tokenizer, max_new_tokens=self._max_new_tokens, temperature=sampling.temperature
        )
        self._watch.start(ids.shape[1])
        # A daemon: a process that ends does not wait for an expert that is being replaced.
        self._thread = threading.Thread(target=self._generate, args=(ids, options), name="chat-answer", daemon=True)
        self._thread.start()

    def pieces(self, *, silence_s: float) -> Iterator[str]:
        """The answer's words as they come; an empty piece after each ``silence_s`` seconds without any.

        Raises:
            BaseException: What ``generate()`` raised.
        """
        waiting = self._streamer.text_queue
        while True:
            try:
                piece = waiting.get(timeout=silence_s)
            except queue.Empty:
                yield ""
                continue
            if piece is None:
                break
            if piece:
                self._pieces.append(piece)
                yield piece
        if self._failure is not None:
            raise self._failure

    def stop(self, *, timeout_s: float) -> bool:
        """End the answer after its present token; whether that came within the time."""
        self._watch.stop()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def answer(self) -> Answer:
        """What has come so far; the whole of it after the last piece."""
        watch = self._watch
        token_ids = watch.token_ids
        return Answer(
            question=self._question,
            text="".join(self._pieces).strip(),
            token_ids=token_ids,
            num_prompt_tokens=watch.num_prompt_tokens,
            seconds=watch.seconds,
            first_token_s=watch.first_token_s,
            ending=self._ending(token_ids),
        )

    def _ending(self, token_ids: tuple[int, ...]) -> Ending:
        ends: Any = self._model.generation_config.eos_token_id
        if token_ids and token_ids[-1] in (ends if isinstance(ends, list) else [ends]):
            return "end"
        return "length" if len(token_ids) >= self._max_new_tokens else "stopped"

    def _generate(self, ids: Tensor, options: dict[str, Any]) -> None:
        try:
            self._model.generate(  # type: ignore[operator]  # a mixin's method, which mypy takes for a tensor
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=self._streamer,
                stopping_criteria=StoppingCriteriaList([self._watch]),
                **options,
            )
        except BaseException as exc:  # raised again where the words are read
            self._failure = exc
            self._streamer.end()


def generate_options(tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Keyword arguments of ``generate()``: greedy at temperature 0."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    # What a generation configuration says of sampling would be warned of.
    options |= {"temperature": temperature} if temperature > 0 else {"temperature": None, "top_p": None, "top_k": None}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return options if padding is None else {**options, "pad_token_id": padding}


class _Watch(StoppingCriteria):
    """Sees every token, takes the time, and ends the answer when it is told to."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.token_ids: tuple[int, ...] = ()
        self.first_token_s = 0.0
        self.seconds = 0.0
        self._started = 0.0
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether it was told to end the answer."""
        return self._stop.is_set()

    def start(self, num_prompt_tokens: int) -> None:
        """Note where the answer begins."""
        self.num_prompt_tokens = num_prompt_tokens
        self._started = time.perf_counter()

    def stop(self) -> None:
        """End the answer after the present token."""
        self._stop.set()

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        self.seconds = time.perf_counter() - self._started
        if not self.token_ids:
            self.first_token_s = self.seconds
        self.token_ids = tuple(input_ids[0, self.num_prompt_tokens :].tolist())
        return torch.full((input_ids.shape[0],), self.stopped, dtype=torch.bool, device=input_ids.device)
