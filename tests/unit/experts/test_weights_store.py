import hashlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import fsspec
import pytest
import torch

from moe_runtime.errors import WeightsError
from moe_runtime.experts.build import build_expert, check_weights, initial_module
from moe_runtime.experts.spec import ExpertSpec
from moe_runtime.experts.weights import save_weights, write_manifest
from moe_runtime.experts.weights_cache import WeightsCache
from moe_runtime.experts.weights_store import WeightsStore

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SPEC = ExpertSpec("l", 0, "e", "feed_forward", (4,), options={"hidden_features": 3})


def writes(content: bytes, calls: list[bytes] | None = None):
    def write(file: BinaryIO) -> None:
        if calls is not None:
            calls.append(content)
        file.write(content)

    return write


@pytest.fixture
def cache(tmp_path: Path) -> WeightsCache:
    return WeightsCache(tmp_path / "cache")


def files_in(cache: WeightsCache) -> list[str]:
    """Fetched files, and parts of them."""
    return sorted(path.name for path in cache.folder.iterdir() if path.suffix in (".safetensors", ".part"))


def test_a_file_is_fetched_once(cache: WeightsCache) -> None:
    calls: list[bytes] = []
    for _ in range(2):
        assert cache.get(SHA256, writes(CONTENT, calls), source="s", user="r").read_bytes() == CONTENT
    assert len(calls) == 1


def test_a_corrupt_download_is_refused_and_leaves_no_file(cache: WeightsCache) -> None:
    wrong = hashlib.sha256(b"junk").hexdigest()
    with pytest.raises(WeightsError, match=f"^s: expected sha256 {SHA256}, fetched a file with {wrong}"):
        cache.get(SHA256, writes(b"junk"), source="s", user="r")
    assert files_in(cache) == []
    assert cache.get(SHA256, writes(CONTENT), source="s", user="r").read_bytes() == CONTENT


def test_a_cached_file_that_was_spoiled_is_fetched_again(cache: WeightsCache) -> None:
    cache.get(SHA256, writes(CONTENT), source="s", user="r").write_bytes(b"junk")
    assert cache.get(SHA256, writes(CONTENT), source="s", user="r").read_bytes() == CONTENT


def test_a_fetch_that_fails_can_be_repeated(cache: WeightsCache) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(CONTENT[:10])
        raise WeightsError("the line is dead")

    with pytest.raises(WeightsError, match="the line is dead"):
        cache.get(SHA256, fail, source="s", user="r")
    assert cache.get(SHA256, writes(CONTENT), source="s", user="r").read_bytes() == CONTENT
    assert files_in(cache) == [f"{SHA256}.safetensors"]


def test_what_has_no_known_hash_gets_its_own(cache: WeightsCache) -> None:
    assert cache.add(writes(CONTENT), source="s", user="r").name == f"{SHA256}.safetensors"


def test_a_hash_that_is_none_never_becomes_a_path(cache: WeightsCache) -> None:
    with pytest.raises(WeightsError, match="expected a sha256 of 64 hex digits"):
        cache.get("../../etc/passwd", writes(CONTENT), source="s", user="r")


#: Fetches the file, and says so in a log that all fetchers share.
FETCHER = """
import os, sys
from pathlib import Path
from moe_runtime.experts.weights_cache import WeightsCache
folder, log, sha256 = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def write(file):
    with open(log, "a") as lines:
        lines.write("fetched\\n")
    file.write(b"weights" * 500)
    file.flush()
    if len(sys.argv) > 4:
        print("half", flush=True)
        sys.stdin.read()
    file.write(b"weights" * 500)
print(WeightsCache(folder).get(sha256, write, source="s", user="r").name)
"""


def start_fetcher(cache: WeightsCache, log: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FETCHER, str(cache.folder), str(log), SHA256, *more]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_that_want_one_file_at_the_same_time_fetch_it_once(cache: WeightsCache, tmp_path: Path) -> None:
    fetchers = [start_fetcher(cache, tmp_path / "log") for _ in range(3)]
    outputs = [fetcher.communicate(timeout=50)[0].strip() for fetcher in fetchers]
    assert outputs == [f"{SHA256}.safetensors"] * 3
    assert (tmp_path / "log").read_text().splitlines() == ["fetched"]


def test_a_fetcher_that_is_killed_midway_leaves_no_bad_file_and_holds_nobody_up(
    cache: WeightsCache, tmp_path: Path
) -> None:
    fetcher = start_fetcher(cache, tmp_path / "log", "pause")
    assert fetcher.stdout is not None
    assert fetcher.stdout.readline() == "half\n"
    fetcher.send_signal(signal.SIGKILL)
    fetcher.communicate()
    assert files_in(cache) == [f"{SHA256}.part"]
    assert cache.get(SHA256, writes(CONTENT), source="s", user="r").read_bytes() == CONTENT
    assert files_in(cache) == [f"{SHA256}.safetensors"]


