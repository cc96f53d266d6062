"""Expert hosts and routers as processes of their own, which tests really freeze and kill."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
from functools import partial
from pathlib import Path

import torch

from moe_runtime.errors import MoERuntimeError
from moe_runtime.launch.expert_process import ExpertProcess
from moe_runtime.service.ports import HostReply, HostRequest, Segment, SegmentResult
from moe_runtime.transport.zmq_host import ZmqHostTransport
from moe_runtime.transport.zmq_router import ZmqTransport

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "zmq", "msgpack", "moe_runtime.launch.expert_process"])
#: Takes far longer to cross a socket than it takes to kill a process.
HUGE_ROWS_SHAPE = (1, 1 << 26)


class ChildProcess:
    """A process that runs one of the functions below, joined to the test by a pipe."""

    def __init__(self, run, *args, **options):
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=run, args=(theirs, *args), kwargs=options, daemon=True)
        self._process.start()
        theirs.close()

    def expect(self, deadline_s=30.0):
        """What the process says next."""
        assert self.pipe.poll(deadline_s), "the process is silent"
        return self.pipe.recv()

    def freeze(self):
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self):
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self):
        self._process.kill()

    def close(self):
        self._process.kill()
        self._process.join()
        self.pipe.close()


def echo(pipe, *, admitted=(), **options):
    """A host that says its endpoint, and then answers every request with its rows plus 1."""
    with _host(pipe, admitted, options) as host:
        while True:
            for delivery in host.receive(60.0):
                host.reply(delivery, reply_to(delivery, delivery.request.rows + 1))


def answer_when_told(pipe, *, admitted=(), **options):
    """A host that says ``received`` for each request, and answers it once told to; then says ``answered``."""
    with _host(pipe, admitted, options) as host:
        while True:
            for delivery in host.receive(60.0):
                pipe.send("received")
                pipe.recv()
                host.reply(delivery, reply_to(delivery, delivery.request.rows + 1))
                pipe.send("answered")


def answer_hugely(pipe, *, admitted=(), **options):
    """A host that says ``answered`` as soon as it has begun to send a huge answer."""
    with _host(pipe, admitted, options) as host:
        while True:
            for delivery in host.receive(60.0):
                host.reply(delivery, reply_to(delivery, torch.ones(HUGE_ROWS_SHAPE)))
                pipe.send("answered")


def exit_at_once(pipe, *, admitted=(), **options):
    """A host that ends its process when it gets a request, without a word to anybody."""
    with _host(pipe, admitted, options) as host:
        while not host.receive(60.0):
            pass
        os._exit(3)


def abort(pipe, *, admitted=(), **options):
    """A host that is ended by the C library when it gets a request."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with _host(pipe, admitted, options) as host:
        while not host.receive(60.0):
            pass
        os.abort()


def serve_experts(pipe, spec, *, max_more_bytes=None, **options):
    """An expert host that says its report, or why it did not start; then its health whenever it is asked."""
    process = ExpertProcess(spec, open_transport=partial(ZmqHostTransport, **options), num_threads=1, node="node-0")
    if max_more_bytes is not None:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = num_pages * resource.getpagesize() + max_more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        pipe.send(process.start())
    except MoERuntimeError as exc:
        pipe.send(f"{type(exc).__name__}: {exc}")
        return
    while pipe.recv() == "health":
        pipe.send(process.health())
    process.stop()


def ask_hugely(pipe, endpoint, *, node):
    """A router that says ``sent`` as soon as it has begun to send a huge request."""
    with contextlib.closing(ZmqTransport(node=node, encryption="none")) as router:
        router.send(endpoint, HostRequest(1, (Segment("a", 1),), torch.ones(HUGE_ROWS_SHAPE), 60.0))
        pipe.send("sent")
        pipe.recv()


def route(pipe, address):
    """A router that says its address. Told ``wait``, it says ``dispatched`` once a message has left for an expert.

    Told anything else, it lets the experts of the layer ``stuck`` work.
    """
    from fakes.live_router import LiveRouter
    from moe_runtime.config.runtime import LimitsConfig, RouterConfig

    torch.set_num_threads(1)
    live = LiveRouter(address=address, limits=LimitsConfig(), router=RouterConfig()).start()
    pipe.send(live.address)
    while pipe.recv() == "wait":
        live.wait_for(lambda status: status["num_messages"] > 0)
        pipe.send("dispatched")
    live.free()
    pipe.recv()


def reply_to(delivery, rows):
    results = tuple(SegmentResult(s.replica_id, s.num_rows) for s in delivery.request.segments)
    return HostReply(delivery.request.ticket, results, rows)


@contextlib.contextmanager
def _host(pipe, admitted, options):
    # One process per core of work: the tests run many.
    torch.set_num_threads(1)
    with contextlib.closing(ZmqHostTransport(**options)) as host:
        host.admit(admitted)
        pipe.send(host.endpoint)
        yield host
