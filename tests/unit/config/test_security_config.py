from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.config.security import SecurityConfig, TLSConfig
from moe_runtime.errors import ConfigError

TLS = {"cert": "server.crt", "key": "server.key"}


def config(address: str, security: dict[str, Any] | None = None) -> dict[str, Any]:
    layer = {"item_shape": [4], "policy": {"kind": "top_k", "k": 1}, "experts": [{"kind": "identity"}]}
    data: dict[str, Any] = {"layers": {"l": layer}, "router": {"address": address}}
    return data if security is None else {**data, "security": security}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1"])
def test_plain_text_is_served_on_loopback_addresses(address: str) -> None:
    assert load_config(config(address)).config.security == SecurityConfig()


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "node:1", "10.0.0.7:1", "router.example:1", "127.1.example:1"]
)
@pytest.mark.parametrize("security", [None, {}, {"tokens": "tokens.yaml"}, {"insecure": False}])
def test_plain_text_elsewhere_has_to_be_written_down(address: str, security: dict[str, Any] | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config(address, security))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("security.tls: expected cert and key")
    assert address in line
    assert "moe-runtime certs" in line
    assert "insecure: true" in line
    load_config(config(address, {**(security or {}), "insecure": True}))
    load_config(config(address, {**(security or {}), "tls": TLS}))


@pytest.mark.parametrize(
    ("security", "line"),
    [
        ({"tls": {"cert": "a"}}, "security.tls.key: missing; expected a PEM file"),
        ({"tls": {**TLS, "ca": "x"}}, "security.tls.ca: unknown key"),
        ({"tsl": TLS}, "security.tsl: unknown key; did you mean tls?"),
        ({"insecure": "perhaps"}, "security.insecure: expected true or false, found 'perhaps'"),
        ({"reflection": True}, "security.reflection: unknown key"),
    ],
)
def test_mistake_in_the_block_is_told_with_its_key(security: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config("127.0.0.1:1", security))
    assert str(caught.value).startswith(line)


def test_paths_start_at_the_configuration_s_folder_unless_they_are_the_node_s() -> None:
    tls = TLSConfig(cert="tls/server.crt", key="/etc/server.key", client_ca="~/ca.crt")
    located = SecurityConfig(tls=tls, tokens="tokens.yaml").located(Path("/srv/app"))
    assert located.files == {
        "security.tls.cert": "/srv/app/tls/server.crt",
        "security.tls.key": "/etc/server.key",
        "security.tls.client_ca": "~/ca.crt",
        "security.tokens": "/srv/app/tokens.yaml",
    }
    assert SecurityConfig().located(Path("/srv")) == SecurityConfig()
