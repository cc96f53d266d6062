"""Whether the mixture says what the dense model says that it was made of: the same greedy tokens, one for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moe_runtime.demos.chat.answering import generate_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Continued as it stands; the model's answer to it is Paris.
CHECK_PROMPT = "The capital of France is"
NUM_CHECKED = 24


@dataclass(frozen=True)
class Comparison:
    """The two continuations of one prompt.

    Attributes:
        prompt: What was continued.
        token_ids: By the model with its experts in actors.
        dense_ids: By the dense model.
        text: Of ``token_ids``.
        dense_text: Of ``dense_ids``.
    """

    prompt: str
    token_ids: tuple[int, ...]
    dense_ids: tuple[int, ...]
    text: str
    dense_text: str

    @property
    def equal(self) -> bool:
        """Whether they are the same."""
        return self.token_ids == self.dense_ids

    @property
    def num_equal(self) -> int:
        """Tokens before the first that differs."""
        pairs = zip(self.token_ids, self.dense_ids, strict=False)
        same = [mine == dense for mine, dense in pairs]
        return same.index(False) if False in same else len(same)


def compare(token_ids: tuple[int, ...], dense_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> Comparison:
    """Both continuations of ``CHECK_PROMPT``, with their texts."""
    text, dense_text = (str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in (token_ids, dense_ids))
    return Comparison(CHECK_PROMPT, token_ids, dense_ids, text.strip(), dense_text.strip())


def greedy_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens with which a model continues ``CHECK_PROMPT``, at most ``NUM_CHECKED``."""
    ids = tokenizer(CHECK_PROMPT, return_tensors="pt")["input_ids"]
    options = generate_options(tokenizer, max_new_tokens=NUM_CHECKED, temperature=0.0)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]  # a mixin's
    return tuple(found[0, ids.shape[1] :].tolist())
