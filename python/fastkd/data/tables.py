"""Text classification data: read from files or the hub, checked row by row, tokenised, and batched by length.

A file is UTF-8 with a header (TSV, CSV), one object a line (JSONL), or Parquet. Columns are found by their usual names:

    text_a, text_b   text_a | text_b, sentence1 | sentence2, premise | hypothesis, question1 | question2,
                     text1 | text2, question | sentence; or one text: text, sentence, content
    label            label, labels, label_id, class, category

or named explicitly. TSV has no quoting: a quote is a plain character and a field cannot hold a tab. Labels are integers
from 0, strings (numbered in sorted order, or in that of `label_names`), or, for regression (`num_labels=1`), floats.

Whatever is wrong with a file is found before training starts: `DataError` says in which line, what was expected and
what to do, for the first rows concerned.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from fastkd.data.columns import PAIR_COLUMNS, TEXT_COLUMNS
from fastkd.data.input_format import encode

LABEL_COLUMNS = ("label", "labels", "label_id", "class", "category")
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}

_SHOWN_BAD_ROWS = 5
_INTEGER = re.compile(r"[+-]?\d+")
_TOKENIZER_CHUNK = 4096


class DataError(ValueError):
    """Data that cannot be used: the message names the place, what came, what was expected, and the remedy."""


class _BadRows:
    """Collects what is wrong with the rows of one source; shows the first few, counts them all."""

    def __init__(self, source: str, unit: str) -> None:
        self.source = source
        self.unit = unit
        self.count = 0
        self.shown: list[str] = []

    def add(self, position: int, got: str, expected: str, remedy: str) -> None:
        self.count += 1
        if len(self.shown) < _SHOWN_BAD_ROWS:
            self.shown.append(f"{self.source}, {self.unit} {position}: {got}; expected {expected}; {remedy}")

    def raise_if_any(self) -> None:
        if not self.count:
            return
        hidden = self.count - len(self.shown)
        more = f"\n... and {hidden} more bad {self.unit}{'s' if hidden > 1 else ''} in {self.source}" if hidden else ""
        raise DataError("\n".join(self.shown) + more)


@dataclass(frozen=True)
class _Table:
    """One source as it was read: `column(name)` gives the raw values, `positions` their line or row numbers."""

    columns: list[str]
    positions: Sequence[int]
    column: Callable[[str], list[Any]]


@dataclass(frozen=True)
class Rows:
    """Checked rows.

    Attributes:
        dataset: columns `text_a` (string), `text_b` (string; pairs only) and `label` (int64 from 0, or float32 for
            regression; absent in unlabelled data).
        label_names: the name of each class in order; None for unnamed integer labels, regression, unlabelled data.
        num_labels: the number of classes; 1 is regression; None is unlabelled.
        source: the file or hub name, for messages.
    """

    dataset: datasets.Dataset
    label_names: tuple[str, ...] | None
    num_labels: int | None
    source: str

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def is_pair(self) -> bool:
        return "text_b" in self.dataset.column_names

    @property
    def is_labelled(self) -> bool:
        return "label" in self.dataset.column_names

    def sample(self, count: int, seed: int = 0) -> Rows:
        """At most `count` rows, drawn without replacement; the same ones for the same seed."""
        if count >= len(self):
            return self
        return replace(self, dataset=self.dataset.shuffle(seed=seed).select(range(count)))

    def digest(self) -> str:
        """A fingerprint of the contents: equal for equal rows in equal order."""
        sha = hashlib.sha256()
        for name in self.dataset.column_names:
            sha.update(name.encode())
            for value in self.dataset[name][:]:
                sha.update(repr(value).encode())
        return sha.hexdigest()


@dataclass(frozen=True)
class DataFolder:
    """The splits of one folder; labels mean the same in all of them."""

    train: Rows
    dev: Rows | None
    test: Rows | None

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self.train.label_names

    @property
    def num_labels(self) -> int | None:
        return self.train.num_labels


def load_rows(
    path_or_hub_name: str | os.PathLike[str],
    *,
    split: str | None = None,
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    require_labels: bool = True,
    text_a: str | None = None,
    text_b: str | None = None,
    label: str | None = None,
    hub_config: str | None = None,
) -> Rows:
    """Read and check one file, one split of a folder, or one split of a dataset on the hub.

    Args:
        path_or_hub_name: a .tsv, .csv, .jsonl or .parquet file; a folder (then `split` says which file); or a name
            that `datasets.load_dataset` knows.
        split: "train", "dev" or "test" of a folder, or any split of a hub dataset.
        label_names: the classes in order. A label is looked up among them by name, else taken as an index.
        num_labels: the number of classes, where the model fixes it; 1 means regression (float labels).
        require_labels: False accepts data without a label column or with all labels empty.
        text_a, text_b, label: column names, where they are not among the usual ones.
        hub_config: the configuration of a hub dataset, such as "sst2" of "nyu-mll/glue".

    Raises:
        DataError: anything wrong with the data.
        ValueError: `label_names` and `num_labels` contradict each other.
    """
    if label_names is not None:
        _check_label_names(label_names, num_labels)
        num_labels = len(label_names)
    check = partial(
        _checked_rows,
        chosen={"text_a": text_a, "text_b": text_b, "label": label},
        num_labels=num_labels,
        require_labels=require_labels,
    )
    path = Path(path_or_hub_name)
    if path.is_dir():
        path = _split_file(path, split)
    if path.is_file():
        bad = _BadRows(str(path), "row" if path.suffix == ".parquet" else "line")
        return check(_read_file(path, bad), bad, label_names=label_names)
    if path.suffix in _READERS or path.is_absolute() or str(path_or_hub_name).startswith("."):
        raise DataError(f"{path}: no such file or folder")

    dataset = _load_from_hub(str(path_or_hub_name), hub_config, split)
    names = label_names if label_names is not None else _class_label_names(dataset, label)
    if num_labels is None and names is not None:
        check = partial(check, num_labels=len(names))
    bad = _BadRows(f"{path_or_hub_name} ({split})", "row")
    table = _Table(dataset.column_names, range(1, len(dataset) + 1), lambda name: dataset[name][:])
    return check(table, bad, label_names=names)


def load_folder(
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    require_labels: bool = True,
    text_a: str | None = None,
    text_b: str | None = None,
    label: str | None = None,
) -> DataFolder:
    """Read `train`, and where they exist `dev` (or `validation`) and `test`, each .tsv, .csv, .jsonl or .parquet.

    The training file fixes the classes: a label that only the others have is an error. Arguments as in `load_rows`.

    Raises:
        DataError: no training file, two files for one split, or anything wrong with the data.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with train.tsv (or .csv, .jsonl, .parquet)")
    read = partial(load_rows, require_labels=require_labels, text_a=text_a, text_b=text_b, label=label)
    train = read(folder, split="train", label_names=label_names, num_labels=num_labels)
    if train.num_labels is not None:
        label_names, num_labels = train.label_names, train.num_labels
    others = {
        split: read(folder, split=split, label_names=label_names, num_labels=num_labels)
        for split in ("dev", "test")
        if _split_candidates(folder, split)
    }
    return DataFolder(train, others.get("dev"), others.get("test"))


