"""Rows of text and their labels, read from files, the hub or memory and checked one by one.

A file is UTF-8 with a header (TSV, CSV), one object a line (JSONL), one text a line (.txt), or Parquet; its suffix,
in any case, says which (`fastkd.data.records`). Data sets, data frames and lists are read as they are
(`fastkd.data.tables`). Columns are found by their usual names:

    text_a, text_b   text_a | text_b, sentence1 | sentence2, premise | hypothesis, question1 | question2,
                     text1 | text2, question | sentence; or one text: text, sentence, content
    label            label, labels, label_id, class, category

or named explicitly. Labels are integers from 0, strings (numbered in sorted order, or in that of `label_names`), or,
for regression (`num_labels=1`), floats. -1, an empty field, and what stands for no value elsewhere (nan, None, NULL...)
mean that a row has no label.

A bad file is found before training starts: `DataError` says in which line, what was expected and what to do, for the
first bad rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fastkd.data.columns import Columns, label_column, text_columns
from fastkd.data.errors import BadRows, DataError
from fastkd.data.labels import LABELS_ARE, LabelRule, check_label_names, resolve_labels
from fastkd.data.records import SUFFIXES, Record, Records, format_of, open_records
from fastkd.data.tables import records_of
from fastkd.data.texts import text_problem

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
# lines of text have no columns, and a folder may hold notes
_SPLIT_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".txt")
RowSource = Any
"""What `load_rows` takes: `Rows`, a path, a name on the hub, or rows in memory."""


@dataclass(frozen=True)
class Rows:
    """Checked rows.

    Attributes:
        dataset: columns `text_a` (string), `text_b` (string; pairs only) and `label` (int64 from 0, or float32 for
            regression; absent in unlabelled data).
        label_names: the name of each class in order; None for unnamed integer labels, regression, unlabelled data.
        num_labels: the number of classes; 1 is regression; None is unlabelled.
        source: the file, hub name or argument, for messages.
        labels_are: whether the source had "names" or "indices", so that other splits are read alike; None: neither.
    """

    dataset: datasets.Dataset
    label_names: tuple[str, ...] | None
    num_labels: int | None
    source: str
    labels_are: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Each row as a dictionary of the columns of `dataset`."""
        return iter(self.dataset)

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

    def in_order_of(self, label_names: Sequence[str]) -> Rows:
        """The same rows with their classes numbered in the order of `label_names`.

        Raises:
            DataError: the rows have no names, or others.
        """
        if self.label_names is None or set(self.label_names) != set(label_names):
            own = "no names" if self.label_names is None else f"the names {', '.join(self.label_names)}"
            raise DataError(f"{self.source}: its labels have {own}, expected {', '.join(label_names)}")
        if self.label_names == tuple(label_names):
            return self
        numbers = [list(label_names).index(name) for name in self.label_names]
        # an array names its type, also without rows, where datasets 3.0 takes no feature
        labels = np.array([numbers[label] for label in self.dataset["label"][:]], dtype=np.int64)
        dataset = self.dataset.remove_columns("label").add_column("label", labels)
        return replace(self, dataset=dataset, label_names=tuple(label_names))

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
    source: RowSource,
    *,
    split: str | None = None,
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    labels_are: str | None = None,
    require_labels: bool = True,
    text_a: str | None = None,
    text_b: str | None = None,
    label: str | None = None,
    hub_config: str | None = None,
    name: str | None = None,
) -> Rows:
    """Read and check one file, one split of a folder or of a dataset on the hub, or rows in memory.

    Args:
        source: a .tsv, .csv, .jsonl, .parquet or .txt file; a folder (then `split` says which file); a name that
            `datasets.load_dataset` knows; a `datasets.Dataset`, an `IterableDataset` (which is read to its end), a
            `DatasetDict`; a DataFrame of pandas or polars, an Arrow table, a dictionary of columns; texts, dictionaries
            or tuples (text, text), (text, label number) or (text, text, label) one by one; or `Rows`, which are given
            back.
        split: "train", "dev" or "test" of a folder, or any split of a hub dataset or `DatasetDict`.
        label_names: the classes in order. The labels of a source are these names, or all of them indices.
        num_labels: the number of classes, where a model fixes it or the source lacks some; 1 means regression (float
            labels).
        labels_are: "names" or "indices", where numbers could be either.
        require_labels: False accepts data without a label column or with all labels empty.
        text_a, text_b, label: names of the columns; default: the usual ones.
        hub_config: the configuration of a hub dataset, such as "sst2" of "nyu-mll/glue".
        name: what messages call rows in memory; default: their type.

    Raises:
        DataError: anything wrong with the data.
        TypeError: a source of another kind.
        ValueError: `label_names` and `num_labels` contradict each other; an unknown `labels_are`.
    """
    if isinstance(source, Rows):
        return source
    if label_names is not None:
        check_label_names(label_names, num_labels)
        num_labels = len(label_names)
    if labels_are is not None and labels_are not in LABELS_ARE:
        raise ValueError(f"labels_are: got {labels_are!r}, expected one of {', '.join(LABELS_ARE)}")
    check = partial(
        _checked_rows,
        chosen=Columns(text_a, text_b, label),
        rule=LabelRule(label_names, num_labels, labels_are),
        require_labels=require_labels,
    )
    if not isinstance(source, str | os.PathLike):
        return check(records_of(_split_in_memory(source, split), name or type(source).__name__))
    path = Path(source)
    if path.is_dir():
        path = _split_file(path, split)
    if path.is_file():
        with path.open("rb") as stream:
            return check(open_records(stream, format_of(path), str(path)))
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise DataError(f"{path}: no such file or folder")
    dataset = _load_from_hub(str(source), hub_config, split)
    return check(records_of(dataset, f"{source} ({split})"))


