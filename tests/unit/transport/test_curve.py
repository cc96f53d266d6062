import pytest
import zmq
from msgspec.structs import replace
from zmq.utils.monitor import recv_monitor_message

from moe_runtime.errors import TransportError
from moe_runtime.service.ports import HostLost
from moe_runtime.transport.curve import KeyPair, check_public_key, make_key_pair, secure_connection
from moe_runtime.transport.zmq_router import ZmqTransport

HANDSHAKE_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


def next_loss(fabric, router, host):
    """The loss that a router hears of while a host answers whoever knocks."""
    events = []
    for _ in range(1000):
        assert host.receive(0.01) == []
        events += router.poll(0.01)
        if events:
            break
    (lost,) = events
    assert isinstance(lost, HostLost)
    return lost


@pytest.fixture
def stranger(curve_fabric):
    """A router with a key of its own that no host has admitted."""
    with_key = ZmqTransport(node="node-1")
    yield with_key
    with_key.close()


def test_secret_key_is_not_shown_and_public_key_is_40_characters():
    keys = make_key_pair()
    assert len(keys.public) == len(keys.secret) == 40
    assert keys.secret not in repr(keys)
    assert check_public_key(keys.public) == keys.public.encode()


@pytest.mark.parametrize("key", ["", "short", "0" * 39, "0" * 45, "\xff" * 40, " " * 40, "#" * 40])
def test_malformed_key_is_a_transport_error(key, curve_fabric):
    with pytest.raises(TransportError, match="expected"):
        check_public_key(key)
    host = curve_fabric.host()
    with pytest.raises(TransportError, match="expected"):
        host.admit([key])
    with pytest.raises(TransportError, match="expected"):
        curve_fabric.router().send(replace(host.endpoint, public_key=key), curve_fabric.make_request(1))


def test_stranger_who_knows_the_host_s_public_key_is_refused(curve_fabric, stranger):
    router, host = curve_fabric.router(), curve_fabric.host()
    stranger.send(host.endpoint, curve_fabric.make_request(1))
    lost = next_loss(curve_fabric, stranger, host)
    assert lost == HostLost(host.endpoint, "the host does not admit this router's key", is_death=False)
    assert host.counters.num_strangers == 1
    curve_fabric.exchange(router, host, 2)
    assert host.counters.num_received == 1


def test_host_admits_nobody_before_it_is_told_to(curve_fabric, stranger):
    host = curve_fabric.host()
    host.admit([])
    stranger.send(host.endpoint, curve_fabric.make_request(1))
    next_loss(curve_fabric, stranger, host)
    host.admit([stranger.public_key])
    curve_fabric.send_when_reached(stranger, host.endpoint, curve_fabric.make_request(2), host=host)
    assert [delivery.request.ticket for delivery in curve_fabric.receive(host)] == [2]


def test_router_that_is_admitted_no_more_keeps_its_connection_but_gets_no_other(curve_fabric):
    router, host = curve_fabric.router(), curve_fabric.host()
    curve_fabric.exchange(router, host, 1)
    host.admit([])
    curve_fabric.exchange(router, host, 2)
    router.retain([])
    router.send(host.endpoint, curve_fabric.make_request(3))
    next_loss(curve_fabric, router, host)


def test_wrong_host_key_never_connects(curve_fabric):
    router, host = curve_fabric.router(), curve_fabric.host()
    wrong = replace(host.endpoint, public_key=make_key_pair().public)
    router.send(wrong, curve_fabric.make_request(1))
    lost = next_loss(curve_fabric, router, host)
    assert lost.endpoint == wrong
    assert "handshake" in lost.reason
    assert host.counters.num_received == 0
    curve_fabric.exchange(router, host, 2)


def test_plain_socket_cannot_talk_to_an_encrypted_address(curve_fabric):
    host = curve_fabric.host()
    with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
        plain.set(zmq.LINGER, 0)
        plain.connect(host.endpoint.remote)
        plain.send(b"hello")
        router = curve_fabric.router()
        curve_fabric.exchange(router, host, 1)
        assert host.counters.num_malformed == 0


