from __future__ import annotations

import socket

import pytest

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.ports import check_ports


@pytest.fixture
def taken():
    """A port of the loopback address where something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_told(taken, host):
    with pytest.raises(StartError) as caught:
        check_ports(f"{host}:{taken}", 1)
    assert str(caught.value) == (
        f"router.address {host}:{taken}: expected a free port, found it taken by another process"
    )


def test_the_port_of_the_second_router_is_tried_too(taken):
    with pytest.raises(StartError, match=f"(?m)^router.address 127.0.0.1:{taken}: expected a free port"):
        check_ports(f"127.0.0.1:{taken - 1}", 2)


def test_an_address_of_another_machine_is_told():
    with pytest.raises(StartError, match=r"^router\.address 192\.0\.2\.1:50051: .* not an address of this machine$"):
        check_ports("192.0.2.1:50051", 1)


def test_a_name_that_does_not_resolve_is_told():
    with pytest.raises(StartError, match=r"^router\.address nowhere\.invalid:50051: .* the name does not resolve$"):
        check_ports("nowhere.invalid:50051", 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_free_port_stays_free_and_any_port_is_not_tried(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    check_ports(f"{host}:{port}", 1)
    socket.create_server(("127.0.0.1", port)).close()
    check_ports(f"{host}:0", 3)


def test_a_port_whose_last_server_left_connections_behind_is_free():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            # The side that closes first keeps the port for a minute.
            accepted.close()
            assert client.recv(1) == b""
    check_ports(f"127.0.0.1:{port}", 1)
