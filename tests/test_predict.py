"""Streaming prediction: formats, order, bad rows, bounded memory, and outputs that are whole or absent."""

from __future__ import annotations

import io
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny_models import early_exit_model, tokenizer_of
from transformers import PreTrainedTokenizerBase

from fastkd import EarlyExitForSequenceClassification
from fastkd.data.records import FORMATS
from fastkd.engines.stream import Stream
from fastkd.inference import predict
from fastkd.inference.answers import BadRowError
from fastkd.inference.row_reader import InputRow, read_rows

SENTENCES = [
    "the film was good",
    "dull",
    "a great actor and a great plot but the film is not fun",
    "who is the actor",
    "not bad",
    "the plot was very boring and the actor was cold but fun",
    "warm and good",
]


@pytest.fixture(scope="module")
def model() -> EarlyExitForSequenceClassification:
    return early_exit_model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer_of("bert")


def rows_of(data: bytes, form: str | None = None) -> list[InputRow]:
    return list(read_rows(io.BytesIO(data), form))


def test_tsv_columns_are_found_by_name() -> None:
    data = b"id\ttext_b\tlabel\ttext_a\r\n7\tright\tx\tleft\r\n8\tno\t\tyes\n"
    assert rows_of(data) == [InputRow(2, "left", "right"), InputRow(3, "yes", "no")]


def test_single_text_column_and_byte_order_mark() -> None:
    assert rows_of("\ufeffText\nun film très “bon”\n".encode(), "tsv") == [InputRow(2, "un film très “bon”")]


def test_jsonl_mixes_pairs_and_single_texts() -> None:
    lines = [{"text_a": "a", "text_b": "b"}, {"sentence": "c"}, {"text_a": "d", "text_b": None}]
    data = "\n".join(json.dumps(line) for line in lines).encode()
    assert rows_of(data) == [InputRow(1, "a", "b"), InputRow(2, "c"), InputRow(3, "d")]


def test_plain_text_keeps_tabs_and_unusual_line_breaks() -> None:
    assert rows_of("one\ttwo\nthree\u2028four\n".encode()) == [
        InputRow(1, "one\ttwo"),
        InputRow(2, "three\u2028four"),
    ]


@pytest.mark.parametrize(
    ("data", "form"), [(b'{"text": "x"}\n', "jsonl"), (b"label\ttext_a\n1\tx\n", "tsv"), (b"x\n", "text")]
)
def test_format_of_a_pipe_is_guessed_from_its_first_line(data: bytes, form: str) -> None:
    assert [(row.text_a, row.problem) for row in rows_of(data)] == [("x", None)]
    assert rows_of(data) == rows_of(data, form)


@pytest.mark.parametrize(
    ("data", "form", "line", "problem"),
    [
        (b"text_a\tlabel\ngood\t1\nbad\n", "tsv", 3, "1 field; expected 2 (text_a, label); complete"),
        (b"text_a\n \n", "tsv", 2, "empty text in column 'text_a'; expected text; fill it in"),
        (b"text_a\tb\ngo\xffod\tx\n", "tsv", 2, "byte 0xff at byte 3 of the line; expected UTF-8"),
        (b'{"text_a": ""}\n', "jsonl", 1, "empty text in column 'text_a'"),
        (b'{"text_a": 3}\n', "jsonl", 1, "3 (int) in column 'text_a'; expected text"),
        (b'{"label": 3}\n', "jsonl", 1, "no text"),
        (b"[1]\n", "jsonl", 1, "a JSON list; expected one JSON object"),
        (b"{broken\n", "jsonl", 1, "invalid JSON (Expecting property name"),
        (b"[" * 100_000, "jsonl", 1, "invalid JSON (brackets are nested too deep)"),
        (b"good\n\nbad\n", "text", 2, "empty text in column 'text'"),
        (b"x" * (1 << 20) + b"yy\n", "text", 1, "longer than 1048576 bytes"),
    ],
)
def test_bad_rows_are_named_by_line(data: bytes, form: str, line: int, problem: str) -> None:
    (bad,) = [row for row in rows_of(data, form) if row.problem is not None]
    assert bad.line == line
    assert bad.problem is not None
    assert problem in bad.problem


def test_line_after_an_endless_one_is_read() -> None:
    assert [row.line for row in rows_of(b"x" * (3 << 20) + b"\nnext\n", "text") if row.problem is None] == [2]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("stated", [True, False])
