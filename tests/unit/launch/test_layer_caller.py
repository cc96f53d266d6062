from __future__ import annotations

import _thread
import copy
import importlib
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_runtime.errors import (
    ConfigError,
    DTypeError,
    ExpertError,
    InvalidRequestError,
    ShapeError,
    UnavailableError,
    UnknownLayerError,
)
from moe_runtime.launch import called_rows
from moe_runtime.launch.library import LayerCaller
from moe_runtime.launch.runtime import serve
from moe_runtime.rpc.client import MoEClient

PLUG_IN = '''
import threading

import torch
from torch import nn

from moe_runtime.config.strict import StrictModel
from moe_runtime.errors import InnerLayerError
from moe_runtime.experts import ExpertContract, ExpertKind

#: Scales of experts that raise, with how often they do; of experts that another layer fails; and whether those that are
#: held may answer.
failing = {}
failed_by_others = set()
opened = threading.Event()
opened.set()
entered = threading.Event()


class Options(StrictModel):
    scale: float


class Scale(nn.Module):
    """Answers its input times a number; raises when the test says so, and waits until the test lets it go on."""

    def __init__(self, shape, options):
        super().__init__()
        self.contract = ExpertContract(shape, shape)
        self.scale = options.scale

    def forward(self, rows):
        entered.set()
        opened.wait()
        if self.scale in failed_by_others:
            raise InnerLayerError("layer inner: no expert answers")
        if failing.get(self.scale, 0) > 0:
            failing[self.scale] -= 1
            raise RuntimeError("the licence server is gone")
        return rows * self.scale


KIND = ExpertKind("scale", Options, Scale)
'''


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """The module of the expert kind ``scale``."""
    (tmp_path / "scale_expert.py").write_text(PLUG_IN)
    info = tmp_path / "scale_expert-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scale-expert\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_runtime.experts]\nscale = scale_expert:KIND\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("scale_expert")
    yield module
    module.failing.clear()
    module.failed_by_others.clear()
    module.opened.set()


def layer(scales=(1.0, 2.0, 3.0), **changes):
    experts = [{"name": f"e{i}", "kind": "scale", "options": {"scale": scale}} for i, scale in enumerate(scales)]
    return {"item_shape": [2], "policy": {"kind": "caller"}, "residual": "none", "experts": experts, **changes}


def config(router=None, **layers):
    return {"name": "library", "device": "cpu", "router": {"replicas": 0, **(router or {})}, "layers": layers}


@pytest.fixture
def runtime(plug_in):
    with serve(config(l=layer(), m=layer((10.0, 20.0))), ray=False) as runtime:
        yield runtime


TOKENS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
EXPERT_IDS = torch.tensor([[2, 0], [0, 1], [1, 2]])
ROWS = torch.tensor([[3.0, 6.0], [1.0, 2.0], [3.0, 4.0], [6.0, 8.0], [10.0, 12.0], [15.0, 18.0]])


def test_rows_come_by_token_then_by_choice(runtime):
    with LayerCaller(runtime) as caller:
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)
        assert torch.equal(caller.rows("m", TOKENS[:1], torch.tensor([[1]])), TOKENS[:1] * 20)
        assert caller.counts() == {"l": [2, 2, 2], "m": [0, 1]}


def test_no_tokens_give_no_rows(runtime):
    with LayerCaller(runtime) as caller:
        assert caller.rows("l", torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2)


def test_rows_may_be_used_by_autograd_and_in_place(runtime):
    with LayerCaller(runtime) as caller:
        rows = caller.rows("l", TOKENS, EXPERT_IDS)
    weights = torch.ones(6, 1, requires_grad=True)
    (rows.mul_(2.0) * weights).sum().backward()
    assert torch.equal(weights.grad, ROWS.sum(1, keepdim=True) * 2)


def test_calls_of_many_threads_are_served_one_after_the_other(runtime):
    with LayerCaller(runtime) as caller, ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(caller.rows, "l", TOKENS * i, EXPERT_IDS) for i in range(40)]
        assert all(torch.equal(call.result(), ROWS * i) for i, call in enumerate(calls))


def test_two_callers_share_a_runtime(runtime):
    with LayerCaller(runtime) as one, LayerCaller(runtime, ["m"]) as other:
        assert torch.equal(one.rows("l", TOKENS, EXPERT_IDS), ROWS)
        assert torch.equal(other.rows("m", TOKENS, torch.zeros(3, 1, dtype=torch.int64)), TOKENS * 10)
        assert list(other.layers) == ["m"]