def load_splits(
    given: Mapping[str, RowSource],
    *,
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    labels_are: str | None = None,
    require_labels: bool = True,
    text_a: str | None = None,
    text_b: str | None = None,
    label: str | None = None,
) -> dict[str, Rows]:
    """The splits of one task by name, read alike: the first fixes the classes, and what its labels mean.

    Args:
        given: the sources by the name that messages give them; those that are `Rows` or None stay what they are.
        label_names, num_labels, labels_are, require_labels, text_a, text_b, label: as in `load_rows`.
    """
    read = partial(load_rows, require_labels=require_labels, text_a=text_a, text_b=text_b, label=label)
    rows: dict[str, Rows] = {}
    for name, source in given.items():
        if source is None:
            continue
        rows[name] = read(source, label_names=label_names, num_labels=num_labels, labels_are=labels_are, name=name)
        if len(rows) == 1 and rows[name].num_labels is not None:
            first = rows[name]
            label_names, num_labels, labels_are = first.label_names, first.num_labels, first.labels_are
    return rows


def load_folder(
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    labels_are: str | None = None,
    require_labels: bool = True,
    text_a: str | None = None,
    text_b: str | None = None,
    label: str | None = None,
) -> DataFolder:
    """Read `train`, and where they exist `dev` (or `validation`) and `test`, each .tsv, .csv, .jsonl or .parquet.

    The training file fixes the classes and how labels are read: a label that only the others have is an error.
    Arguments as in `load_rows`.

    Raises:
        DataError: no training file, two files for one split, or anything wrong with the data.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with train.tsv (or .csv, .jsonl, .parquet)")
    files = {"train": _split_file(folder, "train")}
    files |= {split: _split_file(folder, split) for split in ("dev", "test") if _split_candidates(folder, split)}
    rows = load_splits(
        files,
        label_names=label_names, num_labels=num_labels, labels_are=labels_are, require_labels=require_labels,
        text_a=text_a, text_b=text_b, label=label,
    )  # fmt: skip
    return DataFolder(rows["train"], rows.get("dev"), rows.get("test"))


def _split_in_memory(source: Any, split: str | None) -> Any:
    if split is None:
        return source
    if not isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise DataError(f"split: got {split!r}, but a {type(source).__name__} has no splits; leave it out")
    if split not in source:
        raise DataError(f"split: got {split!r}, expected one of {', '.join(map(str, source))}")
    return source[split]


def _split_file(folder: Path, split: str | None) -> Path:
    if split is None:
        raise DataError(f"{folder} is a folder: name a file in it, or pass split='train', 'dev' or 'test'")
    found = _split_candidates(folder, split)
    names = " or ".join(SPLIT_NAMES.get(split, (split,)))
    if not found:
        raise DataError(
            f"{folder}: no file for split '{split}'; expected {names} with one of {', '.join(_SPLIT_SUFFIXES)}"
        )
    if len(found) > 1:
        files = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: {len(found)} files for split '{split}' ({files}); expected one; remove the others")
    return found[0]


def _split_candidates(folder: Path, split: str) -> list[Path]:
    names = SPLIT_NAMES.get(split, (split,))
    return sorted(
        path
        for path in folder.iterdir()
        if path.stem in names and path.suffix.lower() in _SPLIT_SUFFIXES and path.is_file()
    )


def _load_from_hub(name: str, config: str | None, split: str | None) -> datasets.Dataset:
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # load_dataset raises a dozen unrelated types
        hint = "no such file or folder here; for a hub dataset check the name, its configuration and the split"
        raise DataError(f"{name}: {hint} ({type(error).__name__}: {error})") from error
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"{name}: no split chosen; pass split= one of {', '.join(map(str, loaded))}")
    return loaded


def _checked_rows(records: Records, *, chosen: Columns, rule: LabelRule, require_labels: bool) -> Rows:
    bad = BadRows(records.source, records.unit)
    read = list(records.read(None)) if records.columns is None else None
    columns = records.columns or list(dict.fromkeys(name for record in read or () for name in record.values))
    if not columns:
        _note_problems(read or (), bad)
        bad.raise_if_any()
        raise DataError(f"{records.source}: no rows; expected at least one")
    text_a, text_b = text_columns(columns, chosen, records.source)
    label = label_column(columns, chosen.label, require_labels, records.source, records.hint)
    used = [name for name in dict.fromkeys((text_a, text_b, label)) if name is not None]
    read = list(records.read(used)) if read is None else read
    _note_problems(read, bad)
    good = [record for record in read if record.problem is None]
    texts = {"text_a": text_a} | ({"text_b": text_b} if text_b else {})
    values = {name: [record.values.get(column) for record in good] for name, column in texts.items()}
    for name, column in texts.items():
        for record, value in zip(good, values[name], strict=True):
            if problem := text_problem(value, column):
                bad.add(record.position, problem)
    labels = None
    if label is not None and good:
        labels = resolve_labels(
            [record.values.get(label) for record in good],
            [record.position for record in good],
            replace(rule, class_names=records.class_names.get(label)),
            bad,
            require_labels,
        )
    bad.raise_if_any()
    if not good:
        header = " after the header" if records.unit == "line" else ""
        raise DataError(f"{records.source}: no rows{header}; expected at least one")
    features = {name: datasets.Value("string") for name in values}
    if labels is None:
        dataset = datasets.Dataset.from_dict(values, features=datasets.Features(features))
        return Rows(dataset, None, None, records.source)
    features["label"] = datasets.Value("float32" if labels.num_labels == 1 else "int64")
    dataset = datasets.Dataset.from_dict({**values, "label": labels.numbers}, features=datasets.Features(features))
    return Rows(dataset, labels.label_names, labels.num_labels, records.source, labels.labels_are)


def _note_problems(records: Iterable[Record], bad: BadRows) -> None:
    for record in records:
        if record.problem is not None:
            bad.add(record.position, record.problem)
