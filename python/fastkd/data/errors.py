"""`DataError`, the problem of one row, and the list of bad rows from which the error's message is made."""

from __future__ import annotations

from typing import NamedTuple

_SHOWN_BAD_ROWS = 5


class DataError(ValueError):
    """Data that cannot be used: the message names the place, what came, what was expected, and the remedy."""


class Problem(NamedTuple):
    """What is wrong with one row, in the words that training, prediction and the stream share."""

    got: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.got}; expected {self.expected}; {self.remedy}"


class BadRows:
    """The bad rows of one source: shows the first few, counts them all."""

    def __init__(self, source: str, unit: str) -> None:
        self.source = source
        self.unit = unit
        self.count = 0
        self.shown: list[str] = []

    def add(self, position: int, problem: Problem) -> None:
        self.count += 1
        if len(self.shown) < _SHOWN_BAD_ROWS:
            self.shown.append(f"{self.source}, {self.unit} {position}: {problem}")

    def raise_if_any(self) -> None:
        if not self.count:
            return
        hidden = self.count - len(self.shown)
        more = f"\n... and {hidden} more bad {self.unit}{'s' if hidden > 1 else ''} in {self.source}" if hidden else ""
        raise DataError("\n".join(self.shown) + more)