# Reading


def _split_candidates(folder: Path, split: str) -> list[Path]:
    names = SPLIT_NAMES.get(split, (split,))
    return [path for name in names for suffix in _READERS if (path := folder / f"{name}{suffix}").is_file()]


def _split_file(folder: Path, split: str | None) -> Path:
    if split is None:
        raise DataError(f"{folder} is a folder: name a file in it, or pass split='train', 'dev' or 'test'")
    found = _split_candidates(folder, split)
    names = " or ".join(SPLIT_NAMES.get(split, (split,)))
    if not found:
        raise DataError(f"{folder}: no file for split '{split}'; expected {names} with one of {', '.join(_READERS)}")
    if len(found) > 1:
        files = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: {len(found)} files for split '{split}' ({files}); expected one; remove the others")
    return found[0]


def _read_file(path: Path, bad: _BadRows) -> _Table:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown file type '{path.suffix}'; expected one of {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected a header and rows, or use another file")
    return reader(path, bad)


def _decoded_lines(path: Path, bad: _BadRows) -> Iterator[tuple[int, str]]:
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


def _read_delimited(records: Iterator[tuple[int, list[str]]], bad: _BadRows) -> _Table:
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
    return _Table(columns, positions, lambda name: [fields[index[name]] for fields in values])


def _read_tsv(path: Path, bad: _BadRows) -> _Table:
    return _read_delimited(((number, line.split("\t")) for number, line in _decoded_lines(path, bad)), bad)


def _csv_records(path: Path, bad: _BadRows) -> Iterator[tuple[int, list[str]]]:
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


def _read_csv(path: Path, bad: _BadRows) -> _Table:
    return _read_delimited(_csv_records(path, bad), bad)


def _read_jsonl(path: Path, bad: _BadRows) -> _Table:
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
    return _Table(columns, positions, lambda name: [value.get(name) for value in objects])


def _read_parquet(path: Path, bad: _BadRows) -> _Table:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from error
    return _Table(table.column_names, range(1, table.num_rows + 1), lambda name: table.column(name).to_pylist())


_READERS = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _load_from_hub(name: str, config: str | None, split: str | None) -> datasets.Dataset:
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # load_dataset raises a dozen unrelated types
        hint = "no such file or folder here; for a hub dataset check the name, its configuration and the split"
        raise DataError(f"{name}: {hint} ({type(error).__name__}: {error})") from error
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"{name}: no split chosen; pass split= one of {', '.join(map(str, loaded))}")
    return loaded


