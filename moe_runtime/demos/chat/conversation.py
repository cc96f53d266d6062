"""What was said so far, as the token ids that the model continues; the oldest is left out where it is too much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from moe_runtime.demos.errors import DemoError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """What the model is to continue.

    Attributes:
        ids: Token ids, ``(1, num_tokens)``.
        num_forgotten: Turns at the beginning that no longer fit and are not in it.
    """

    ids: Tensor
    num_forgotten: int


class Conversation:
    """The turns so far. Questions are put to the model by its tokenizer's chat template.

    A tokenizer without one is a base model's: its text is continued as it stands, line by line.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, context: int, system: str | None = None) -> None:
        """Begin.

        Args:
            tokenizer: The model's.
            context: Tokens that the model can look back on, its answer included.
            system: The system prompt; None leaves it to the template.
        """
        self._tokenizer = tokenizer
        self._context = context
        self._system = system
        self._turns: list[Turn] = []

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said, oldest first."""
        return tuple(self._turns)

    @property
    def context(self) -> int:
        """Tokens that the model can look back on, its answer included."""
        return self._context

    def prompt(self, question: str, *, max_new_tokens: int) -> Prompt:
        """What the model is to continue in answer to a question: as many of the last turns as leave room for it.

        Args:
            question: The new one.
            max_new_tokens: Room for the answer; at most half of the context is kept free for it.

        Raises:
            DemoError: If the question alone is too long, or the chat template cannot hold what was said.
        """
        limit = self._context - min(max_new_tokens, self._context // 2)
        for num_forgotten in range(len(self._turns) + 1):
            ids = self._ids(self._turns[num_forgotten:], question)
            if ids.shape[1] <= limit:
                return Prompt(ids, num_forgotten)
        raise DemoError(
            f"the question: expected at most {limit:,} tokens, so that an answer fits the model's context of "
            f"{self._context:,}; found {ids.shape[1]:,}"
        )

    def add(self, question: str, answer: str) -> None:
        """Remember a turn."""
        self._turns.append(Turn(question, answer))

    def reset(self) -> None:
        """Forget everything."""
        self._turns.clear()

    def _ids(self, turns: list[Turn], question: str) -> Tensor:
        if self._tokenizer.chat_template is None:
            lines = [line for turn in turns for line in (turn.question, turn.answer)]
            ids: Tensor = self._tokenizer("\n".join([*lines, question]), return_tensors="pt")["input_ids"]
            return ids
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                self._messages(turns, question), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as exc:
            raise DemoError(f"the model's chat template does not take what was said: {exc}") from exc
        templated: Tensor = encoded["input_ids"]
        return templated

    def _messages(self, turns: list[Turn], question: str) -> list[dict[str, str]]:
        said = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in (("user", turn.question), ("assistant", turn.answer))
        ]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *said, {"role": "user", "content": question}]
