from __future__ import annotations

import os
import socket

import pytest

from moe_runtime.errors import StartError
from moe_runtime.ray_backend.cluster import Cluster, connect, existing_address


@pytest.fixture(autouse=True)
def _no_cluster_around(monkeypatch):
    for key in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"):
        # Set before it is deleted, so that what the code sets is undone too.
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)


@pytest.fixture
def listening():
    """An address where something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, None, None),
        ("10.0.0.1:6379", None, "10.0.0.1:6379"),
        (None, "10.0.0.2:6379", "10.0.0.2:6379"),
        ("10.0.0.1:6379", "10.0.0.2:6379", "10.0.0.1:6379"),
        ("local", "10.0.0.2:6379", None),
        (None, "local", None),
    ],
)
def test_the_address_given_comes_before_the_environment_and_local_means_here(monkeypatch, given, environment, expected):
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert existing_address(given) == expected


def test_the_authentication_mode_is_set_before_ray_starts_and_follows_the_token(monkeypatch, tmp_path, listening):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StartError, match=r"a unit test called ray\.init"):
        connect(listening)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    monkeypatch.delenv("RAY_AUTH_MODE")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    with pytest.raises(StartError, match=r"a unit test called ray\.init"):
        connect(listening)
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_mode_that_is_set_already_is_left_alone(monkeypatch, listening):
    monkeypatch.setenv("RAY_AUTH_MODE", "k8s")
    with pytest.raises(StartError, match=r"a unit test called ray\.init"):
        connect(listening)
    assert os.environ["RAY_AUTH_MODE"] == "k8s"


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "nowhere.invalid"])
def test_an_address_where_nobody_listens_is_refused_before_ray_tries_it(host):
    with pytest.raises(StartError) as caught:
        connect(f"{host}:1")
    assert str(caught.value) == (
        f"no Ray cluster answers at {host}:1; start one with `ray start --head` or leave the address out"
    )
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize("address", ["local", "auto", "ray://127.0.0.1:1"])
def test_an_address_that_ray_resolves_itself_is_left_to_it(address):
    with pytest.raises(StartError, match=r"a unit test called ray\.init"):
        connect(address)


def test_whatever_ray_fails_with_is_a_start_error_with_its_cause():
    with pytest.raises(StartError, match="Ray cannot be started here: a unit test called") as caught:
        connect("local")
    assert isinstance(caught.value.__cause__, AssertionError)


def test_disconnecting_leaves_ray_alone_where_it_was_initialised_before():
    Cluster("10.0.0.1:6379", "n", 0.0, embedded=False, connected_here=False).disconnect()
