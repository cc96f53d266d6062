"""What is shown around the conversation: what is about to happen, whether the model is right, and how to begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from moe_runtime.demos.chat.check import Comparison
    from moe_runtime.demos.chat.served import ServedModel


def show_title(notes: Console) -> None:
    """One line on what is about to happen."""
    notes.print(Text.assemble(("A chat", "bold"), ": attention in this process, experts in Ray actors\n"))


def show_comparison(notes: Console, comparison: Comparison | None) -> None:
    """A check mark, or both texts where they differ; nothing where nothing was compared."""
    if comparison is None:
        return
    quoted = f"“{comparison.prompt} {_in_one_line(comparison.text)}”"
    if comparison.equal:
        line = f"{len(comparison.token_ids)} tokens as the dense model's: {quoted}"
        notes.print(Text.assemble(("✓ ", "green"), (line, "dim")), no_wrap=True, overflow="ellipsis")
        return
    notes.print(
        Text.assemble(("✗ ", "red"), f"other tokens than the dense model's, after the first {comparison.num_equal}")
    )
    for name, text in (("dense", comparison.dense_text), ("here ", comparison.text)):
        notes.print(Text.assemble((f"  {name}  ", "dim"), _in_one_line(f"{comparison.prompt} {text}")))


def show_ready(notes: Console, served: ServedModel) -> None:
    """What is chatted with, and how."""
    actors = served.read().actors
    where = f"experts in {len(actors)} actors" if actors else "experts in this process"
    notes.print(Text.assemble("\n", (served.name, "bold"), f", {where}"))
    notes.print(Text("/experts shows their load, /help the rest; Ctrl-C stops an answer, Ctrl-D ends\n", "dim"))


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
