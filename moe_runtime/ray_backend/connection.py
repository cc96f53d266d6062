"""This program's connection to Ray, which the program may end at any time."""

from __future__ import annotations

from typing import Any

import ray

from moe_runtime.errors import StartError

LOST = "Ray was shut down in this program, which cannot reach the runtime any more"

_HELD: list[ray.ObjectRef[Any]] = []


class Connection:
    """The connection that the program has when this is made.

    To be looked at before Ray is asked for anything: without a connection it would start another cluster, or end the
    process.
    """

    def __init__(self) -> None:
        """Remember it."""
        self._id = _id()

    @property
    def is_there(self) -> bool:
        """Whether the program has it still."""
        return self._id is not None and self._id == _id()

    def expect(self, name: str) -> None:
        """Check that it is there.

        Args:
            name: Of the runtime that is to be asked.

        Raises:
            StartError: If it is not.
        """
        if not self.is_there:
            raise StartError(f"runtime {name}: {LOST}")

    def hold(self, asked: ray.ObjectRef[Any]) -> None:
        """Keep a reference for good if the connection is gone: giving it up while Ray shuts down ends the process."""
        if not self.is_there:
            _HELD.append(asked)


def _id() -> str | None:
    return str(ray.get_runtime_context().get_worker_id()) if ray.is_initialized() else None
