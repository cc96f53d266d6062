"""What a chat is asked to be: which model, how it draws its words, and whether it answers once or for long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.demos.errors import DemoError

if TYPE_CHECKING:
    from pathlib import Path

#: With its own system prompt the small model takes "The capital of France is" for a wish to hear French.
SYSTEM_PROMPT = "You are a helpful assistant. You answer questions and complete sentences."


@dataclass(frozen=True)
class Sampling:
    """How the words of an answer are chosen.

    Attributes:
        temperature: 0 takes the most likely token each time.
        max_new_tokens: At most so many tokens per answer.
        seed: What is drawn at random is drawn from this, so that a conversation can be had again.
    """

    temperature: float = 0.2
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class ChatSettings:
    """One run of the chat.

    Attributes:
        prompt: Answer this and end; None reads questions from standard input.
        json_path: Where to write the result as well.
        checkpoint: A Hugging Face MoE checkpoint to chat with, instead of the model that is fetched.
        experts_per_actor: Of each layer.
        system: The system prompt; None is ``SYSTEM_PROMPT`` for the model that is fetched, and none for others.
        sampling: How answers are drawn.
        checks: Whether the tokens are held against the dense model's before the chat.
    """

    prompt: str | None = None
    json_path: Path | None = None
    checkpoint: Path | None = None
    experts_per_actor: int = 1
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    checks: bool = True

    def check(self) -> None:
        """Find out before anything takes time, not after.

        Raises:
            DemoError: If there is no checkpoint where one is named, no folder for the result, or no prompt in it.
        """
        if self.prompt is not None and not self.prompt.strip():
            raise DemoError("--prompt: expected a question, found nothing but blanks")
        if self.json_path is not None and not self.json_path.parent.is_dir():
            raise DemoError(
                f"--json {self.json_path}: expected an existing folder, found none at {self.json_path.parent}"
            )
        if self.checkpoint is not None and not (self.checkpoint / "config.json").is_file():
            raise DemoError(
                f"--checkpoint {self.checkpoint}: expected a folder with the config.json of a Hugging Face model, "
                f"found none"
            )
