"""Registers the faulty kind for one run: in this process, and in those that it starts meanwhile."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moe_runtime.chaos.faulty_expert import KIND_NAME
from moe_runtime.experts.registry import ENTRY_POINT_GROUP

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The distribution that the configuration of a run lists among its plug-ins.
PLUG_IN = "moe-runtime-chaos"
_SEARCH_PATH = "PYTHONPATH"


@contextmanager
def armed(folder: Path) -> Iterator[None]:
    """Have the faulty kind until the end of the ``with``.

    A plug-in is found by the metadata of its distribution. This one's are written to a folder of the run, which is
    put before the search path of this process and of its children: any other process, those of other runtimes on the
    same machine included, knows no such kind, whatever its configuration or its requests say.

    Args:
        folder: Where the metadata are written; of this run alone.
    """
    info = folder / f"{PLUG_IN.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUG_IN}\nVersion: 1.0\n")
    entry = f"{KIND_NAME} = moe_runtime.chaos.faulty_expert:KIND"
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{entry}\n")
    before = os.environ.get(_SEARCH_PATH)
    os.environ[_SEARCH_PATH] = os.pathsep.join([str(folder), *([before] if before else [])])
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if before is None:
            del os.environ[_SEARCH_PATH]
        else:
            os.environ[_SEARCH_PATH] = before
