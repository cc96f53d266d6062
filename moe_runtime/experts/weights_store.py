"""How a process comes by the weight files that its specs name, whatever they are: paths, addresses, bundled files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from moe_runtime.config.load import is_uri
from moe_runtime.errors import WeightsError
from moe_runtime.experts.remote_files import fetch_uri, manifest_sha256
from moe_runtime.experts.weights import sha256_of
from moe_runtime.experts.weights_cache import WeightsCache, default_cache

if TYPE_CHECKING:
    from collections.abc import Mapping


class BundleReader(Protocol):
    """Reads files of the bundle that a runtime was deployed from, wherever that is."""

    def __call__(self, sha256: str, file: BinaryIO) -> None:
        """Write the bundled file of that hash into ``file``.

        Raises:
            WeightsError: If the bundle has none, or cannot be reached.
        """
        ...


@dataclass(frozen=True)
class WeightsStore:
    """Gives weight files as paths on this node.

    Attributes:
        cache: Keeps what was fetched.
        user: The runtime that fetches; the cache keeps files as long as they have users.
        listed: sha256 of each bundled file, by the path that specs have of it.
        read_bundle: Reads those that are not on this node.
    """

    cache: WeightsCache = field(default_factory=default_cache)
    user: str = "local"
    listed: Mapping[str, str] = field(default_factory=dict)
    read_bundle: BundleReader | None = None

    def fetch(self, source: str) -> Path:
        """The file that a spec names, on this node.

        A path that is there is taken as it is. An address is fetched into the cache, where a manifest beside it
        saves fetching it twice; a bundled file that is elsewhere is fetched from there.

        Raises:
            WeightsError: If it is nowhere, cannot be fetched, or is not what is listed.
        """
        if is_uri(source):
            return self._fetch_uri(source)
        path, sha256 = Path(source), self.listed.get(source)
        if sha256 is None or (path.is_file() and sha256_of(path) == sha256):
            return path
        if self.read_bundle is None:
            raise WeightsError(f"{source}: expected a weight file with sha256 {sha256}, found none")
        read = self.read_bundle
        return self.cache.get(sha256, lambda file: read(sha256, file), source=source, user=self.user)

    def _fetch_uri(self, uri: str) -> Path:
        sha256 = manifest_sha256(uri)
        if sha256 is None:
            return self.cache.add(lambda file: fetch_uri(uri, file), source=uri, user=self.user)
        return self.cache.get(sha256, lambda file: fetch_uri(uri, file), source=uri, user=self.user)
