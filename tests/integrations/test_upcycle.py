from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from integrations import dense_models
from moe_runtime.errors import ConfigError, UnsupportedModelError, WeightsError
from moe_runtime.integrations.transformers.upcycling import Upcycling, load_dense, upcycle

EQUAL = 1e-5
Make = Callable[..., PreTrainedModel]


def upcycled(model: PreTrainedModel, tmp_path: Path, options: Upcycling | None = None) -> PreTrainedModel:
    dense = dense_models.save(model, tmp_path / "dense")
    return dense_models.load(upcycle(dense, tmp_path / "moe", options))


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    return dense_models.save(dense_models.llama(), tmp_path / "dense")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        dense_models.llama,
        dense_models.llama3,
        dense_models.mistral,
        dense_models.qwen2,
        dense_models.qwen2_with_windows,
    ],
)
def test_the_mixture_computes_what_the_dense_model_does(make: Make, tied: bool, shared: bool, tmp_path: Path) -> None:
    dense = make(tie_word_embeddings=tied)
    mixture = upcycled(dense, tmp_path, Upcycling(experts=4, top_k=2, shared=shared))
    assert dense_models.difference(mixture, dense) < EQUAL
    expected = "qwen2_moe" if shared or dense.config.model_type == "qwen2" else "mixtral"
    assert mixture.config.model_type == expected
    assert mixture.config.tie_word_embeddings == tied


@pytest.mark.parametrize("options", [Upcycling(experts=1, top_k=1), Upcycling(experts=5, top_k=5, gate_init="zeros")])
def test_any_number_of_equal_experts_is_the_dense_layer(options: Upcycling, tmp_path: Path) -> None:
    dense = dense_models.llama()
    assert dense_models.difference(upcycled(dense, tmp_path, options), dense) < EQUAL


