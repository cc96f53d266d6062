"""The bundles of a machine: each file once under its hash, and each bundle as a folder that looks like the original."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_runtime.config.state_folder import locked_folder, state_folder
from moe_runtime.errors import ConfigError, StartError
from moe_runtime.experts.weights_cache import Removed
from moe_runtime.launch.bundle import MANIFEST_FILE, collect_bundle, parse_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from moe_runtime.launch.bundle import Bundle, BundledFile

_PART = ".part"


@dataclass(frozen=True)
class StoredBundle:
    """A bundle on this machine.

    Attributes:
        bundle: What it holds.
        folder: With the files, as the configuration names them.
    """

    bundle: Bundle
    folder: Path

    @property
    def config(self) -> Path:
        """The configuration file, whose relative paths are those of the bundle."""
        return self.folder / self.bundle.config

    @property
    def paths(self) -> Mapping[str, Path]:
        """Absolute path of each file, by its sha256."""
        return {file.sha256: self.folder / file.path for file in self.bundle.files}

    @property
    def listed(self) -> Mapping[str, str]:
        """sha256 of each file, by its absolute path."""
        return {str(self.folder / file.path): file.sha256 for file in self.bundle.files}


@dataclass(frozen=True)
class BundleStore:
    """``blobs/<sha256>`` and ``bundles/<id>``, whose files are links to blobs.

    A blob under its final name is whole; a bundle has its manifest from the moment on that all its files are there.
    So whatever is killed on the way can be repeated.

    Attributes:
        home: The machine's state folder.
    """

    home: Path = field(default_factory=state_folder)

    @property
    def blobs(self) -> Path:
        """Folder of the files, each under its sha256."""
        return self.home / "blobs"

    @property
    def bundles(self) -> Path:
        """Folder of the bundles, each in one of its id."""
        return self.home / "bundles"

    def store(self, config: Path) -> StoredBundle:
        """The bundle of a configuration file of this machine, or of the manifest of one whose blobs are here.

        Raises:
            ConfigError: If the configuration or a file that it names cannot be bundled; one line per mistake.
            StartError: If it cannot be stored, or a blob is missing or not what it was.
        """
        if config.name.endswith(MANIFEST_FILE):
            with self._locked():
                return self._assemble(parse_bundle(_read(config), origin=str(config)))
        bundle = collect_bundle(config)
        with self._locked():
            for file in bundle.files:
                self._add(config.expanduser().absolute().parent / file.path, file)
            return self._assemble(bundle)

    def remove(self, runtime: str) -> Removed:
        """Remove the bundles of a runtime and what was left unfinished, then the blobs that no bundle needs."""
        if not self.home.is_dir():
            return Removed()
        with self._locked():
            removed = [
                bundle
                for folder in self.bundles.iterdir()
                if (bundle := _bundle_in(folder)) is None or bundle.runtime == runtime
                if _is_removed(folder)
            ]
            for blob in self.blobs.iterdir():
                # The number of links counts the bundles; where links cannot be made, blobs are spare copies.
                if blob.stat().st_nlink == 1:
                    blob.unlink()
            # Where a deployment from afar puts a wheel of this package.
            shutil.rmtree(self.home / "wheels", ignore_errors=True)
            for folder in (self.blobs, self.bundles, self.home):
                _remove_if_empty(folder)
        bundles = [bundle for bundle in removed if bundle is not None]
        return Removed(len(bundles), sum(bundle.num_bytes for bundle in bundles))

    def _add(self, source: Path, file: BundledFile) -> None:
        blob = self.blobs / file.sha256
        if blob.is_file() and blob.stat().st_size == file.num_bytes:
            return
        part = blob.with_name(f"{file.sha256}{_PART}")
        try:
            shutil.copyfile(source, part)
        except OSError as exc:
            raise StartError(f"{source}: cannot be copied to {self.blobs}: {exc}") from exc
        if _sha256(part) != file.sha256:
            part.unlink()
            raise StartError(f"{source}: it changed while it was bundled; deploy again when it is finished")
        part.replace(blob)

    def _assemble(self, bundle: Bundle) -> StoredBundle:
        root = self.bundles / bundle.id
        stored = StoredBundle(bundle, root / "files")
        manifest = root / MANIFEST_FILE
        try:
            for file in bundle.files:
                self._link(stored.folder / file.path, file)
            part = manifest.with_name(f"{MANIFEST_FILE}{_PART}")
            part.write_text(bundle.to_json(), encoding="utf-8")
            part.replace(manifest)
        except OSError as exc:
            raise StartError(f"bundle {bundle.id[:12]}: cannot be stored in {root}: {exc}") from exc
        return stored

    def _link(self, path: Path, file: BundledFile) -> None:
        if path.is_file() and _sha256(path) == file.sha256:
            return
        blob = self.blobs / file.sha256
        if not blob.is_file() or _sha256(blob) != file.sha256:
            blob.unlink(missing_ok=True)
            raise StartError(f"bundle: expected {file.path} at {blob}, found none or a corrupt one; deploy again")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(blob, path)
        except OSError:
            # A file system without hard links.
            shutil.copyfile(blob, path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Bundles of this machine are stored and removed one at a time."""
        try:
            with locked_folder(self.home):
                self.blobs.mkdir(mode=0o700, exist_ok=True)
                self.bundles.mkdir(mode=0o700, exist_ok=True)
                yield
        except OSError as exc:
            raise StartError(f"{self.home}: expected a folder for bundles, found: {exc}") from exc


def _bundle_in(folder: Path) -> Bundle | None:
    try:
        return parse_bundle((folder / MANIFEST_FILE).read_text(encoding="utf-8"), origin=str(folder))
    except (OSError, ConfigError):
        return None


def _is_removed(folder: Path) -> bool:
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
    else:
        # The manifest of a bundle that was brought here.
        folder.unlink(missing_ok=True)
    return not folder.exists()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _read(manifest: Path) -> str:
    try:
        return manifest.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{manifest}: expected the manifest of a bundle, found: {exc}") from exc


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
