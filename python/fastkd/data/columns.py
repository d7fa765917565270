"""Which columns of a table hold the texts and the label. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fastkd.data.errors import DataError

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


def text_columns(
    columns: Sequence[str], chosen_a: str | None, chosen_b: str | None, source: str
) -> tuple[str, str | None]:
    for argument, name in (("text_a", chosen_a), ("text_b", chosen_b)):
        if name is not None and name not in columns:
            raise DataError(f"{source}: no column '{name}' ({argument}=); the columns are {', '.join(columns)}")
    if chosen_a is not None:
        return chosen_a, chosen_b
    for name_a, name_b in PAIR_COLUMNS:
        found_a, found_b = find_column(columns, name_a), chosen_b or find_column(columns, name_b)
        if found_a and found_b:
            return found_a, found_b
    for name in TEXT_COLUMNS:
        if found_a := find_column(columns, name):
            return found_a, chosen_b
    known = ", ".join([*TEXT_COLUMNS, *(f"{a} + {b}" for a, b in PAIR_COLUMNS)])
    raise DataError(
        f"{source}, header: no text column among {', '.join(columns)}; expected one of {known}; "
        "rename a column or say which one holds the text with text_a="
    )


def label_column(columns: Sequence[str], chosen: str | None, required: bool, source: str) -> str | None:
    if chosen is not None and chosen not in columns:
        raise DataError(f"{source}: no column '{chosen}' (label=); the columns are {', '.join(columns)}")
    found = chosen or next((found for name in LABEL_COLUMNS if (found := find_column(columns, name))), None)
    if found is None and required:
        raise DataError(
            f"{source}, header: no label column among {', '.join(columns)}; "
            f"expected one of {', '.join(LABEL_COLUMNS)}; rename a column or say which one holds the label with label="
        )
    return found


def find_column(columns: Sequence[str], name: str) -> str | None:
    """The column called `name`, else the one that differs from it only in case."""
    if name in columns:
        return name
    return next((column for column in columns if column.strip().lower() == name), None)