def _class_label_names(dataset: datasets.Dataset, label: str | None) -> list[str] | None:
    for name in [label] if label else LABEL_COLUMNS:
        feature = dataset.features.get(name)
        if isinstance(feature, datasets.ClassLabel):
            return list(feature.names)
    return None


# Checking


def _checked_rows(
    table: _Table,
    bad: _BadRows,
    *,
    chosen: dict[str, str | None],
    label_names: Sequence[str] | None,
    num_labels: int | None,
    require_labels: bool,
) -> Rows:
    text_a, text_b = _text_columns(table.columns, chosen["text_a"], chosen["text_b"], bad.source)
    label = _label_column(table.columns, chosen["label"], require_labels, bad.source)
    columns = {"text_a": table.column(text_a)} | ({"text_b": table.column(text_b)} if text_b else {})
    for name, values in columns.items():
        _check_texts(values, text_a if name == "text_a" else text_b or "", table.positions, bad)
    raw_labels = table.column(label) if label else None
    if raw_labels is not None:
        raw_labels = [None if _is_missing(value, regression=num_labels == 1) else value for value in raw_labels]
        if not require_labels and all(value is None for value in raw_labels):
            raw_labels = None
    names: tuple[str, ...] | None = None
    numbers: list[int] | list[float] | None = None
    if raw_labels is not None and len(raw_labels):
        numbers, names, num_labels = _resolve_labels(raw_labels, table.positions, label_names, num_labels, bad)
    bad.raise_if_any()
    if not len(table.positions):
        raise DataError(f"{bad.source}: no rows after the header; expected at least one")
    features = {name: datasets.Value("string") for name in columns}
    if numbers is None:
        dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        return Rows(dataset, None, None, bad.source)
    features["label"] = datasets.Value("float32" if num_labels == 1 else "int64")
    dataset = datasets.Dataset.from_dict({**columns, "label": numbers}, features=datasets.Features(features))
    return Rows(dataset, names, num_labels, bad.source)


def _find(columns: Sequence[str], name: str) -> str | None:
    """The column called `name`, else the one that differs from it only in case."""
    if name in columns:
        return name
    return next((column for column in columns if column.strip().lower() == name), None)


def _text_columns(
    columns: Sequence[str], chosen_a: str | None, chosen_b: str | None, source: str
) -> tuple[str, str | None]:
    for argument, name in (("text_a", chosen_a), ("text_b", chosen_b)):
        if name is not None and name not in columns:
            raise DataError(f"{source}: no column '{name}' ({argument}=); the columns are {', '.join(columns)}")
    if chosen_a is not None:
        return chosen_a, chosen_b
    for name_a, name_b in PAIR_COLUMNS:
        found_a, found_b = _find(columns, name_a), chosen_b or _find(columns, name_b)
        if found_a and found_b:
            return found_a, found_b
    for name in TEXT_COLUMNS:
        if found_a := _find(columns, name):
            return found_a, chosen_b
    known = ", ".join([*TEXT_COLUMNS, *(f"{a} + {b}" for a, b in PAIR_COLUMNS)])
    raise DataError(
        f"{source}, header: no text column among {', '.join(columns)}; expected one of {known}; "
        "rename a column or say which one holds the text with text_a="
    )


def _label_column(columns: Sequence[str], chosen: str | None, required: bool, source: str) -> str | None:
    if chosen is not None and chosen not in columns:
        raise DataError(f"{source}: no column '{chosen}' (label=); the columns are {', '.join(columns)}")
    found = chosen or next((found for name in LABEL_COLUMNS if (found := _find(columns, name))), None)
    if found is None and required:
        raise DataError(
            f"{source}, header: no label column among {', '.join(columns)}; "
            f"expected one of {', '.join(LABEL_COLUMNS)}; rename a column or say which one holds the label with label="
        )
    return found


def _check_texts(values: Sequence[Any], column: str, positions: Sequence[int], bad: _BadRows) -> None:
    for position, value in zip(positions, values, strict=True):
        if isinstance(value, str) and value.strip():
            continue
        if value is None:
            got = f"no value in column '{column}'"
        elif isinstance(value, str):
            got = f"empty text in column '{column}'"
        else:
            got = f"{value!r} ({type(value).__name__}) in column '{column}'"
        bad.add(position, got, "text", "fill it in or delete the row")