def test_what_does_not_fit_in_one_batch_is_sent_in_parts(runtime, monkeypatch):
    # A token with two choices has two rows of 8 bytes.
    monkeypatch.setattr(called_rows, "MAX_BATCH_BYTES", 48)
    tokens, expert_ids = TOKENS.repeat(7, 1), EXPERT_IDS.repeat(7, 1)
    with LayerCaller(runtime) as caller:
        assert torch.equal(caller.rows("l", tokens, expert_ids), ROWS.repeat(7, 1))
        assert caller.counts()["l"] == [14, 14, 14]


def test_an_exact_layer_is_never_sent_in_parts(plug_in, monkeypatch):
    monkeypatch.setattr(called_rows, "MAX_BATCH_BYTES", 16)
    with serve(config(l=layer(exact=True)), ray=False) as runtime, LayerCaller(runtime) as caller:
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)
        assert caller._calling.engine.stats.layers["l"].totals.num_batches == 1


def test_what_an_exact_layer_cannot_send_at_once_is_refused(plug_in, monkeypatch):
    monkeypatch.setattr(called_rows, "MAX_ROWS_BYTES", 15)
    with (
        serve(config(l=layer(exact=True, experts_per_actor=3)), ray=False) as runtime,
        LayerCaller(runtime) as caller,
        pytest.raises(InvalidRequestError, match=r"at most 15 bytes of rows for one actor, found 48 for 3 tokens"),
    ):
        caller.rows("l", TOKENS, EXPERT_IDS)


@pytest.mark.parametrize(
    ("tokens", "expert_ids", "error", "message"),
    [
        (TOKENS[:, :1], EXPERT_IDS, ShapeError, r"tokens of shape \(T, 2\), found \(3, 1\)"),
        (TOKENS, EXPERT_IDS[:2], ShapeError, r"expert_ids of shape \(3, k\), found \(2, 2\)"),
        (TOKENS.double(), EXPERT_IDS, DTypeError, r"torch.float32, found torch.float64"),
        (TOKENS, EXPERT_IDS.int(), DTypeError, r"torch.int64, found torch.int32"),
        (TOKENS, EXPERT_IDS + 1, InvalidRequestError, r"experts 0 to 2, found 1 to 3"),
        (TOKENS, EXPERT_IDS - 1, InvalidRequestError, r"experts 0 to 2, found -1 to 1"),
        (TOKENS.to("meta"), EXPERT_IDS, InvalidRequestError, r"on the CPU, found one on meta"),
    ],
)
def test_what_can_never_be_right_is_refused_and_the_caller_goes_on(runtime, tokens, expert_ids, error, message):
    with LayerCaller(runtime) as caller:
        with pytest.raises(error, match=message):
            caller.rows("l", tokens, expert_ids)
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)


def test_a_layer_that_is_not_there_is_named(runtime):
    with LayerCaller(runtime, ["l"]) as caller, pytest.raises(UnknownLayerError, match="expected one of the layers l"):
        caller.rows("m", TOKENS, EXPERT_IDS)
    with pytest.raises(UnknownLayerError, match="expected layers of the runtime, found k"):
        LayerCaller(runtime, ["k", "l"])


def test_an_expert_that_recovers_is_waited_for(runtime, plug_in):
    plug_in.failed_by_others.add(2.0)
    with LayerCaller(runtime, patience_s=30.0) as caller, ThreadPoolExecutor(1) as pool:
        call = pool.submit(caller.rows, "l", TOKENS, EXPERT_IDS)
        while not caller.num_retried:
            assert not call.done()
        plug_in.failed_by_others.clear()
        assert torch.equal(call.result(), ROWS)
        # The two rows of that expert alone were asked for again.
        assert caller.num_retried % 2 == 0
        assert caller.counts()["l"] == [2, 2, 2]


def test_an_expert_that_does_not_recover_is_named_when_patience_ends(runtime, plug_in):
    plug_in.failed_by_others.add(2.0)
    with LayerCaller(runtime, patience_s=0.2) as caller:
        with pytest.raises(ExpertError, match=r"layer l: expert e1: .*no expert answers.*; waited 0.2 s for it"):
            caller.rows("l", TOKENS, EXPERT_IDS)
        plug_in.failed_by_others.clear()
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)


def test_an_expert_that_answers_badly_once_is_asked_again(plug_in):
    with serve(config(l=layer(exact=True)), ray=False) as runtime, LayerCaller(runtime) as caller:
        plug_in.failing[2.0] = 1
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)
        assert caller.num_retried == 2


