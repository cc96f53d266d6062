"""``generate()`` gives the same tokens with the experts in a runtime as without one, in every way of decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import moe_runtime.integrations.transformers as moe_hf
from fakes import zoo
from moe_runtime.launch.runtime import serve

#: A layout of checkpoints each: per expert, fused with biases, per expert beside a shared expert, per expert.
_FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe")
#: Long enough that tokens that differ once would lead elsewhere.
_NEW_TOKENS = {"max_new_tokens": 12, "min_new_tokens": 12}
_WAYS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "static-cache": {"do_sample": False, "cache_implementation": "static"},
}


@dataclass(frozen=True)
class Pair:
    """The same model twice."""

    whole: PreTrainedModel
    distributed: PreTrainedModel


@pytest.fixture(scope="module", params=_FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A family's model in one process, and the same with its experts in a runtime."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    zoo.save(request.param, folder, dtype=torch.float32)
    with serve(moe_hf.config(folder, experts_per_actor=2, name=request.param), ray=False) as runtime:
        yield Pair(whole=zoo.reference(request.param, folder), distributed=moe_hf.load(folder, runtime=runtime))


def _prompts(lengths: list[int]) -> dict[str, Tensor]:
    """Prompts of different lengths as a batch, padded on the left."""
    token_ids = torch.randint(3, 100, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    return {"input_ids": token_ids * mask, "attention_mask": mask}


def _generated(model: PreTrainedModel, prompts: Mapping[str, Tensor], way: str) -> Tensor:
    torch.manual_seed(5)
    found = model.generate(**prompts, **_NEW_TOKENS, **_WAYS[way])
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("lengths", [[7], [7, 3, 5]], ids=["one-prompt", "left-padded-batch"])
@pytest.mark.parametrize("way", _WAYS)
def test_generate_gives_the_same_tokens(pair: Pair, way: str, lengths: list[int]) -> None:
    prompts = _prompts(lengths)
    expected = _generated(pair.whole, prompts, way)
    assert expected.shape == (len(lengths), 19)
    assert torch.equal(_generated(pair.distributed, prompts, way), expected)


def test_the_scores_of_every_step_are_the_same(pair: Pair) -> None:
    options: dict[str, Any] = {
        **_NEW_TOKENS,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    expected = pair.whole.generate(**_prompts([7, 4]), **options)
    found = pair.distributed.generate(**_prompts([7, 4]), **options)
    assert all(torch.equal(one, other) for one, other in zip(found.scores, expected.scores, strict=True))


def test_another_seed_samples_other_tokens(pair: Pair) -> None:
    torch.manual_seed(6)
    other = pair.distributed.generate(**_prompts([7]), **_NEW_TOKENS, **_WAYS["sampling"])
    assert not torch.equal(other, _generated(pair.distributed, _prompts([7]), "sampling"))


def test_an_encoder_and_decoder_generate_the_same_tokens(tmp_path: Path) -> None:
    zoo.save("switch_transformers", tmp_path, dtype=torch.float32)
    whole = zoo.reference("switch_transformers", tmp_path)
    with serve(moe_hf.config(tmp_path, name="switch"), ray=False) as runtime:
        distributed = moe_hf.load(tmp_path, runtime=runtime)
        prompts = _prompts([7, 7])
        assert torch.equal(_generated(distributed, prompts, "greedy"), _generated(whole, prompts, "greedy"))
