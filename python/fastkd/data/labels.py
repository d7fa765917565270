"""Labels as they stand in a table become numbers: classes from 0, or floats for regression."""

from __future__ import annotations

import itertools
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.data.errors import BadRows, DataError, Problem

LABELS_ARE = ("names", "indices")
"""How numbers among named classes can be meant."""

_INTEGER = re.compile(r"[+-]?\d{1,4000}")  # Python reads no longer one
_INT64 = 2**63
_MOST_CLASSES = 10_000  # more are numbers of another kind
_FEW_CLASSES = 50  # so many may have one row each, as in a small test
_FLOAT32_MAX = 3.4028234663852886e38
_UNLABELLED = -1
"""How hub datasets mark rows whose class is kept secret."""
# how pandas and others write that there is no value
_MISSING = frozenset(
    ["nan", "NaN", "NAN", "-nan", "None", "null", "NULL", "Null", "NA", "N/A", "n/a", "<NA>", "#N/A", "#NA", "NaT"]
)


@dataclass(frozen=True)
class LabelRule:
    """What is known of the labels before they are read.

    Attributes:
        label_names: the classes in order, as a model or another split has them.
        num_labels: how many; 1 is regression.
        labels_are: whether numbers are "names" of `label_names` or "indices" into them; None: whichever fits all.
        class_names: what the source itself calls the classes 0, 1, 2...
    """

    label_names: Sequence[str] | None = None
    num_labels: int | None = None
    labels_are: str | None = None
    class_names: Sequence[str] | None = None

    @property
    def is_regression(self) -> bool:
        return self.num_labels == 1


@dataclass(frozen=True)
class Labels:
    """Resolved labels.

    Attributes:
        numbers: int64 from 0, or floats that float32 holds.
        label_names: None for unnamed classes and regression.
        num_labels: 1 is regression.
        labels_are: how they were read; other splits of the same data are read alike.
    """

    numbers: list[int] | list[float]
    label_names: tuple[str, ...] | None
    num_labels: int
    labels_are: str | None = None


_Labelled = list[tuple[int, Any]]
"""Position and raw label of each row."""


def resolve_labels(
    raw: Sequence[Any], positions: Sequence[int], rule: LabelRule, bad: BadRows, required: bool
) -> Labels | None:
    """Turn raw labels into numbers; None where no row needs one and none has one.

    Rows without a label that should have one, and labels that do not fit, are added to `bad`.

    Raises:
        DataError: the labels as a whole cannot be used.
    """
    labelled: _Labelled = []
    missing: _Labelled = []
    for position, value in zip(positions, raw, strict=True):
        value = _python_value(value)
        (missing if is_missing(value, rule) else labelled).append((position, value))
    if not labelled and not required:
        return None
    for position, value in missing:
        bad.add(position, _no_label(value))
    if not labelled:
        return None
    if rule.is_regression:
        return Labels(_regression_labels(labelled, bad), None, 1)
    if rule.class_names is not None and rule.labels_are != "indices":
        return _numbered_names(labelled, rule, bad)
    if rule.label_names is not None:
        return _named_labels(labelled, tuple(rule.label_names), rule.labels_are, bad)
    return _unnamed_labels(labelled, rule.num_labels, bad)


def check_label_names(label_names: Sequence[str], num_labels: int | None) -> None:
    """Raise ValueError unless these are names of `num_labels` classes."""
    if isinstance(label_names, str) or len(label_names) < 2 or len(set(label_names)) < len(label_names):
        raise ValueError(f"label_names must be two or more different names, got {label_names!r}")
    if num_labels is not None and num_labels != len(label_names):
        raise ValueError(f"num_labels is {num_labels} but label_names has {len(label_names)} names: {label_names!r}")


def names_of_classes(id2label: Mapping[Any, str] | None) -> tuple[str, ...] | None:
    """The names of a model's classes in order; None where it has none but transformers' LABEL_0, LABEL_1...

    Args:
        id2label: of a configuration; JSON makes its keys texts.
    """
    if not id2label:
        return None
    names = tuple(str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0])))
    is_generic = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return None if is_generic or len(names) < 2 else names


def label_rule(config: Any) -> dict[str, Any]:
    """What the configuration of a model says about the labels of its rows, as arguments of `fastkd.load_rows`."""
    return {"label_names": names_of_classes(config.id2label), "num_labels": config.num_labels}


def is_missing(value: Any, rule: LabelRule) -> bool:
    """Whether a raw label says that there is none; what `rule.label_names` lists is a name."""
    if value is None or value == "":
        return True
    if rule.is_regression:
        return False
    if isinstance(value, float) and math.isnan(value):
        return True
    is_marked = (isinstance(value, str) and value in _MISSING) or _as_integer(value) == _UNLABELLED
    return is_marked and _as_text(value) not in (rule.label_names or ())


