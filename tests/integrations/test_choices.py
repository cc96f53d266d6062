"""What callers choose for a model's experts is checked before anything is loaded or started."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import transformers

import moe_runtime.integrations.transformers as moe_hf
from fakes import zoo
from moe_runtime.errors import ConfigError
from moe_runtime.experts.checkpoints.checkpoint import open_checkpoint
from moe_runtime.integrations.transformers.layers import Source
from moe_runtime.integrations.transformers.placement import Placement
from moe_runtime.integrations.transformers.providing import GivenRuntime

_NAME = "expected a name: a letter or digit, then at most 62 letters, digits and _ . -"
_MISTAKES = {
    "no-experts-per-actor": ({"experts_per_actor": 0}, "experts_per_actor: expected at least 1, found 0"),
    "text-as-number": ({"experts_per_actor": "2"}, "experts_per_actor: expected a whole number, found '2'"),
    "truth-as-number": ({"experts_per_actor": True}, "experts_per_actor: expected a whole number, found True"),
    "no-replicas": ({"replicas": 0}, "replicas: expected at least 1, found 0"),
    "truth-as-replicas": ({"replicas": True}, "replicas: expected a whole number, found True"),
    "unknown-resource": ({"resources": {"cpus": -1}}, "resources.cpus: unknown key; did you mean num_cpus?"),
    "bad-resource": ({"resources": {"num_cpus": -1}}, "resources.num_cpus: expected at least 0.0, found -1"),
    "no-resources": ({"resources": 7}, "resources: expected a mapping, found 7"),
    "text-as-truth": ({"exact": "yes"}, "exact: expected true or false, found 'yes'"),
    "number-as-name": ({"name": 5}, "name: expected a text, found 5"),
    "path-as-name": ({"name": "a b/../c"}, f"name: {_NAME}, found 'a b/../c'"),
}
_FAILURE = ({"on_failure": "explode"}, "on_failure: expected wait or drop, found 'explode'")
_DTYPES = "expected auto or one of float32, float64, float16, bfloat16"
_DTYPE_MISTAKES = {
    "no-dtype": ({"dtype": "foo"}, f"dtype: {_DTYPES}, found 'foo'"),
    "no-float": ({"dtype": "int8"}, f"dtype: {_DTYPES}, found 'int8'"),
    "no-float-of-torch": ({"dtype": torch.int8}, f"dtype: {_DTYPES}, found torch.int8"),
    "number-as-dtype": ({"dtype": 5}, f"dtype: {_DTYPES}, found 5"),
}
_START_MISTAKES = {
    "past-timeout": ({"start_timeout_s": -1}, "start_timeout_s: expected more than 0.0, found -1"),
    "truth-as-timeout": ({"start_timeout_s": True}, "start_timeout_s: expected a number, found True"),
    "no-runtime": ({"runtime": "experts"}, "runtime: expected what moe_runtime.serve returns, found 'experts'"),
}


def cases(*mistakes):
    every = {name: case for group in mistakes for name, case in group.items()}
    return pytest.mark.parametrize(("choice", "said"), every.values(), ids=every)


@cases(_MISTAKES, _DTYPE_MISTAKES, _START_MISTAKES, {"on-failure": _FAILURE})
def test_load_says_what_is_wrong_before_it_looks_at_the_checkpoint(choice, said, tmp_path):
    with pytest.raises(ConfigError) as caught:
        moe_hf.load(tmp_path / "none", **choice)
    assert str(caught.value) == said


@cases(_MISTAKES, _DTYPE_MISTAKES)
def test_config_says_what_is_wrong_before_it_looks_at_the_checkpoint(choice, said, tmp_path):
    with pytest.raises(ConfigError) as caught:
        moe_hf.config(tmp_path / "none", **choice)
    assert str(caught.value) == said


@cases(_MISTAKES, {"on-failure": _FAILURE})
def test_use_says_what_is_wrong_where_it_is_entered(choice, said, runtime):
    with pytest.raises(ConfigError) as caught, moe_hf.use(runtime, **choice):
        pass
    assert str(caught.value) == said


def test_use_of_what_is_no_runtime_is_refused_where_it_is_entered():
    with pytest.raises(ConfigError, match=r"runtime: expected what moe_runtime\.serve returns"), moe_hf.use("experts"):
        pass


@cases(_MISTAKES, {"on-failure": _FAILURE})
def test_adopt_says_what_is_wrong_and_writes_nothing(choice, said, runtime, state_folder):
    with pytest.raises(ConfigError) as caught:
        moe_hf.adopt(zoo.built("mixtral"), runtime, **choice)
    assert str(caught.value) == said
    assert not state_folder.exists()


def test_a_choice_is_wrong_too_where_the_runtime_has_the_layers_already(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    moe_hf.load(path, runtime=runtime)
    with pytest.raises(ConfigError, match="replicas: expected at least 1, found 0"):
        moe_hf.load(path, runtime=runtime, replicas=0)


def test_a_dtype_that_experts_do_not_have_is_refused_where_a_runtime_is_used(tmp_path, runtime):
    path = zoo.save("mixtral", tmp_path / "mixtral")
    with moe_hf.use(runtime), pytest.raises(ConfigError, match=r"dtype: .*found torch\.int8"):
        transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_runtime", dtype=torch.int8)


def test_every_mistake_is_a_line():
    with pytest.raises(ConfigError) as caught:
        Placement(replicas=0, resources={"cpus": 1, "num_gpus": -1})
    assert str(caught.value).splitlines() == [
        "replicas: expected at least 1, found 0",
        "resources.num_gpus: expected at least 0.0, found -1",
        "resources.cpus: unknown key; did you mean num_cpus?",
    ]


def test_what_is_wrong_with_every_layer_alike_is_said_once(tmp_path, runtime):
    source = Source(open_checkpoint(zoo.save("mixtral", tmp_path / "mixtral")))
    dtypes = dict.fromkeys((layer.module for layer in source.checkpoint.layers), torch.int8)
    with pytest.raises(ConfigError) as caught, ExitStack() as stack:
        GivenRuntime(runtime).provide(source, Placement(), dtypes=dtypes, stack=stack)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("layers.model.layers.0.mlp.experts.dtype: expected float32, float64, float16 or bfloat16")
    assert line.endswith("found 'int8' (and 1 more like it)")