def test_an_expert_that_raises_each_time_is_asked_twice_and_not_waited_for(plug_in):
    with serve(config(l=layer(exact=True)), ray=False) as runtime, LayerCaller(runtime, patience_s=1e6) as caller:
        plug_in.failing[2.0] = 3
        with pytest.raises(ExpertError, match=r"layer l: expert e1: .*licence server is gone.*; it was asked twice"):
            caller.rows("l", TOKENS, EXPERT_IDS)
        # The one failure that is left does not count with those of the call before.
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)


def test_an_expert_whose_answer_overflows_each_time_is_not_waited_for(plug_in):
    served = layer((1.0, 3e38, 3.0))
    with serve(config(l=served), ray=False) as runtime, LayerCaller(runtime, patience_s=1e6) as caller:
        with pytest.raises(ExpertError, match=r"layer l: expert e1: .*NaN or infinity; it was asked twice"):
            caller.rows("l", torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[1], [1]]))
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS.clamp(max=0)), TOKENS.repeat_interleave(2, 0))


def test_an_expert_that_answers_badly_is_found_beside_one_that_is_waited_for(plug_in):
    with serve(config(l=layer(exact=True)), ray=False) as runtime, LayerCaller(runtime, patience_s=1e6) as caller:
        plug_in.failing[2.0] = 2
        plug_in.failed_by_others.update((1.0, 3.0))
        with pytest.raises(ExpertError, match=r"layer l: expert e1: .*licence server is gone.*; it was asked twice"):
            caller.rows("l", TOKENS, EXPERT_IDS)


def test_rows_of_a_failed_expert_are_zeros_where_they_may_be_dropped(runtime, plug_in, caplog):
    plug_in.failing[2.0] = math.inf
    expected = ROWS.clone()
    expected[3] = expected[4] = 0.0
    with LayerCaller(runtime, on_failure="drop") as caller:
        for _ in range(2):
            assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), expected)
        assert (caller.num_dropped, caller.num_retried) == (4, 0)
        assert caller.counts()["l"] == [4, 0, 4]
    assert [record.levelname for record in caplog.records if "are zeros" in record.message] == ["WARNING"]


def test_an_expert_that_hangs_is_given_up_after_the_layers_timeout(plug_in):
    with serve(config(l=layer(timeout_ms=100)), ray=False) as runtime, LayerCaller(runtime, patience_s=0.3) as caller:
        plug_in.opened.clear()
        with pytest.raises(ExpertError, match=r"no answer within the layer's timeout_ms; waited"):
            caller.rows("l", TOKENS, EXPERT_IDS)
        plug_in.opened.set()


def test_in_an_exact_layer_all_rows_of_the_failed_expert_are_sent_again(plug_in):
    with serve(config(l=layer(exact=True)), ray=False) as runtime, LayerCaller(runtime) as caller:
        tokens = TOKENS.clone()
        asked = called_rows.RowsAsked.of(caller.layers["l"], tokens, EXPERT_IDS)
        # The first of the two rows of expert 1: rows 3 and 4.
        missing = torch.tensor([False, False, False, True, False, False])
        assert asked.to_send_again(missing).tolist() == [3, 4]


def test_a_runtime_that_is_closed_ends_the_wait(plug_in):
    runtime = serve(config(l=layer()), ray=False)
    plug_in.failed_by_others.add(2.0)
    with LayerCaller(runtime) as caller, ThreadPoolExecutor(1) as pool:
        call = pool.submit(caller.rows, "l", TOKENS, EXPERT_IDS)
        while not caller.num_retried:
            assert not call.done()
        runtime.close()
        with pytest.raises(UnavailableError, match="runtime library: it was closed"):
            call.result()
        with pytest.raises(UnavailableError, match="runtime library: it was closed"):
            caller.rows("l", TOKENS, EXPERT_IDS)


def test_an_interrupted_call_leaves_the_caller_usable(runtime, plug_in):
    def interrupt():
        plug_in.entered.wait()
        _thread.interrupt_main()

    with LayerCaller(runtime) as caller:
        caller.rows("l", TOKENS, EXPERT_IDS)
        plug_in.opened.clear()
        plug_in.entered.clear()
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            caller.rows("l", TOKENS, EXPERT_IDS)
        thread.join()
        plug_in.opened.set()
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)
        assert caller.counts()["l"] == [4, 4, 4]


def test_a_closed_caller_says_so_and_leaves_no_thread(runtime):
    caller = LayerCaller(runtime)
    caller.close()
    caller.close()
    with pytest.raises(UnavailableError, match="it was closed"):
        caller.rows("l", TOKENS, EXPERT_IDS)
    assert "moe-follow" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_caller_stays_in_its_process(runtime, take):
    with LayerCaller(runtime) as caller, pytest.raises(InvalidRequestError, match="an attempt to copy or pickle it"):
        take(caller)


