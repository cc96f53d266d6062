from __future__ import annotations

import pytest

from moe_runtime.config.hosts import is_loopback
from moe_runtime.errors import ConfigError
from moe_runtime.ray_backend.addresses import next_address, public_address, router_addresses


def test_the_second_router_on_a_node_takes_the_next_port():
    addresses = router_addresses("0.0.0.0:50051", ["n1", "n2", "n1", "n1", "n2"])
    assert addresses == ["0.0.0.0:50051", "0.0.0.0:50051", "0.0.0.0:50052", "0.0.0.0:50053", "0.0.0.0:50052"]


def test_port_zero_stays_any_for_every_router():
    assert router_addresses("127.0.0.1:0", ["n1", "n1"]) == ["127.0.0.1:0", "127.0.0.1:0"]


def test_a_loopback_address_cannot_serve_two_nodes():
    with pytest.raises(
        ConfigError, match=r"router\.address: expected one that other nodes reach.*2 nodes.*127\.0\.0\.1"
    ):
        router_addresses("127.0.0.1:50051", ["n1", "n2"])


def test_a_port_beyond_the_last_is_refused():
    with pytest.raises(ConfigError, match=r"port 65535 \+ 1"):
        router_addresses("10.0.0.1:65535", ["n1", "n1"])


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("[::1]", True), ("0.0.0.0", False), ("h", False)],
)
def test_loopback_hosts_are_recognised(host, expected):
    assert is_loopback(host) is expected


def test_node_stands_for_the_address_of_each_routers_node():
    addresses = router_addresses("node:50051", ["n1", "n2", "n1"], ips=["10.0.0.1", "fd00::2", "10.0.0.1"])
    assert addresses == ["10.0.0.1:50051", "[fd00::2]:50051", "10.0.0.1:50052"]


def test_node_means_nothing_without_nodes():
    with pytest.raises(ConfigError, match="without Ray there are no nodes"):
        router_addresses("node:50051", [""])


def test_a_router_that_comes_to_a_node_takes_the_first_port_that_no_other_there_has():
    assert next_address("node:50051", ip="10.0.0.1", taken=[]) == "10.0.0.1:50051"
    assert next_address("0.0.0.0:50051", ip="10.0.0.1", taken=["0.0.0.0:50051", "0.0.0.0:50053"]) == "0.0.0.0:50052"
    assert next_address("node:0", ip="10.0.0.1", taken=["10.0.0.1:40000"]) == "10.0.0.1:0"
    with pytest.raises(ConfigError, match="no port up to 65535 is left"):
        next_address("node:65535", ip="10.0.0.1", taken=["10.0.0.1:65535"])


def test_clients_get_the_nodes_address_where_every_interface_is_bound():
    assert public_address("0.0.0.0:50051", "10.1.2.3") == "10.1.2.3:50051"
    assert public_address("127.0.0.1:50051", "10.1.2.3") == "127.0.0.1:50051"