def _python_value(value: Any) -> Any:
    """A label as Python has it: without spaces around it, and no scalar of NumPy or tensor with one number."""
    if isinstance(value, str):
        return value.strip()
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _no_label(value: Any) -> Problem:
    got, remedy = "no label", "fill it in or delete the row"
    if value is not None and value != "":
        got += f" ({value!r})"
        remedy += f"; if {value} is a class, name all classes with label_names="
    return Problem(got, "a label in every row", remedy)


def _regression_labels(labelled: _Labelled, bad: BadRows) -> list[float]:
    numbers = []
    for position, value in labelled:
        number = _as_float(value)
        if number is None:
            bad.add(position, Problem(_described(value), "a finite number (regression)", "correct the label"))
        elif abs(number) > _FLOAT32_MAX:
            problem = Problem(
                _described(value), "a number that float32 can hold, up to 3.4e38", "correct or rescale it"
            )
            bad.add(position, problem)
        else:
            numbers.append(number)
    return numbers


def _numbered_names(labelled: _Labelled, rule: LabelRule, bad: BadRows) -> Labels:
    """Integers that stand for names of the source itself."""
    own = tuple(rule.class_names or ())
    if rule.label_names is None and rule.num_labels not in (None, len(own)):
        raise DataError(
            f"{bad.source}: it names {len(own)} classes ({_shortened(own)}); expected {rule.num_labels}; "
            "pass num_labels as they are, or the names as label_names="
        )
    wanted = own if rule.label_names is None else tuple(rule.label_names)
    index = {name: number for number, name in enumerate(wanted)}
    unknown = [name for name in own if name not in index]
    if rule.label_names is not None and len(unknown) == len(own):
        raise DataError(
            f"{bad.source}: it names the classes {_shortened(own)}, expected {_shortened(wanted)}; rename them, or "
            "pass labels_are='indices' if the numbers mean the same classes in the same order"
        )
    numbers = []
    for position, value in labelled:
        number = _as_integer(value)
        if number is None or not 0 <= number < len(own):
            bad.add(position, Problem(f"label {value!r}", f"0 to {len(own) - 1}", "correct the label"))
        elif own[number] not in index:
            bad.add(position, Problem(f"unknown label {own[number]!r}", f"one of {_shortened(wanted)}", _ALL_NAMES))
        else:
            numbers.append(index[own[number]])
    return Labels(numbers, wanted, len(wanted))


_ALL_NAMES = "correct the label or pass all labels as label_names="


def _named_labels(labelled: _Labelled, names: tuple[str, ...], labels_are: str | None, bad: BadRows) -> Labels:
    different = {_as_text(value): value for _, value in labelled}
    by_name = {text: names.index(text) for text in different if text in names}
    by_index = {
        text: number
        for text, value in different.items()
        if (number := _as_integer(value)) is not None and 0 <= number < len(names)
    }
    reading = labels_are or _reading(by_name, by_index, different, names, bad)
    numbers_of = by_name if reading == "names" else by_index
    numbers = []
    for position, value in labelled:
        number = numbers_of.get(_as_text(value))
        if number is None:
            expected = f"one of {_shortened(names)}" if reading == "names" else f"an index from 0 to {len(names) - 1}"
            if labels_are is None:
                expected += ", in every row a name or in every row an index"
            bad.add(position, Problem(f"unknown label {_short(value)}", expected, _ALL_NAMES))
        else:
            numbers.append(number)
    return Labels(numbers, names, len(names), reading)


def _reading(
    by_name: Mapping[str, int],
    by_index: Mapping[str, int],
    different: Mapping[str, Any],
    names: tuple[str, ...],
    bad: BadRows,
) -> str:
    """Whether the labels of a source are names or indices: the reading that fits all, else the one that fits more.

    Raises:
        DataError: both fit and do not mean the same.
    """
    if len(by_name) == len(by_index) == len(different) and by_name != by_index:
        text = next(text for text in different if by_name[text] != by_index[text])
        raise DataError(
            f"{bad.source}: label {text} may be the class {text} or the class number {text}, which is "
            f"{names[by_index[text]]}, and so all labels can be read in two ways; expected one; pass "
            "labels_are='names' or labels_are='indices'"
        )
    return "names" if len(by_name) >= len(by_index) else "indices"


