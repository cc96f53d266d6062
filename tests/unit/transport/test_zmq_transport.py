import stat
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
import zmq
from msgspec.structs import replace

from moe_runtime.errors import StartError, TransportError
from moe_runtime.service.ports import Delivery
from moe_runtime.transport.header import encode_reply, encode_request
from moe_runtime.transport.header_fields import Address
from moe_runtime.transport.ipc_folder import sweep_ipc
from moe_runtime.transport.zmq_socket import MAX_MESSAGES_PER_CALL, receive_waiting

GARBAGE = [
    [b""],
    [b"", b""],
    [b"\xc1garbage", b"rows"],
    [b"\x80"],
    [msgpack.packb({"version": 1, "kind": "request"}), b"rows"],
    [b"a", b"b", b"c", b"d"],
    [msgpack.packb([4, "request", 1, [9, 9], [["a", 1]], "float32", [1, 1], [1, 2, 3], 1.0, []])],
    [b"\0" * 100_000],
]


def socket_paths(endpoint):
    path = endpoint.local.removeprefix("ipc://")
    return {path, path.replace(".ipc", ".shm")}


@pytest.fixture
def raw_socket():
    """Opens bare ZeroMQ sockets, as a stranger would."""
    context = zmq.Context()
    sockets = []

    def open_one(kind):
        sockets.append(context.socket(kind))
        sockets[-1].setsockopt(zmq.LINGER, 0)
        return sockets[-1]

    yield open_one
    for socket in sockets:
        socket.close()
    context.term()


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_garbage_at_a_host_is_counted_and_harms_nobody(zmq_fabric, raw_socket, kind):
    router, host = zmq_fabric.router(), zmq_fabric.host(max_queued_messages=100)
    zmq_fabric.exchange(router, host, 1)
    stranger = raw_socket(zmq.DEALER)
    stranger.connect(getattr(host.endpoint, kind))
    for frames in GARBAGE:
        stranger.send_multipart(frames)
    zmq_fabric.wait_for_counter(host, host.receive, "num_malformed", len(GARBAGE))
    zmq_fabric.exchange(router, host, 2)
    assert host.counters.num_received == 2


def test_garbage_at_a_router_is_counted_and_harms_nobody(zmq_fabric, raw_socket):
    router, fake = zmq_fabric.router(), raw_socket(zmq.ROUTER)
    port = fake.bind_to_random_port("tcp://127.0.0.1")
    honest = zmq_fabric.host()
    address = f"tcp://127.0.0.1:{port}"
    endpoint = replace(honest.endpoint, local=None, remote=address)
    router.send(endpoint, zmq_fabric.make_request(1))
    route = fake.recv_multipart()[0]
    for frames in GARBAGE:
        fake.send_multipart([route, *frames])
    zmq_fabric.wait_for_counter(router, router.poll, "num_malformed", len(GARBAGE))
    zmq_fabric.exchange(router, honest, 2)


@pytest.mark.parametrize("wrong", ["sender", "receiver"])
def test_reply_between_other_incarnations_is_refused_and_counted(zmq_fabric, raw_socket, wrong):
    router, fake = zmq_fabric.router(), raw_socket(zmq.ROUTER)
    port = fake.bind_to_random_port("tcp://127.0.0.1")
    endpoint = replace(zmq_fabric.host().endpoint, local=None, remote=f"tcp://127.0.0.1:{port}")
    request = zmq_fabric.make_request(1)
    router.send(endpoint, request)
    route = fake.recv_multipart()[0]
    right = Address(sender=endpoint.incarnation, receiver=router.incarnation)
    reply = zmq_fabric.make_reply(Delivery(b"", request))
    fake.send_multipart([route, *encode_reply(reply, address=replace(right, **{wrong: 77}))])
    zmq_fabric.wait_for_counter(router, router.poll, "num_refused", 1)
    fake.send_multipart([route, *encode_reply(reply, address=right)])
    assert [reply.ticket for reply in zmq_fabric.poll(router)] == [1]


def test_message_that_a_socket_sends_again_to_a_successor_is_refused(zmq_fabric, raw_socket):
    dead, stranger = zmq_fabric.host(), raw_socket(zmq.DEALER)
    stranger.connect(dead.endpoint.remote)
    frames = encode_request(zmq_fabric.make_request(1), address=Address(9, dead.endpoint.incarnation))
    stranger.send_multipart(frames)
    zmq_fabric.receive(dead)
    dead.close()
    stranger.send_multipart(frames)
    successor = zmq_fabric.successor(dead.endpoint)
    zmq_fabric.wait_for_counter(successor, successor.receive, "num_refused", 1)
    assert successor.counters.num_received == 0


def test_unintelligible_address_is_a_transport_error(zmq_fabric):
    endpoint = replace(zmq_fabric.host().endpoint, local="nonsense", remote="nonsense")
    router = zmq_fabric.router()
    with pytest.raises(TransportError, match="endpoint nonsense: cannot connect"):
        router.send(endpoint, zmq_fabric.make_request(1))


def test_host_of_another_node_without_a_remote_address_cannot_be_reached(zmq_fabric):
    host = zmq_fabric.host(node="node-7", ip=None)
    assert host.endpoint.remote is None
    with pytest.raises(TransportError, match="on node node-7 cannot be reached from node node-"):
        zmq_fabric.router().send(host.endpoint, zmq_fabric.make_request(1))


