"""The one reader of rows: TSV, CSV, JSON lines, Parquet and plain text become records, one after the other.

TSV has no quoting: a quote is a plain character and a field cannot hold a tab. CSV has it. A JSON line is an object
with the columns as its keys. Plain text is one text a line. All but Parquet are UTF-8. A record that cannot be read
says why and keeps its place; what follows it is read.
"""

from __future__ import annotations

import codecs
import json
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastkd.data.columns import find_text_columns
from fastkd.data.errors import DataError, Problem

SUFFIXES = {
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
"""The format that a suffix stands for, in any case."""
FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))
LONGEST_RECORD = 1 << 20
"""Bytes; a longer record is no text or pair of texts, and would break the promise of bounded memory."""

_TEXT_COLUMN = "text"
_PARQUET_MAGIC = b"PAR1"
_PARQUET_ROWS = 1024  # read together
_WORD = re.compile(r"\w[\w.-]*")
# longest first: the mark of UTF-32 begins with that of UTF-16
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Record(NamedTuple):
    """One record: its line or row number from 1, and its values by column or the problem with it."""

    position: int
    values: Mapping[str, Any]
    problem: Problem | None = None


@dataclass(frozen=True)
class Records:
    """A source that is open.

    Attributes:
        source: its name, for messages.
        unit: what positions count, "line" or "row".
        columns: None where every record brings its own.
        read: gives the records, of these columns only where the format allows it; to be called once.
        class_names: of columns whose integers are numbers of named classes (Parquet, as `datasets` writes it).
        hint: what an error about a missing label adds.
    """

    source: str
    unit: str
    columns: list[str] | None
    read: Callable[[Sequence[str] | None], Iterator[Record]]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    hint: str = ""


class _Line(NamedTuple):
    """A line without its ending; what cannot be decoded is a problem."""

    number: int
    text: str
    problem: Problem | None = None


def format_of(path: str | Path) -> str:
    """The format of a file by its suffix.

    Raises:
        DataError: a suffix that stands for none.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: unknown file type '{suffix}', so the format is unknown; expected one of {', '.join(SUFFIXES)}"
        )
    return SUFFIXES[suffix.lower()]


def open_records(stream: BinaryIO, form: str | None, source: str) -> Records:
    """Read the head of a stream; its records are read as they are taken.

    Args:
        stream: need not be seekable.
        form: one of `FORMATS`; None looks at the first line.
        source: its name, for messages.

    Raises:
        DataError: an empty stream, one that is not UTF-8 but UTF-16 or UTF-32, a header that is none, or a Parquet
            file that is damaged.
    """
    first = stream.readline(LONGEST_RECORD)
    if not first:
        raise DataError(f"{source} is empty; expected a header and rows, or at least one text")
    if form == "parquet" or (form is None and first.startswith(_PARQUET_MAGIC)):
        return _parquet(stream, first, source)
    _check_encoding(first, source)
    lines = _lines(stream, first)
    if form is None:
        line = next(lines)
        form = _guessed(line)
        lines = _put_back(line, lines)
    if form == "jsonl":
        return Records(source, "line", None, lambda columns: _json_records(lines))
    if form == "text":
        return Records(source, "line", [_TEXT_COLUMN], lambda columns: _text_records(lines))
    fields = _tsv_fields(lines) if form == "tsv" else _csv_fields(lines)
    return _delimited(fields, source)


def read_json_lines(stream: BinaryIO, before: int = 0) -> Iterator[Record]:
    """The records of JSON lines of a stream that stands behind its first `before` lines."""
    return _json_records(_lines(stream, stream.readline(LONGEST_RECORD), before))


def _lines(stream: BinaryIO, raw: bytes, before: int = 0) -> Iterator[_Line]:
    """Numbered lines, the first of which is read already."""
    # reading in binary ends lines at \n only: text may hold U+2028 and other characters str.splitlines() breaks at
    number = before
    while raw:
        number += 1
        if len(raw) == LONGEST_RECORD and not raw.endswith(b"\n"):
            while (rest := stream.readline(LONGEST_RECORD)) and not rest.endswith(b"\n"):
                pass
            yield _Line(number, "", _too_long("a line"))
        else:
            yield _decoded(number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)
        raw = stream.readline(LONGEST_RECORD)


def _decoded(number: int, raw: bytes) -> _Line:
    try:
        return _Line(number, raw.decode("utf-8").removesuffix("\n").removesuffix("\r"))
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        remedy = "convert the file, for example with iconv -f WINDOWS-1252 -t UTF-8"
        return _Line(number, "", Problem(got, "UTF-8", remedy))


def _too_long(what: str) -> Problem:
    return Problem(
        f"{what} longer than {LONGEST_RECORD} bytes", "one text or pair of texts", "shorten it: models read its start"
    )


def _check_encoding(first: bytes, source: str) -> None:
    encoding = next((name for mark, name in _OTHER_MARKS.items() if first.startswith(mark)), None)
    # without a mark the zero bytes of UTF-16 give it away: text has none
    if encoding is None and b"\0" in first[:64]:
        encoding = "UTF-16LE" if first[1:2] == b"\0" else "UTF-16BE"
    if encoding is not None:
        raise DataError(
            f"{source}: the file is {encoding}, or no text at all; expected UTF-8; convert it: "
            f"iconv -f {encoding} -t UTF-8"
        )


def _put_back(line: _Line, lines: Iterator[_Line]) -> Iterator[_Line]:
    yield line
    yield from lines


def _guessed(line: _Line) -> str:
    if line.text.lstrip().startswith("{"):
        return "jsonl"
    if find_text_columns(line.text.split("\t")):
        return "tsv"
    try:
        columns = _CsvRecord().feed(line.text) or []
    except _BrokenRecord:
        return "text"
    # a sentence with commas is no header
    is_header = len(columns) > 1 and all(map(_WORD.fullmatch, columns)) and find_text_columns(columns)
    return "csv" if is_header else "text"


def _text_records(lines: Iterator[_Line]) -> Iterator[Record]:
    return (Record(line.number, {_TEXT_COLUMN: line.text}, line.problem) for line in lines)


# JSON lines


def _json_records(lines: Iterator[_Line]) -> Iterator[Record]:
    return (_json_record(line) for line in lines)


class _RepeatedKey(ValueError):
    """A key that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(next(name for name in names if names.count(name) > 1))
    return value


