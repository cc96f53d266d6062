from __future__ import annotations

import re
import ssl
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.config.load import load_config
from moe_runtime.rpc.certificates import CertificateFiles

RUNNER = CliRunner()


def run(*arguments: str) -> tuple[int, str]:
    done = RUNNER.invoke(app, ["certs", *arguments])
    return done.exit_code, done.output


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_certificates_are_made_for_the_machine_and_the_hosts_that_are_named(tmp_path: Path) -> None:
    code, _ = run(str(tmp_path / "c"), "--host", "router.example", "--host", "10.0.0.7", "--host", "[fd00::2]")
    assert code == 0
    files = CertificateFiles(tmp_path / "c")
    names = read(files.server).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "router.example"]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["127.0.0.1", "::1", "10.0.0.7", "fd00::2"]


def test_each_certificate_is_good_for_its_own_purpose_only(tmp_path: Path) -> None:
    run(str(tmp_path / "c"), "--days", "30")
    files = CertificateFiles(tmp_path / "c")
    for path, usage in (
        (files.server, ExtendedKeyUsageOID.SERVER_AUTH),
        (files.client, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        certificate = read(path)
        certificate.verify_directly_issued_by(read(files.ca))
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert 29 < (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds() / 86400 < 31
    assert read(files.ca).extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.server, files.server_key)


def test_keys_are_their_owner_s_alone(tmp_path: Path) -> None:
    run(str(tmp_path / "c"))
    files = CertificateFiles(tmp_path / "c")
    modes = {path.name: path.stat().st_mode & 0o777 for path in files.paths if path.suffix == ".key"}
    assert modes == {"ca.key": 0o600, "server.key": 0o600, "client.key": 0o600}
    assert files.folder.stat().st_mode & 0o777 == 0o700


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    run(str(tmp_path / "c"))
    files = CertificateFiles(tmp_path / "c")
    before = {path: path.read_bytes() for path in files.paths}
    code, output = run(str(tmp_path / "c"))
    assert code == 1
    assert "expected to make new files" in output
    files.ca.unlink()
    assert run(str(tmp_path / "c"))[0] == 1
    assert not files.ca.exists()
    assert {path: path.read_bytes() for path in files.paths if path.exists()} == {
        path: content for path, content in before.items() if path != files.ca
    }


@pytest.mark.parametrize("host", ["", "a b:1", "router:50051", "http://x", "\N{SNOWMAN}"])
def test_host_that_is_none_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    code, output = run(str(tmp_path / "c"), "--host", host)
    assert code == 1
    assert "expected a name or an address" in output
    assert not (tmp_path / "c").exists()


def test_configuration_that_is_printed_can_be_used(tmp_path: Path) -> None:
    _, output = run(str(tmp_path / "c"))
    [block] = re.findall(r"^  security:\n    tls: .*\n", output, re.MULTILINE)
    layer = {"item_shape": [4], "policy": {"kind": "top_k", "k": 1}, "experts": [{"kind": "identity"}]}
    data = {"layers": {"l": layer}, "router": {"address": "node:1"}, **yaml.safe_load(block)}
    assert all(Path(path).exists() for path in load_config(data).config.security.files.values())
    assert "moe_runtime.MoEClient(ADDRESS, tls=tls)" in output