def _unnamed_labels(labelled: _Labelled, num_labels: int | None, bad: BadRows) -> Labels:
    integers = sum(_as_integer(value) is not None for _, value in labelled)
    if integers < len(labelled) and all(_as_float(value) is not None for _, value in labelled):
        position, value = next(pair for pair in labelled if _as_integer(pair[1]) is None)
        raise DataError(
            f"{bad.source}, {bad.unit} {position}: {_described(value)}, and every label is a number; expected integers "
            "or names; for regression pass num_labels=1"
        )
    if 2 * integers >= len(labelled):
        return _integer_labels(labelled, num_labels, bad)
    return _string_labels(labelled, num_labels, bad)


def _integer_labels(labelled: _Labelled, num_labels: int | None, bad: BadRows) -> Labels:
    first: dict[int, int] = {}  # position of the first row of each class
    numbers: list[int] = []
    highest = None if num_labels is None else num_labels - 1
    for position, value in labelled:
        number = _as_integer(value)
        if number is None:
            bad.add(position, Problem(_described(value), "an integer like the other labels", _ALL_NAMES))
        elif number < 0 or number > (_INT64 - 1 if highest is None else highest):
            expected = "0 or more, below 2^63" if highest is None else f"0 to {highest}"
            remedy = "correct the label or the number of labels"
            bad.add(position, Problem(f"unknown label {_short(number)}", expected, remedy))
        else:
            first.setdefault(number, position)
            numbers.append(number)
    if num_labels is None and first:
        _check_no_gaps(first, bad)
        _check_repeated(len(first), len(numbers), bad)
    return Labels(numbers, None, num_labels or max([1, *numbers]) + 1)


def _check_no_gaps(first: Mapping[int, int], bad: BadRows) -> None:
    """Raise DataError unless the classes are 0 to C-1: a typo or a column of numbers is no class."""
    classes = sorted(first)
    top = classes[-1]
    if classes[0] > 0:
        bad.raise_if_any()
        lacks = f", or pass num_labels={top + 1} if the file merely lacks a class" if top < _MOST_CLASSES else ""
        raise DataError(
            f"{bad.source}: integer labels start at {classes[0]} ({_shortened(classes)}); expected 0 to C-1; renumber "
            f"them, name them (as in label_names=['1', '2']){lacks}"
        )
    gaps = [(low + 1, high - 1) for low, high in itertools.pairwise(classes) if high > low + 1]
    if not gaps:
        return
    bad.raise_if_any()
    absent = [f"{low}" if low == high else f"{low} to {high}" for low, high in gaps]
    label = gaps[0][1] + 1
    remedy = f", or pass num_labels={top + 1} if there are so many classes" if top < _MOST_CLASSES else ""
    raise DataError(
        f"{bad.source}, {bad.unit} {first[label]}: label {_short(label)}, but no row has {_shortened(absent, 3)}; "
        f"expected every class from 0 to C-1; correct the label, say which column holds the labels with label={remedy}"
    )


def _check_repeated(classes: int, rows: int, bad: BadRows) -> None:
    """Raise DataError for labels that hardly any two rows share: they number or describe rows."""
    if classes > _FEW_CLASSES and 2 * classes > rows:
        bad.raise_if_any()
        raise DataError(
            f"{bad.source}: {classes} different labels in {rows} rows; expected classes that rows share; say which "
            f"column holds the labels with label=, or pass num_labels={classes} if there are so many classes"
        )


def _string_labels(labelled: _Labelled, num_labels: int | None, bad: BadRows) -> Labels:
    strings: list[str] = []
    for position, value in labelled:
        if isinstance(value, str) and _as_float(value) is None:
            strings.append(value)
            continue
        bad.add(position, Problem(_described(value), "a name like the other labels", _ALL_NAMES))
    names = tuple(sorted(set(strings)))
    bad.raise_if_any()
    if len(names) < 2:
        raise DataError(f"{bad.source}: every label is {names[0]!r}; expected two or more classes; pass label_names=")
    if num_labels is not None and num_labels != len(names):
        raise DataError(
            f"{bad.source}: {len(names)} different labels ({_shortened(names)}); expected {num_labels}; "
            "pass all of them in the model's order as label_names="
        )
    if num_labels is None:
        _check_repeated(len(names), len(strings), bad)
    index = {name: i for i, name in enumerate(names)}
    return Labels([index[value] for value in strings], names, len(names), "names")


def _as_integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    return None


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _as_text(value: Any) -> str:
    number = None if isinstance(value, str) else _as_integer(value)
    return str(value) if number is None else str(number)


def _described(value: Any) -> str:
    return f"label {_short(value)}"


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _shortened(values: Sequence[Any], shown: int = 10) -> str:
    text = ", ".join(map(str, values[:shown]))
    return f"{text}, ... ({len(values)} in all)" if len(values) > shown else text