def _json_record(line: _Line) -> Record:
    if line.problem is not None:
        return Record(line.number, {}, line.problem)
    if not line.text.strip():
        return Record(line.number, {}, Problem("a blank line", "one JSON object", "complete or delete the line"))
    try:
        value = json.loads(line.text, object_pairs_hook=_object)
    except _RepeatedKey as error:
        problem = Problem(f"the key '{error}' twice", "one value for each key", "rename or delete one of them")
        return Record(line.number, {}, problem)
    except json.JSONDecodeError as error:
        got = f"invalid JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        got = "invalid JSON (brackets are nested too deep)"
    except ValueError:
        got = "invalid JSON (an integer of thousands of digits)"
    else:
        if isinstance(value, dict):
            return Record(line.number, value)
        problem = Problem(f"a JSON {type(value).__name__}", "one JSON object", "write one object a line")
        return Record(line.number, {}, problem)
    return Record(line.number, {}, Problem(got, "one JSON object", "complete or delete the line"))


# TSV and CSV


class _Fields(NamedTuple):
    """The fields of a record that begins in line `number`."""

    number: int
    fields: list[str]
    problem: Problem | None = None


def _delimited(records: Iterator[_Fields], source: str) -> Records:
    header = next(records)
    if header.problem is not None:
        raise DataError(f"{source}, line 1: {header.problem}")
    columns = header.fields
    if not any(columns):
        raise DataError(f"{source}, line 1: a blank line; expected the column names; delete it or add a header")
    _check_different(columns, f"{source}, line 1")

    def read(wanted: Sequence[str] | None) -> Iterator[Record]:
        for number, fields, problem in records:
            if problem is None and len(fields) != len(columns):
                problem = _wrong_count(fields, columns)
            yield Record(number, {} if problem else dict(zip(columns, fields, strict=True)), problem)

    return Records(source, "line", columns, read)


def _check_different(columns: Sequence[str], place: str) -> None:
    if len(set(columns)) < len(columns):
        raise DataError(f"{place}: repeated column names ({', '.join(columns)}); rename them")


def _wrong_count(fields: list[str], columns: list[str]) -> Problem:
    got = f"{len(fields)} field{'s' if len(fields) > 1 else ''}" if any(fields) else "a blank line"
    return Problem(got, f"{len(columns)} ({', '.join(columns)})", "complete or delete the line")


def _tsv_fields(lines: Iterator[_Line]) -> Iterator[_Fields]:
    return (_Fields(line.number, line.text.split("\t"), line.problem) for line in lines)


class _BrokenRecord(ValueError):
    """A line that no CSV record can hold."""


class _CsvRecord:
    """One record as it is read; a quoted field may span lines."""

    def __init__(self) -> None:
        self._fields: list[str] = []
        self._open: list[str] | None = None  # parts of a quoted field that goes on

    def feed(self, line: str) -> list[str] | None:
        """The fields, once the record is complete.

        Raises:
            _BrokenRecord: something follows a closing quote.
        """
        position = 0
        while True:
            if self._open is not None:
                end = line.find('"', position)
                if end < 0:
                    self._open.append(line[position:] + "\n")
                    return None
                if line.startswith('""', end):
                    self._open.append(line[position : end + 1])
                    position = end + 2
                    continue
                self._fields.append("".join([*self._open, line[position:end]]))
                self._open = None
                position = end + 1
                if position == len(line):
                    return self._fields
                if line[position] != ",":
                    raise _BrokenRecord("',' expected after '\"'")
                position += 1
            if line.startswith('"', position):
                self._open = []
                position += 1
                continue
            end = line.find(",", position)
            self._fields.append(line[position:] if end < 0 else line[position:end])
            if end < 0:
                return self._fields
            position = end + 1


