import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_runtime.errors import ConfigError, StartError
from moe_runtime.launch.bundle import collect_bundle, parse_bundle
from moe_runtime.launch.bundle_store import BundleStore

CONFIG = """
name: small
layers:
  l:
    item_shape: [8]
    gate: {kind: linear, weights: gate.safetensors}
    experts:
      - {kind: feed_forward, count: 2, weights: "w/e{i}.safetensors"}
      - {kind: identity}
      - {kind: conv, weights: "s3://bucket/conv.safetensors"}
      - {kind: swiglu, weights: /shared/swiglu.safetensors}
"""
FILES = {"gate.safetensors": b"gate", "w/e0.safetensors": b"zero", "w/e1.safetensors": b"one"}


def write_config(folder: Path, *, text: str = CONFIG, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    config = folder / "config.yaml"
    config.write_text(text, encoding="utf-8")
    return config


def test_a_bundle_holds_the_configuration_and_the_files_it_names_by_relative_paths(tmp_path: Path) -> None:
    bundle = collect_bundle(write_config(tmp_path))
    assert [file.path for file in bundle.files] == ["config.yaml", *sorted(FILES)]
    assert bundle.runtime == "small"
    assert bundle.num_bytes == len(CONFIG) + 11


def test_a_manifest_of_hashes_beside_the_weights_goes_along(tmp_path: Path) -> None:
    config = write_config(tmp_path, files={**FILES, "w/manifest.json": b"{}", "w/notes.txt": b"-"})
    assert "w/manifest.json" in {file.path for file in collect_bundle(config).files}
    assert "w/notes.txt" not in {file.path for file in collect_bundle(config).files}


def test_the_same_contents_elsewhere_have_the_same_id(tmp_path: Path) -> None:
    first, second = write_config(tmp_path / "a"), write_config(tmp_path / "b")
    assert collect_bundle(first).id == collect_bundle(second).id


@pytest.mark.parametrize("changed", ["w/e1.safetensors", "gate.safetensors", "config.yaml"])
def test_any_other_content_has_another_id(tmp_path: Path, changed: str) -> None:
    config = write_config(tmp_path)
    before = collect_bundle(config).id
    (tmp_path / changed).write_bytes((tmp_path / changed).read_bytes() + b"\n")
    assert collect_bundle(config).id != before


def test_every_missing_file_is_told_with_its_key(tmp_path: Path) -> None:
    config = write_config(tmp_path, files={"w/e0.safetensors": b"zero"})
    with pytest.raises(ConfigError) as caught:
        collect_bundle(config)
    assert str(caught.value).splitlines() == [
        f"config.yaml: layers.l.gate.weights: {tmp_path}/gate.safetensors: expected a file, found none",
        f"config.yaml: layers.l.experts.0.weights: {tmp_path}/w/e1.safetensors: expected a file, found none",
    ]


def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    config = write_config(tmp_path / "c", text=CONFIG.replace("gate.safetensors", "../secret"))
    with pytest.raises(ConfigError, match=r"layers\.l\.gate\.weights: expected a file below .*, found '\.\./secret'"):
        collect_bundle(config)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    config = write_config(tmp_path / "c")
    (tmp_path / "c" / "gate.safetensors").unlink()
    (tmp_path / "c" / "gate.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=rf"which leads to {tmp_path}/secret; put the file there"):
        collect_bundle(config)


def test_a_link_within_the_folder_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    config = write_config(tmp_path / "a")
    before = collect_bundle(config).id
    (tmp_path / "a" / "gate.safetensors").rename(tmp_path / "a" / "real")
    (tmp_path / "a" / "gate.safetensors").symlink_to("real")
    assert collect_bundle(config).id == before


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "w/../../x", ""])
def test_a_manifest_whose_paths_lead_out_is_refused(tmp_path: Path, path: str) -> None:
    data = json.loads(collect_bundle(write_config(tmp_path)).to_json())
    data["files"][0]["path"] = path
    with pytest.raises(ConfigError, match="expected a path within the bundle"):
        parse_bundle(json.dumps(data), origin="m")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "files": [1]}'])
def test_a_malformed_manifest_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^m: expected"):
        parse_bundle(text, origin="m")


