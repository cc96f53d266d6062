"""What a chat came to, for ``--json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.demos.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from moe_runtime.demos.chat.answering import Answer
    from moe_runtime.demos.chat.check import Comparison
    from moe_runtime.demos.chat.loads import Reading


@dataclass(frozen=True)
class ChatResult:
    """One run.

    Attributes:
        model: What was chatted with.
        checkpoint: Its folder.
        answers: In order.
        comparison: With the dense model; None where that was not asked for or there is none.
        experts: What the experts have done since they were started, and where they are.
        start_s: Seconds that each stage of starting took, by its name.
    """

    model: str
    checkpoint: Path
    answers: tuple[Answer, ...]
    comparison: Comparison | None
    experts: Reading
    start_s: Mapping[str, float]

    @property
    def tokens_equal_dense(self) -> bool | None:
        """Whether the tokens were those of the dense model; None where they were not compared."""
        return None if self.comparison is None else self.comparison.equal

    def check(self) -> None:
        """Hold the outcome against the demo's promise.

        Raises:
            DemoError: If the tokens are not the dense model's.
        """
        if self.comparison is not None and not self.comparison.equal:
            raise DemoError(
                f"{self.comparison.prompt!r}: expected the dense model's tokens, found others after the first "
                f"{self.comparison.num_equal} of {len(self.comparison.dense_ids)}"
            )

    def write_json(self, path: Path) -> None:
        """Write everything to a file as one JSON object."""
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; the last prompt and answer stand at the top as well."""
        last = {} if not self.answers else _answer(self.answers[-1])
        return {
            **last,
            "tokens_equal_dense": self.tokens_equal_dense,
            "num_actors": len(self.experts.actors),
            "model": self.model,
            "checkpoint": str(self.checkpoint),
            "answers": [_answer(answer) for answer in self.answers],
            "comparison": None if self.comparison is None else asdict(self.comparison),
            "loads": {layer: list(counts) for layer, counts in self.experts.loads.layers.items()},
            "actors": [asdict(actor) for actor in self.experts.actors],
            "num_retried": self.experts.num_retried,
            "start_s": dict(self.start_s),
        }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "prompt": answer.question,
        "answer": answer.text,
        "num_tokens": answer.num_tokens,
        "tokens_per_s": answer.tokens_per_s,
        "first_token_s": answer.first_token_s,
        "seconds": answer.seconds,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "ending": answer.ending,
        "token_ids": list(answer.token_ids),
    }