def test_the_mixture_generates_the_dense_models_tokens(tmp_path: Path) -> None:
    dense = dense_models.mistral()
    prompt = torch.tensor([[1, 5, 9, 13]])
    mixture = upcycled(dense, tmp_path)
    expected = dense.generate(prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(mixture.generate(prompt, max_new_tokens=20, do_sample=False), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_noise_makes_every_copy_another_and_only_the_copies(shared: bool, tmp_path: Path) -> None:
    dense = dense_models.llama()
    mixture = upcycled(dense, tmp_path, Upcycling(noise=0.1, shared=shared))
    assert 1e-3 < dense_models.difference(mixture, dense) < 1
    scale = 0.5 if shared else 1.0
    for found, layer in zip(mixture.model.layers, dense.model.layers, strict=True):
        expected = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        noise = (found.mlp.experts.gate_up_proj - expected) / expected.std()
        assert noise.std().item() == pytest.approx(0.1, rel=0.05)
        down_noise = (
            found.mlp.experts.down_proj / scale - layer.mlp.down_proj.weight
        ) / layer.mlp.down_proj.weight.std()
        assert down_noise.std().item() == pytest.approx(0.1, rel=0.05)
        assert len({tuple(copy.flatten().tolist()) for copy in noise}) == 4
        assert torch.equal(found.self_attn.q_proj.weight, layer.self_attn.q_proj.weight)
        if shared:
            assert torch.equal(found.mlp.shared_expert.gate_proj.weight, layer.mlp.gate_proj.weight)


def test_gates_and_noise_come_from_the_seed(llama_folder: Path, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> dict[str, torch.Tensor]:
        return load_file(upcycle(llama_folder, tmp_path / name, Upcycling(noise=0.1, seed=seed)) / "model.safetensors")

    first, again, other = made("first", 3), made("again", 3), made("other", 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing == {name for name in first if "block_sparse_moe" in name}


def test_gates_have_the_standard_deviation_that_was_asked_for_or_are_zeros(llama_folder: Path, tmp_path: Path) -> None:
    drawn = load_file(upcycle(llama_folder, tmp_path / "a", Upcycling(experts=64, gate_std=0.3)) / "model.safetensors")
    zeros = load_file(upcycle(llama_folder, tmp_path / "b", Upcycling(gate_init="zeros")) / "model.safetensors")
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert drawn[gate].shape == (64, 32)
    assert drawn[gate].std().item() == pytest.approx(0.3, rel=0.1)
    assert not torch.equal(drawn[gate], drawn["model.layers.2.block_sparse_moe.gate.weight"])
    assert not zeros[gate].any()


def test_checkpoints_in_several_files_are_read_and_written(tmp_path: Path) -> None:
    dense = dense_models.qwen2()
    folder = dense_models.save(dense, tmp_path / "dense", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    moe = upcycle(folder, tmp_path / "moe", Upcycling(max_shard_bytes=60_000))
    sizes = [path.stat().st_size for path in moe.glob("model-*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 60_000 + 8_000  # and a header
    assert dense_models.difference(dense_models.load(moe), dense) < EQUAL


def test_the_files_have_the_dtype_that_was_asked_for_or_the_dense_models(tmp_path: Path) -> None:
    folder = dense_models.save(dense_models.llama().to(torch.bfloat16), tmp_path / "dense")
    for name, expected in (("auto", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        moe = upcycle(folder, tmp_path / name, Upcycling(dtype=name))  # type: ignore[arg-type]  # names of a loop
        assert {tensor.dtype for tensor in load_file(moe / "model.safetensors").values()} == {expected}
        assert json.loads((moe / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


def test_a_dtype_that_mixtures_cannot_have_has_to_be_said(llama_folder: Path, tmp_path: Path) -> None:
    dense_models.change_config(llama_folder, dtype="float64")
    with pytest.raises(ConfigError, match=r"dtype auto: expected float32, bfloat16 or float16, found torch\.float64"):
        upcycle(llama_folder, tmp_path / "moe")
    upcycle(llama_folder, tmp_path / "moe", Upcycling(dtype="float32"))


def test_a_head_that_differs_from_the_embedding_it_should_be_tied_to_stays(tmp_path: Path) -> None:
    folder = dense_models.save(dense_models.llama(tie_word_embeddings=False), tmp_path / "dense")
    dense_models.change_config(folder, tie_word_embeddings=True)
    moe = upcycle(folder, tmp_path / "moe")
    assert not json.loads((moe / "config.json").read_text())["tie_word_embeddings"]
    assert dense_models.difference(dense_models.load(moe), dense_models.llama()) < EQUAL


def test_what_belongs_to_the_model_comes_along_byte_for_byte(llama_folder: Path, tmp_path: Path) -> None:
    companions = {
        "tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"temperature": 0.6}', "LICENSE": "Apache",
    }  # fmt: skip
    for name, text in companions.items():
        (llama_folder / name).write_text(text)
    (llama_folder / "README.md").write_text("the dense model's own")
    moe = upcycle(llama_folder, tmp_path / "moe")
    assert {name: (moe / name).read_text() for name in companions} == companions
    assert not (moe / "README.md").exists()


def test_a_note_says_what_it_was_made_from(llama_folder: Path, tmp_path: Path) -> None:
    note = json.loads((upcycle(llama_folder, tmp_path / "moe", Upcycling(noise=0.01)) / "upcycled.json").read_text())
    assert note["source"] == str(llama_folder)
    assert note["model_type"] == "llama"
    assert note["files"] == {"model.safetensors": (llama_folder / "model.safetensors").stat().st_size}
    assert note["options"]["noise"] == 0.01


def test_progress_rises_to_one(llama_folder: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    upcycle(llama_folder, tmp_path / "moe", on_progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_dense_model_can_be_loaded_for_comparison(llama_folder: Path) -> None:
    assert torch.equal(dense_models.logits(load_dense(llama_folder)), dense_models.logits(dense_models.llama()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dense_models.llama(attention_bias=True), "cannot have attention_bias True"),
        (dense_models.llama(mlp_bias=True), "cannot have mlp_bias True"),
        (dense_models.mistral(layer_types=["chunked_attention"] * 3), "cannot have layer_types chunked_attention"),
        (dense_models.qwen2(is_causal=False), "cannot have is_causal False"),
    ],
)
def test_settings_that_the_mixture_cannot_have_are_refused(
    model: PreTrainedModel, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        upcycle(dense_models.save(model, tmp_path / "dense"), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "expected a dense model of one of Llama, Mistral, Qwen2; found model_type 'gpt2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "found LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "fp8"}}, "found a quantization_config"),
    ],
)
def test_models_of_other_kinds_are_refused(
    changes: dict[str, object], message: str, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        upcycle(dense_models.change_config(llama_folder, **changes), tmp_path / "moe")


def test_a_mixture_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    moe = upcycle(llama_folder, tmp_path / "moe")
    with pytest.raises(UnsupportedModelError, match="found a mixture already: mixtral with num_local_experts 4"):
        upcycle(moe, tmp_path / "again")


def test_a_folder_that_is_there_is_left_alone_unless_forced(llama_folder: Path, tmp_path: Path) -> None:
    moe = upcycle(llama_folder, tmp_path / "moe")
    with pytest.raises(ConfigError, match="expected nothing there, found a folder; --force replaces it"):
        upcycle(llama_folder, moe, Upcycling(experts=2))
    upcycle(llama_folder, moe, Upcycling(experts=2), force=True)
    assert json.loads((moe / "config.json").read_text())["num_local_experts"] == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_force_replaces_only_what_upcycling_made(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for target in (tmp_path / "mine", llama_folder):
        with pytest.raises(ConfigError, match="expected a folder made by upcycling"):
            upcycle(llama_folder, target, force=True)
    assert (llama_folder / "model.safetensors").exists()


def test_a_mixture_is_not_replaced_by_one_of_a_model_inside_of_it(llama_folder: Path, tmp_path: Path) -> None:
    moe = upcycle(llama_folder, tmp_path / "moe")
    inside = shutil.copytree(llama_folder, moe / "dense")
    with pytest.raises(ConfigError, match="expected a folder apart from the dense model"):
        upcycle(inside, moe, force=True)
    assert (inside / "model.safetensors").exists()


def test_an_interrupted_run_leaves_nothing(llama_folder: Path, tmp_path: Path) -> None:
    def interrupt(share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(llama_folder, tmp_path / "moe", on_progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=12_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    # 3 layers of 4 x 3 x 48 x 32 (experts), 3,072 (attention), 128 (gate) and 64; 6,208 and 32 outside; 4 bytes each.
    with pytest.raises(ConfigError, match=r"expected 285\.3 KB free for the checkpoint, found 12.0 KB"):
        upcycle(llama_folder, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_folder_that_cannot_be_made_is_named(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json/moe: cannot be written"):
        upcycle(llama_folder, llama_folder / "config.json" / "moe")


def test_a_missing_tensor_file_or_folder_is_named(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="found nothing there"):
        upcycle(tmp_path / "nowhere", tmp_path / "moe")
    weights = llama_folder / "model.safetensors"
    tensors = load_file(weights)
    removed = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, weights)
    with pytest.raises(WeightsError, match=r"expected a tensor model\.layers\.1\.mlp\.up_proj\.weight \(48, 32\)"):
        upcycle(llama_folder, tmp_path / "moe")
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": removed[:40].clone()}, weights)
    with pytest.raises(WeightsError, match=r"expected shape \(48, 32\) by its config, found \(40, 32\)"):
        upcycle(llama_folder, tmp_path / "moe")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"model\.safetensors: expected a whole safetensors file"):
        upcycle(llama_folder, tmp_path / "moe")
    weights.rename(llama_folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is of a format that is not read"):
        upcycle(llama_folder, tmp_path / "moe")


def test_an_index_that_names_a_tensor_its_file_lacks_is_named(tmp_path: Path) -> None:
    folder = dense_models.save(dense_models.llama(), tmp_path / "dense", max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"]["lm_head.weight"] = text["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(text))
    with pytest.raises(WeightsError, match=r"expected the tensor lm_head\.weight, by model\.safetensors\.index\.json"):
        upcycle(folder, tmp_path / "moe")


def test_tensors_that_the_model_does_not_know_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    weights = llama_folder / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, weights)
    upcycle(llama_folder, tmp_path / "moe")
    save_file(tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, weights)
    with pytest.raises(WeightsError, match=r"found 1 more: model\.layers\.0\.self_attn\.q_norm\.weight"):
        upcycle(llama_folder, tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 2, "top_k": 3}, "top_k: expected 1 to 2, the number of experts; found 3"),
        ({"experts": 0}, "experts: expected 1 or more; found 0"),
        ({"noise": -0.1}, "noise: expected 0 or more, and finite; found -0.1"),
        ({"noise": float("nan")}, "noise: expected 0 or more"),
        ({"gate_std": 0.0}, "gate_std: expected more than 0"),
        ({"gate_init": "ones"}, "gate_init: expected normal or zeros; found ones"),
        ({"dtype": "int8"}, "dtype: expected auto, float32, bfloat16, float16; found int8"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: expected 1 or more; found 0"),
        ({"seed": -1}, "seed: expected 0 to"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Upcycling(**options)  # type: ignore[arg-type]  # wrong on purpose


def test_the_files_are_as_transformers_saves_them(llama_folder: Path, tmp_path: Path) -> None:
    moe = upcycle(llama_folder, tmp_path / "moe", Upcycling(experts=2, top_k=1))
    config = MixtralConfig.from_pretrained(moe)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "reference")

    def shapes(folder: Path) -> dict[str, list[int]]:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping

    assert shapes(moe) == shapes(tmp_path / "reference")
