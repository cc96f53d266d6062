from __future__ import annotations

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.config.observing import MetricsConfig
from moe_runtime.config.runtime import RuntimeConfig
from moe_runtime.config.security import SecurityConfig
from moe_runtime.errors import ConfigError
from moe_runtime.logs import LogSettings


def load(**blocks: object) -> RuntimeConfig:
    layers = {"l": {"item_shape": [4], "experts": [{"kind": "identity", "count": 2}]}}
    return load_config({"layers": layers, **blocks}).config


def test_by_default_no_port_is_opened_and_warnings_are_logged_for_people() -> None:
    config = load()
    assert config.metrics.address is None
    assert config.logging.settings == LogSettings("human", "warning")


OPEN = SecurityConfig(insecure=True)
TOKENS = SecurityConfig(tokens="tokens.yaml")
BOTH = SecurityConfig(tokens="tokens.yaml", insecure=True)


@pytest.mark.parametrize(
    ("address", "token", "security", "needed"),
    [
        ("127.0.0.1:9464", None, TOKENS, False),
        ("[::1]:9464", None, TOKENS, False),
        ("localhost:9464", True, TOKENS, True),
        ("0.0.0.0:9464", None, TOKENS, True),
        ("0.0.0.0:9464", None, BOTH, True),
        ("0.0.0.0:9464", False, BOTH, False),
        ("0.0.0.0:9464", None, OPEN, False),
        ("10.0.0.1:9464", True, TOKENS, True),
        (None, None, TOKENS, False),
        (None, True, TOKENS, False),
    ],
)
def test_a_scrape_shows_a_token_where_others_reach_the_address(
    address: str | None, token: bool | None, security: SecurityConfig, needed: bool
) -> None:
    metrics = MetricsConfig(address=address, token=token)
    assert metrics.needs_token(security) is needed
    metrics.check(security)


@pytest.mark.parametrize(
    ("block", "mistake"),
    [
        ({"metrics": {"address": "9464"}}, "metrics.address: expected HOST:PORT"),
        ({"metrics": {"address": "127.0.0.1:65536"}}, "metrics.address: expected HOST:PORT"),
        ({"metrics": {"hottest_experts": 0}}, "metrics.hottest_experts: "),
        (
            {"metrics": {"address": "0.0.0.0:9464"}},
            "metrics.token: expected a file of tokens at security.tokens, since scrapes of 0.0.0.0:9464",
        ),
        (
            {"metrics": {"address": "0.0.0.0:9464", "token": False}},
            "metrics.token: expected true where others reach 0.0.0.0:9464, found false",
        ),
        ({"logging": {"format": "xml"}}, "logging.format: "),
        ({"logging": {"level": "loud"}}, "logging.level: "),
    ],
)
def test_a_mistake_is_told_by_its_key(block: dict[str, object], mistake: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(**block)
    assert mistake in str(raised.value)
