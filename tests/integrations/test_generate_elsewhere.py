"""What programs do with a model works with its experts elsewhere, or is refused with what to do instead."""

from __future__ import annotations

import copy
import gc
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

import moe_runtime.integrations.transformers as moe_hf
from fakes import zoo
from fakes.prompts import prompt
from moe_runtime.errors import ExpertError, UnavailableError, UnsupportedModelError
from moe_runtime.launch.runtime import serve

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.fixture
def path(tmp_path):
    return zoo.save("mixtral", tmp_path / "mixtral")


@pytest.fixture
def plain(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="grouped_mm")


@pytest.fixture
def model(path, runtime):
    return moe_hf.load(path, runtime=runtime, experts_per_actor=2)


class Words:
    """Stands for a tokenizer: a token is its number."""

    def decode(self, ids, **_options):
        return "".join(f"{int(each)} " for each in ids)


def test_tokens_stream_while_a_thread_generates(model, plain):
    inputs = prompt(rows=1)
    streamer = transformers.TextIteratorStreamer(Words(), skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    found = [int(word) for text in streamer for word in text.split()]
    thread.join()
    assert found == plain.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()


def test_threads_that_generate_at_once_get_their_own_tokens(model, plain):
    lengths = (3, 6, 9)
    prompts = [prompt(rows=1, length=length) for length in lengths]
    together = threading.Barrier(len(prompts))

    def generate(inputs):
        together.wait()
        return model.generate(**inputs, **GREEDY)

    with ThreadPoolExecutor(len(prompts)) as threads:
        found = list(threads.map(generate, prompts))
    for inputs, tokens in zip(prompts, found, strict=True):
        assert torch.equal(tokens, plain.generate(**inputs, **GREEDY))


class Interrupter:
    """A streamer that has the process interrupted at the third token, at a moment of the system's choice."""

    def __init__(self):
        self.num_tokens = 0

    def put(self, _tokens):
        self.num_tokens += 1
        if self.num_tokens == 3:
            main = threading.main_thread().ident
            threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGINT)).start()

    def end(self):
        raise AssertionError("it was interrupted")


def test_an_interrupted_generate_leaves_the_model_usable(model, plain):
    inputs = prompt(rows=1)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **{**GREEDY, "max_new_tokens": 100, "min_new_tokens": 100}, streamer=Interrupter())
        assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))


def test_hidden_states_and_router_logits_are_there(model, plain):
    with torch.no_grad():
        ours, theirs = (
            each(**prompt(), output_hidden_states=True, output_router_logits=True) for each in (model, plain)
        )
    for name in ("hidden_states", "router_logits"):
        assert all(torch.equal(*pair) for pair in zip(ours[name], theirs[name], strict=True))


def test_a_forward_that_nobody_differentiates_needs_no_no_grad(model, plain):
    assert torch.equal(model(**prompt()).logits, plain(**prompt()).logits.detach())


def test_training_through_experts_elsewhere_is_refused(model):
    model.requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match="training through experts in actors comes later"):
        model(**prompt())
    with torch.no_grad():
        model(**prompt())


@pytest.mark.parametrize("name", ["save_pretrained", "push_to_hub"])
def test_saving_a_model_without_its_experts_is_refused(model, path, tmp_path, name):
    for each in (model, model.model):
        with pytest.raises(UnsupportedModelError, match=f"the model's experts live in actors, .* copy {path}"):
            getattr(each, name)(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_experts_implementations_are_refused(model):
    with pytest.raises(UnsupportedModelError, match=r"expected 'moe_runtime', since .* found another .*: 'grouped_mm'"):
        model.set_experts_implementation("grouped_mm")
    assert model.get_experts_implementation() == {"": "moe_runtime"}
    model.set_experts_implementation(model.get_experts_implementation())


def test_pickling_is_refused(model, tmp_path):
    for each in (model, model.model):
        with pytest.raises(UnsupportedModelError, match="cannot be pickled"):
            pickle.dumps(each)
    with pytest.raises(UnsupportedModelError, match="cannot be pickled"):
        torch.save(model, tmp_path / "model.pt")


def test_a_copy_shares_the_experts_and_outlives_the_model(path, plain, runtime):
    model = moe_hf.load(path, runtime=runtime)
    other = copy.deepcopy(model)
    del model
    gc.collect()
    assert torch.equal(other.generate(**prompt(), **GREEDY), plain.generate(**prompt(), **GREEDY))
    with pytest.raises(UnsupportedModelError, match="cannot be pickled"):
        pickle.dumps(other)


def test_a_model_that_is_forgotten_gives_its_place_in_the_runtime_back(path, runtime):
    model = moe_hf.load(path, runtime=runtime)
    caller = model.__dict__["moe_runtime_experts"].caller
    del model
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "moe-runtime-give-back":
            thread.join()
    with pytest.raises(UnavailableError, match="closed"):
        caller.rows("model.layers.0.mlp.experts", torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.timeout(240)
def test_a_compiled_model_calls_its_experts(model, plain):
    # Eager: what is compiled is not of interest, what breaks is.
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**prompt()).logits, plain(**prompt()).logits)


def test_a_model_whose_runtime_has_ended_says_so(path):
    with serve({"name": "short", "router": {"replicas": 0}, "layers": {}}, ray=False) as short:
        model = moe_hf.load(path, runtime=short)
    with pytest.raises(UnavailableError, match="short"):
        model(**prompt())


def test_infinities_are_those_of_the_model_in_one_process(model, plain):
    embeddings = torch.zeros(1, 4, 32)
    embeddings[0, 2] = float("inf")
    with torch.no_grad():
        ours, theirs = (each(inputs_embeds=embeddings).logits for each in (model, plain))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])


def overflowing(folder):
    """A checkpoint with a layer whose experts answer finite tokens with infinities."""
    model = zoo.built("mixtral").to(torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(60000.0)
    model.save_pretrained(folder)
    return folder


def test_an_expert_that_fails_for_good_is_an_error_that_names_it(tmp_path, runtime):
    model = moe_hf.load(overflowing(tmp_path / "model"), runtime=runtime)
    expected = r"layer model\.layers\.1\.mlp\.experts: expert expert-\d: .*finite.*; it was asked twice"
    with pytest.raises(ExpertError, match=expected):
        model.generate(**prompt(), **GREEDY)


def test_an_expert_that_fails_is_dropped_where_that_is_wanted(tmp_path, runtime, caplog):
    model = moe_hf.load(overflowing(tmp_path / "model"), runtime=runtime, on_failure="drop")
    with torch.no_grad():
        assert model(**prompt()).logits.isfinite().all()
    assert moe_hf.experts(model).num_dropped > 0
    assert "model.layers.1.mlp.experts" in caplog.text