def test_a_caller_of_a_forked_process_says_where_it_belongs(runtime, monkeypatch):
    with LayerCaller(runtime) as caller:
        with monkeypatch.context() as patch:
            patch.setattr("moe_runtime.launch.library.os.getpid", lambda: 1)
            with pytest.raises(UnavailableError, match="found a fork of it, process 1"):
                caller.rows("l", TOKENS, EXPERT_IDS)
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)


def test_a_runtime_without_routers_has_no_address_and_shows_its_layers(runtime):
    assert runtime.addresses == ()
    with pytest.raises(UnavailableError, match=r"found router.replicas 0"):
        _ = runtime.address
    description = runtime.describe()
    assert list(description["layers"]) == ["l", "m"]
    assert description["layers"]["l"]["experts"][0]["replicas"][0]["state"] == "ready"
    assert description["routers"] == []


def test_layers_are_added_to_a_runtime_without_any(plug_in):
    seen = []
    with serve(config(), ray=False) as runtime, LayerCaller(runtime) as caller:
        assert runtime.describe()["hosts"] == []
        runtime.add_layers({"l": layer(), "m": layer((10.0,))}, on_progress=lambda *ready: seen.append(ready))
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)
        assert list(runtime.config.layers) == ["l", "m"]
        assert list(runtime.describe()["layers"]) == ["l", "m"]


def test_layers_that_are_there_are_left_alone_when_others_are_added(runtime):
    with LayerCaller(runtime) as caller:
        caller.rows("l", TOKENS, EXPERT_IDS)
        before = runtime.describe()["layers"]["l"]
        runtime.add_layers({"l": layer(), "n": layer((5.0,))})
        assert torch.equal(caller.rows("n", TOKENS, torch.zeros(3, 1, dtype=torch.int64)), TOKENS * 5)
        assert runtime.describe()["layers"]["l"] == before
        assert caller.counts()["l"] == [2, 2, 2]


def test_a_layer_that_is_removed_is_unknown_while_others_are_left_alone(runtime):
    with LayerCaller(runtime) as caller:
        caller.rows("m", TOKENS, torch.zeros(3, 1, dtype=torch.int64))
        caller.rows("l", TOKENS, EXPERT_IDS)
        before = runtime.describe()["layers"]["l"]
        runtime.remove_layers(["m"])
        assert list(runtime.config.layers) == list(caller.layers) == ["l"]
        assert [host["host_id"] for host in runtime.describe()["hosts"]] == [f"l/e{i}/0" for i in range(3)]
        assert runtime.describe()["layers"] == {"l": before}
        with pytest.raises(UnknownLayerError, match="expected one of the layers l, found 'm'"):
            caller.rows("m", TOKENS, EXPERT_IDS)
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)
        runtime.add_layers({"m": layer((7.0,))})
        assert torch.equal(caller.rows("m", TOKENS, torch.zeros(3, 1, dtype=torch.int64)), TOKENS * 7)


def test_all_layers_may_be_removed(runtime):
    with LayerCaller(runtime) as caller:
        runtime.remove_layers(["l", "m"])
        assert runtime.describe()["hosts"] == []
        assert not caller.layers


def test_a_layer_that_leaves_its_group_is_served_by_its_hosts_no_longer(plug_in):
    group = {"actor_group": "g"}
    with serve(config(l=layer(**group), m=layer(**group)), ray=False) as runtime, LayerCaller(runtime) as caller:
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)
        runtime.remove_layers(["m"])
        assert [host["replicas"] for host in runtime.describe()["hosts"]] == [[f"l/e{i}/0"] for i in range(3)]
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)


def test_layers_that_the_runtime_does_not_have_cannot_be_removed(runtime):
    with pytest.raises(ConfigError, match=r"expected layers of the runtime, which has l, m, found j, k"):
        runtime.remove_layers(["l", "k", "j"])
    assert list(runtime.config.layers) == ["l", "m"]


def test_a_runtime_that_was_closed_has_no_layers_to_remove(plug_in):
    with serve(config(l=layer()), ray=False) as runtime:
        pass
    with pytest.raises(UnavailableError, match="closed or left"):
        runtime.remove_layers(["l"])


