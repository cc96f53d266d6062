"""Breaks a text into lines while it comes in, so that a terminal does not cut words in two at its edge."""

from __future__ import annotations

import re
import sys

from rich.cells import cell_len

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")
#: What would steer a terminal instead of being read.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class WordWrap:
    """Turns pieces of a text into what to write; a word is held back until it is whole."""

    def __init__(self, width: int | None) -> None:
        """Begin at the left edge of a terminal of so many columns; None has no edge, and gets the text as it is."""
        self._width = width or sys.maxsize
        self._as_it_is = width is None
        self._column = 0
        self._blank = ""
        self._word = ""

    def feed(self, piece: str) -> str:
        """What is to be written now that this came in."""
        if self._as_it_is:
            return piece
        written: list[str] = []
        for part in _PARTS.findall(_CONTROL.sub("", piece)):
            if part.isspace():
                written.append(self._finish_word())
                self._take_space(part, written)
            else:
                self._word += part
                # Scripts without blanks between words may break anywhere.
                if cell_len(part) > len(part) or cell_len(self._word) >= self._width:
                    written.append(self._finish_word())
        return "".join(written)

    def flush(self) -> str:
        """What was held back."""
        return self._finish_word()

    def _take_space(self, space: str, written: list[str]) -> None:
        if space == "\n":
            written.append("\n")
            self._column, self._blank = 0, ""
        else:
            self._blank += space.expandtabs(4)

    def _finish_word(self) -> str:
        """The word so far with the blanks before it, or on a line of its own where it does not fit."""
        word, blank = self._word, self._blank
        if not word:
            return ""
        self._word = self._blank = ""
        width = cell_len(word)
        if self._column and self._column + len(blank) + width > self._width:
            self._column, blank = 0, "\n"
        else:
            self._column += len(blank)
        # The terminal itself cuts what is longer than a line.
        self._column = (self._column + width - 1) % self._width + 1
        return blank + word
