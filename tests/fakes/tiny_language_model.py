"""A real language model of transformers with a real tokenizer, too small to say anything sensible."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before transformers is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

CONTEXT = 256
transformers_logging.disable_progress_bar()
#: As ChatML has it, in fewer tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
_SPECIAL = ["<end>", "<system>", "<user>", "<assistant>"]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per character of ASCII, and the chat template's."""
    # As the pre-tokenizer writes a blank and the end of a line.
    alphabet = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": _SPECIAL[1:]})
    fast.chat_template = chat_template
    return fast


def tiny_llama(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> PreTrainedModel:
    """A random dense model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_sizes(tokenizer))).eval()


def tiny_mixture(folder: Path, *, seed: int = 0) -> Path:
    """The folder of a random mixture of 4 experts, 2 of them per token, with its tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = MixtralConfig(**_sizes(tokenizer), num_local_experts=4, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
