"""Weight files that a configuration names by an address: whatever fsspec opens (``s3://``, ``gs://``, ``https://``)."""

from __future__ import annotations

import shutil
from typing import BinaryIO

import fsspec

from moe_runtime.errors import WeightsError
from moe_runtime.experts.foreign import in_one_line
from moe_runtime.experts.weights import MANIFEST_NAME, listed_sha256

_CHUNK_BYTES = 4 << 20


def fetch_uri(uri: str, file: BinaryIO) -> None:
    """Write the bytes at an address into a file; credentials are those of the environment.

    Raises:
        WeightsError: If there is nothing, or it cannot be read.
    """
    try:
        with fsspec.open(uri, "rb") as remote:
            shutil.copyfileobj(remote, file, _CHUNK_BYTES)
    except FileNotFoundError as exc:
        raise WeightsError(f"{uri}: expected a weight file, found none") from exc
    except Exception as exc:
        # Every store has errors of its own.
        raise _unreadable(uri, exc) from exc


def manifest_sha256(uri: str) -> str | None:
    """The hash that the ``manifest.json`` beside a file lists for it; None without a manifest, or an entry in it.

    Raises:
        WeightsError: If the manifest is malformed, or cannot be read.
    """
    folder, _, name = uri.rpartition("/")
    manifest = f"{folder}/{MANIFEST_NAME}"
    try:
        with fsspec.open(manifest, "rb") as remote:
            text = remote.read()
    except FileNotFoundError:
        return None
    except Exception as exc:
        raise _unreadable(manifest, exc) from exc
    return listed_sha256(text, name=name, manifest=manifest)


def check_uri(uri: str) -> str | None:
    """The hash that is listed for a file, after a look whether it is there; nothing is fetched.

    Raises:
        WeightsError: If it is not there, or cannot be looked for.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        is_there = filesystem.isfile(path)
    except Exception as exc:
        raise _unreadable(uri, exc) from exc
    if not is_there:
        raise WeightsError(f"{uri}: expected a weight file, found none")
    return manifest_sha256(uri)


def _unreadable(uri: str, error: Exception) -> WeightsError:
    hint = ""
    if isinstance(error, ImportError):
        hint = "; install what fsspec names on every node"
    return WeightsError(f"{uri}: expected a file that fsspec can read, found: {in_one_line(error)}{hint}")
