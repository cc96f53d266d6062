"""The model as the chat uses it: it generates here, and its experts can be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_runtime.demos.chat.loads import Reading

#: Where a model does not say how far it can look back.
_DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class ServedModel:
    """A language model whose experts are elsewhere.

    Attributes:
        name: For people.
        model: Attention, router and everything else that is no expert.
        tokenizer: Its tokenizer.
        read: What its experts have done so far, and where they are.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    read: Callable[[], Reading]

    @property
    def context(self) -> int:
        """Tokens that the model can look back on."""
        config: Any = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or _DEFAULT_CONTEXT)
