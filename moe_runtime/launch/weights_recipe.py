"""How the processes of a runtime on Ray come by their weight files."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from moe_runtime.experts.weights_store import WeightsStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class WeightsRecipe:
    """Plain values from which a process on any node makes its store.

    Attributes:
        runtime: The runtime's name.
        deployment: Id of the bundle that it was deployed from; None if it was served.
        listed: sha256 of each bundled file that the process needs, by the path that specs have of it.
    """

    runtime: str
    deployment: str | None = None
    listed: Mapping[str, str] = field(default_factory=dict)

    def only(self, sources: Iterable[str | None]) -> WeightsRecipe:
        """The same for a process that needs these files alone."""
        listed = {source: self.listed[source] for source in sources if source is not None and source in self.listed}
        return replace(self, listed=listed)

    def store(self) -> WeightsStore:
        """The store, for a process that is connected to the runtime's cluster."""
        if self.deployment is None:
            return WeightsStore(user=self.runtime)
        # Only where there is a bundle: the import brings Ray.
        from moe_runtime.ray_backend.depot import read_from_depot

        read_bundle = partial(read_from_depot, self.runtime, self.deployment)
        return WeightsStore(user=self.runtime, listed=self.listed, read_bundle=read_bundle)