def test_a_call_that_waits_for_a_layer_that_is_removed_ends(runtime, plug_in):
    plug_in.failed_by_others.add(2.0)
    with LayerCaller(runtime, patience_s=1e6) as caller, ThreadPoolExecutor(1) as pool:
        call = pool.submit(caller.rows, "l", TOKENS, EXPERT_IDS)
        while not caller.num_retried:
            assert not call.done()
        runtime.remove_layers(["l"])
        with pytest.raises(UnknownLayerError, match="expected one of the layers m, found 'l'"):
            call.result()
        assert torch.equal(caller.rows("m", TOKENS[:1], torch.tensor([[1]])), TOKENS[:1] * 20)


def test_a_call_in_parts_ends_when_its_layer_is_removed_and_the_next_gets_only_its_own(runtime, plug_in, monkeypatch):
    # A token with two choices has two rows of 8 bytes.
    monkeypatch.setattr(called_rows, "MAX_BATCH_BYTES", 16)
    with LayerCaller(runtime) as caller, ThreadPoolExecutor(2) as pool:
        plug_in.opened.clear()
        plug_in.entered.clear()
        call = pool.submit(caller.rows, "l", TOKENS, EXPERT_IDS)
        plug_in.entered.wait()
        version = caller._calling.engine.table.version
        removing = pool.submit(runtime.remove_layers, ["l"])
        while caller._calling.engine.table.version == version:
            assert not call.done()
        plug_in.opened.set()
        with pytest.raises(UnknownLayerError, match="found 'l'"):
            call.result()
        removing.result()
        assert torch.equal(caller.rows("m", TOKENS, torch.tensor([[0, 1]] * 3))[::2], TOKENS * 10)


def test_a_layer_that_has_the_name_of_another_one_is_refused(runtime):
    with pytest.raises(ConfigError, match=r"layers.l: expected a name that no layer of the runtime has"):
        runtime.add_layers({"n": layer(), "l": layer((5.0,))})
    assert list(runtime.config.layers) == ["l", "m"]


def test_a_layer_that_cannot_be_built_changes_nothing(runtime, plug_in):
    plug_in.failing[7.0] = math.inf
    with pytest.raises(ConfigError, match="licence server is gone"):
        runtime.add_layers({"n": layer((6.0, 7.0))})
    assert list(runtime.describe()["layers"]) == ["l", "m"]
    assert len(runtime.describe()["hosts"]) == 5


def test_the_actors_of_a_group_are_replaced_by_some_that_have_a_new_layer_too(plug_in):
    with serve(config(l=layer(actor_group="g")), ray=False) as runtime, LayerCaller(runtime) as caller:
        caller.rows("l", TOKENS, EXPERT_IDS)
        runtime.add_layers({"m": layer((10.0, 20.0, 30.0), actor_group="g")})
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)
        assert torch.equal(caller.rows("m", TOKENS, EXPERT_IDS), ROWS * 10)
        hosts = runtime.describe()["hosts"]
        assert [host["replicas"] for host in hosts] == [[f"l/e{i}/0", f"m/e{i}/0"] for i in range(3)]


def test_layers_are_added_beside_routers_as_well(plug_in):
    routed = {"policy": {"kind": "top_k", "k": 1}}
    with serve(config(router={"replicas": 1, "address": "127.0.0.1:0"}, l=layer(**routed)), ray=False) as runtime:
        runtime.add_layers({"m": layer((10.0,), **routed)})
        with MoEClient(runtime.address) as client, LayerCaller(runtime) as caller:
            assert torch.equal(client.forward(TOKENS, layer="m", timeout_s=20.0).outputs, TOKENS * 10)
            assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)


def test_a_caller_is_told_when_its_program_leaves_the_runtime(runtime):
    def call_for_ever(caller):
        while True:
            caller.rows("l", TOKENS, EXPERT_IDS)

    with LayerCaller(runtime) as caller:
        runtime._session.dismiss("it was left")
        # What is served before the caller's thread hears of it may still be answered.
        with pytest.raises(UnavailableError, match="runtime library: it was left"):
            call_for_ever(caller)


def test_a_layer_that_its_caller_routes_needs_a_runtime_without_routers(plug_in):
    with pytest.raises(ConfigError, match=r"router.replicas: expected 0, since layer l has policy caller.*, found 1"):
        serve(config(router={"replicas": 1}, l=layer()), ray=False)


def test_a_layer_of_another_policy_may_be_called_as_well(plug_in):
    with (
        serve(config(l=layer(policy={"kind": "top_k", "k": 2})), ray=False) as runtime,
        LayerCaller(runtime) as caller,
    ):
        assert torch.equal(caller.rows("l", TOKENS, EXPERT_IDS), ROWS)