def test_every_format_of_training_is_answered_from_files_and_pipes(form: str, stated: bool) -> None:
    texts = ['good, "very" good', "naïve \u2028 film"]
    stream: Any = io.BytesIO()
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"label": [0, 1], "text": texts}), stream)
    elif form == "csv":
        stream.write(b'label,text\n0,"good, ""very"" good"\n' + f"1,{texts[1]}\n".encode())
    elif form == "jsonl":
        stream.write("\n".join(json.dumps({"label": 0, "text": text}) for text in texts).encode())
    else:
        head = "label\ttext\n" if form == "tsv" else ""
        stream.write((head + "\n".join(("0\t" if head else "") + text for text in texts)).encode())
    stream.seek(0)

    class Pipe(io.BufferedReader):
        def seekable(self) -> bool:
            return False

        def seek(self, *arguments: Any) -> int:
            raise OSError("a pipe")

    for source in (stream, Pipe(io.BytesIO(stream.getvalue()))):
        rows = list(read_rows(source, form if stated else None))
        assert [(row.text_a, row.text_b, row.problem) for row in rows] == [(text, None, None) for text in texts]


def test_a_sentence_with_commas_is_no_header_of_csv() -> None:
    assert [row.text_a for row in rows_of(b"Well, text, he said\nno\n")] == ["Well, text, he said", "no"]


