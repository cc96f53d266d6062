"""Real expert hosts, in threads and in processes of their own, with a plug-in that misbehaves when it is asked to."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fakes.faulty_experts import FAULTS, SLEEP_S, install
from fakes.host_process import ChildProcess, serve_experts
from moe_runtime.config.experts import ResourcesConfig
from moe_runtime.errors import MoERuntimeError, TransportError
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.launch.expert_process import ExpertProcess
from moe_runtime.launch.recipes import HostedExpert, HostSpec
from moe_runtime.ray_backend.expert_actor import ExpertActor
from moe_runtime.ray_backend.plan import HostHealth
from moe_runtime.service.ports import HostLost, HostReply, HostRequest, Segment
from moe_runtime.transport.in_process import InProcessNetwork
from moe_runtime.transport.zmq_router import ZmqTransport

DEADLINE_S = 20.0
FAULTY, GOOD = "l/faulty/0", "l/good/0"


@pytest.fixture(autouse=True)
def plug_in(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path / "site"))


def host_of(**fields):
    """A host with a faulty expert, and one that is good."""
    faulty = ExpertSpec("l", 0, "faulty", **{"kind": "faulty", "item_shape": (2,), **fields})
    good = ExpertSpec("l", 1, "good", "identity", (2,))
    return HostSpec("l/faulty/0", (HostedExpert(FAULTY, faulty), HostedExpert(GOOD, good)), "cpu", ResourcesConfig())


def request(ticket, *segments, timeout_s=DEADLINE_S):
    """Rows of two columns, given as (replica_id, [value of each row]); a value may be the name of a fault."""
    values = [FAULTS.get(value, value) for _, listed in segments for value in listed]
    rows = torch.tensor(values, dtype=torch.float32).unsqueeze(1).repeat(1, 2)
    listed = tuple(Segment(replica_id, len(given)) for replica_id, given in segments)
    return HostRequest(ticket, listed, rows, timeout_s, (f"request-{ticket}",))


class InThreads:
    """A host in a thread of this process, and a router."""

    def __init__(self, stack):
        network = InProcessNetwork()
        self.router = stack.enter_context(contextlib.closing(network.router_transport()))
        self.transport = network.host_transport()
        self.process = ExpertProcess(host_of(), open_transport=lambda: self.transport, num_threads=None)
        self.endpoint = self.process.start().endpoint
        stack.callback(self.process.stop)

    def health(self):
        return self.process.health()


class InProcesses:
    """A host in a process of its own, and a router in this one."""

    def __init__(self, stack):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-", dir="/tmp")))
        options = {"node": "node-0", "folder": folder, "encryption": "none"}
        self.process = stack.enter_context(contextlib.closing(ChildProcess(serve_experts, host_of(), **options)))
        self.endpoint = self.process.expect().endpoint
        self.router = stack.enter_context(contextlib.closing(ZmqTransport(node="node-0", encryption="none")))

    def health(self):
        self.process.pipe.send("health")
        return self.process.expect()


@pytest.fixture(params=[InThreads, InProcesses])
def host(request):
    with contextlib.ExitStack() as stack:
        yield request.param(stack)


@pytest.fixture
def in_process():
    with contextlib.ExitStack() as stack:
        yield InProcesses(stack)


def next_event(host):
    """The next reply or loss that the router hears of."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < deadline
        events = host.router.poll(DEADLINE_S)
        if events:
            (event,) = events
            return event


def ask(host, ticket, *segments):
    host.router.send(host.endpoint, request(ticket, *segments))
    reply = next_event(host)
    assert isinstance(reply, HostReply)
    assert reply.ticket == ticket
    return reply


def health_when(host, check):
    """The first health that passes a check."""
    deadline = time.monotonic() + DEADLINE_S
    while not check(health := host.health()):
        assert time.monotonic() < deadline, health
    return health


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("raise", "ValueError: a row asked for it"),
        ("system_exit", "SystemExit: 3"),
        ("interrupt", "KeyboardInterrupt"),
    ],
)
def test_a_row_that_makes_an_expert_raise_fails_alone_and_the_host_serves_on(host, fault, error):
    reply = ask(host, 1, (FAULTY, [1.0, fault, 3.0]), (GOOD, [4.0]))
    faulty, good = reply.results
    assert faulty.failed_rows == (1,)
    assert faulty.error == f"{FAULTY}: the expert raised {error}, in 1 of 3 rows"
    assert good.error is None
    assert reply.rows[:, 0].tolist() == [10.0, 0.0, 30.0, 4.0]
    assert ask(host, 2, (FAULTY, [5.0])).rows[:, 0].tolist() == [50.0]
    assert host.health().num_faults == {}


@pytest.mark.parametrize("fault", ["none", "shape", "dtype", "rows"])
def test_a_wrong_output_costs_its_segment_counts_as_a_fault_and_does_not_make_the_host_unfit(host, fault):
    reply = ask(host, 1, (FAULTY, [1.0, fault]), (GOOD, [4.0]))
    faulty, good = reply.results
    assert faulty.error is not None
    assert (faulty.has_rows, good.error) == (False, None)
    assert reply.rows[:, 0].tolist() == [4.0]
    health = host.health()
    assert (health.num_faults, health.unfit) == ({FAULTY: 1}, None)


def test_rows_that_are_not_finite_fail_alone_and_do_not_take_the_expert_away(host):
    reply = ask(host, 1, (FAULTY, ["nan", 2.0, 3e38]))
    assert reply.results[0].failed_rows == (0, 2)
    assert reply.rows[:, 0].tolist() == [0.0, 20.0, 0.0]
    assert host.health().unfit is None


