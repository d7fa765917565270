"""Rows of text and their labels, read from files or the hub and checked one by one.

A file is UTF-8 with a header (TSV, CSV), one object a line (JSONL), or Parquet. Columns are found by their usual names:

    text_a, text_b   text_a | text_b, sentence1 | sentence2, premise | hypothesis, question1 | question2,
                     text1 | text2, question | sentence; or one text: text, sentence, content
    label            label, labels, label_id, class, category

or named explicitly. Labels are integers from 0, strings (numbered in sorted order, or in that of `label_names`), or,
for regression (`num_labels=1`), floats.

A bad file is found before training starts: `DataError` says in which line, what was expected and what to do, for the
first bad rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from fastkd.data.columns import LABEL_COLUMNS, label_column, text_columns
from fastkd.data.errors import BadRows, DataError
from fastkd.data.formats import READERS, Table, read_file
from fastkd.data.labels import check_label_names, is_missing, resolve_labels

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}


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
        label_names: the classes in order. A label is one of these names, or an index.
        num_labels: the number of classes, where the model fixes it; 1 means regression (float labels).
        require_labels: False accepts data without a label column or with all labels empty.
        text_a, text_b, label: names of the columns; default: the usual ones.
        hub_config: the configuration of a hub dataset, such as "sst2" of "nyu-mll/glue".

    Raises:
        DataError: anything wrong with the data.
        ValueError: `label_names` and `num_labels` contradict each other.
    """
    if label_names is not None:
        check_label_names(label_names, num_labels)
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
        bad = BadRows(str(path), "row" if path.suffix == ".parquet" else "line")
        return check(read_file(path, bad), bad, label_names=label_names)
    if path.suffix in READERS or path.is_absolute() or str(path_or_hub_name).startswith("."):
        raise DataError(f"{path}: no such file or folder")

    dataset = _load_from_hub(str(path_or_hub_name), hub_config, split)
    names = label_names if label_names is not None else _class_label_names(dataset, label)
    if num_labels is None and names is not None:
        check = partial(check, num_labels=len(names))
    bad = BadRows(f"{path_or_hub_name} ({split})", "row")
    table = Table(dataset.column_names, range(1, len(dataset) + 1), lambda name: dataset[name][:])
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


def _split_file(folder: Path, split: str | None) -> Path:
    if split is None:
        raise DataError(f"{folder} is a folder: name a file in it, or pass split='train', 'dev' or 'test'")
    found = _split_candidates(folder, split)
    names = " or ".join(SPLIT_NAMES.get(split, (split,)))
    if not found:
        raise DataError(f"{folder}: no file for split '{split}'; expected {names} with one of {', '.join(READERS)}")
    if len(found) > 1:
        files = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: {len(found)} files for split '{split}' ({files}); expected one; remove the others")
    return found[0]


def _split_candidates(folder: Path, split: str) -> list[Path]:
    names = SPLIT_NAMES.get(split, (split,))
    return [path for name in names for suffix in READERS if (path := folder / f"{name}{suffix}").is_file()]


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


def _checked_rows(
    table: Table,
    bad: BadRows,
    *,
    chosen: dict[str, str | None],
    label_names: Sequence[str] | None,
    num_labels: int | None,
    require_labels: bool,
) -> Rows:
    text_a, text_b = text_columns(table.columns, chosen["text_a"], chosen["text_b"], bad.source)
    label = label_column(table.columns, chosen["label"], require_labels, bad.source)
    columns = {"text_a": table.column(text_a)} | ({"text_b": table.column(text_b)} if text_b else {})
    for name, values in columns.items():
        _check_texts(values, text_a if name == "text_a" else text_b or "", table.positions, bad)
    raw_labels = table.column(label) if label else None
    if raw_labels is not None:
        raw_labels = [None if is_missing(value, regression=num_labels == 1) else value for value in raw_labels]
        if not require_labels and all(value is None for value in raw_labels):
            raw_labels = None
    names: tuple[str, ...] | None = None
    numbers: list[int] | list[float] | None = None
    if raw_labels is not None and len(raw_labels):
        numbers, names, num_labels = resolve_labels(raw_labels, table.positions, label_names, num_labels, bad)
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


def _check_texts(values: Sequence[Any], column: str, positions: Sequence[int], bad: BadRows) -> None:
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