def speak(host, prepare):
    """Whether a raw socket gets in, once it was prepared and has said something."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        prepare(socket)
        with socket.get_monitor_socket(HANDSHAKE_EVENTS) as monitor:
            socket.connect(host.endpoint.remote)
            for _ in range(1000):
                assert host.receive(0.01) == []
                if monitor.poll(10):
                    event = recv_monitor_message(monitor)["event"]
                    break
            socket.disable_monitor()
    return event == zmq.EVENT_HANDSHAKE_SUCCEEDED


def with_plain_password(socket, _host_key):
    socket.set(zmq.PLAIN_USERNAME, b"admin")
    socket.set(zmq.PLAIN_PASSWORD, b"admin")


def with_a_key_of_its_own(socket, host_key):
    secure_connection(socket, make_key_pair(), host_key=host_key)


def with_the_host_s_key_for_its_own(socket, host_key):
    secure_connection(socket, KeyPair(host_key, make_key_pair().secret), host_key=host_key)


def with_no_key(_socket, _host_key):
    pass


@pytest.mark.parametrize(
    "prepare", [with_no_key, with_plain_password, with_a_key_of_its_own, with_the_host_s_key_for_its_own]
)
def test_raw_socket_without_an_admitted_key_says_nothing_to_a_host(curve_fabric, prepare):
    router, host = curve_fabric.router(), curve_fabric.host()
    curve_fabric.exchange(router, host, 1)
    assert not speak(host, lambda socket: prepare(socket, host.endpoint.public_key))
    assert (host.counters.num_received, host.counters.num_malformed) == (1, 0)
    curve_fabric.exchange(router, host, 2)


def test_public_key_of_an_admitted_router_is_no_use_without_its_secret(curve_fabric):
    router, host = curve_fabric.router(), curve_fabric.host()
    curve_fabric.exchange(router, host, 1)
    stolen = KeyPair(router.public_key, make_key_pair().secret)
    assert not speak(host, lambda socket: secure_connection(socket, stolen, host_key=host.endpoint.public_key))
    curve_fabric.exchange(router, host, 2)
    assert host.counters.num_received == 2


def test_many_strangers_at_once_do_not_keep_a_router_out(curve_fabric):
    router, host = curve_fabric.router(), curve_fabric.host()
    strangers = [ZmqTransport(node="node-1") for _ in range(20)]
    for stranger in strangers:
        stranger.send(host.endpoint, curve_fabric.make_request(1))
    curve_fabric.exchange(router, host, 2)
    for stranger in strangers:
        next_loss(curve_fabric, stranger, host)
        stranger.close()
    curve_fabric.exchange(router, host, 3)
    assert host.counters.num_received == 2


def test_ipc_address_needs_no_key(curve_fabric):
    host = curve_fabric.host()
    near = ZmqTransport(node=host.endpoint.node)
    curve_fabric.exchange(near, host, 1)
    near.close()


@pytest.mark.parametrize(("ours", "theirs"), [("curve", "none"), ("none", "curve")])
def test_ends_that_differ_in_encryption_are_a_transport_error(curve_fabric, ours, theirs):
    host = curve_fabric.host(encryption=theirs)
    router = ZmqTransport(node="node-1", encryption=ours)
    with pytest.raises(TransportError, match=f"expected data_plane.encryption {ours} as here, found {theirs}"):
        router.send(host.endpoint, curve_fabric.make_request(1))
    router.close()


def test_only_encrypted_ends_have_public_keys(curve_fabric, ipc_fabric):
    assert curve_fabric.host().endpoint.public_key is not None
    assert curve_fabric.router().public_key is not None
    assert ipc_fabric.host().endpoint.public_key is None
    assert ipc_fabric.router().public_key is None