def test_a_file_stays_as_long_as_it_has_users(cache: WeightsCache) -> None:
    for user in ("one", "two"):
        path = cache.get(SHA256, writes(CONTENT), source="s", user=user)
    assert cache.release("one").num_files == 0
    assert path.is_file()
    removed = cache.release("two")
    assert (removed.num_files, removed.num_bytes) == (1, len(CONTENT))
    assert not cache.folder.exists()
    assert cache.release("two").num_files == 0


def test_a_release_of_one_name_leaves_a_longer_one_alone(cache: WeightsCache) -> None:
    path = cache.add(writes(CONTENT), source="s", user="prod.two")
    cache.release("two")
    assert path.is_file()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    folder.mkdir()
    save_weights(folder / "e.safetensors", initial_module(SPEC).state_dict())
    return folder / "e.safetensors"


def with_weights(source: str) -> ExpertSpec:
    return ExpertSpec(**{**vars(SPEC), "seed": 5, "weights": source})


def test_an_expert_gets_its_weights_from_an_address(weights: Path, cache: WeightsCache) -> None:
    spec = with_weights(weights.as_uri())
    expert = build_expert(spec, store=WeightsStore(cache, user="r"))
    assert torch.equal(next(expert.module.parameters()), next(initial_module(SPEC).parameters()))
    assert expert.weights_version == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert check_weights(spec) == "unknown"


def test_a_manifest_beside_an_address_saves_fetching_twice(weights: Path, cache: WeightsCache) -> None:
    write_manifest(weights.parent)
    store, source = WeightsStore(cache, user="r"), weights.as_uri()
    first = store.fetch(source)
    content = weights.read_bytes()
    # Gone, but for what is listed: nobody looks at the file again.
    weights.unlink()
    assert store.fetch(source) == first
    assert first.read_bytes() == content


def test_a_file_behind_an_address_that_is_not_what_the_manifest_lists_is_refused(
    weights: Path, cache: WeightsCache
) -> None:
    write_manifest(weights.parent)
    weights.write_bytes(b"junk")
    with pytest.raises(WeightsError, match=r"layers\.l\.experts\[e\]\.weights: file:.*: expected sha256"):
        build_expert(with_weights(weights.as_uri()), store=WeightsStore(cache, user="r"))


def test_a_malformed_manifest_behind_an_address_is_told(weights: Path, cache: WeightsCache) -> None:
    (weights.parent / "manifest.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"manifest\.json: expected a manifest of weight files"):
        WeightsStore(cache, user="r").fetch(weights.as_uri())


def test_any_store_of_fsspec_will_do(weights: Path, cache: WeightsCache) -> None:
    fsspec.filesystem("memory").pipe("/deploy-test/e.safetensors", weights.read_bytes())
    fetched = WeightsStore(cache, user="r").fetch("memory://deploy-test/e.safetensors")
    assert fetched.read_bytes() == weights.read_bytes()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("memory://deploy-test/none", "expected a weight file, found none"),
        ("nowhere://x/y", "expected a file that fsspec can read, found: ValueError"),
    ],
)
def test_an_address_that_leads_nowhere_is_told(source: str, reason: str, cache: WeightsCache) -> None:
    with pytest.raises(WeightsError, match=f"{source}: {reason}"):
        check_weights(with_weights(source))
    with pytest.raises(WeightsError, match="layers"):
        build_expert(with_weights(source), store=WeightsStore(cache, user="r"))


def test_a_bundled_file_that_is_elsewhere_is_read_from_the_bundle(cache: WeightsCache) -> None:
    asked: list[str] = []

    def read(sha256: str, file: BinaryIO) -> None:
        asked.append(sha256)
        file.write(CONTENT)

    store = WeightsStore(cache, user="r", listed={"/nowhere/e": SHA256}, read_bundle=read)
    assert store.fetch("/nowhere/e").read_bytes() == CONTENT
    assert store.fetch("/nowhere/e") == cache.folder / f"{SHA256}.safetensors"
    assert asked == [SHA256]


def test_a_bundled_file_that_is_on_this_node_is_taken_where_it_is(tmp_path: Path, cache: WeightsCache) -> None:
    path = tmp_path / "e"
    path.write_bytes(CONTENT)
    assert WeightsStore(cache, user="r", listed={str(path): SHA256}).fetch(str(path)) == path
    assert not cache.folder.exists()