def test_a_stored_bundle_looks_like_the_original_and_storing_it_again_changes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c")
    store = BundleStore(tmp_path / "home")
    stored = store.store(config)
    assert {name: (stored.folder / name).read_bytes() for name in FILES} == FILES
    assert stored.config.read_text() == CONFIG
    assert store.store(config) == stored == store.store(stored.config)
    assert stored.listed[str(stored.folder / "w/e0.safetensors")] in stored.paths


def test_a_bundle_comes_from_a_manifest_and_the_files_that_were_brought_under_their_hashes(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c")
    bundle, store = collect_bundle(config), BundleStore(tmp_path / "home")
    store.blobs.mkdir(parents=True)
    store.bundles.mkdir()
    manifest = store.bundles / f"{bundle.id}.bundle.json"
    manifest.write_text(bundle.to_json())
    with pytest.raises(StartError, match=r"expected config\.yaml at .*, found none or a corrupt one"):
        store.store(manifest)
    for file in bundle.files:
        (store.blobs / file.sha256).write_bytes((tmp_path / "c" / file.path).read_bytes())
    assert store.store(manifest).config.read_text() == CONFIG
    store.remove("small")
    assert not (tmp_path / "home").exists()


def test_a_file_that_was_spoiled_in_the_store_is_mended(tmp_path: Path) -> None:
    config, store = write_config(tmp_path / "c"), BundleStore(tmp_path / "home")
    stored = store.store(config)
    spoiled = stored.folder / "w/e0.safetensors"
    spoiled.unlink()
    spoiled.write_bytes(b"junk")
    assert (store.store(config).folder / "w/e0.safetensors").read_bytes() == b"zero"


def test_removing_a_runtime_keeps_what_others_need(tmp_path: Path) -> None:
    store = BundleStore(tmp_path / "home")
    store.store(write_config(tmp_path / "a"))
    other = store.store(write_config(tmp_path / "b", text=CONFIG.replace("small", "other")))
    removed = store.remove("small")
    assert (removed.num_files, removed.num_bytes) == (1, len(CONFIG) + 11)
    assert (other.folder / "w/e0.safetensors").read_bytes() == b"zero"
    assert len(list(store.blobs.iterdir())) == 4
    store.remove("other")
    assert not (tmp_path / "home").exists()
    assert store.remove("other").num_files == 0


#: Stores a bundle, and stops itself for good when the second file is about to be linked.
KILLED = """
import os, signal, sys
from pathlib import Path
from moe_runtime.launch import bundle_store
calls = []
link = os.link
def die(source, target):
    calls.append(target)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    link(source, target)
os.link = die
bundle_store.BundleStore(Path(sys.argv[1])).store(Path(sys.argv[2]))
"""


def test_storing_that_was_killed_midway_can_be_repeated_and_leaves_nothing(tmp_path: Path) -> None:
    config, store = write_config(tmp_path / "c"), BundleStore(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", KILLED, str(store.home), str(config)], check=False, timeout=50)
    assert done.returncode == -signal.SIGKILL
    assert not list(store.bundles.glob("*/bundle.json"))
    assert {name: (store.store(config).folder / name).read_bytes() for name in FILES} == FILES
    store.remove("small")
    assert os.listdir(tmp_path) == ["c"]


def test_keys_and_tokens_are_not_bundled(tmp_path: Path) -> None:
    tls = 'tls: {cert: server.crt, key: /etc/moe/server.key, client_ca: "~/ca.crt"}'
    text = f"{CONFIG}security: {{{tls}, tokens: secrets/tokens.yaml}}\n"
    config = write_config(tmp_path, text=text, files={**FILES, "server.crt": b"c", "secrets/tokens.yaml": b"t"})
    with pytest.raises(ConfigError) as caught:
        collect_bundle(config)
    first, second = str(caught.value).splitlines()
    assert first.startswith("config.yaml: security.tokens: expected an absolute path")
    assert second.startswith("config.yaml: security.tls.cert: expected an absolute path")
    absolute = text.replace("server.crt", "/etc/moe/server.crt").replace("secrets/tokens.yaml", "~/tokens.yaml")
    bundle = collect_bundle(write_config(tmp_path, text=absolute))
    assert [file.path for file in bundle.files] == ["config.yaml", *sorted(FILES)]
