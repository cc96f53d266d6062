"""A model with its experts in a runtime is the model that it is without."""

from __future__ import annotations

import pytest
import torch
import transformers
import yaml

import moe_runtime.integrations.transformers as moe_hf
from fakes import zoo
from fakes.changed_checkpoints import quantise_to_fp8, quantise_to_mxfp4
from fakes.prompts import prompt
from moe_runtime.errors import ConfigError, UnsupportedModelError, WeightsError
from moe_runtime.experts.checkpoints.internals import dequantizing_anywhere
from moe_runtime.launch.runtime import serve


def plain(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="grouped_mm", **options)


def same_logits(one, other, **inputs):
    with torch.no_grad():
        return torch.equal(one(**inputs).logits, other(**inputs).logits)


def train_experts(path):
    """Write other weights of the same shapes into a checkpoint."""
    model = plain(path)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data.neg_()
    model.save_pretrained(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_logits_are_bit_equal_to_those_of_the_model_in_one_process(name, dtype, tmp_path, runtime):
    path = zoo.save(name, tmp_path / name, dtype=dtype)
    model = moe_hf.load(path, runtime=runtime, experts_per_actor=2)
    assert model.dtype == dtype
    assert same_logits(model, plain(path), **prompt())


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "sampled", "beams", "static-cache"],
)
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_generate_gives_the_tokens_of_the_model_in_one_process(name, how, tmp_path, runtime):
    path = zoo.save(name, tmp_path / name)
    found = []
    for model in (plain(path), moe_hf.load(path, runtime=runtime)):
        torch.manual_seed(11)
        found.append(model.generate(**prompt(), max_new_tokens=8, min_new_tokens=8, **how))
    assert torch.equal(*found)


def test_experts_of_another_dtype_than_the_checkpoint_s_are_those_of_the_model_in_that_dtype(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral", dtype=torch.bfloat16)
    model = moe_hf.load(path, runtime=runtime, dtype="float32")
    assert same_logits(model, plain(path, dtype=torch.float32), **prompt())


def test_without_exact_the_logits_are_near(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    model = moe_hf.load(path, runtime=runtime, exact=False)
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt()).logits, plain(path)(**prompt()).logits)


def test_a_model_with_an_encoder_and_a_decoder_is_loaded_as_what_it_is(tmp_path, runtime):
    zoo.built("switch_transformers").save_pretrained(tmp_path / "switch")
    model = moe_hf.load(tmp_path / "switch", runtime=runtime)
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "switch")
    assert type(model) is type(reference)
    inputs = prompt() | {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 8]])}
    with torch.no_grad():
        # Its own experts are a loop of linear layers: near, not equal.
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits)


def test_another_class_of_the_same_checkpoint_finds_its_experts(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    model = moe_hf.load(path, runtime=runtime, auto_class=transformers.AutoModel)
    reference = transformers.AutoModel.from_pretrained(path, experts_implementation="grouped_mm")
    with torch.no_grad():
        assert torch.equal(model(**prompt()).last_hidden_state, reference(**prompt()).last_hidden_state)


def test_the_rest_of_the_model_is_frozen_and_has_no_expert(tmp_path, runtime):
    model = moe_hf.load(zoo.save("mixtral", tmp_path / "mixtral"), runtime=runtime)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any("experts" in name for name in model.state_dict())
    assert not model.training


def test_loading_says_nothing_of_experts_that_it_leaves_out(tmp_path, runtime, caplog, monkeypatch):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    _, about = moe_hf_load_with_info(path, runtime)
    assert about["unexpected_keys"] == set() == about["missing_keys"]
    assert "experts" not in caplog.text
    assert not transformers.MixtralForCausalLM._keys_to_ignore_on_load_unexpected


def moe_hf_load_with_info(path, runtime):
    with moe_hf.use(runtime):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, experts_implementation="moe_runtime", output_loading_info=True
        )


