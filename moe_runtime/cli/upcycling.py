"""The command that makes a mixture of experts of a dense model; what it does loads when it is called."""

from __future__ import annotations

import re
import signal
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_runtime.cli.consoles import stdout_console
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DensePath = Annotated[
    Path,
    typer.Argument(
        metavar="DENSE",
        help="A Llama, Mistral or Qwen2: a folder of safetensors files, or a GGUF file.",
        exists=True,
        show_default=False,
    ),
]
OutPath = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.", show_default=False)]

GateInit = Annotated[Literal["normal", "zeros"], typer.Option(help="Gates of random weights, or of zeros.")]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto is the dense model's.")
]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", re.IGNORECASE)
_KILLED_BY_SIGTERM = 128 + signal.SIGTERM


def _num_bytes(text: str) -> int:
    """The bytes that a size like ``200MB`` means."""
    match = _SIZE.fullmatch(text.strip())
    unit = (match[2] or "").upper() if match else None
    if match is None or unit not in _UNITS:
        raise typer.BadParameter(f"expected a size like 5GB or 200MB; found {text!r}")
    return int(float(match[1]) * _UNITS[unit])


def upcycle(  # noqa: PLR0913  # each argument is an option
    dense: DensePath,
    out: OutPath,
    *,
    experts: Annotated[int, typer.Option(metavar="N", help="Copies of each layer's MLP.")] = 4,
    top_k: Annotated[int, typer.Option(metavar="K", help="How many of them work on a token.")] = 2,
    shared: Annotated[
        bool, typer.Option("--shared", help="Make the MLP a shared expert as well; always a Qwen2-MoE.")
    ] = False,
    noise: Annotated[
        float, typer.Option(metavar="S", help="Noise on each copy, relative to the weights' standard deviation.")
    ] = 0.0,
    gate_init: GateInit = "normal",
    gate_std: Annotated[float, typer.Option(metavar="STD", help="Standard deviation of random gates.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Of gates and noise.")] = 0,
    dtype: DType = "auto",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="No weight file is larger.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it was made by this command.")] = False,
) -> None:
    """Make a mixture of experts of a dense model: copies of its MLPs behind new gates, for plain transformers too."""
    max_shard_bytes = _num_bytes(max_shard_size)
    _check_installed()
    from moe_runtime.integrations.transformers.upcycling.checkpoint import upcycle as write_upcycled
    from moe_runtime.integrations.transformers.upcycling.options import Upcycling

    options = Upcycling(
        experts=experts,
        top_k=top_k,
        shared=shared,
        noise=noise,
        gate_init=gate_init,
        gate_std=gate_std,
        seed=seed,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    with _bar("Upcycling") as on_progress, _cleaning_up_on_sigterm():
        folder = write_upcycled(dense, out, options, force=force, on_progress=on_progress)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files"
    summary = f"{folder}: {experts} experts per layer, top-{top_k}; {sum(sizes) / 1e9:.2f} GB in {files}"
    stdout_console().print(summary, markup=False, soft_wrap=True)


def _check_installed() -> None:
    if missing := [package for package in ("transformers", "gguf") if find_spec(package) is None]:
        raise ConfigError(
            f"upcycle: expected {' and '.join(missing)} to be installed: pip install 'moe-runtime[transformers]'"
        )


@contextmanager
def _bar(title: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr; what moves it takes the share that is done."""
    from rich.console import Console

    from moe_runtime.progress import make_progress

    with make_progress(Console(stderr=True), has_notes=False) as progress:
        task = progress.add_task(title, total=None)
        yield lambda share: progress.update(task, total=1.0, completed=share)


@contextmanager
def _cleaning_up_on_sigterm() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C: with gigabytes that are half written removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_KILLED_BY_SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
