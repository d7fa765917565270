"""Which columns of a table or keys of an object hold the texts and the label. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastkd.data.errors import DataError, Problem
from fastkd.data.texts import text_problem

PAIR_COLUMNS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
)
"""Names of two texts, in the order in which they are looked for."""
TEXT_COLUMNS = ("text_a", "text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels", "label_id", "class", "category")

_SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", "\r": "carriage returns"}


class Columns(NamedTuple):
    """Columns that a user names; None takes the usual ones."""

    text_a: str | None = None
    text_b: str | None = None
    label: str | None = None


USUAL = Columns()


def text_columns(columns: Sequence[str], chosen: Columns, source: str) -> tuple[str, str | None]:
    """The columns of the one or two texts.

    Raises:
        DataError: a chosen column is missing, or there is none of the usual ones.
    """
    for argument in ("text_a", "text_b"):
        _check_chosen(columns, argument, getattr(chosen, argument), source)
    found = find_text_columns(columns, chosen)
    if found is None:
        _check_separated(columns, source)
        raise DataError(
            f"{source}: no text column among {_listed(columns)}; expected one of {_usual_texts()}; "
            "rename a column or say which one holds the text with text_a="
        )
    return found


def find_text_columns(columns: Iterable[str], chosen: Columns = USUAL) -> tuple[str, str | None] | None:
    """As `text_columns`, of columns that hold what was chosen; None where there is no text column."""
    names = [name for name in columns if isinstance(name, str)]
    # the first of those that differ in case only, and before all one that is written as usual
    known = {name.strip().lower(): name for name in reversed(names)} | {name: name for name in names}
    if chosen.text_a is not None:
        return chosen.text_a, chosen.text_b
    for name_a, name_b in PAIR_COLUMNS:
        found_a, found_b = known.get(name_a), chosen.text_b or known.get(name_b)
        if found_a and found_b:
            return found_a, found_b
    return next(((known[name], chosen.text_b) for name in TEXT_COLUMNS if name in known), None)


def label_column(columns: Sequence[str], chosen: str | None, required: bool, source: str, hint: str = "") -> str | None:
    """The column of the label; None where there is none and none is required. Errors end with the hint.

    Raises:
        DataError: the chosen column, or a required one, is missing.
    """
    _check_chosen(columns, "label", chosen, source)
    usual = next((found for name in LABEL_COLUMNS if (found := find_column(columns, name))), None)
    found = usual if chosen is None else chosen
    if found is None and required:
        _check_separated(columns, source)
        raise DataError(
            f"{source}: no label column among {_listed(columns)}; "
            f"expected one of {', '.join(LABEL_COLUMNS)}; rename a column or say which one holds the label "
            f"with label={hint}"
        )
    return found


def find_column(columns: Sequence[str], name: str) -> str | None:
    """The column called `name`, else the one that differs from it only in case."""
    if name in columns:
        return name
    # a DataFrame without a header has numbers for names
    return next((column for column in columns if isinstance(column, str) and column.strip().lower() == name), None)


def texts_of(row: Mapping[str, Any], chosen: Columns = USUAL) -> tuple[str, str | None] | Problem:
    """The one or two texts of a row that stands alone, or what is wrong with them.

    A second text that is None marks a single text, as writers of mixed files do.
    """
    for name in (chosen.text_a, chosen.text_b):
        if name is not None and name not in row:
            return Problem(f"no column '{name}' among {_listed(row)}", "it in every row", "add it or delete the row")
    found = find_text_columns([name for name, value in row.items() if value is not None or name in chosen], chosen)
    if found is None:
        got = f"no text column among {_listed(row) or 'no columns'}"
        return Problem(got, f"one of {_usual_texts()}", "give the text one of these names or delete the row")
    first, second = found
    if second is not None and row[second] is None:
        second = None
    for name in (first, second):
        if name is not None and (problem := text_problem(row[name], name)):
            return problem
    return row[first], None if second is None else row[second]


def _check_chosen(columns: Sequence[str], argument: str, name: str | None, source: str) -> None:
    if name is not None and name not in columns:
        raise DataError(f"{source}: no column '{name}' ({argument}=); the columns are {_listed(columns)}")


def _check_separated(columns: Sequence[str], source: str) -> None:
    """Raise DataError where the header is in one piece, because something else separates the columns or the lines."""
    header = "\t".join(map(str, columns))
    mark = (
        "\r" if "\r" in header else next((mark for mark in _SEPARATORS if len(columns) == 1 and mark in header), None)
    )
    if mark is not None:
        raise DataError(
            f"{source}, header: {header[:60]!r}, where {_SEPARATORS[mark]} seem to separate the "
            "columns; expected commas between the columns of a .csv file, tabs in a .tsv file, "
            "and \\n or \\r\\n between lines; convert or rename the file"
        )


def _usual_texts() -> str:
    return ", ".join([*TEXT_COLUMNS, *(f"{a} + {b}" for a, b in PAIR_COLUMNS)])


def _listed(columns: Iterable[Any], shown: int = 20) -> str:
    names = [str(column) for column in columns]
    return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")