def test_a_broken_csv_record_leaves_what_follows() -> None:
    rows = rows_of(b'label,text\n0,good\n1,"never closed\n0,fine\n1,"a"b\n0,"two\nlines"\n', "csv")
    assert [(row.line, row.text_a) for row in rows if row.problem is None] == [
        (2, "good"), (4, "fine"), (6, "two\nlines"),
    ]  # fmt: skip
    assert [row.line for row in rows if row.problem] == [3, 5]


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
def test_columns_can_be_named(form: str) -> None:
    data = b"id\treview\ttitle\n1\tgood\tbad\n"
    if form == "jsonl":
        data = b'{"review": "good", "title": "bad"}\n{"review": "good", "title": null}\n{"text": "x", "title": "y"}\n'
    rows = list(read_rows(io.BytesIO(data), form, text_a="review", text_b="title"))
    assert rows[0] == InputRow(rows[0].line, "good", "bad")
    if form == "jsonl":
        assert rows[1] == InputRow(2, "good")
        assert rows[2].problem is not None
        assert "no column 'review' among text, title" in rows[2].problem
        return
    with pytest.raises(ValueError, match=r"input: no column 'body' \(text_a=\); the columns are id, review, title"):
        list(read_rows(io.BytesIO(data), form, text_a="body"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "hi \\ud83d"}', "lone surrogate U+D83D at character 4 in column 'text'"),
        ('{"text": 1' + "0" * 5000 + "}", "an integer of thousands of digits"),
        ("[" * 100_000, "nested too deep"),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_what_no_tokenizer_takes_is_reported_and_the_rest_goes_on(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, line: str,
    message: str, batch_size: int | None,
) -> None:  # fmt: skip
    source = tmp_path / "in.JSONL"
    source.write_text(f'{{"text": "good"}}\n{line}\n{{"text": "bad"}}\n', encoding="utf-8")
    summary = predict.predict_file(model, tokenizer, str(source), str(tmp_path / "out.jsonl"), batch_size=batch_size)
    assert (summary.rows, summary.bad_rows) == (3, 1)
    assert summary.problems[0].startswith("line 2: ")
    assert message in summary.problems[0]


@pytest.mark.parametrize(
    ("data", "form", "message"),
    [
        ("text\na\n".encode("utf-16"), None, "input: the file is UTF-16.*iconv -f UTF-16"),
        (b"PAR1 and no more", None, "input: not a readable Parquet file"),
        (b"", None, "input is empty"),
        (b"text_a\n", "tsv", "a header and no rows"),
        (b"label\tbody\n1\tx\n", "tsv", "no text column"),
    ],
)
def test_input_without_rows_is_an_error(data: bytes, form: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(data, form)


@pytest.mark.parametrize("speed", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("batch_size", "window"), [(None, 1), (None, 1024), (1, 1), (3, 4), (32, 1024)])
def test_answers_are_those_of_the_model_in_input_order(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, speed: float,
    batch_size: int | None, window: int,
) -> None:  # fmt: skip
    rows = [InputRow(line, text) for line, text in enumerate(SENTENCES, start=1)]
    answers = list(predict.predict(model, tokenizer, rows, speed=speed, batch_size=batch_size, window=window))
    assert [answer.line for answer in answers] == list(range(1, len(SENTENCES) + 1))
    for text, answer in zip(SENTENCES, answers, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt"), speed=speed)
        probabilities = expected.logits[0].softmax(-1)
        assert answer.label == f"LABEL_{int(probabilities.argmax())}"
        assert answer.probability == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert answer.exit_layer == expected.exit_layer.item()


@pytest.mark.parametrize("batch_size", [None, 4])
def test_exit_layers_can_be_chosen(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, batch_size: int | None
) -> None:
    rows = [InputRow(line, text) for line, text in enumerate(SENTENCES, start=1)]
    answers = predict.predict(model, tokenizer, rows, speed=1.0, exit_layers=[2], batch_size=batch_size)
    assert {answer.exit_layer for answer in answers} == {2}


def test_pairs_are_answered_as_pairs(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [InputRow(1, "good film", "bad plot"), InputRow(2, "good film")]
    pair, single = predict.predict(model, tokenizer, rows, speed=0.0)
    with torch.no_grad():
        expected = model(**tokenizer("good film", "bad plot", return_tensors="pt")).logits[0].softmax(-1)
    assert pair.probability == pytest.approx(float(expected.max()), abs=1e-5)
    assert pair.probability != pytest.approx(single.probability, abs=1e-5)


def test_long_texts_are_cut_at_max_length(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [InputRow(1, "good " * 500), InputRow(2, "good " * 6)]
    by_default, _ = predict.predict(model, tokenizer, rows)  # 66 positions
    assert by_default.problem is None
    cut, whole = predict.predict(model, tokenizer, rows, max_length=8)
    assert cut.probability == pytest.approx(whole.probability, abs=1e-5)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_an_endless_input_is_read_as_answers_are_taken(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, batch_size: int | None
) -> None:
    taken = 0

    def endless() -> Iterator[InputRow]:
        nonlocal taken
        while True:
            taken += 1
            yield InputRow(taken, SENTENCES[taken % len(SENTENCES)])

    answers = predict.predict(model, tokenizer, endless(), window=10, batch_size=batch_size)
    for _ in range(11):
        next(answers)
    # one window more than was given; the stream engine gathers 4096 tokens first, of sentences of 3 and more
    assert taken <= (20 if batch_size else 4096 // 3 + 20)


def test_regression_answers_a_number(tokenizer: PreTrainedTokenizerBase) -> None:
    model = early_exit_model(num_labels=1)
    (answer,) = predict.predict(model, tokenizer, [InputRow(1, "good")])
    with torch.no_grad():
        assert answer.label == pytest.approx(model(**tokenizer("good", return_tensors="pt")).logits.item(), abs=1e-5)
    assert answer.probability is None
    assert answer.exit_layer == 4


def test_answer_that_is_no_number_is_a_problem(tokenizer: PreTrainedTokenizerBase) -> None:
    model = early_exit_model()
    with torch.no_grad():
        model.last_head.out_proj.weight.fill_(math.nan)
    (answer,) = predict.predict(model, tokenizer, [InputRow(1, "good")])
    assert answer.label is None
    assert answer.problem is not None
    assert "not a finite number" in answer.problem


def test_file_to_file_keeps_bad_rows_in_place(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.tsv", tmp_path / "deep" / "out.tsv"
    source.write_text("text_a\tlabel\ngood film\t1\n\t0\nbad plot\t1\nmissing\n", encoding="utf-8")
    summary = predict.predict_file(model, tokenizer, str(source), str(target), speed=1.0)
    header, *lines = [line.split("\t") for line in target.read_text(encoding="utf-8").splitlines()]
    assert header == ["label", "probability", "exit_layer", "error"]
    assert [bool(line[3]) for line in lines] == [False, True, False, True]
    assert lines[1][:3] == ["", "", ""]
    assert lines[1][3].startswith("empty text in column 'text_a'")
    assert lines[0][2] == "1"
    assert 1 / 3 <= float(lines[0][1]) <= 1
    assert (summary.rows, summary.bad_rows, summary.exits) == (4, 2, {1: 2})
    assert [problem.split(";")[0] for problem in summary.problems] == [
        "line 3: empty text in column 'text_a'",
        "line 5: 1 field",
    ]
    assert summary.average_layers == 1.0


def test_jsonl_to_jsonl(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text_a": "good"}\nnonsense\n', encoding="utf-8")
    predict.predict_file(model, tokenizer, str(source), str(target))
    answered, bad = map(json.loads, target.read_text(encoding="utf-8").splitlines())
    assert set(answered) == {"label", "probability", "exit_layer"}
    assert bad["label"] is None
    assert bad["error"].startswith("invalid JSON")


def test_stopping_at_a_bad_row_leaves_nothing(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.tsv"
    source.write_text("good\n" * 50 + "\ngood\n", encoding="utf-8")
    with pytest.raises(BadRowError, match=r"in\.txt, line 51: empty text in column 'text'; .*--bad-rows mark"):
        predict.predict_file(model, tokenizer, str(source), str(target), bad_rows="stop", window=8)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_failure_half_way_keeps_the_earlier_output_and_the_answers_so_far(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.tsv"
    source.write_text("good\n" * 50, encoding="utf-8")
    target.write_text("earlier\n", encoding="utf-8")

    def interrupt(rows: int) -> None:
        if rows == 20:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match=r"not finished: the answers so far are in .*out\.partial\.tsv"),
    ):
        predict.predict_file(model, tokenizer, str(source), str(target), on_progress=interrupt, window=8)
    assert target.read_text(encoding="utf-8") == "earlier\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.partial.tsv", "out.tsv"]
    assert len((tmp_path / "out.partial.tsv").read_text(encoding="utf-8").splitlines()) == 1 + 20


def test_ctrl_c_keeps_answers_behind_a_row_that_waits(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(SENTENCES * 8), encoding="utf-8")
    rows = list(read_rows(io.BytesIO(source.read_bytes())))
    uncertainty = sorted(row.uncertainty for row in model.stream(rows, tokenizer, exit_layers=[1, 4], speed=1.0))
    speed = uncertainty[len(uncertainty) // 2]
    expected = list(predict.predict(model, tokenizer, rows, speed=speed, window=8))
    assert len({prediction.exit_layer for prediction in expected}) > 1

    move_on, runs = Stream._move_on, 0

    def interrupted(self: Stream, stage: int, *arguments: Any) -> None:
        nonlocal runs
        runs += 1
        if stage > 0 or runs == 4:
            raise KeyboardInterrupt
        move_on(self, stage, *arguments)

    monkeypatch.setattr(Stream, "_move_on", interrupted)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="not finished"):
        predict.predict_file(model, tokenizer, str(source), str(target), speed=speed, window=8)
    written = [json.loads(line) for line in (tmp_path / "out.partial.jsonl").read_text(encoding="utf-8").splitlines()]
    answered = [index for index, row in enumerate(written) if row["label"] is not None]
    missing = [row["error"] for row in written if row["label"] is None]
    assert answered
    assert missing
    assert set(missing) == {"not answered before the run broke off"}
    assert written[-1]["label"] is not None
    for index in answered:
        assert written[index]["label"] == expected[index].label
        assert written[index]["exit_layer"] == expected[index].exit_layer == 1


def test_empty_input_leaves_nothing(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = tmp_path / "in.tsv"
    for content in ("", "text_a\n"):
        source.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"empty|no rows"):
            predict.predict_file(model, tokenizer, str(source), str(tmp_path / "out.tsv"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.tsv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "absent.tsv"}, "no file absent.tsv"),
        ({"source": "in.xml"}, "in.xml: unknown file type '.xml'.*--format tsv"),
        ({"source": "in.txt", "destination": "out.png"}, "out.png has the suffix '.png', but predictions are"),
        ({"source": "in.txt", "destination": "out.txt"}, "predictions are written as"),
        ({"source": "in.txt", "destination": "folder"}, "folder is a folder; give the name of a file in it"),
        ({"source": "in.txt", "destination": "in.txt/out.tsv"}, "in.txt is a file, so nothing can be written into it"),
        ({"source": "in.txt", "input_format": "xml"}, "format: got 'xml'"),
        ({"source": "in.txt", "bad_rows": "ignore"}, "bad_rows: got 'ignore'"),
    ],
)
def test_bad_arguments_are_found_without_a_model(
    arguments: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("good\n", encoding="utf-8")
    Path("folder").mkdir()
    defaults = {"destination": "out.tsv", "input_format": None, "output_format": None, "bad_rows": "mark"}
    with pytest.raises((ValueError, OSError), match=message):
        predict.check_files(**{**defaults, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["batch_size", "window"])
def test_counts_must_be_positive(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, argument: str
) -> None:
    with pytest.raises(ValueError, match=f"{argument}: got 0"):
        list(predict.predict(model, tokenizer, [InputRow(1, "x")], **{argument: 0}))


def test_the_input_stays_and_devices_and_pipes_are_read_and_written(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, link = tmp_path / "in.tsv", tmp_path / "link.tsv"
    source.write_text("text_a\n" + "good\n" * 5, encoding="utf-8")
    link.symlink_to(source)
    for target in (source, link):
        with pytest.raises(ValueError, match="is also an input, which would be lost"):
            predict.predict_file(model, tokenizer, str(source), str(target))
        with pytest.raises(ValueError, match="is also an input"):
            predict.check_files(str(source), str(target), None, None, "mark")
    assert source.read_text(encoding="utf-8").startswith("text_a\ngood")
    assert predict.predict_file(model, tokenizer, str(source), os.devnull).rows == 5
    assert not Path(os.devnull).is_file()
    given, taken, read = tmp_path / "given", tmp_path / "taken", []
    for pipe in (given, taken):
        os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: given.write_text("good\ndull\n", encoding="utf-8"), daemon=True)
    reader = threading.Thread(target=lambda: read.append(taken.read_text(encoding="utf-8")), daemon=True)
    writer.start()
    reader.start()
    assert predict.predict_file(model, tokenizer, str(given), str(taken)).rows == 2
    reader.join(20)
    assert len(read[0].splitlines()) == 3
    assert taken.is_fifo()
