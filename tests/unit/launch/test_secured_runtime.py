"""A whole runtime in one process, served by TLS to those with tokens, and what the command line sees of it."""

from __future__ import annotations

import http.client
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import moe_runtime as moe
from fakes.secured import ALICE, METRICS, write_tokens
from moe_runtime.cli.app import app
from moe_runtime.cli.serving import print_welcome
from moe_runtime.launch.build import validate as moe_validate
from moe_runtime.rpc.certificates import CertificateFiles, make_certificates

CONFIG = """
name: secured
device: cpu
layers:
  l: {item_shape: [4], policy: {kind: top_k, k: 1}, experts: [{kind: identity}]}
router: {address: "127.0.0.1:0"}
security:
  tls: {cert: certs/server.crt, key: certs/server.key, client_ca: certs/ca.crt}
  tokens: tokens.yaml
"""


@pytest.fixture
def certs(tmp_path: Path) -> CertificateFiles:
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    write_tokens(tmp_path / "tokens.yaml")
    return make_certificates(tmp_path / "certs")


def status(address: str, *options: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["status", "--address", address, "--json", *options], env=env)
    return done.exit_code, done.output


def test_runtime_is_called_by_those_with_certificate_and_token_alone(tmp_path: Path, certs: CertificateFiles) -> None:
    tls = moe.ClientTLS(ca=certs.ca, cert=certs.client, key=certs.client_key)
    rows = np.ones((2, 4), np.float32)
    with moe.serve(tmp_path / "config.yaml", ray=False) as runtime:
        with moe.MoEClient(runtime.address, tls=tls, token=ALICE) as client:
            np.testing.assert_allclose(client.forward(rows, layer="l", timeout_s=20).outputs, rows, rtol=1e-6)
        with moe.MoEClient(runtime.address, tls=tls, token="") as client, pytest.raises(moe.UnauthenticatedError):
            client.forward(rows, layer="l", timeout_s=20)


def test_status_shows_its_token_and_certificate(tmp_path: Path, certs: CertificateFiles) -> None:
    token = tmp_path / "token"
    token.write_text(METRICS + "\n", encoding="utf-8")
    token.chmod(0o600)
    files = ("--ca", str(certs.ca), "--cert", str(certs.client), "--key", str(certs.client_key))
    with moe.serve(tmp_path / "config.yaml", ray=False) as runtime:
        code, output = status(runtime.address, "--token-file", str(token), *files)
        assert code == 0, output
        assert json.loads(output)["routers"][0]["description"]["name"] == "secured"
        assert status(runtime.address, *files, env={"MOE_RUNTIME_TOKEN": METRICS})[0] == 0
        code, output = status(runtime.address, *files)
        assert code == 1
        assert "expected a token" in output
        token.chmod(0o644)
        code, output = status(runtime.address, "--token-file", str(token), *files)
        assert code == 1
        assert "chmod 600" in output


def scrape(address: str, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    try:
        connection.request("GET", "/metrics", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_metrics_are_scraped_with_a_token_of_their_scope(tmp_path: Path, certs: CertificateFiles) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG + 'metrics: {address: "127.0.0.1:0", token: true}\n', encoding="utf-8")
    with moe.serve(config, ray=False) as runtime:
        (router,) = runtime.describe()["routers"]
        answers = [scrape(router["metrics_address"], token) for token in (None, ALICE, METRICS)]
    assert answers == [401, 401, 200]


def test_serving_says_what_calls_need(tmp_path: Path, certs: CertificateFiles) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_welcome(["a:1"], layers=["l"], console=console, last=("stop", "s"), config=tmp_path / "config.yaml")
    assert isinstance(console.file, io.StringIO)
    [needs] = [line for line in console.file.getvalue().splitlines() if "both with" in line]
    assert all(option in needs for option in ("--ca", "--cert", "--key", "--token-file", "ClientTLS", "token="))


def test_files_are_checked_before_anything_starts(tmp_path: Path, certs: CertificateFiles) -> None:
    assert moe_validate(tmp_path / "config.yaml").name == "secured"
    write_tokens(tmp_path / "tokens.yaml", "- {name: alice}")
    with pytest.raises(moe.ConfigError, match=r"tokens\.yaml: 0\.scopes"):
        moe_validate(tmp_path / "config.yaml")
    certs.server_key.write_bytes(certs.client_key.read_bytes())
    with pytest.raises(moe.ConfigError, match="expected a PEM certificate and its unencrypted key"):
        moe_validate(tmp_path / "config.yaml")
    # They may be files of the routers' nodes, which this machine need not be one of.
    certs.ca.unlink()
    assert moe_validate(tmp_path / "config.yaml").name == "secured"


@pytest.mark.parametrize("file", ["certs/server.crt", "certs/server.key", "certs/ca.crt", "tokens.yaml"])
def test_runtime_that_lacks_a_file_does_not_start(tmp_path: Path, certs: CertificateFiles, file: str) -> None:
    (tmp_path / file).unlink()
    with pytest.raises(moe.ConfigError, match="expected a file"):
        moe.serve(tmp_path / "config.yaml", ray=False)


def test_token_of_the_environment_is_the_default(
    tmp_path: Path, certs: CertificateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_RUNTIME_TOKEN", METRICS)
    tls: dict[str, Any] = {"ca": certs.ca, "cert": certs.client, "key": certs.client_key}
    with (
        moe.serve(tmp_path / "config.yaml", ray=False) as runtime,
        moe.MoEClient(runtime.address, tls=moe.ClientTLS(**tls)) as client,
    ):
        assert client.status(timeout_s=20)["draining"] is False
    assert os.environ["MOE_RUNTIME_TOKEN"] not in repr(client._connector)
