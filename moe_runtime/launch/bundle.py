"""A bundle: a configuration and every file that it names by a relative path, under the hash of all their contents."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from moe_runtime.config.load import is_uri, load_config
from moe_runtime.config.strict import NAME_PATTERN
from moe_runtime.errors import ConfigError
from moe_runtime.experts.weights import MANIFEST_NAME, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moe_runtime.config.load import LoadedConfig

MANIFEST_FILE = "bundle.json"
_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BundledFile:
    """One file of a bundle.

    Attributes:
        path: Relative to the configuration's folder, with ``/``; never leads out of it.
        sha256: Of its content, in hex.
        num_bytes: Its size.
    """

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Bundle:
    """What a runtime is deployed from.

    Attributes:
        runtime: The runtime's name.
        config: Path of the configuration among the files.
        files: Sorted by path.
    """

    runtime: str
    config: str
    files: tuple[BundledFile, ...]

    @property
    def id(self) -> str:
        """sha256 in hex: the same for the same contents under the same paths, wherever they lie."""
        listed = [[file.path, file.sha256] for file in self.files]
        return hashlib.sha256(json.dumps([self.config, listed]).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.num_bytes for file in self.files)

    def to_json(self) -> str:
        """The bundle's manifest, as ``parse_bundle`` reads it."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"


def collect_bundle(config: Path) -> Bundle:
    """The bundle of a configuration file.

    Relative paths are the files of this machine that go with the configuration; absolute paths and addresses are
    meant as the nodes see them, and stay what they are.

    Raises:
        ConfigError: If the configuration cannot work, or a file is missing, is none, or lies outside the
            configuration's folder; one line per mistake.
    """
    config = config.expanduser().absolute()
    loaded = load_config(config)
    paths = {config.name, *_relative_paths(loaded)}
    files = tuple(_bundled(loaded.base_dir, path) for path in sorted(paths))
    return Bundle(runtime=loaded.config.name, config=config.name, files=files)


def parse_bundle(text: str, *, origin: str) -> Bundle:
    """The bundle that a manifest describes.

    Args:
        text: What ``Bundle.to_json`` made.
        origin: How messages name it.

    Raises:
        ConfigError: If it is malformed, or a path in it leads out of the bundle.
    """
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise ConfigError(f"{origin}: expected format {_FORMAT}, found {data['format']!r}")
        files = tuple(_checked(BundledFile(**file)) for file in data["files"])
        bundle = Bundle(runtime=data["runtime"], config=data["config"], files=files)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ConfigError(f"{origin}: expected the manifest of a bundle, found something else: {exc!r}") from exc
    if bundle.config not in {file.path for file in files} or not re.match(NAME_PATTERN, bundle.runtime):
        raise ConfigError(f"{origin}: expected a runtime's name and its configuration among the files, found neither")
    return bundle


def _checked(file: BundledFile) -> BundledFile:
    path = PurePosixPath(file.path)
    if path.is_absolute() or ".." in path.parts or str(path) in ("", ".") or not _SHA256.fullmatch(file.sha256):
        raise ConfigError(f"{MANIFEST_FILE}: expected a path within the bundle and a sha256, found {file!r}")
    return file


def _relative_paths(loaded: LoadedConfig) -> set[str]:
    """The files that a configuration names by relative paths, and the manifests beside them.

    Raises:
        ConfigError: With one line per file that is missing or lies outside.
    """
    mistakes, paths = _secrets_to_ship(loaded), set()
    for key, source in _sources(loaded):
        if is_uri(source) or Path(source).is_absolute():
            continue
        mistake = _mistake(loaded.base_dir, source)
        if mistake is not None:
            mistakes.append(f"{loaded.origin}{key}: {mistake}")
            continue
        path = Path(os.path.normpath(source))
        paths.add(path.as_posix())
        manifest = path.parent / MANIFEST_NAME
        if _mistake(loaded.base_dir, str(manifest)) is None:
            paths.add(manifest.as_posix())
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    return paths


def _secrets_to_ship(loaded: LoadedConfig) -> list[str]:
    """Certificates, keys and tokens that are meant as files of this machine.

    They stay out of bundles, which outlive what they are for; on a node they can be replaced without a deployment.
    """
    return [
        f"{loaded.origin}{key}: expected an absolute path, or one that starts with ~/, of a file on every node with "
        f"routers, found {path!r}: keys and tokens do not travel with a configuration; see docs/security.md"
        for key, path in loaded.config.security.files.items()
        if not path.startswith(("/", "~/"))
    ]


def _sources(loaded: LoadedConfig) -> Iterator[tuple[str, str]]:
    """Every weight file that the configuration names, with the key that names it."""
    for name, layer in loaded.config.layers.items():
        if layer.gate.weights is not None:
            yield f"layers.{name}.gate.weights", layer.gate.weights
        for index, block in enumerate(layer.experts):
            for i in range(block.count if block.weights is not None else 0):
                yield f"layers.{name}.experts.{index}.weights", str(block.weights).replace("{i}", str(i))


def _mistake(base: Path, source: str) -> str | None:
    path = base / source
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        return f"{path}: expected a file, found none"
    except (OSError, ValueError, RuntimeError) as exc:
        return f"{path}: expected a file, found: {exc}"
    # Both ways: `..` leaves the bundle where it is unpacked, and a link could smuggle any file of this machine in.
    if os.path.normpath(source).startswith("..") or not real.is_relative_to(base.resolve()):
        return (
            f"expected a file below {base}, found {source!r}, which leads to {real}; put the file there, or give "
            f"an absolute path if every node has it"
        )
    return None if real.is_file() else f"{path}: expected a file, found a folder or a device"


def _bundled(base: Path, path: str) -> BundledFile:
    file = base / path
    return BundledFile(path=path, sha256=sha256_of(file), num_bytes=file.stat().st_size)
