"""Rows that are in memory: data sets, data frames, Arrow tables, columns and lists. Needs neither datasets nor pandas.

A source that knows its columns becomes a `Table`, which gives Python values for a slice of rows at a time, and only of
the columns that are asked for. A list, or whatever else gives rows one by one, becomes one record a row:

    text   (text, text)   (text, 1)   (text, text, "class")   {"text": text, "label": "class"}

The second value of a tuple is a second text where it is one, else the label.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fastkd.data.columns import Columns, text_columns
from fastkd.data.errors import DataError, Problem
from fastkd.data.records import Record, Records

_CHUNK = 1024  # rows that become Python values together
_SOURCES = "a Dataset, a DataFrame, an Arrow table, a dictionary of columns, or texts, tuples or dictionaries in a list"
_A_ROW = "a text, a tuple (text, text), (text, label) or (text, text, label), or a dictionary"
_PAIR_HINT = "; a tuple of two texts is a pair: write (text, text, label), or {'text': text, 'label': label}"

Slice = Callable[[Sequence[str], int, int], Mapping[str, Sequence[Any]]]
"""(columns, first row, end) -> the Python values of each of these columns."""


class Table:
    """A sequence of rows as dictionaries.

    It has no `__iter__`: the iterator that Python makes of `__getitem__` counts a row when it has arrived, so an
    interrupt loses none.

    Args:
        columns: to read.
        rows: how many there are.
        read: see `Slice`.
        class_names: of columns whose integers are numbers of named classes.
    """

    def __init__(
        self, columns: Sequence[str], rows: int, read: Slice, class_names: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.columns = list(columns)
        self.class_names = class_names or {}
        self._rows = rows
        self._read = read
        self._chunk: tuple[int, Mapping[str, Sequence[Any]]] = -1, {}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row >= self._rows:
            raise IndexError(row)
        number = row // _CHUNK
        if self._chunk[0] != number:
            end = min(self._rows, (number + 1) * _CHUNK)
            self._chunk = number, self._read(self.columns, number * _CHUNK, end)
        return {name: values[row % _CHUNK] for name, values in self._chunk[1].items()}

    def of(self, columns: Sequence[str]) -> Table:
        """The same rows with these columns only."""
        return Table(columns, self._rows, self._read, self.class_names)


def table_of(rows: Any, argument: str) -> Table | None:
    """The table that `rows` are; None for what gives its rows one by one.

    Raises:
        DataError: several splits, columns of different lengths or of one name, a frame that is still to be computed.
    """
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(rows, datasets.Dataset):
        return _table_of_dataset(rows, class_names_of(rows.features))
    if type(rows).__name__ == "LazyFrame":
        raise DataError(f"{argument}: got a LazyFrame; expected a DataFrame; pass {argument}.collect()")
    if hasattr(rows, "iloc") and hasattr(rows, "columns"):
        _check_names(rows.columns, argument)
        return Table(list(rows.columns), len(rows), partial(_slice_of_pandas, rows))
    if hasattr(rows, "__arrow_c_stream__") and (hasattr(rows, "columns") or hasattr(rows, "column_names")):
        import pyarrow

        table = pyarrow.table(rows)
        _check_names(table.column_names, argument)
        return Table(table.column_names, table.num_rows, partial(_slice_of_arrow, table))
    return _table_of_columns(rows, argument) if isinstance(rows, Mapping) else None


def records_of(rows: Any, source: str) -> Records:
    """The records of rows in memory, numbered from 1; `source` names them in messages.

    Raises:
        DataError: as `table_of`.
        TypeError: nothing that gives rows.
    """
    table = table_of(rows, source)
    if table is not None:
        return Records(source, "row", table.columns, partial(_records_of_table, table), table.class_names)
    iterable = _rows_one_by_one(rows, source)
    if is_iterable_dataset(rows) and rows.column_names is not None:
        names = class_names_of(rows.features or {})
        return Records(source, "row", list(rows.column_names), partial(_records_of_stream, rows), names)
    return Records(source, "row", None, lambda columns: map(_record, *_numbered(iterable)), hint=_PAIR_HINT)


def rows_to_stream(rows: Any, chosen: Columns, argument: str) -> Iterable[Any]:
    """What gives these rows one by one without reading them whole: of a table their texts or `input_ids` only.

    Raises:
        DataError: as `table_of`; a table without a text column.
        TypeError: nothing that gives rows.
    """
    table = table_of(rows, argument)
    columns = table.columns if table is not None else rows.column_names if is_iterable_dataset(rows) else None
    wanted: list[str] = []
    if columns is not None:
        wanted = [name for name in ("input_ids", "token_type_ids") if name in columns]
        if "input_ids" not in columns:
            wanted = [name for name in text_columns(columns, chosen, argument) if name is not None]
    # what Python makes an iterator of has either __iter__ or __getitem__
    return _rows_one_by_one(rows, argument) if table is None else table.of(wanted)  # type: ignore[return-value]


def values_of_row(row: Any) -> Mapping[str, Any] | Problem:
    """The columns of a row that is given by itself, or why it is none."""
    if isinstance(row, Mapping):
        return row
    if isinstance(row, str):
        return {"text_a": row}
    if isinstance(row, tuple | list) and 1 <= len(row) <= 3:
        names: tuple[str, ...] = ("text_a", "text_b", "label")
        if len(row) == 2 and row[1] is None:
            names = ("text_a",)  # no second text, or no label
        elif len(row) == 2 and not isinstance(row[1], str):
            names = ("text_a", "label")
        return dict(zip(names, row, strict=False))
    got = "no value" if row is None else f"{reprlib.repr(row)} ({type(row).__name__})"
    return Problem(got, _A_ROW, "correct or delete the row")


def is_iterable_dataset(rows: Any) -> bool:
    """Whether this is a `datasets.IterableDataset`."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(rows, datasets.IterableDataset)