def test_an_expert_that_breaks_makes_its_host_unfit(host):
    assert ask(host, 1, (FAULTY, ["break"])).rows is None
    assert host.health().unfit.startswith(f"{FAULTY}: its golden probe differs by nan")
    # It still answers, so that what is asked meanwhile is not lost.
    reply = ask(host, 2, (GOOD, [1.0]), (FAULTY, [2.0]))
    assert [result.error is None for result in reply.results] == [True, False]


@pytest.mark.parametrize("fault", ["sleep", "spin"])
def test_a_busy_expert_does_not_keep_its_host_from_saying_how_it_is(host, fault):
    host.router.send(host.endpoint, request(1, (FAULTY, [fault])))
    busy = health_when(host, lambda health: health.busy_s > 0)
    assert (busy.num_requests, busy.num_waiting) == (1, 1)
    assert busy.rss_bytes > 1 << 20
    assert next_event(host).results[0].compute_ms >= SLEEP_S * 900
    idle = health_when(host, lambda health: not health.busy_s)
    assert (idle.num_requests, idle.num_waiting) == (1, 0)


def test_health_of_a_host_that_was_not_started():
    process = ExpertProcess(host_of(), open_transport=InProcessNetwork().host_transport, num_threads=None)
    health = process.health()
    assert health == HostHealth(rss_bytes=health.rss_bytes)
    assert health.rss_bytes > 0


def test_health_and_the_transport_count_what_was_asked_and_answered():
    with contextlib.ExitStack() as stack:
        host = InThreads(stack)
        ask(host, 1, (FAULTY, [1.0, 2.0]), (GOOD, [3.0]))
        ask(host, 2, (FAULTY, ["raise"]))
        health = host.health()
        counters = host.transport.counters
    assert (health.num_requests, health.num_waiting, health.unfit, health.inner) == (2, 0, None, {})
    assert (counters.num_received, counters.num_sent) == (2, 2)


def test_an_expert_that_ends_its_process_is_lost_by_its_death(in_process):
    in_process.router.send(in_process.endpoint, request(1, (FAULTY, ["exit"])))
    assert next_event(in_process) == HostLost(in_process.endpoint, "its process ended", is_death=True)


def test_a_frozen_host_is_lost_without_a_death_and_its_late_answer_is_ignored(in_process):
    ask(in_process, 1, (FAULTY, [1.0]))
    in_process.router.send(in_process.endpoint, request(2, (FAULTY, ["sleep"])))
    health_when(in_process, lambda health: health.busy_s > 0)
    in_process.process.freeze()
    assert next_event(in_process) == HostLost(in_process.endpoint, "its process is frozen", is_death=False)
    in_process.process.thaw()
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(TransportError):
            in_process.router.send(in_process.endpoint, request(3, (FAULTY, [3.0])))
            break
        assert time.monotonic() < deadline
        assert in_process.router.poll(0.01) == []
    reply = next_event(in_process)
    assert (reply.ticket, reply.rows[:, 0].tolist()) == (3, [30.0])
    assert in_process.router.poll(0.0) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("RuntimeError", "PlugInError: layers.l.experts[faulty]: building kind 'faulty' for rows of shape [2] raised"),
        ("KeyboardInterrupt", "PlugInError: expert host l/faulty/0: building its experts raised KeyboardInterrupt"),
        ("MemoryError", "StartError: expert host l/faulty/0: no memory was left on node"),
    ],
)
def test_what_a_constructor_raises_is_an_error_of_the_start(error, said):
    spec = host_of(options={"raises_when_built": error})
    process = ExpertProcess(spec, open_transport=InProcessNetwork().host_transport, num_threads=None)
    # In a thread, as in an actor: Ctrl-C reaches the main one only.
    with ThreadPoolExecutor() as threads, pytest.raises(MoERuntimeError) as caught:
        threads.submit(process.start).result(DEADLINE_S)
    assert f"{type(caught.value).__name__}: {caught.value}".startswith(said)


async def test_a_ping_of_an_actor_that_was_not_started_is_answered():
    assert await ExpertActor(b"").ping() is None


def test_experts_that_turn_out_too_large_while_they_are_loaded_are_a_start_error(tmp_path):
    spec = host_of(kind="feed_forward", item_shape=(4096,), options={"hidden_features": 16384})
    options = {"node": "node-0", "folder": tmp_path, "encryption": "none", "max_more_bytes": 256 << 20}
    with contextlib.closing(ChildProcess(serve_experts, spec, **options)) as process:
        said = process.expect()
    assert said.startswith("StartError: expert host l/faulty/0: no memory was left on node node-0")


def test_the_log_names_the_requests_whose_rows_failed(caplog):
    with contextlib.ExitStack() as stack:
        host = InThreads(stack)
        ask(host, 7, (FAULTY, [1.0, "nan"]))
    (record,) = [record for record in caplog.records if hasattr(record, "request_ids")]
    assert record.request_ids == ["request-7"]
    expected = f"requests request-7: {FAULTY}: expected finite outputs, found NaN or infinity, in 1 of 2 rows"
    assert record.getMessage() == expected


def test_stopping_a_host_waits_for_the_run_that_is_under_way():
    with contextlib.ExitStack() as stack:
        host = InThreads(stack)
        host.router.send(host.endpoint, request(1, (FAULTY, ["sleep"])))
        health_when(host, lambda health: health.busy_s > 0)
        stopping = threading.Thread(target=host.process.stop)
        stopping.start()
        stopping.join(DEADLINE_S)
        reply, lost = host.router.poll(DEADLINE_S)
        assert reply.rows[0, 0] == FAULTS["sleep"] * 10
        assert lost.endpoint == host.endpoint
        assert host.process.join() == "it was stopped"
