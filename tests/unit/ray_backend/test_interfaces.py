from __future__ import annotations

import pytest

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.interfaces import address_in, interface_addresses

ADDRESSES = ["127.0.0.1", "10.1.0.7", "10.2.0.7", "10.2.0.9", "fd00::7"]


def test_a_node_binds_its_address_in_the_network():
    assert address_in("10.1.0.0/16", known="10.2.0.7", node="n1", addresses=ADDRESSES) == "10.1.0.7"
    assert address_in("fd00::/8", known="10.2.0.7", node="n1", addresses=ADDRESSES) == "fd00::7"


def test_of_several_addresses_in_the_network_the_known_one_is_taken():
    assert address_in("10.2.0.0/16", known="10.2.0.9", node="n1", addresses=ADDRESSES) == "10.2.0.9"


def test_a_node_without_an_address_in_the_network_is_named_with_it():
    with pytest.raises(StartError, match=r"expected node n1 to have an address in 10\.9\.0\.0/16, found 10\.1\.0\.7, "):
        address_in("10.9.0.0/16", known="10.2.0.7", node="n1", addresses=ADDRESSES)


def test_this_machine_has_its_loopback_address():
    assert "127.0.0.1" in interface_addresses()
