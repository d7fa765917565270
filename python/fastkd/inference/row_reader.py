"""Rows to be answered, one by one: from a file or pipe of any format of `fastkd.data.records`, or from memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from fastkd.data import records
from fastkd.data.columns import USUAL, Columns, text_columns, texts_of
from fastkd.data.errors import DataError, Problem
from fastkd.data.files import is_special
from fastkd.data.records import FORMATS, Record, open_records
from fastkd.data.tables import rows_to_stream, values_of_row

STANDARD_STREAM = "-"


@dataclass(frozen=True)
class InputRow:
    """One row as read: its line or row number from 1, and either its texts or the problem with it."""

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
    if path == STANDARD_STREAM or is_special(path):
        return None
    try:
        return records.format_of(path)
    except DataError as error:
        raise ValueError(f"format: {error}, or pass --format {'|'.join(FORMATS)}") from None


def read_rows(
    stream: BinaryIO,
    form: str | None = None,
    name: str = "input",
    *,
    text_a: str | None = None,
    text_b: str | None = None,
) -> Iterator[InputRow]:
    """Read rows one by one.

    Args:
        stream: of any format of `fastkd.data.records`. Tables name their text columns as in `fastkd.data.columns`;
            JSON lines may mix pairs with single texts, whose second text is absent or null.
        form: one of `FORMATS`; None looks at the first line.
        name: of the file, for messages.
        text_a, text_b: names of the columns; default: the usual ones.

    Raises:
        DataError: nothing in the stream, a table without a text column, or another encoding than UTF-8.
    """
    chosen = Columns(text_a, text_b)
    opened = open_records(stream, form, name)
    wanted = None
    if opened.columns is not None:
        first, second = text_columns(opened.columns, chosen, name)
        chosen = Columns(first, second)
        wanted = [first] if second is None else [first, second]
    is_empty = True
    for record in opened.read(wanted):
        is_empty = False
        yield row_of(record, chosen)
    if is_empty:
        raise DataError(f"{name} has a header and no rows; expected at least one text")


def input_rows(rows: Any, *, text_a: str | None = None, text_b: str | None = None) -> Iterator[InputRow]:
    """Rows of any kind that `EarlyExitForSequenceClassification.stream` takes, one by one; an `InputRow` as it is.

    Args:
        rows: not read whole.
        text_a, text_b: names of the columns; default: the usual ones.

    Raises:
        DataError: a table without a text column.
        TypeError: rows that are none.
    """
    chosen = Columns(text_a, text_b)
    given = rows_to_stream(rows, chosen, "rows")
    return (_in_memory(number, row, chosen) for number, row in enumerate(given, 1))


def _in_memory(number: int, row: Any, chosen: Columns) -> InputRow:
    if isinstance(row, InputRow):
        return row
    values = values_of_row(row)
    is_table = hasattr(row, "keys")
    texts = values if isinstance(values, Problem) else texts_of(values, chosen if is_table else USUAL)
    return InputRow(number, problem=str(texts)) if isinstance(texts, Problem) else InputRow(number, *texts)


def row_of(record: Record, chosen: Columns) -> InputRow:
    """The texts of a record, or why there are none."""
    texts = record.problem or texts_of(record.values, chosen)
    if isinstance(texts, Problem):
        return InputRow(record.position, problem=str(texts))
    return InputRow(record.position, *texts)