def class_names_of(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The names of the classes of each ClassLabel among the features of a data set."""
    return {name: tuple(feature.names) for name, feature in features.items() if _is_class_label(feature)}


def _is_class_label(feature: Any) -> bool:
    datasets = sys.modules["datasets"]
    return isinstance(feature, datasets.ClassLabel) and bool(feature.names)


def _numbered(rows: Iterable[Any]) -> tuple[Iterable[int], Iterable[Any]]:
    given = list(rows)
    return range(1, len(given) + 1), given


def _record(position: int, row: Any) -> Record:
    values = values_of_row(row)
    return Record(position, {}, values) if isinstance(values, Problem) else Record(position, values)


def _records_of_table(table: Table, columns: Sequence[str] | None) -> Iterator[Record]:
    chosen = table if columns is None else table.of(columns)
    return (Record(row + 1, chosen[row]) for row in range(len(chosen)))


def _records_of_stream(rows: Any, columns: Sequence[str] | None) -> Iterator[Record]:
    chosen = rows if columns is None else rows.select_columns(list(columns))
    return (Record(number, row) for number, row in enumerate(chosen, 1))


def _rows_one_by_one(rows: Any, argument: str) -> Iterable[Any]:
    if isinstance(rows, str | bytes):
        raise TypeError(f"{argument}: got one text; expected {_SOURCES}; pass [{reprlib.repr(rows)}]")
    if not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        raise TypeError(f"{argument}: got {type(rows).__name__}; expected {_SOURCES}")
    return rows


def _table_of_dataset(dataset: Any, class_names: Mapping[str, Sequence[str]]) -> Table:
    def read(columns: Sequence[str], start: int, end: int) -> Mapping[str, Sequence[Any]]:
        # a format would give tensors
        return dataset.select_columns(list(columns)).with_format(None)[start:end]

    return Table(dataset.column_names, len(dataset), read, class_names)


def _slice_of_pandas(frame: Any, columns: Sequence[str], start: int, end: int) -> Mapping[str, Sequence[Any]]:
    part = frame.iloc[start:end]
    return {name: _without_marks(part[name]) for name in columns}


def _without_marks(series: Any) -> list[Any]:
    """The values of a pandas Series, None in the place of NaN, NaT and NA."""
    return [
        None if is_absent else value for value, is_absent in zip(series.tolist(), series.isna().tolist(), strict=True)
    ]


def _slice_of_arrow(table: Any, columns: Sequence[str], start: int, end: int) -> Mapping[str, Sequence[Any]]:
    return {name: table.column(name).slice(start, end - start).to_pylist() for name in columns}


def _table_of_columns(columns: Mapping[str, Any], argument: str) -> Table:
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(columns, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = list(columns)
        raise DataError(
            f"{argument}: got the splits {', '.join(splits)}; expected one of them; pass {argument}[{splits[0]!r}]"
        )
    for name, values in columns.items():
        if isinstance(values, str | bytes) or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
            raise DataError(
                f"{argument}: got a dictionary with one {type(values).__name__} as {name!r}; expected {_SOURCES}; put "
                "a single row into a list"
            )
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{argument}: its columns have {lengths} rows; expected the same number in each")

    def read(chosen: Sequence[str], start: int, end: int) -> Mapping[str, Sequence[Any]]:
        return {name: _plain(columns[name][start:end]) for name in chosen}

    return Table(list(columns), next(iter(lengths.values()), 0), read)


def _plain(values: Any) -> Sequence[Any]:
    """Python values of a list, or of a piece of an array or series."""
    if hasattr(values, "isna"):
        return _without_marks(values)
    convert = next(
        (getattr(values, name) for name in ("tolist", "to_pylist", "to_list") if hasattr(values, name)), None
    )
    return values if convert is None else convert()


def _check_names(names: Iterable[Any], argument: str) -> None:
    given = list(names)
    repeated = sorted({str(name) for name in given if given.count(name) > 1})
    if repeated:
        raise DataError(f"{argument}: repeated column names ({', '.join(repeated)}); rename them")
