"""What is known of a deployment: the files that it serves, and how far its runtime is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class DepotPlan:
    """The actor that serves a deployment's files.

    Attributes:
        deployment: Id of the bundle.
        files: Absolute path of each file on the depot's node, by its sha256.
        node_id: Ray's id of the node that has them.
    """

    deployment: str
    files: Mapping[str, Path]
    node_id: str


class Phase(StrEnum):
    """How far a runtime's controller is."""

    NEW = "new"
    STARTING = "starting"
    SERVING = "serving"
    ENDING = "ending"


@dataclass(frozen=True)
class DeploymentStanding:
    """What runs under a name: from which deployment, and how far it is."""

    deployment: str | None
    phase: Phase
