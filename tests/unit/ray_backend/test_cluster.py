from __future__ import annotations

import os

import pytest

from moe_runtime.ray_backend.cluster import Cluster, connect, existing_address


@pytest.fixture(autouse=True)
def _no_cluster_around(monkeypatch):
    for key in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"):
        # Set before it is deleted, so that what the code sets is undone too.
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)


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


def test_the_authentication_mode_is_set_before_ray_starts_and_follows_the_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AssertionError, match=r"ray\.init"):
        connect("10.0.0.1:6379")
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    monkeypatch.delenv("RAY_AUTH_MODE")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    with pytest.raises(AssertionError, match=r"ray\.init"):
        connect("10.0.0.1:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_mode_that_is_set_already_is_left_alone(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "k8s")
    with pytest.raises(AssertionError, match=r"ray\.init"):
        connect("10.0.0.1:6379")
    assert os.environ["RAY_AUTH_MODE"] == "k8s"


def test_disconnecting_leaves_ray_alone_where_it_was_initialised_before():
    Cluster("10.0.0.1:6379", "n", 0.0, embedded=False, connected_here=False).disconnect()