def test_answer_to_a_stranger_whose_queue_is_full_is_discarded_and_counted(zmq_fabric, raw_socket):
    host = zmq_fabric.host(max_queued_messages=1)
    stranger = raw_socket(zmq.DEALER)
    stranger.setsockopt(zmq.RCVHWM, 1)
    stranger.connect(host.endpoint.remote)
    request = zmq_fabric.make_request(1)
    stranger.send_multipart(encode_request(request, address=Address(9, host.endpoint.incarnation)))
    (delivery,) = zmq_fabric.receive(host)
    large = zmq_fabric.make_reply(delivery, delivery.request.rows.repeat(1, 1 << 18))
    for _ in range(1000):
        host.reply(delivery, large)
    assert host.counters.num_discarded > 0
    assert host.counters.num_sent + host.counters.num_discarded == 1000
    # libzmq 4.3.5 aborts where a socket closes in the moment in which its peer leaves half of a message unread.
    for _ in range(host.counters.num_sent):
        stranger.recv_multipart(copy=False)


def test_ipc_socket_is_private_and_goes_with_its_host(zmq_fabric):
    host = zmq_fabric.host()
    path = Path(host.endpoint.local.removeprefix("ipc://"))
    assert f"{host.endpoint.incarnation:016x}" in path.name
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    host.close()
    assert list(zmq_fabric.folder.iterdir()) == []


def test_sweep_removes_what_a_killed_host_left_and_does_not_disturb_the_living(zmq_fabric):
    router, living = zmq_fabric.router(), zmq_fabric.host()
    zmq_fabric.exchange(router, living, 1)
    command = (
        "import pathlib, sys; from moe_runtime.transport.zmq_host import ZmqHostTransport\n"
        "host = ZmqHostTransport(node='node-0', folder=pathlib.Path(sys.argv[1]))\n"
        "print(host.endpoint.local, flush=True); host.receive(60.0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", command, zmq_fabric.folder], stdout=subprocess.PIPE, text=True
    ) as process:
        left = process.stdout.readline().strip().removeprefix("ipc://")
        assert sweep_ipc(zmq_fabric.folder, min_age_s=-60.0) == 0
        process.kill()
    assert Path(left).exists()
    assert sweep_ipc(zmq_fabric.folder, min_age_s=-60.0) == 2
    assert {str(path) for path in zmq_fabric.folder.glob("*")} == socket_paths(living.endpoint)
    zmq_fabric.exchange(router, living, 2)
    zmq_fabric.exchange(zmq_fabric.router(), living, 3)


def test_answer_whose_ticket_is_not_awaited_is_counted(zmq_fabric, raw_socket):
    router, fake = zmq_fabric.router(), raw_socket(zmq.ROUTER)
    port = fake.bind_to_random_port("tcp://127.0.0.1")
    endpoint = replace(zmq_fabric.host().endpoint, local=None, remote=f"tcp://127.0.0.1:{port}")
    request = zmq_fabric.make_request(1)
    router.send(endpoint, request)
    route = fake.recv_multipart()[0]
    other = replace(zmq_fabric.make_reply(Delivery(b"", request)), ticket=2)
    address = Address(sender=endpoint.incarnation, receiver=router.incarnation)
    fake.send_multipart([route, *encode_reply(other, address=address)])
    zmq_fabric.wait_for_counter(router, router.poll, "num_unexpected", 1)


def test_one_call_takes_a_bounded_number_of_messages_from_a_flood(raw_socket):
    flooded, flood = raw_socket(zmq.PAIR), raw_socket(zmq.PAIR)
    flood.setsockopt(zmq.SNDHWM, 0)
    flooded.setsockopt(zmq.RCVHWM, 0)
    # In one context, a message is there as soon as it is sent.
    flooded.bind("inproc://flood")
    flood.connect("inproc://flood")
    for _ in range(MAX_MESSAGES_PER_CALL + 3):
        flood.send(b"x")
    assert len([*receive_waiting(flooded)]) == MAX_MESSAGES_PER_CALL
    assert len([*receive_waiting(flooded)]) == 3
    assert [*receive_waiting(flooded)] == []


def test_port_range_that_is_used_up_is_a_start_error(zmq_fabric):
    first = zmq_fabric.host()
    port = int(first.endpoint.remote.rpartition(":")[2])
    with pytest.raises(StartError, match=f"no free tcp port .* {port} to {port}"):
        zmq_fabric.host(port_range=(port, port))
    assert {str(path) for path in zmq_fabric.folder.glob("*")} == socket_paths(first.endpoint)


def test_second_host_takes_the_next_port_of_the_range(zmq_fabric, raw_socket):
    blocker = raw_socket(zmq.ROUTER)
    port = blocker.bind_to_random_port("tcp://127.0.0.1", min_port=20000, max_port=30000)
    host = zmq_fabric.host(port_range=(port, port + 200))
    assert port < int(host.endpoint.remote.rpartition(":")[2]) <= port + 200


@pytest.mark.parametrize("options", [{"ip": "203.0.113.7"}, {"ip": "203.0.113.7", "port_range": (20000, 20009)}])
def test_address_that_is_not_this_machine_s_is_a_start_error(zmq_fabric, options):
    with pytest.raises(StartError, match=r"cannot listen at tcp://203\.0\.113\.7"):
        zmq_fabric.host(**options)
    assert list(zmq_fabric.folder.iterdir()) == []
