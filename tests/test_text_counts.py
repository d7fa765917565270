"""Unknown tokens and cut rows are counted and told, in training, tracing and prediction."""

from __future__ import annotations

import warnings
from pathlib import Path

import datasets
import pytest
from tiny_models import early_exit_model, tokenizer_of

from fastkd.data.batches import tokenize
from fastkd.data.input_format import encode, with_input_format
from fastkd.data.rows import Rows
from fastkd.data.text_counts import TextCounts, TextWarning
from fastkd.inference.predict import predict_file
from fastkd.inference.trace_rows import trace_rows

READABLE = ["the film was very good", "a dull plot", "fun and great"]
UNREADABLE = ["这部电影很好看", "情节无聊", "演员不错"]


def table(texts: list[str]) -> Rows:
    return Rows(datasets.Dataset.from_dict({"text_a": texts}), None, None, "made up")


def test_unknown_tokens_and_cut_rows_are_counted() -> None:
    counts = TextCounts()
    encode(tokenizer_of("bert"), ["the film 这", "good"], None, 5, counts=counts)
    assert (counts.rows, counts.cut, counts.tokens, counts.unknown) == (2, 0, 4, 1)
    encode(tokenizer_of("bert"), ["the film was very good", "the film was"], None, 5, counts=counts)
    assert (counts.rows, counts.cut, counts.tokens) == (4, 1, 10)
    assert any("1 of 4 rows (25.0%) were cut at 5 tokens" in sentence for sentence in counts.sentences())


@pytest.mark.parametrize("input_format", ["standard", "uer"])
def test_a_pair_that_is_cut_counts_once(input_format: str) -> None:
    counts, tokenizer = TextCounts(), with_input_format(tokenizer_of("bert"), input_format)
    encode(tokenizer, ["the film", "the film was"], ["fun", "very good and fun"], 7, counts=counts)
    assert (counts.rows, counts.cut) == (2, 1)


def test_above_a_tenth_of_unknown_tokens_is_told_loudly() -> None:
    with pytest.warns(TextWarning, match="made up: THE TOKENIZER CANNOT READ THESE TEXTS"):
        tokenize(table(UNREADABLE), tokenizer_of("bert"), 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(table(READABLE), tokenizer_of("bert"), 64)
    with pytest.warns(TextWarning, match=r"2 of 3 rows \(66.7%\) were cut at 5 tokens"):
        tokenize(table(READABLE[:1] * 2 + ["fun"]), tokenizer_of("bert"), 5)
    with pytest.warns(TextWarning, match="CANNOT READ"):
        trace_rows(early_exit_model(), tokenizer_of("bert"), table(UNREADABLE))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_prediction_counts_every_row_once(tmp_path: Path, batch_size: int | None) -> None:
    source = tmp_path / "rows.txt"
    source.write_text("\n".join([*READABLE, *UNREADABLE]) + "\n")
    summary = predict_file(
        early_exit_model(), tokenizer_of("bert"), str(source), str(tmp_path / "answers.tsv"),
        batch_size=batch_size, max_length=6,
    )  # fmt: skip
    said = summary.to_dict()
    assert said["rows_cut"] == 2
    assert said["unknown_tokens"] > 0
    assert summary.texts.rows == 6
    assert "CANNOT READ" in summary.texts.sentences()[0]
