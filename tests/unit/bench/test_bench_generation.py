"""Steps of `generate` are timed one by one, without the prompt's; a prefill is timed as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_runtime.bench.generation import GenerationCase, generated, time_generation

DECODE, PREFILL = GenerationCase("decode", 3), GenerationCase("prefill", 1, 20)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=8000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return MixtralForCausalLM(config).eval()


def test_as_many_steps_are_timed_as_were_asked_for(model: Any):
    times = time_generation(model, DECODE, 7, num_threads=1)
    assert len(times) == 7
    assert min(times) > 0.0


def test_a_turn_of_decoding_has_some_steps_however_few_are_asked_for(model: Any):
    assert len(time_generation(model, DECODE, 1, num_threads=1)) == 4


def test_a_prefill_is_one_time_per_call(model: Any):
    assert len(time_generation(model, PREFILL, 2, num_threads=1)) == 2


def test_every_sequence_gets_its_tokens_though_the_model_would_end_earlier(model: Any):
    tokens = generated(model, DECODE, 5)
    assert tokens.shape == (3, 8 + 5)
    assert torch.equal(tokens[:, :8], DECODE.prompt())


def test_tokens_of_a_call_are_those_of_its_prompts_or_one_for_each_sequence():
    assert (DECODE.num_tokens, PREFILL.num_tokens) == (3, 20)
