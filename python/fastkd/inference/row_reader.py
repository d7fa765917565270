"""Read rows from a file or pipe, one by one: TSV, JSON lines or text. A row that cannot be read says why."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastkd.data.columns import PAIR_COLUMNS, TEXT_COLUMNS

FORMATS = ("tsv", "jsonl", "text")
STANDARD_STREAM = "-"

_SUFFIXES = {".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text"}
_LONGEST_LINE = 1 << 20  # bytes; a longer line is no sentence and would break the promise of bounded memory


@dataclass(frozen=True)
class InputRow:
    """One row as read: its line number from 1, and either its texts or the problem with it."""

    line: int
    text_a: str = ""
    text_b: str | None = None
    problem: str | None = None


def format_of(path: str, stated: str | None = None) -> str | None:
    """The row format of a file: as stated, else by suffix; None for a stream that must be looked at.

    Raises:
        ValueError: an unknown format, or a suffix that tells none.
    """
    if stated is not None:
        if stated not in FORMATS:
            raise ValueError(f"format: got {stated!r}, expected one of {', '.join(FORMATS)}")
        return stated
    if path == STANDARD_STREAM:
        return None
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"format: cannot tell the format of {path!r} from its suffix {suffix!r}; name the file "
            f"{', '.join(_SUFFIXES)} or pass --format {'|'.join(FORMATS)}"
        )
    return _SUFFIXES[suffix]


def read_rows(stream: BinaryIO, form: str | None = None, name: str = "input") -> Iterator[InputRow]:
    """Read rows one by one.

    Args:
        stream: UTF-8 bytes. TSV has a header that names the text columns as in `fastkd.data.columns` (text_a and
            perhaps text_b; no quoting; other columns are ignored), JSONL one object a line with these keys, text one
            sentence a line.
        form: one of `FORMATS`; None looks at the first line.
        name: of the file, for messages.

    Raises:
        ValueError: nothing in the stream, or a TSV header without a text column.
    """
    lines = _lines(stream)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{name} is empty; expected at least one sentence")
    form = form or _guess(first)
    if form == "tsv":
        yield from _tsv_rows(first, lines, name)
        return
    parse = _json_row if form == "jsonl" else _text_row
    yield parse(1, first)
    for number, line in enumerate(lines, start=2):
        yield parse(number, line)


def _lines(stream: BinaryIO) -> Iterator[str | InputRow]:
    """Decoded lines without their ending; an `InputRow` with the problem where a line cannot be had."""
    number = 0
    while raw := stream.readline(_LONGEST_LINE):
        number += 1
        if len(raw) == _LONGEST_LINE and not raw.endswith(b"\n"):
            while (rest := stream.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield InputRow(number, problem=f"longer than {_LONGEST_LINE} bytes; a row is one sentence or pair")
            continue
        raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        try:
            yield raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            yield InputRow(number, problem=f"byte 0x{raw[error.start]:02x} is not UTF-8; convert the file to UTF-8")


def _guess(first: str | InputRow) -> str:
    if isinstance(first, InputRow):
        return "text"
    if first.lstrip().startswith("{"):
        return "jsonl"
    return "tsv" if _text_columns(first.split("\t")) else "text"


def _text_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The one or two columns that hold the text, by the names in `fastkd.data.columns`; empty where there is none."""
    known = {column.strip().lower(): column for column in columns}
    for names in (*PAIR_COLUMNS, *((name,) for name in TEXT_COLUMNS)):
        if all(name in known for name in names):
            return tuple(known[name] for name in names)
    return ()


def _tsv_rows(header: str | InputRow, lines: Iterator[str | InputRow], name: str) -> Iterator[InputRow]:
    columns = [] if isinstance(header, InputRow) else header.split("\t")
    texts = _text_columns(columns)
    if not texts:
        raise ValueError(
            f"{name}, line 1: the header has no text column; expected {TEXT_COLUMNS[0]} (and {PAIR_COLUMNS[0][1]} for "
            "pairs), separated by tabs; for one sentence a line pass --format text"
        )
    indices = [columns.index(text) for text in texts]
    is_empty = True
    for number, line in enumerate(lines, start=2):
        is_empty = False
        if isinstance(line, InputRow):
            yield line
            continue
        fields = line.split("\t")
        if len(fields) != len(columns):
            yield InputRow(number, problem=f"{len(fields)} columns, expected {len(columns)} ({', '.join(columns)})")
            continue
        yield _row(number, [fields[index] for index in indices], texts)
    if is_empty:
        raise ValueError(f"{name} has a header and no rows; expected at least one sentence")


def _json_row(number: int, line: str | InputRow) -> InputRow:
    if isinstance(line, InputRow):
        return line
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return InputRow(number, problem=f"not JSON ({error})")
    # a null second text is how writers of mixed files mark a single one
    given = {key: text for key, text in value.items() if text is not None} if isinstance(value, dict) else {}
    texts = _text_columns(list(given))
    if not texts:
        return InputRow(number, problem=f'no text; expected an object such as {{"{TEXT_COLUMNS[0]}": "..."}}')
    return _row(number, [given[name] for name in texts], texts)


def _text_row(number: int, line: str | InputRow) -> InputRow:
    return line if isinstance(line, InputRow) else _row(number, [line], ("text",))


def _row(number: int, texts: Sequence[Any], names: Sequence[str]) -> InputRow:
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            return InputRow(number, problem=f"{name} is a JSON {type(text).__name__}, expected a string")
        if not text.strip():
            return InputRow(number, problem=f"{name} is empty" if len(names) > 1 or name != "text" else "empty line")
    return InputRow(number, *texts)
