"""Rows: every format and label kind reads the same; every bad row is named by file, line and remedy."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import datasets
import pyarrow
import pyarrow.parquet

from fastkd.data.errors import DataError
from fastkd.data.rows import load_folder, load_rows

TEXTS = ['a "quoted" start', "it's, with a comma", "naïve café \u2028 one line", "plain"]


def _write_tsv(path: Path, columns: dict[str, list[Any]]) -> None:
    lines = ["\t".join(columns), *("\t".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_csv(path: Path, columns: dict[str, list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])


def _write_jsonl(path: Path, columns: dict[str, list[Any]]) -> None:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


WRITERS: dict[str, Callable[[Path, dict[str, list[Any]]], None]] = {
    ".tsv": _write_tsv,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def _file(folder: Path, content: str | bytes, name: str = "rows.tsv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _error(path: Path, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(path, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("is_pair", [False, True])
def test_every_format_reads_the_same_rows(tmp_path: Path, suffix: str, is_pair: bool) -> None:
    columns: dict[str, list[Any]] = {"label": [1, 0, 2, 1], "text_a": TEXTS}
    if is_pair:
        columns["text_b"] = TEXTS[::-1]
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, columns)
    rows = load_rows(path)
    assert rows.dataset["text_a"][:] == TEXTS
    assert rows.dataset["label"][:] == [1, 0, 2, 1]
    assert rows.is_pair == is_pair
    assert not is_pair or rows.dataset["text_b"][:] == TEXTS[::-1]
    assert (rows.num_labels, rows.label_names, len(rows)) == (3, None, 4)


@pytest.mark.parametrize("suffix", WRITERS)
def test_string_labels_are_numbered_in_sorted_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, {"label": ["world", "sports", "business", "sports"], "text": TEXTS})
    rows = load_rows(path)
    assert rows.label_names == ("business", "sports", "world")
    assert rows.dataset["label"][:] == [2, 1, 0, 1]


def test_label_names_give_the_order_by_name_or_by_index(tmp_path: Path) -> None:
    names = ["world", "sports", "business"]
    by_name = _file(tmp_path, "label\ttext\nsports\ta\nworld\tb\n")
    assert load_rows(by_name, label_names=names).dataset["label"][:] == [1, 0]
    by_index = _file(tmp_path, "label\ttext\n1\ta\n0\tb\n")
    assert load_rows(by_index, label_names=names).dataset["label"][:] == [1, 0]
    # names that look like numbers are names
    stars = _file(tmp_path, "label\ttext\n1\ta\n2\tb\n")
    assert load_rows(stars, label_names=["1", "2"]).dataset["label"][:] == [0, 1]
    with pytest.raises(ValueError, match="num_labels is 4 but label_names has 3"):
        load_rows(by_name, label_names=names, num_labels=4)


def test_regression_has_to_be_asked_for(tmp_path: Path) -> None:
    path = _file(tmp_path, "label\ttext\n5\ta\n3.8\tb\n-1\tc\n")
    assert load_rows(path, num_labels=1).dataset["label"][:] == pytest.approx([5.0, 3.8, -1.0])
    assert "line 3: label '3.8'" in _error(path)
    assert "num_labels=1" in _error(path)
    assert "line 2: label 'nan'; expected a finite number" in _error(
        _file(tmp_path, "label\ttext\nnan\ta\n1\tb\n"), num_labels=1
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("label\tsentence", ("second", None)),
        ("Label\tText", ("second", None)),
        ("class\tpremise\thypothesis", ("second", "third")),
        ("label\tsentence1\tsentence2", ("second", "third")),
        ("label\tquestion\tsentence", ("second", "third")),
        ("label\tid\ttext_a\ttext_b", ("third", "fourth")),
    ],
)
def test_usual_column_names(tmp_path: Path, header: str, expected: tuple[str, str | None]) -> None:
    fields = ["0", "second", "third", "fourth"][: header.count("\t") + 1]
    dataset = load_rows(_file(tmp_path, f"{header}\n" + "\t".join(fields) + "\n")).dataset
    assert (dataset["text_a"][0], dataset["text_b"][0] if "text_b" in dataset.column_names else None) == expected


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = _file(tmp_path, "stars\ttitle\treview\n0\tone\ttwo\n1\tthree\tfour\n")
    rows = load_rows(path, label="stars", text_a="review", text_b="title")
    assert rows.dataset[0] == {"text_a": "two", "text_b": "one", "label": 0}
    assert "no column 'score' (label=); the columns are stars, title, review" in _error(
        path, label="score", text_a="title"
    )
    assert "no text column among stars, title, review" in _error(path)
    assert "text_a=" in _error(path)
    assert "no label column" in _error(path, text_a="title")


def test_unlabelled_text(tmp_path: Path) -> None:
    path = _file(tmp_path, "text\none\ntwo\n")
    rows = load_rows(path, require_labels=False)
    assert (rows.num_labels, rows.is_labelled, rows.dataset.column_names) == (None, False, ["text_a"])
    assert "no label column" in _error(path)
    blank = _file(tmp_path, "label\ttext\n\tone\n\ttwo\n")
    assert not load_rows(blank, require_labels=False).is_labelled
    half = _file(tmp_path, "label\ttext\n\tone\n1\ttwo\n")
    assert "line 2: no label" in _error(half, require_labels=False)


def test_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = _file(tmp_path, b"\xef\xbb\xbflabel\ttext\r\n0\tone\r\n1\ttwo")
    assert load_rows(path).dataset["text_a"][:] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("label\ttext\n0\tok\n1\ttoo\tmany\n", "line 3: 3 fields; expected 2 (label, text); complete or delete"),
        ("label\ttext\n0\tok\n1\n", "line 3: 1 field; expected 2"),
        ("label\ttext\n0\tok\n\n1\tok\n", "line 3: a blank line; expected 2"),
        ("label\ttext\n0\tok\n1\t  \n", "line 3: empty text in column 'text'; expected text; fill it in"),
        ("label\ttext\n0\tok\nx\tok\n1\tok\n", "line 3: label 'x'; expected an integer like the other labels"),
        ("label\ttext\na\tok\nb\tok\n7\tok\n", "line 4: label '7'; expected a name like the other labels"),
        (
            "label\ttext\n0\tok\n-1\tok\n",
            "line 3: no label ('-1'); expected a label in every row; fill it in or delete the row; if -1",
        ),
        ("label\ttext\n0\tok\n\tok\n", "line 3: no label; expected a label in every row"),
        (
            b"label\ttext\n0\tok\n1\tcaf\xe9\n",
            "line 3: byte 0xe9 at byte 6 of the line; expected UTF-8; convert",
        ),
        ("label\ttext\n1\tok\n2\tok\n", "integer labels start at 1 (1, 2); expected 0 to C-1"),
        ("label\ttext\na\tok\na\tok\n", "every label is 'a'; expected two or more classes"),
        ("label\ttext\n", "no rows after the header"),
        ("label\tlabel\n0\t1\n", "line 1: repeated column names (label, label)"),
        ("\n0\tok\n", "line 1: a blank line; expected the column names"),
        ("", "is empty; expected a header and rows"),
    ],
)
def test_bad_tsv(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = _file(tmp_path, content)
    message = _error(path)
    assert message.startswith(str(path))
    assert expected in message


def test_unknown_labels_of_a_model(tmp_path: Path) -> None:
    path = _file(tmp_path, "label\ttext\n0\tok\n3\tok\n")
    assert "line 3: unknown label 3; expected 0 to 2" in _error(path, num_labels=3)
    named = _file(tmp_path, "label\ttext\ngood\tok\nmeh\tok\n")
    assert "line 3: unknown label 'meh'; expected one of bad, good" in _error(named, label_names=["bad", "good"])
    assert "2 different labels (good, meh); expected 3" in _error(named, num_labels=3)


def test_the_first_bad_rows_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    path = _file(tmp_path, "label\ttext\n" + "0\t\n" * 40)
    message = _error(path)
    assert message.count("empty text") == 5
    assert message.endswith(f"and 35 more bad lines in {path}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('label,text\n0,"one\ntwo"\n1,\n', "line 4: empty text"),
        ('label,text\n0,ok\n1,"never closed\n', "line 3: broken CSV"),
        ("label,text\n0,ok,more\n", "line 2: 3 fields"),
        (b"label,text\n0,\xff\n", "line 2: byte 0xff at byte 3"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert expected in _error(_file(tmp_path, content, "rows.csv"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"label": 0, "text": "ok"}\n{"label": 1,}\n', "line 2: invalid JSON"),
        ('{"label": 0, "text": "ok"}\n[1, 2]\n', "line 2: a JSON list; expected one JSON object"),
        ('{"label": 0, "text": "ok"}\n{"label": 1}\n', "line 2: no value in column 'text'"),
        ('{"label": 0, "text": 3}\n', "line 1: 3 (int) in column 'text'; expected text"),
        ('{"label": 0, "text": "ok"}\n{"label": true, "text": "ok"}\n', "line 2: label True"),
        ("\n", "line 1: a blank line"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in _error(_file(tmp_path, content, "rows.jsonl"))


def test_bad_parquet(tmp_path: Path) -> None:
    assert "not a readable Parquet file" in _error(_file(tmp_path, "label\ttext\n", "rows.parquet"))
    path = tmp_path / "null.parquet"
    _write_parquet(path, {"label": [0, 1], "text": ["ok", None]})
    assert "row 2: no value in column 'text'" in _error(path)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    assert "no such file or folder" in _error(tmp_path / "rows.tsv")
    assert "unknown file type '.xlsx'" in _error(_file(tmp_path, "x", "rows.xlsx"))
    assert "is a folder" in _error(tmp_path)
    assert "no file for split 'train'; expected train with one of .tsv" in _error(tmp_path, split="train")
    with pytest.raises(DataError, match="no such folder"):
        load_folder(tmp_path / "nothing")


def test_folder_shares_its_labels(tmp_path: Path) -> None:
    _file(tmp_path, "label\ttext\nb\tone\na\ttwo\nc\tthree\n", "train.tsv")
    _file(tmp_path, "label,text\nc,four\nc,five\n", "validation.csv")
    folder = load_folder(tmp_path)
    assert folder.label_names == ("a", "b", "c")
    assert folder.dev is not None
    assert folder.dev.dataset["label"][:] == [2, 2]
    assert folder.test is None
    _file(tmp_path, "label\ttext\nd\tsix\n", "test.tsv")
    with pytest.raises(DataError, match=r"test\.tsv, line 2: unknown label 'd'; expected one of a, b, c"):
        load_folder(tmp_path)
    _file(tmp_path, "label\ttext\na\tsix\n", "dev.tsv")
    with pytest.raises(DataError, match="2 files for split 'dev'"):
        load_folder(tmp_path)


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    stored = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [1, 0]}, features=features)
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, split: str | None) -> Any:
        asked.append((name, config, split))
        return stored if split else datasets.DatasetDict({"train": stored})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("owner/reviews", split="train", hub_config="small")
    assert asked == [("owner/reviews", "small", "train")]
    assert (rows.label_names, rows.num_labels, rows.dataset["label"][:]) == (("neg", "pos"), 2, [1, 0])
    with pytest.raises(DataError, match="pass split= one of train"):
        load_rows("owner/reviews")
    stored = stored.map(lambda row: {"label": -1})
    with pytest.raises(DataError, match=r"owner/reviews \(test\), row 1: no label"):
        load_rows("owner/reviews", split="test")
    assert not load_rows("owner/reviews", split="test", require_labels=False).is_labelled


def test_hub_that_cannot_be_reached_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no such file or folder here; for a hub dataset check the name"):
        load_rows("no-such-owner/no-such-dataset", split="train")


def test_sample_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    _write_tsv(path, {"label": [i % 2 for i in range(50)], "text": [f"row {i}" for i in range(50)]})
    rows = load_rows(path)
    assert rows.sample(50) is rows
    assert len(rows.sample(10)) == 10
    assert rows.sample(10, seed=1).digest() == rows.sample(10, seed=1).digest()
    assert rows.sample(10, seed=1).digest() != rows.sample(10, seed=2).digest()
    assert rows.digest() == load_rows(path).digest()


@pytest.mark.parametrize(("name", "num_labels", "is_pair"), [("ag_news", 4, False), ("mrpc", 2, True)])
def test_real_folders(name: str, num_labels: int, is_pair: bool) -> None:
    root = Path(os.environ.get("FASTKD_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / name).is_dir():
        pytest.skip(f"the real dataset {name} is not on this machine; set FASTKD_DATA to the folder that has it")
    folder = load_folder(root / name)
    assert folder.dev is not None
    assert folder.test is not None
    assert (folder.num_labels, folder.train.is_pair) == (num_labels, is_pair)
    assert min(map(len, (folder.train, folder.dev, folder.test))) > 400


# One reading a file


def _labelled(folder: Path, labels: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    WRITERS[path.suffix](path, {"label": labels, "text": [f"row {number}" for number in range(len(labels))]})
    return path


def test_numbers_among_named_classes_are_read_in_one_way(tmp_path: Path) -> None:
    stars = ["1", "2", "3", "4", "5"]
    assert load_rows(_labelled(tmp_path, [0, 1, 2, 3, 4]), label_names=stars).dataset["label"][:] == [0, 1, 2, 3, 4]
    assert load_rows(_labelled(tmp_path, [1, 2, 3, 4, 5]), label_names=stars).dataset["label"][:] == [0, 1, 2, 3, 4]
    both = _labelled(tmp_path, [1, 2, 3])
    message = _error(both, label_names=stars)
    assert "label 1 may be the class 1 or the class number 1, which is 2" in message
    assert "labels_are='names' or labels_are='indices'" in message
    assert load_rows(both, label_names=stars, labels_are="names").dataset["label"][:] == [0, 1, 2]
    assert load_rows(both, label_names=stars, labels_are="indices").dataset["label"][:] == [1, 2, 3]
    # both readings say the same
    assert load_rows(_labelled(tmp_path, [0, 1, 1]), label_names=["0", "1"]).dataset["label"][:] == [0, 1, 1]
    mixed = _error(_labelled(tmp_path, ["bad", "good", 1]), label_names=["bad", "good"])
    assert "line 3: unknown label 1; expected one of bad, good, in every row a name or in every row an index" in mixed
    with pytest.raises(ValueError, match="labels_are: got 'numbers', expected one of names, indices"):
        load_rows(both, labels_are="numbers")


def test_a_folder_is_read_in_the_way_of_its_training_rows(tmp_path: Path) -> None:
    _labelled(tmp_path, [1, 2, 3, 4, 5], "train.jsonl")
    _labelled(tmp_path, [1, 2], "dev.jsonl")
    folder = load_folder(tmp_path, label_names=["1", "2", "3", "4", "5"])
    assert folder.dev is not None
    assert folder.dev.dataset["label"][:] == [0, 1]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 4], "label 4, but no row has 1 to 3; expected every class from 0 to C-1"),
        ([0, 1, 3, 100], "label 3, but no row has 2, 4 to 99; expected"),
        ([0, 1467810369], "label 1467810369, but no row has 1 to 1467810368; expected"),
        ([0, 1, 1, -1], "no label ("),
        (
            ["pos", "neg", "nan"],
            "no label ('nan'); expected a label in every row; fill it in or delete the row; if",
        ),
        (["pos", "neg", "None"], "no label ('None')"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, suffix: str, labels: list[Any], message: str) -> None:
    assert message in _error(_labelled(tmp_path, labels, f"rows{suffix}"))


def test_numbers_and_texts_of_rows_are_no_classes(tmp_path: Path) -> None:
    for labels in ([*range(60)], [f"id {number}" for number in range(60)], [*range(60), *range(30)]):
        path = _labelled(tmp_path, labels)
        assert f"60 different labels in {len(labels)} rows; expected classes that rows share" in _error(path)
        assert load_rows(path, num_labels=60).num_labels == 60
    assert load_rows(_labelled(tmp_path, [*range(60), *range(60)])).num_labels == 60


def test_gaps_are_right_where_the_number_of_classes_is_given(tmp_path: Path) -> None:
    path = _labelled(tmp_path, [0, 4])
    assert "pass num_labels=5 if" in _error(path)
    assert load_rows(path, num_labels=5).num_labels == 5
    # millions of classes are no classes, so no number is suggested
    assert "num_labels" not in _error(_labelled(tmp_path, [0, 99_999_999]))
    assert "which column holds the labels with label=" in _error(_labelled(tmp_path, [0, 99_999_999]))


@pytest.mark.parametrize("suffix", WRITERS)
def test_minus_one_means_unlabelled_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = _labelled(tmp_path, [-1, -1], f"rows{suffix}")
    assert not load_rows(path, require_labels=False).is_labelled
    assert "no label (" in _error(path)
    mood = load_rows(_labelled(tmp_path, [-1, 0, 1], f"mood{suffix}"), label_names=["-1", "0", "1"])
    assert mood.dataset["label"][:] == [0, 1, 2]
    assert load_rows(path, num_labels=1).dataset["label"][:] == [-1.0, -1.0]


def test_integers_beyond_int64_and_numbers_beyond_float32(tmp_path: Path) -> None:
    message = _error(_labelled(tmp_path, [0, 10**40]))
    assert "line 2: unknown label 1000000" in message
    assert "expected 0 or more, below 2^63" in message
    assert "unknown label" in _error(_labelled(tmp_path, [0, 10**40]), num_labels=2)
    for wrong in (1e39, -1e39, 10**400):
        message = _error(_labelled(tmp_path, [0.5, wrong]), num_labels=1)
        assert "line 2: label" in message
        assert "float32 can hold" in message or "a finite number" in message


def _class_label_file(folder: Path, names: list[str], labels: list[int]) -> Path:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    data = {"text": [f"row {number}" for number in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(data, features=features).to_parquet(folder / "named.parquet")
    return folder / "named.parquet"


def test_names_of_classes_in_parquet_are_kept(tmp_path: Path) -> None:
    path = _class_label_file(tmp_path, ["neg", "pos"], [0, 1, 1])
    rows = load_rows(path)
    assert (rows.label_names, rows.dataset["label"][:]) == (("neg", "pos"), [0, 1, 1])
    # a model may number them otherwise
    assert load_rows(path, label_names=["pos", "neg"]).dataset["label"][:] == [1, 0, 0]
    assert "it names the classes neg, pos, expected NEGATIVE, POSITIVE" in _error(
        path, label_names=["NEGATIVE", "POSITIVE"]
    )
    same = load_rows(path, label_names=["NEGATIVE", "POSITIVE"], labels_are="indices")
    assert same.dataset["label"][:] == [0, 1, 1]
    assert "it names 2 classes (neg, pos); expected 3" in _error(path, num_labels=3)


def test_rows_in_another_order_of_their_classes(tmp_path: Path) -> None:
    rows = load_rows(_labelled(tmp_path, ["a", "b", "c", "a"]))
    turned = rows.in_order_of(("c", "a", "b"))
    assert (turned.label_names, turned.dataset["label"][:]) == (("c", "a", "b"), [1, 2, 0, 1])
    assert turned.digest() != rows.digest()
    assert turned.in_order_of(("a", "b", "c")).digest() == rows.digest()
    assert rows.in_order_of(("a", "b", "c")) is rows
    with pytest.raises(DataError, match="its labels have the names a, b, c, expected a, b, d"):
        rows.in_order_of(("a", "b", "d"))


# One reader


def test_suffixes_in_any_case(tmp_path: Path) -> None:
    for name in ("train.TSV", "dev.Csv", "test.NDJSON"):
        suffix = {".ndjson": ".jsonl"}.get(Path(name).suffix.lower(), Path(name).suffix.lower())
        WRITERS[suffix](tmp_path / name, {"label": [0, 1], "text": ["a", "b"]})
    folder = load_folder(tmp_path)
    assert folder.dev is not None
    assert folder.test is not None
    assert load_rows(tmp_path / "train.TSV").dataset["text_a"][:] == ["a", "b"]
    _file(tmp_path, "not a split\n", "train.txt")
    load_folder(tmp_path)
    assert load_rows(tmp_path / "train.txt", require_labels=False).dataset["text_a"][:] == ["not a split"]


def test_csv_fields_of_any_length_and_form(tmp_path: Path) -> None:
    long = "x " * 70_000
    texts = [long, 'one, "two"\nthree', '5" screen', "", "end"]
    path = tmp_path / "rows.csv"
    _write_csv(path, {"label": [0, 1, 0, 1, 0], "text": [*texts[:3], "filled", "end"]})
    assert load_rows(path).dataset["text_a"][:] == [*texts[:3], "filled", "end"]
    path.write_text('label,text\n0,5" screen\n1,"a ""b"""\n', encoding="utf-8")
    assert load_rows(path).dataset["text_a"][:] == ['5" screen', 'a "b"']


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".txt"])
def test_other_encodings_are_named_with_the_command_that_converts(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = _file(tmp_path, 'label\ttext\n0\tok\n{"text": "a"}\n'.encode(encoding), f"rows{suffix}")
    message = _error(path, require_labels=False)
    assert "the file is UTF-" in message
    assert "convert it: iconv -f UTF-" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "hi \\ud83d", "label": 1}', "lone surrogate U+D83D at character 4 in column 'text'"),
        ('{"text": "hi", "label": ' + "9" * 5000 + "}", "invalid JSON (an integer of thousands of digits)"),
        ("[" * 100_000, "invalid JSON (brackets are nested too deep)"),
        ('{"text": [1, 2], "label": 1}', "[1, 2] (list) in column 'text'"),
        ('{"text": "' + "x" * (1 << 20) + '"}', "a line longer than 1048576 bytes"),
    ],
)
def test_bad_json_is_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = _file(tmp_path, '{"text": "ok", "label": 0}\n' + line + "\n", "rows.jsonl")
    assert f"rows.jsonl, line 2: {message}" in _error(path)