def _csv_fields(lines: Iterator[_Line]) -> Iterator[_Fields]:
    # what a broken record has swallowed is read again as records of their own
    again: deque[_Line] = deque()

    def following() -> _Line | None:
        return again.popleft() if again else next(lines, None)

    while first := following():
        if first.problem is not None:
            yield _Fields(first.number, [], first.problem)
            continue
        found, seen = _csv_record(first, following)
        if isinstance(found, Problem):
            again.extendleft(reversed(seen))
            yield _Fields(first.number, [], found)
        else:
            yield _Fields(first.number, found)


def _csv_record(first: _Line, following: Callable[[], _Line | None]) -> tuple[list[str] | Problem, list[_Line]]:
    """The fields of the record that begins in line `first`, or what is wrong; and the further lines that it took."""
    record, seen, size = _CsvRecord(), list[_Line](), len(first.text)
    line: _Line | None = first
    try:
        while line is not None:
            if line.problem is not None:
                return line.problem, seen
            if size > LONGEST_RECORD:
                return _too_long("a quoted field"), seen
            fields = record.feed(line.text)
            if fields is not None:
                return fields, seen
            line = following()
            if line is not None:
                seen.append(line)
                size += len(line.text) + 1
        reason = "a quote is never closed"
    except _BrokenRecord as error:
        reason = str(error)
    remedy = "quote fields that hold commas, line ends or quotes, and double the quotes in them"
    return Problem(f"broken CSV ({reason})", "a well-formed record", remedy), seen


# Parquet


def _parquet(stream: BinaryIO, first: bytes, source: str) -> Records:
    with _parquet_explained(source):
        parquet = _parquet_file(_seekable(stream, first))
        columns = parquet.schema_arrow.names
        class_names = _class_names(parquet.schema_arrow.metadata or {})
    _check_different(columns, source)

    def read(wanted: Sequence[str] | None) -> Iterator[Record]:
        with _parquet_explained(source):
            yield from _parquet_records(parquet, wanted, range(parquet.num_row_groups), 0)

    return Records(source, "row", columns, read, class_names)


def read_parquet_rows(
    path: str | Path, first: int, count: int, wanted: Sequence[str] | None = None
) -> Iterator[Record]:
    """The records of the rows `first` to `first + count` of a Parquet file, counted from 0; no other pages are read.

    Raises:
        DataError: the file is damaged.
    """
    with Path(path).open("rb") as stream, _parquet_explained(str(path)):
        parquet = _parquet_file(stream)
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        ends = list(accumulate(sizes))
        groups = [group for group, end in enumerate(ends) if end > first and end - sizes[group] < first + count]
        if groups:
            before = ends[groups[0]] - sizes[groups[0]]
            records = _parquet_records(parquet, wanted, groups, before)
            yield from islice(records, first - before, first - before + count)


@contextmanager
def _parquet_explained(source: str) -> Iterator[None]:
    """Inside, what pyarrow raises is a DataError."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{source}: not a readable Parquet file ({error}); write it again") from error


def _parquet_file(stream: Any) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)


def _parquet_records(
    parquet: Any, wanted: Sequence[str] | None, groups: Sequence[int], before: int
) -> Iterator[Record]:
    """The rows of these row groups, of which the first stands behind `before` rows."""
    number, columns = before, None if wanted is None else list(wanted)
    for batch in parquet.iter_batches(_PARQUET_ROWS, row_groups=list(groups), columns=columns):
        values = {name: _plain(batch.column(index)) for index, name in enumerate(batch.schema.names)}
        for row in range(batch.num_rows):
            number += 1
            yield _parquet_record(number, {name: column[row] for name, column in values.items()})


def _seekable(stream: BinaryIO, first: bytes) -> Any:
    """The whole stream, of which `first` is read: the table of contents of a Parquet file stands at its end."""
    if stream.seekable():
        stream.seek(0)
        return stream
    file: Any = tempfile.TemporaryFile()  # noqa: SIM115  # the reader keeps it open
    file.write(first)
    shutil.copyfileobj(stream, file)
    file.seek(0)
    return file


def _plain(column: Any) -> list[Any]:
    """Python values; a `Problem` in place of text that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_plain_value(value) for value in column]


def _plain_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return Problem(f"byte 0x{error.object[error.start]:02x} in a text", "UTF-8", "write the text as UTF-8")


def _parquet_record(number: int, values: dict[str, Any]) -> Record:
    problem = next((value for value in values.values() if isinstance(value, Problem)), None)
    return Record(number, values if problem is None else {}, problem)


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, Sequence[str]]:
    """Names of the classes of each column that `datasets` wrote as a ClassLabel."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            name: tuple(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
