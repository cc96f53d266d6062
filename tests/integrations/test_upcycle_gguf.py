from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel

from integrations import dense_models, gguf_models
from moe_runtime.errors import UnsupportedModelError, WeightsError
from moe_runtime.integrations.transformers.upcycling import Upcycling, load_dense, upcycle


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [dense_models.llama, dense_models.qwen2])
def test_the_mixture_of_a_gguf_file_computes_what_its_model_does(
    make: Callable[..., PreTrainedModel], tied: bool, shared: bool, tmp_path: Path
) -> None:
    dense = make(tie_word_embeddings=tied)
    path = gguf_models.save(dense, tmp_path / "dense.gguf")
    mixture = dense_models.load(upcycle(path, tmp_path / "moe", Upcycling(shared=shared)))
    assert dense_models.difference(load_dense(path), dense) == 0
    assert dense_models.difference(mixture, dense) < 1e-5
    assert mixture.config.tie_word_embeddings == tied


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (GGMLQuantizationType.Q8_0, torch.float32),
        (GGMLQuantizationType.F16, torch.float16),
        (GGMLQuantizationType.BF16, torch.bfloat16),
    ],
)
def test_quantised_files_become_float32_and_others_stay_what_they_are(
    stored: GGMLQuantizationType, expected: torch.dtype, tmp_path: Path
) -> None:
    dense = dense_models.llama(intermediate_size=64)
    path = gguf_models.save(dense, tmp_path / "dense.gguf", matrices=stored)
    config = json.loads((upcycle(path, tmp_path / "moe") / "config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")
    mixture = dense_models.load(upcycle(path, tmp_path / "float32", Upcycling(dtype="float32")))
    assert dense_models.difference(mixture, load_dense(path)) < 1e-5
    assert 0 < dense_models.difference(mixture, dense) < 0.1  # what the file's precision costs


def test_the_special_tokens_are_the_files(tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.eos_token_id": 77, "tokenizer.ggml.bos_token_id": 76}
    path = gguf_models.save(dense_models.llama(), tmp_path / "dense.gguf", fields=fields)
    moe = upcycle(path, tmp_path / "moe")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((moe / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == (76, 77)


def test_a_folder_may_stand_for_the_one_gguf_file_in_it(tmp_path: Path) -> None:
    path = gguf_models.save(dense_models.llama(), tmp_path / "dense.gguf")
    upcycle(tmp_path, tmp_path / "moe")
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(WeightsError, match=r"expected one GGUF file, found 2; name one: .*dense\.gguf"):
        upcycle(tmp_path, tmp_path / "again")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"fields": {"llama.expert_count": 8}}, UnsupportedModelError, "found a mixture already: llama with expert_c"),
        (
            {"fields": {"llama.rope.scaling.type": "yarn"}},
            UnsupportedModelError,
            r"rope\.scaling\.type = 'yarn'",
        ),
        ({"fields": {"llama.attention.sliding_window": 9}}, UnsupportedModelError, r"sliding_window = 9"),
        ({"tensors": {"rope_freqs.weight": torch.ones(4)}}, UnsupportedModelError, r"found rope_freqs\.weight"),
        ({"fields": {"split.count": 3}}, WeightsError, "found one of 3 parts"),
    ],
)
def test_what_transformers_would_drop_without_a_word_is_refused(
    more: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = gguf_models.save(dense_models.llama(), tmp_path / "dense.gguf", **more)
    with pytest.raises(error, match=message):
        upcycle(path, tmp_path / "moe")


def test_settings_that_change_nothing_are_no_reason_to_refuse(tmp_path: Path) -> None:
    fields = {"llama.rope.scaling.type": "none", "llama.expert_count": 0}
    upcycle(gguf_models.save(dense_models.llama(), tmp_path / "dense.gguf", fields=fields), tmp_path / "moe")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.95])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = gguf_models.save(dense_models.llama(), tmp_path / "dense.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=r"dense\.gguf"):
        upcycle(path, tmp_path / "moe")


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="expected a checkpoint's folder or a GGUF file, found another file"):
        upcycle(path, tmp_path / "moe")
