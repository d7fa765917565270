"""Labels as they stand in a table become numbers: classes from 0, or floats for regression."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from fastkd.data.errors import BadRows, DataError

_INTEGER = re.compile(r"[+-]?\d+")


def resolve_labels(
    raw: Sequence[Any],
    positions: Sequence[int],
    label_names: Sequence[str] | None,
    num_labels: int | None,
    bad: BadRows,
) -> tuple[list[int] | list[float], tuple[str, ...] | None, int]:
    """Turn raw labels (None where missing) into numbers. Returns them, the class names, and the number of classes."""
    labelled: list[tuple[int, Any]] = []
    for position, value in zip(positions, raw, strict=True):
        if value is None:
            bad.add(position, "no label", "a label in every row", "fill it in or delete the row")
            continue
        labelled.append((position, value.strip() if isinstance(value, str) else value))
    if not labelled:
        bad.raise_if_any()
    if num_labels == 1:
        return _regression_labels(labelled, bad), None, 1
    if label_names is not None:
        return _named_labels(labelled, tuple(label_names), bad), tuple(label_names), len(label_names)
    integers = sum(_as_integer(value) is not None for _, value in labelled)
    if integers < len(labelled) and all(_as_float(value) is not None for _, value in labelled):
        position, value = next(pair for pair in labelled if _as_integer(pair[1]) is None)
        raise DataError(
            f"{bad.source}, {bad.unit} {position}: label {value!r}, and every label is a number; expected integers or "
            "names; for regression pass num_labels=1"
        )
    if 2 * integers >= len(labelled):
        numbers, classes = _integer_labels(labelled, num_labels, bad)
        return numbers, None, classes
    return _string_labels(labelled, num_labels, bad)


def check_label_names(label_names: Sequence[str], num_labels: int | None) -> None:
    if isinstance(label_names, str) or len(label_names) < 2 or len(set(label_names)) < len(label_names):
        raise ValueError(f"label_names must be two or more different names, got {label_names!r}")
    if num_labels is not None and num_labels != len(label_names):
        raise ValueError(f"num_labels is {num_labels} but label_names has {len(label_names)} names: {label_names!r}")


def is_missing(value: Any, *, regression: bool) -> bool:
    if isinstance(value, str):
        return not value.strip()
    # -1 is how hub datasets mark rows whose class is kept secret
    return value is None or (not regression and isinstance(value, int) and value == -1)


def _regression_labels(labelled: list[tuple[int, Any]], bad: BadRows) -> list[float]:
    numbers = []
    for position, value in labelled:
        number = _as_float(value)
        if number is None:
            bad.add(position, f"label {value!r}", "a finite number (regression)", "correct the label")
            continue
        numbers.append(number)
    return numbers


def _named_labels(labelled: list[tuple[int, Any]], names: tuple[str, ...], bad: BadRows) -> list[int]:
    numbers = []
    for position, value in labelled:
        index = names.index(str(value)) if str(value) in names else _as_integer(value)
        if index is None or not 0 <= index < len(names):
            expected = f"one of {_shortened(names)}, or an index from 0 to {len(names) - 1}"
            remedy = "correct the label or pass all labels as label_names"
            bad.add(position, f"unknown label {value!r}", expected, remedy)
            continue
        numbers.append(index)
    return numbers


def _integer_labels(labelled: list[tuple[int, Any]], num_labels: int | None, bad: BadRows) -> tuple[list[int], int]:
    numbers: list[int] = []
    highest = None if num_labels is None else num_labels - 1
    for position, value in labelled:
        number = _as_integer(value)
        if number is None:
            remedy = "correct the label or pass all labels as label_names"
            bad.add(position, f"label {value!r}", "an integer like the other labels", remedy)
        elif number < 0 or (highest is not None and number > highest):
            expected = "0 or more" if highest is None else f"0 to {highest}"
            bad.add(position, f"unknown label {number}", expected, "correct the label or the number of labels")
        else:
            numbers.append(number)
    if num_labels is None and numbers and min(numbers) > 0:
        classes = sorted(set(numbers))
        bad.raise_if_any()
        raise DataError(
            f"{bad.source}: integer labels start at {classes[0]} ({_shortened(classes)}); expected 0 to C-1; renumber "
            "them, pass label_names= (for example ['1', '2']), or num_labels= if the file merely lacks a class"
        )
    return numbers, num_labels or max([1, *numbers]) + 1


def _string_labels(
    labelled: list[tuple[int, Any]], num_labels: int | None, bad: BadRows
) -> tuple[list[int], tuple[str, ...], int]:
    strings: list[str] = []
    for position, value in labelled:
        if isinstance(value, str) and _as_float(value) is None:
            strings.append(value)
            continue
        remedy = "correct the label or pass all labels as label_names"
        bad.add(position, f"label {value!r}", "a name like the other labels", remedy)
    names = tuple(sorted(set(strings)))
    bad.raise_if_any()
    if len(names) < 2:
        raise DataError(f"{bad.source}: every label is {names[0]!r}; expected two or more classes; pass label_names=")
    if num_labels is not None and num_labels != len(names):
        raise DataError(
            f"{bad.source}: {len(names)} different labels ({_shortened(names)}); expected {num_labels}; "
            "pass all of them in the model's order as label_names="
        )
    index = {name: i for i, name in enumerate(names)}
    return [index[value] for value in strings], names, len(names)


def _as_integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        return int(value)
    return None


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _shortened(values: Sequence[Any], shown: int = 10) -> str:
    text = ", ".join(map(str, values[:shown]))
    return f"{text}, ... ({len(values)} in all)" if len(values) > shown else text
