"""The one check of a text: what training, prediction and the stream refuse. Needs no torch."""

from __future__ import annotations

import reprlib

from fastkd.data.errors import Problem


def text_problem(value: object, column: str | None = None) -> Problem | None:
    """Why `value`, of the column where there is one, is no text that a tokenizer can take; None where it is one."""
    place = "" if column is None else f" in column '{column}'"
    if isinstance(value, str):
        if not value.strip():
            return Problem(f"empty text{place}", "text", "fill it in or delete the row")
        return _undecoded(value, place)
    got = f"no value{place}" if value is None else f"{reprlib.repr(value)} ({type(value).__name__}){place}"
    return Problem(got, "text", "fill it in or delete the row")


def _undecoded(text: str, place: str) -> Problem | None:
    """Half of a surrogate pair stands for no character, and no tokenizer takes it."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start + 1}{place}"
        return Problem(got, "whole characters", "write the character whole or delete it")
    return None
