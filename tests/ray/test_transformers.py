"""A Hugging Face model's experts in actors of a cluster: the tokens stay what they are, whoever is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import moe_runtime.integrations.transformers as moe_hf
from fakes import zoo
from fakes.alone import _one_thread, _quiet_transformers  # noqa: F401  fixtures
from fakes.prompts import prompt
from moe_runtime.errors import AlreadyRunningError
from moe_runtime.launch.runtime import serve
from moe_runtime.launch.served import Runtime

# An actor imports transformers before it serves.
pytestmark = pytest.mark.timeout(300)
GREEDY = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("mixtral", tmp_path_factory.mktemp("checkpoints") / "mixtral")


@pytest.fixture(scope="module")
def plain(path: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="grouped_mm")


@pytest.fixture(scope="module")
def model(cluster: str, path: Path) -> Iterator[transformers.PreTrainedModel]:
    """In a runtime of its own."""
    model = moe_hf.load(path, experts_per_actor=2, name="mixtral", start_timeout_s=240.0)
    yield model
    moe_hf.close(model)


@pytest.fixture(scope="module")
def empty(cluster: str) -> Iterator[Runtime]:
    """A runtime on the cluster that models are added to."""
    with serve({"name": "empty", "start_timeout_s": 240.0, "router": {"replicas": 0}, "layers": {}}) as runtime:
        yield runtime


def pids(model):
    return {actor.pid for layer in moe_hf.experts(model).layers for each in layer.experts for actor in each.actors}


class Killer:
    """A streamer that kills a process at the given token."""

    def __init__(self, pid, *, at_token):
        self.pid = pid
        self.left = at_token

    def put(self, _tokens):
        self.left -= 1
        if self.left == 0:
            os.kill(self.pid, signal.SIGKILL)

    def end(self):
        assert self.left <= 0


def test_a_model_in_a_runtime_of_its_own_generates_the_tokens_of_one_process(model, plain, actor_names):
    assert len(pids(model)) == 2
    with torch.no_grad():
        assert torch.equal(model(**prompt()).logits, plain(**prompt()).logits)
    assert torch.equal(model.generate(**prompt(), **GREEDY), plain.generate(**prompt(), **GREEDY))
    assert actor_names("mixtral")


def test_an_actor_that_is_killed_while_tokens_are_generated_costs_none(model, plain):
    inputs = prompt(rows=1)
    killed = min(pids(model))
    before = moe_hf.experts(model)
    tokens = model.generate(**inputs, **GREEDY, streamer=Killer(killed, at_token=8))
    assert torch.equal(tokens, plain.generate(**inputs, **GREEDY))
    after = moe_hf.experts(model)
    assert after.num_retried > before.num_retried
    assert after.num_dropped == before.num_dropped == 0
    assert killed not in pids(model)


def test_a_second_model_of_the_same_name_is_refused(model, path):
    with pytest.raises(AlreadyRunningError, match="mixtral"):
        moe_hf.load(path, name="mixtral")


def test_a_model_that_is_closed_leaves_no_actor(cluster, path, actor_names, eventually):
    with pytest.raises(ZeroDivisionError):
        closed_after_error(path)
    eventually(lambda: not actor_names("short-lived"))


def closed_after_error(path):
    model = moe_hf.load(path, experts_per_actor=4, name="short-lived", start_timeout_s=240.0)
    try:
        model.generate(**prompt(), max_new_tokens=1 // 0)
    finally:
        moe_hf.close(model)


def test_from_pretrained_puts_experts_into_a_runtime_that_runs(empty, path, plain):
    with moe_hf.use(empty, experts_per_actor=4):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_runtime")
    assert len(pids(model)) == 1
    assert torch.equal(model.generate(**prompt(), **GREEDY), plain.generate(**prompt(), **GREEDY))
    moe_hf.close(model)


def test_an_adopted_model_outlives_an_actor(empty, plain, state_folder):
    model = transformers.AutoModelForCausalLM.from_config(plain.config)
    model.load_state_dict(plain.state_dict())
    moe_hf.adopt(model, empty, experts_per_actor=4, name="adopted")
    inputs = prompt(rows=1)
    (killed,) = pids(model)
    tokens = model.generate(**inputs, **GREEDY, streamer=Killer(killed, at_token=4))
    assert torch.equal(tokens, plain.generate(**inputs, **GREEDY))
    adopted = {layer.layer for layer in moe_hf.experts(model).layers}
    others = empty.config.layers.keys() - adopted
    moe_hf.close(model)
    assert empty.config.layers.keys() == others
    assert {host["host_id"] for host in empty.describe()["hosts"]}.isdisjoint({"group:adopted.experts/0/0"})
    assert not list((state_folder / "adopted").iterdir())
