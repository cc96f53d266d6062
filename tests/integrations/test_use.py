"""``from_pretrained(..., experts_implementation="moe_runtime")`` means the runtime that is used at the moment."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

import moe_runtime.integrations.transformers as moe_hf
from fakes import zoo
from fakes.prompts import prompt
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.launch.runtime import serve

OURS = {"experts_implementation": "moe_runtime"}


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def logits(model):
    with torch.no_grad():
        return model(**prompt()).logits


@pytest.fixture
def path(tmp_path):
    return zoo.save("mixtral", tmp_path / "mixtral")


@pytest.fixture
def plain(path):
    return load(path, experts_implementation="grouped_mm")


def test_inside_the_experts_are_in_the_runtime_and_stay_there(path, plain, runtime):
    with moe_hf.use(runtime, experts_per_actor=4):
        model = load(path, **OURS)
    assert model.config._experts_implementation == "moe_runtime"
    assert len(runtime.describe()["hosts"]) == 1
    assert torch.equal(logits(model), logits(plain))


def test_inside_a_class_of_a_model_works_as_the_automatic_one(path, plain, runtime):
    with moe_hf.use(runtime):
        model = transformers.MixtralForCausalLM.from_pretrained(path, **OURS)
    assert torch.equal(logits(model), logits(plain))


def test_inside_a_model_that_does_not_ask_keeps_its_experts(path, plain, runtime):
    with moe_hf.use(runtime):
        model = load(path, experts_implementation="grouped_mm")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not runtime.config.layers


@pytest.mark.parametrize("model_class", [transformers.AutoModelForCausalLM, transformers.MixtralForCausalLM])
def test_outside_the_name_is_an_error_that_says_what_to_do(path, model_class, runtime):
    with moe_hf.use(runtime):
        pass
    (path / "model.safetensors").unlink()  # nothing of it is read before
    with pytest.raises(
        UnsupportedModelError, match=r"only where a runtime is used, .*MixtralForCausalLM.*use\(runtime"
    ):
        model_class.from_pretrained(path, **OURS)


def test_another_thread_is_outside(path, runtime):
    with moe_hf.use(runtime), ThreadPoolExecutor(1) as thread:
        loading = thread.submit(load, path, **OURS)
    with pytest.raises(UnsupportedModelError, match="in the same thread"):
        loading.result()


def test_an_error_inside_ends_it(path, runtime):
    with pytest.raises(RuntimeError, match="of the caller"), moe_hf.use(runtime):
        raise RuntimeError("of the caller")
    with pytest.raises(UnsupportedModelError):
        load(path, **OURS)


def test_the_innermost_of_several_counts(path, runtime):
    with serve({"name": "inner", "router": {"replicas": 0}, "layers": {}}, ray=False) as inner:
        with moe_hf.use(runtime):
            with moe_hf.use(inner):
                load(path, **OURS)
            assert (len(inner.config.layers), len(runtime.config.layers)) == (2, 0)
            load(path, **OURS)
        assert (len(inner.config.layers), len(runtime.config.layers)) == (2, 2)


def test_threads_that_load_at_once_do_not_meet(path, plain, runtime):
    together = threading.Barrier(3)

    def remote(used):
        with moe_hf.use(used):
            together.wait()
            return load(path, **OURS)

    def own():
        together.wait()
        return load(path, experts_implementation="grouped_mm")

    with serve({"name": "second", "router": {"replicas": 0}, "layers": {}}, ray=False) as second:
        with ThreadPoolExecutor(3) as threads:
            loads = [threads.submit(remote, runtime), threads.submit(remote, second), threads.submit(own)]
            models = [each.result() for each in loads]
        assert all(torch.equal(logits(model), logits(plain)) for model in models)
        assert len(runtime.config.layers) == len(second.config.layers) == 2
        assert models[2].state_dict().keys() == plain.state_dict().keys()


def test_a_model_that_was_given_the_name_without_actors_says_so_when_it_is_called(runtime):
    model = zoo.built("mixtral")
    model.set_experts_implementation("moe_runtime")
    with pytest.raises(UnsupportedModelError, match=r"MixtralExperts: expected experts that live in actors"):
        model(**prompt())
    with moe_hf.use(runtime):
        built = transformers.AutoModelForCausalLM.from_config(model.config, **OURS)
    with pytest.raises(UnsupportedModelError, match=r"adopt\(model, runtime\)"):
        built(**prompt())
