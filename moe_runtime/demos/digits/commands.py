"""The commands that serve the demo's layer again and call it: ready to be pasted into the shell that ran the demo."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

_CALL = """\
{python} - <<'END'
import moe_runtime as moe
from sklearn.datasets import load_digits
digits = load_digits()
images = (digits.data[:8] / 16).astype("float32")
with moe.MoEClient("{address}") as client:
    result = client.forward(images, layer="digits", return_routing=True)
print("digits ", digits.target[:8])
print("answers", result.outputs.argmax(axis=1))
print("experts", result.report.expert_ids.reshape(8, 2).tolist())
END"""


def serve_command(config_path: Path) -> str:
    """The shell command that serves the configuration until it is stopped."""
    return f"{_program('moe-runtime')} serve {shlex.quote(str(config_path))}"


def call_command(address: str) -> str:
    """The shell command that classifies the first eight images, and names their experts."""
    return _CALL.format(python=_program("python"), address=address)


def _program(name: str) -> str:
    """A program of this Python environment, by its name where the shell finds it, else by its path."""
    path = Path(sys.executable).with_name(name)
    on_path = shutil.which(name)
    if not path.exists() or (on_path is not None and Path(on_path).absolute() == path):
        return name
    here = os.path.relpath(path)
    return shlex.quote(here if not here.startswith(os.pardir) else str(path))