def _check_label_names(label_names: Sequence[str], num_labels: int | None) -> None:
    if isinstance(label_names, str) or len(label_names) < 2 or len(set(label_names)) < len(label_names):
        raise ValueError(f"label_names must be two or more different names, got {label_names!r}")
    if num_labels is not None and num_labels != len(label_names):
        raise ValueError(f"num_labels is {num_labels} but label_names has {len(label_names)} names: {label_names!r}")


def _is_missing(value: Any, *, regression: bool) -> bool:
    if isinstance(value, str):
        return not value.strip()
    # -1 is how hub datasets mark rows whose class is kept secret
    return value is None or (not regression and isinstance(value, int) and value == -1)


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


def _resolve_labels(
    raw: Sequence[Any],
    positions: Sequence[int],
    label_names: Sequence[str] | None,
    num_labels: int | None,
    bad: _BadRows,
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


def _regression_labels(labelled: list[tuple[int, Any]], bad: _BadRows) -> list[float]:
    numbers = []
    for position, value in labelled:
        number = _as_float(value)
        if number is None:
            bad.add(position, f"label {value!r}", "a finite number (regression)", "correct the label")
            continue
        numbers.append(number)
    return numbers


def _named_labels(labelled: list[tuple[int, Any]], names: tuple[str, ...], bad: _BadRows) -> list[int]:
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


def _integer_labels(labelled: list[tuple[int, Any]], num_labels: int | None, bad: _BadRows) -> tuple[list[int], int]:
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
    labelled: list[tuple[int, Any]], num_labels: int | None, bad: _BadRows
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


def _shortened(values: Sequence[Any], shown: int = 10) -> str:
    text = ", ".join(map(str, values[:shown]))
    return f"{text}, ... ({len(values)} in all)" if len(values) > shown else text


# Tokens and batches


def tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> datasets.Dataset:
    """Token ids, truncated to `max_length` and not padded, with `length` and, where the rows have them, `labels`.

    Pairs are encoded together and the longer text loses tokens first, unless the tokenizer's `input_format` says
    otherwise.

    Raises:
        ValueError: `max_length` is more than the tokenizer's model takes, or leaves no room for text.
    """
    special_tokens = tokenizer.num_special_tokens_to_add(pair=rows.is_pair)
    if not special_tokens < max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length is {max_length}; expected more than the {special_tokens} special tokens "
            f"and at most the tokenizer's model_max_length, {tokenizer.model_max_length}"
        )
    columns: dict[str, list[Any]] = {"length": []}
    for start in range(0, len(rows), _TOKENIZER_CHUNK):
        chunk = rows.dataset[start : start + _TOKENIZER_CHUNK]
        encoded = encode(tokenizer, chunk["text_a"], chunk.get("text_b"), max_length)
        for name, values in encoded.items():
            columns.setdefault(name, []).extend(values)
        columns["length"].extend(map(len, encoded["input_ids"]))
    if rows.is_labelled:
        columns["labels"] = rows.dataset["label"][:]
    return datasets.Dataset.from_dict(columns)


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """Pads each batch to its longest row; to a multiple of 8 where a GPU's matrix units want that."""
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if torch.cuda.is_available() else None)


class LengthSortedBatches:
    """Batches of rows of like length, longest first, so that little is padded and memory runs out at once or never.

    Iterating gives dicts of tensors and may be repeated. `order[i]` is the row number of the i-th sample given.
    """

    def __init__(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> None:
        self.order = sorted(range(len(dataset)), key=dataset["length"][:].__getitem__, reverse=True)
        self.batch_size = batch_size
        self._dataset = dataset.remove_columns("length")
        self._collate = padding_collator(tokenizer)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self.order), self.batch_size):
            columns = self._dataset[self.order[start : start + self.batch_size]]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield dict(self._collate(rows))


class ShuffledOnceSampler(torch.utils.data.Sampler[int]):
    """One order for all epochs: that of `random.Random(seed).shuffle`, as in the official FastBERT code."""

    def __init__(self, rows: int, seed: int) -> None:
        self.order = list(range(rows))
        random.Random(seed).shuffle(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """A shuffle whose consecutive rows, `group` at a time, are of like length; a function of (seed, epoch) alone.

    transformers' sampler of this name draws from the global generator, so that a resumed epoch would see other rows.
    Rows are shuffled, sorted by length within pools of 50 groups, and the groups are shuffled again; a last incomplete
    group stays last.
    """

    POOL_GROUPS = 50

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths = lengths
        self.group = group
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 16) + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.group * self.POOL_GROUPS
        ordered: list[int] = []
        for start in range(0, len(shuffled), pool):
            ordered += sorted(shuffled[start : start + pool], key=self.lengths.__getitem__, reverse=True)
        full = len(ordered) // self.group
        for index in torch.randperm(full, generator=generator).tolist():
            yield from ordered[index * self.group : (index + 1) * self.group]
        yield from ordered[full * self.group :]