@pytest.mark.parametrize(
    ("name", "text", "separator"),
    [
        ("a.csv", "text;label\na;0\n", "semicolons"),
        ("a.csv", "text\tlabel\na\t0\n", "tabs"),
        ("a.tsv", "text,label\na,0\n", "commas"),
        ("a.tsv", "text|label\na|0\n", "bars"),
        ("a.tsv", "text\tlabel\ra\t0\r", "carriage returns"),
        ("a.csv", "label,other\rx,0\r", "carriage returns"),
    ],
)
def test_other_separators_are_told(tmp_path: Path, name: str, text: str, separator: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(DataError, match=f"where {separator} seem to separate the columns; expected commas between"):
        load_rows(tmp_path / name)


def test_a_column_or_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array([0])]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays(columns, names=["text", "text", "label"]), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match=r"a.parquet: repeated column names \(text, text, label\); rename them"):
        load_rows(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "text": "c", "label": 1}\n')
    with pytest.raises(DataError, match="line 2: the key 'text' twice; expected one value for each key"):
        load_rows(tmp_path / "a.jsonl")


def test_damage_in_parquet_with_checksums_is_seen(tmp_path: Path) -> None:
    path, text = tmp_path / "a.parquet", "a text that is nowhere else"
    table = pyarrow.table({"text": [text, "b"], "label": [0, 1]})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, compression="none")
    path.write_bytes(path.read_bytes().replace(text.encode(), text.upper().encode(), 1))
    with pytest.raises(DataError, match=r"not a readable Parquet file \(.*; write it again"):
        load_rows(path)


def test_text_in_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pyarrow.array([b"ok", b"caf\xe9"])
    text = pyarrow.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"label": [0, 1], "text": text}), tmp_path / "rows.parquet")
    assert "row 2: byte 0xe9 in a text; expected UTF-8" in _error(tmp_path / "rows.parquet")
