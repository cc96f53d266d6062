from __future__ import annotations

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.config.observing import MetricsConfig
from moe_runtime.config.runtime import RuntimeConfig
from moe_runtime.errors import ConfigError
from moe_runtime.logs import LogSettings


def load(**blocks: object) -> RuntimeConfig:
    layers = {"l": {"item_shape": [4], "experts": [{"kind": "identity", "count": 2}]}}
    return load_config({"layers": layers, **blocks}).config


def test_by_default_no_port_is_opened_and_warnings_are_logged_for_people() -> None:
    config = load()
    assert config.metrics.address is None
    assert config.logging.settings == LogSettings("human", "warning")


@pytest.mark.parametrize(
    ("address", "token", "needed"),
    [
        ("127.0.0.1:9464", None, False),
        ("[::1]:9464", None, False),
        ("localhost:9464", True, True),
        ("0.0.0.0:9464", None, True),
        ("10.0.0.1:9464", True, True),
        (None, None, False),
    ],
)
def test_a_scrape_shows_a_token_where_others_reach_the_address(
    address: str | None, token: bool | None, needed: bool
) -> None:
    assert MetricsConfig(address=address, token=token).needs_token is needed


@pytest.mark.parametrize(
    ("block", "mistake"),
    [
        ({"metrics": {"address": "9464"}}, "metrics.address: expected HOST:PORT"),
        ({"metrics": {"address": "127.0.0.1:65536"}}, "metrics.address: expected HOST:PORT"),
        ({"metrics": {"hottest_experts": 0}}, "metrics.hottest_experts: "),
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
