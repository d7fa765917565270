"""Files of rows: TSV, CSV, JSONL and Parquet become a `Table` of raw values, with the line or row number of each.

TSV has no quoting: a quote is a plain character and a field cannot hold a tab. Text is UTF-8.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fastkd.data.errors import BadRows, DataError


@dataclass(frozen=True)
class Table:
    """One source as it was read: `column(name)` gives the raw values, `positions` their line or row numbers."""

    columns: list[str]
    positions: Sequence[int]
    column: Callable[[str], list[Any]]


def read_file(path: Path, bad: BadRows) -> Table:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown file type '{path.suffix}'; expected one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected a header and rows, or use another file")
    return reader(path, bad)


def _read_tsv(path: Path, bad: BadRows) -> Table:
    return _read_delimited(((number, line.split("\t")) for number, line in _decoded_lines(path, bad)), bad)


def _read_csv(path: Path, bad: BadRows) -> Table:
    return _read_delimited(_csv_records(path, bad), bad)


def _read_jsonl(path: Path, bad: BadRows) -> Table:
    positions: list[int] = []
    objects: list[dict[str, Any]] = []
    for number, line in _decoded_lines(path, bad):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            got = f"invalid JSON ({error.msg} at column {error.colno})" if line.strip() else "a blank line"
            bad.add(number, got, "one JSON object", "complete or delete the line")
            continue
        if not isinstance(value, dict):
            bad.add(number, f"a JSON {type(value).__name__}", "one JSON object", "write one object a line")
            continue
        positions.append(number)
        objects.append(value)
    columns = list(dict.fromkeys(name for value in objects for name in value))
    if not columns:
        bad.raise_if_any()
    return Table(columns, positions, lambda name: [value.get(name) for value in objects])


def _read_parquet(path: Path, bad: BadRows) -> Table:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from error
    return Table(table.column_names, range(1, table.num_rows + 1), lambda name: table.column(name).to_pylist())


def _read_delimited(records: Iterator[tuple[int, list[str]]], bad: BadRows) -> Table:
    _, columns = next(records, (1, []))
    if not any(columns):
        bad.raise_if_any()
        raise DataError(f"{bad.source}, line 1: a blank line; expected the column names; delete it or add a header")
    if len(set(columns)) < len(columns):
        raise DataError(f"{bad.source}, line 1: repeated column names ({', '.join(columns)}); rename them")
    positions: list[int] = []
    values: list[list[str]] = []
    for number, fields in records:
        if len(fields) != len(columns):
            got = "a blank line" if not any(fields) else f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
            bad.add(number, got, f"{len(columns)} ({', '.join(columns)})", "complete or delete the line")
            continue
        positions.append(number)
        values.append(fields)
    index = {name: i for i, name in enumerate(columns)}
    return Table(columns, positions, lambda name: [fields[index[name]] for fields in values])


def _csv_records(path: Path, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line + "\n" for _, line in _decoded_lines(path, bad)), strict=True)
    start = 1
    try:
        for fields in reader:
            yield start, fields
            # a quoted field may span lines: a record is named by its first one
            start = reader.line_num + 1
    except csv.Error as error:
        remedy = "quote fields that hold commas, line ends or quotes, and double the quotes in them"
        bad.add(start, f"broken CSV ({error})", "a well-formed record", remedy)


def _decoded_lines(path: Path, bad: BadRows) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ending; a line that is not UTF-8 is reported, and given with replacement marks."""
    # iterating in binary ends lines at \n only: text may hold U+2028 and other characters str.splitlines() breaks at
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                got = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
                bad.add(number, got, "UTF-8", "convert the file, for example with iconv -f WINDOWS-1252 -t UTF-8")
                line = raw.decode("utf-8", errors="replace")
            yield number, line.removesuffix("\n").removesuffix("\r")


READERS = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
