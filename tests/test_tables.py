"""Rows in memory: every kind of source gives the same rows, and a bad row is named wherever it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import datasets
import pyarrow
from tiny_models import early_exit_model, one_thread, tokenizer_of

import fastkd
from fastkd.data.columns import USUAL
from fastkd.data.errors import DataError
from fastkd.data.rows import Rows, load_rows
from fastkd.data.tables import rows_to_stream
from fastkd.inference.predict import predict
from fastkd.inference.trace_rows import trace_rows

__all__ = ["one_thread"]

TEXTS = ["the film was good", "a bad plot", "the actor was not dull", "cold"]
LABELS = [1, 0, 1, 2]
NAMES = ["bad", "good", "warm"]
PAIRS = TEXTS[::-1]


def _pandas(columns: dict[str, list[Any]]) -> Any:
    return pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas").DataFrame(columns)


def _polars(columns: dict[str, list[Any]]) -> Any:
    return pytest.importorskip("polars", reason="polars is not installed: pip install polars").DataFrame(columns)


def _iterable(columns: dict[str, list[Any]]) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict(columns).to_iterable_dataset()


def _generated(columns: dict[str, list[Any]]) -> datasets.IterableDataset:
    """One that does not know its columns."""
    return datasets.IterableDataset.from_generator(lambda: iter(_dictionaries(columns)))


def _dictionaries(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


KINDS: dict[str, Callable[[dict[str, list[Any]]], Any]] = {
    "dataset": datasets.Dataset.from_dict,
    "torch-dataset": lambda columns: datasets.Dataset.from_dict(columns).with_format("torch"),
    "iterable-dataset": _iterable,
    "generated-dataset": _generated,
    "pandas": _pandas,
    "polars": _polars,
    "arrow": pyarrow.table,
    "columns": dict,
    "arrays": lambda columns: {name: numpy.array(values) for name, values in columns.items()},
    "dictionaries": _dictionaries,
    "generator": lambda columns: (row for row in _dictionaries(columns)),
    "numpy-scalars": lambda columns: [
        {name: numpy.array(value)[()] for name, value in row.items()} for row in _dictionaries(columns)
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_rows(kind: str) -> None:
    rows = load_rows(KINDS[kind]({"id": [7, 8, 9, 10], "sentence1": TEXTS, "sentence2": PAIRS, "label": LABELS}))
    assert rows.dataset.to_dict() == {"text_a": TEXTS, "text_b": PAIRS, "label": LABELS}
    assert (rows.num_labels, rows.label_names) == (3, None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_names_columns_and_bad_rows(kind: str) -> None:
    columns = {"body": ["good", " ", "bad", "dull"], "y": ["pos", "neg", "pos", "neg"]}
    with pytest.raises(DataError, match="no text column among body, y"):
        load_rows(KINDS[kind](columns), name="train")
    with pytest.raises(DataError, match=r"^train, row 2: empty text in column 'body'; expected text") as caught:
        load_rows(KINDS[kind](columns), text_a="body", label="y", name="train")
    assert "row 1" not in str(caught.value)
    rows = load_rows(KINDS[kind](columns | {"body": TEXTS}), text_a="body", label="y")
    assert rows.label_names == ("neg", "pos")


def test_tuples_are_pairs_or_have_a_label() -> None:
    pairs = load_rows([("a", "b"), ("c", "d")], require_labels=False)
    assert pairs.dataset.to_dict() == {"text_a": ["a", "c"], "text_b": ["b", "d"]}
    labelled = load_rows([("a", 1), ("c", 0)])
    assert labelled.dataset.to_dict() == {"text_a": ["a", "c"], "label": [1, 0]}
    both = load_rows([("a", "b", "pos"), ("c", "d", "neg")])
    assert both.dataset.to_dict() == {"text_a": ["a", "c"], "text_b": ["b", "d"], "label": [1, 0]}
    assert load_rows(["a", "c"], require_labels=False).dataset.to_dict() == {"text_a": ["a", "c"]}
    with pytest.raises(DataError, match="a tuple of two texts is a pair"):
        load_rows([("a", "pos"), ("c", "neg")])
    with pytest.raises(DataError, match="row 2: no label"):
        load_rows([("a", 1), ("c", None)])
    with pytest.raises(DataError, match=r"list, row 2: 5 \(int\); expected a text, a tuple"):
        load_rows([("a", 1), 5])


def test_names_of_a_class_label_are_the_classes() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    dataset = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    for source in (dataset, dataset.to_iterable_dataset()):
        assert load_rows(source).label_names == ("b", "a")
        assert load_rows(source, label_names=["a", "b"]).dataset["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1.0, None, 0.0, 1.0], "row 2: no label"), ([0.0, 1.0, 0.0, 1.5], "for regression pass num_labels=1")],
)
def test_a_frame_says_which_value_is_missing(labels: list[Any], message: str) -> None:
    for make in (_pandas, KINDS["arrow"]):
        with pytest.raises(DataError, match=message):
            load_rows(make({"text": TEXTS, "label": labels}))


def test_pandas_marks_of_absence_are_no_texts_and_no_labels() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    frame = pandas.DataFrame({"text": ["a", None, "c"], "label": pandas.array([1, 0, None], dtype="Int64")})
    with pytest.raises(DataError, match=r"(?s)row 2: no value in column 'text'.*row 3: no label"):
        load_rows(frame)
    numbers = pandas.DataFrame({"text": ["a", "b"], "label": [0.5, 2]}, index=["x", "y"])
    assert load_rows(numbers, num_labels=1).dataset["label"][:] == [0.5, 2.0]
    with pytest.raises(DataError, match=r"repeated column names \(text\)"):
        load_rows(pandas.DataFrame([["a", "b"]], columns=["text", "text"]))


def test_a_frame_without_a_header_has_numbers_for_names() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    headless = pandas.DataFrame([[1, "a"], [0, "b"]])
    for read in (load_rows, early_exit_model().trace):
        options: Any = {} if read is load_rows else {"tokenizer": tokenizer_of("bert")}
        with pytest.raises(DataError, match="no text column among 0, 1; expected one of text_a"):
            read(headless, **options)
    assert load_rows(headless, text_a=1, label=0).dataset["label"][:] == [1, 0]
    levels = pandas.MultiIndex.from_tuples([("text", "first"), ("label", "first")])
    with pytest.raises(DataError, match=r"no text column among \('text', 'first'\)"):
        load_rows(pandas.DataFrame([["a", 1]], columns=levels))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (5, TypeError, "got int; expected a Dataset"),
        (b"text", TypeError, "got one text"),
        ({"text": "one"}, DataError, "a dictionary with one str as 'text'"),
        ({"text": ["a"], "label": [0, 1]}, DataError, "expected the same number in each"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}), DataError, "the splits train"),
        ([], DataError, "no rows"),
        ({}, DataError, "no rows"),
        (datasets.Dataset.from_dict({"text": [], "label": []}), DataError, "no rows"),
    ],
)
def test_what_is_no_source_is_refused(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_rows(source)


def test_a_split_is_one_of_a_data_set_with_splits() -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})})
    assert len(load_rows(splits, split="train")) == 2
    with pytest.raises(DataError, match="got 'dev', expected one of train"):
        load_rows(splits, split="dev")
    with pytest.raises(DataError, match="a list has no splits"):
        load_rows(["a"], split="train")


def test_a_lazy_frame_is_to_be_collected() -> None:
    with pytest.raises(DataError, match=r"got a LazyFrame; .*pass rows.collect\(\)"):
        load_rows(_polars({"text": ["a"]}).lazy(), name="rows", require_labels=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_pair", [False, True])
def test_a_stream_and_predict_answer_every_kind_alike(kind: str, is_pair: bool) -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    plain = list(zip(TEXTS, PAIRS, strict=True)) if is_pair else TEXTS
    expected = list(model.stream(plain, tokenizer, speed=0.5))
    columns: dict[str, list[Any]] = {"label": LABELS, "one": TEXTS} | ({"two": PAIRS} if is_pair else {})
    chosen = {"text_a": "one"} | ({"text_b": "two"} if is_pair else {})
    assert list(model.stream(KINDS[kind](columns), tokenizer, speed=0.5, **chosen)) == expected
    usual = {"label": LABELS, "text_a": TEXTS} | ({"text_b": PAIRS} if is_pair else {})
    answers = list(predict(model, tokenizer, KINDS[kind](usual), speed=0.5))
    assert [(answer.label, answer.exit_layer) for answer in answers] == [(a.label, a.exit_layer) for a in expected]


def test_a_stream_passes_over_labels_and_marks_bad_rows() -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    expected = [row.label for row in model.stream(TEXTS, tokenizer)]
    assert [row.label for row in model.stream(list(zip(TEXTS, LABELS, strict=True)), tokenizer)] == expected
    triples = list(zip(TEXTS, PAIRS, LABELS, strict=True))
    pairs = list(zip(TEXTS, PAIRS, strict=True))
    assert list(model.stream(triples, tokenizer)) == list(model.stream(pairs, tokenizer))
    rows = load_rows(pairs, require_labels=False)
    assert list(model.stream(rows, tokenizer)) == list(model.stream(pairs, tokenizer))
    problems = [row.problem for row in model.stream(["film", 5, ("", "a")], tokenizer)]
    assert problems[0] is None
    assert problems[1] is not None
    assert problems[1].startswith("5 (int); expected a text, a tuple")
    assert problems[2] is not None
    assert problems[2].startswith("empty text")


@pytest.mark.parametrize("kind", ["dataset", "iterable-dataset", "pandas", "polars", "arrow", "columns"])
def test_a_stream_of_a_table_without_texts_is_refused(kind: str) -> None:
    with pytest.raises(DataError, match="rows: no text column among body"):
        early_exit_model().stream(KINDS[kind]({"body": TEXTS}), tokenizer_of("bert"))


def test_a_stream_of_one_text_is_refused() -> None:
    with pytest.raises(TypeError, match=r"rows: got one text; .*pass \['film'\]"):
        early_exit_model().stream("film", tokenizer_of("bert"))


def test_a_stream_takes_tokens_of_a_table() -> None:
    model = early_exit_model()
    ids = [[2, 7, 9, 3], [2, 8, 3]]
    expected = list(model.stream([{"input_ids": row} for row in ids]))
    assert list(model.stream({"input_ids": ids, "name": ["a", "b"]})) == expected
    assert list(model.stream(datasets.Dataset.from_dict({"input_ids": ids}))) == expected


def test_an_iterable_data_set_is_read_as_the_stream_goes() -> None:
    taken = itertools.count()
    last = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal last
        while True:
            last = next(taken)
            yield {"text": TEXTS[last % 4]}

    endless = datasets.IterableDataset.from_generator(rows)
    stream = early_exit_model().stream(endless, tokenizer_of("bert"), look_ahead=8, tokens_per_run=64)
    assert [row.line for row in itertools.islice(stream, 20)] == list(range(1, 21))
    assert last < 200


def test_a_table_is_read_a_slice_at_a_time_and_only_its_texts() -> None:
    read = []
    table = rows_to_stream({"text": ["a"] * 3000, "other": [0] * 3000}, USUAL, "rows")
    inner = table._read  # type: ignore[attr-defined]
    table._read = lambda *piece: read.append(piece) or inner(*piece)  # type: ignore[attr-defined]
    rows = iter(table)
    assert next(rows) == {"text": "a"}
    assert read == [(["text"], 0, 1024)]
    assert len([*rows]) == 2999
    assert [piece[1] for piece in read] == [0, 1024, 2048]


def test_an_interrupt_inside_a_table_loses_no_row() -> None:
    table = rows_to_stream({"text": [str(number) for number in range(3000)]}, USUAL, "rows")
    inner, is_first = table._read, True  # type: ignore[attr-defined]

    def interrupted(*piece: Any) -> Any:
        nonlocal is_first
        if piece[1] and is_first:
            is_first = False
            raise KeyboardInterrupt
        return inner(*piece)

    table._read = interrupted  # type: ignore[attr-defined]
    rows = iter(table)
    got: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        got.extend(row["text"] for row in rows)
    got = [str(number) for number in range(1024)]
    got.extend(row["text"] for row in rows)
    assert got == [str(number) for number in range(3000)]


@pytest.mark.parametrize("kind", ["dataset", "pandas", "dictionaries"])
def test_a_trace_takes_rows(kind: str) -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    source = KINDS[kind]({"text": TEXTS, "label": LABELS})
    trace = model.trace(source, tokenizer=tokenizer)
    expected = trace_rows(model, tokenizer, load_rows({"text": TEXTS, "label": LABELS}, name="rows"))
    assert torch.equal(trace.logits, expected.logits)
    assert trace.source == expected.source
    assert trace.rows is not None
    assert expected.rows is not None
    assert trace.rows.tolist() == expected.rows.tolist()
    assert trace.labels is not None
    assert trace.labels.tolist() == [LABELS[row] for row in trace.rows.tolist()]
    assert torch.equal(trace_rows(model, tokenizer, source).logits, expected.logits)
    with pytest.raises(TypeError, match="or rows together with tokenizer="):
        model.trace({"text": TEXTS})
    with pytest.raises(DataError, match=r"rows, row 4: unknown label 3"):
        model.trace({"text": TEXTS, "label": [0, 1, 2, 3]}, tokenizer=tokenizer)


def _options() -> dict[str, Any]:
    return {"max_steps": 2, "batch_size": 4, "max_length": 12, "progress": False, "bf16": False}


@pytest.mark.parametrize("kind", ["dataset", "pandas", "polars", "generated-dataset", "dictionaries"])
def test_trainings_take_every_kind_of_source(kind: str, tmp_path: Path) -> None:
    columns = {"text": TEXTS, "label": [NAMES[label] for label in LABELS]}
    states = []
    for number, source in enumerate((load_rows(columns), KINDS[kind](columns))):
        dev = load_rows(columns) if number == 0 else KINDS[kind](columns)
        model, tokenizer = early_exit_model(head_dropout=0.0), tokenizer_of("bert")
        options = fastkd.FinetuneOptions(**_options())
        result = fastkd.finetune(model, source, dev, tmp_path / f"tuned{number}", options, tokenizer)
        assert model.config.id2label == dict(enumerate(NAMES))
        assert "accuracy" in result.metrics
        fastkd.distill(
            model, TEXTS if number else load_rows(TEXTS, require_labels=False), None, tmp_path / f"model{number}",
            fastkd.DistillOptions(**_options()), tokenizer,
        )  # fmt: skip
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_knowledge_distillation_takes_a_frame(tmp_path: Path) -> None:
    frame = _pandas({"text": TEXTS, "label": [NAMES[label] for label in LABELS]})
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    trainer = fastkd.KDTrainer(None, model, "none", fastkd.KDOptions(**_options()), tokenizer=tokenizer)
    trainer.train(frame, frame, tmp_path / "student")
    assert model.config.id2label == dict(enumerate(NAMES))


def test_dev_labels_mean_what_those_of_train_mean(tmp_path: Path) -> None:
    """A class that only dev has is an error, and dev may lack one."""
    model, tokenizer = early_exit_model(num_labels=2), tokenizer_of("bert")
    train, dev = [("good", "a", "pos"), ("bad", "b", "neg")], [("dull", "c", "pos")]
    options = fastkd.FinetuneOptions(**_options())
    with pytest.raises(DataError, match="dev, row 1: unknown label 'other'"):
        fastkd.finetune(model, train, [("dull", "c", "other")], tmp_path / "tuned", options, tokenizer)
    fastkd.finetune(model, train, dev, tmp_path / "tuned", options, tokenizer)


def test_rows_stay_what_they_are() -> None:
    rows = load_rows([("a", 0), ("b", 1)])
    assert load_rows(rows) is rows
    assert isinstance(rows, Rows)
    assert list(rows) == [{"text_a": "a", "label": 0}, {"text_a": "b", "label": 1}]