def test_an_actor_has_its_experts_of_every_layer(tmp_path, runtime):
    model = moe_hf.load(zoo.save("mixtral", tmp_path / "mixtral"), runtime=runtime, experts_per_actor=2)
    hosted = sorted(sorted(host["replicas"]) for host in runtime.describe()["hosts"])
    layers = [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert hosted == [
        [f"{layer}/expert-{expert}/0" for layer in layers for expert in experts] for experts in ((0, 1), (2, 3))
    ]
    moe_hf.close(model)


def test_what_experts_did_can_be_seen(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    model = moe_hf.load(path, runtime=runtime)
    tokens = prompt()
    with torch.no_grad():
        model(**tokens)
    seen = moe_hf.experts(model)
    assert [layer.module for layer in seen.layers] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for layer in seen.layers:
        assert [each.expert for each in layer.experts] == [0, 1, 2, 3]
        assert sum(each.num_assignments for each in layer.experts) == 2 * tokens["input_ids"].numel()
        assert all(actor.state == "ready" for each in layer.experts for actor in each.actors)
    assert seen.num_dropped == seen.num_retried == 0


def test_a_configuration_written_as_yaml_serves_the_model_that_is_loaded_from_it(tmp_path):
    path = zoo.save("qwen3_moe", tmp_path / "qwen3_moe")
    written = tmp_path / "served.yaml"
    configuration = moe_hf.config(path, experts_per_actor=4, name="qwen")
    configuration["layers"]["model.layers.0.mlp.experts"]["timeout_ms"] = 5000.0
    written.write_text(yaml.safe_dump(configuration))
    with serve(written, ray=False) as runtime:
        model = moe_hf.load(path, runtime=runtime)
        assert list(runtime.config.layers) == list(configuration["layers"])
        assert same_logits(model, plain(path), **prompt())


def test_a_model_is_served_by_the_layers_of_the_same_checkpoint_that_are_there(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    moe_hf.load(path, runtime=runtime)
    moe_hf.load(path, runtime=runtime)
    assert list(runtime.config.layers) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_a_checkpoint_that_was_written_anew_is_another_model(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    moe_hf.load(path, runtime=runtime)
    train_experts(path)
    model = moe_hf.load(path, runtime=runtime)
    assert [name.partition(".")[0] for name in runtime.config.layers] == ["model", "model", "mixtral", "mixtral"]
    assert same_logits(model, plain(path), **prompt())


def test_layers_of_another_dtype_or_less_exact_ones_are_not_those_of_the_model(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    moe_hf.load(path, runtime=runtime, exact=False)
    for how, num_layers in (({}, 4), ({"dtype": "bfloat16"}, 6), ({"exact": False}, 6)):
        model = moe_hf.load(path, runtime=runtime, **how)
        assert len(runtime.config.layers) == num_layers
        if how != {"exact": False}:
            assert same_logits(model, plain(path, dtype=how.get("dtype", "float32")), **prompt())


def test_layers_that_were_configured_for_other_files_do_not_start(tmp_path):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    configuration = moe_hf.config(path)
    train_experts(path)
    with pytest.raises(WeightsError, match="they have changed since the layer was configured"):
        serve(configuration, ray=False)


def test_models_of_one_runtime_have_layers_of_different_names(tmp_path, runtime):
    paths = [
        zoo.save("mixtral", tmp_path / "mixtral"),
        zoo.save("gpt_oss", tmp_path / "gpt_oss"),
        zoo.save("mixtral", tmp_path / "other" / "mixtral"),
    ]
    models = [
        moe_hf.load(path, runtime=runtime, name=name) for path, name in zip(paths, (None, None, "third"), strict=True)
    ]
    assert list(runtime.config.layers) == [
        *(f"model.layers.{i}.mlp.experts" for i in (0, 1)),
        *(f"gpt_oss.model.layers.{i}.mlp.experts" for i in (0, 1)),
        *(f"third.model.layers.{i}.mlp.experts" for i in (0, 1)),
    ]
    for path, model in zip(paths, models, strict=True):
        assert same_logits(model, plain(path), **prompt())
    with pytest.raises(ConfigError, match="name: expected one under which the runtime has no layers, found 'third'"):
        moe_hf.load(zoo.save("mixtral", tmp_path / "more" / "mixtral"), runtime=runtime, name="third")


def test_a_model_without_experts_is_refused(tmp_path, runtime):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: expected a model with experts"):
        moe_hf.load(tmp_path, runtime=runtime)


def test_a_name_on_the_hub_is_refused_with_what_to_do(runtime):
    with pytest.raises(WeightsError, match=r"found 'some/model'; huggingface_hub.snapshot_download"):
        moe_hf.load("some/model", runtime=runtime)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, runtime):
    with pytest.raises(WeightsError, match=r"config\.json"):
        moe_hf.load(tmp_path, runtime=runtime)


def test_a_device_that_is_not_there_is_refused(tmp_path, runtime):
    with pytest.raises(ConfigError, match="device: expected auto or a device of torch, found 'gpu'"):
        moe_hf.load(zoo.save("mixtral", tmp_path / "mixtral"), runtime=runtime, device="gpu")


def test_an_option_that_experts_elsewhere_cannot_follow_is_refused(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    with pytest.raises(UnsupportedModelError, match="expected no key_mapping"):
        moe_hf.load(path, runtime=runtime, options={"key_mapping": {"a": "b"}})


def test_an_expert_whose_tensors_are_missing_is_an_error_that_names_them_and_leaves_nothing(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    (path / "model.safetensors").unlink()
    with pytest.raises((WeightsError, OSError), match=r"model\.safetensors"):
        moe_hf.load(path, runtime=runtime)
    assert not runtime.config.layers


def test_a_model_that_was_closed_says_so(tmp_path, runtime):
    model = moe_hf.load(zoo.save("mixtral", tmp_path / "mixtral"), runtime=runtime)
    moe_hf.close(model)
    moe_hf.close(model)
    with pytest.raises(Exception, match="the model's experts were closed: load it again"):
        model(**prompt())


def test_a_model_with_its_own_experts_has_none_to_close(tmp_path):
    with pytest.raises(UnsupportedModelError, match="found MixtralForCausalLM with its own"):
        moe_hf.close(zoo.built("mixtral"))


def test_a_model_of_fp8_is_the_one_that_transformers_dequantises(tmp_path, runtime):
    path = zoo.save("deepseek_v3", tmp_path / "model", dtype=torch.bfloat16)
    quantise_to_fp8(path)
    # transformers alone reads them where accelerate is installed only.
    with dequantizing_anywhere():
        reference = plain(path, quantization_config=transformers.FineGrainedFP8Config(dequantize=True))
    model = moe_hf.load(path, runtime=runtime)
    assert model.dtype == torch.bfloat16
    assert same_logits(model, reference, input_ids=torch.arange(3, 12)[None])


def test_a_model_of_mxfp4_is_the_one_that_transformers_dequantises(tmp_path, runtime):
    path = zoo.save("gpt_oss", tmp_path / "model", dtype=torch.bfloat16)
    quantise_to_mxfp4(path)
    reference = plain(path, quantization_config=transformers.Mxfp4Config(dequantize=True))
    with moe_hf.use(runtime):
        model = transformers.GptOssForCausalLM.from_pretrained(path, experts_implementation="moe_runtime")
    assert same_logits(model, reference, input_ids=torch.arange(3, 12)[None])
