"""Answers for a stream of sentences: tokenise, sort by length, run with early exit, answer in input order.

How many rows are in memory is bounded, so files of any size and endless pipes can be answered. A row that cannot be
answered (empty text, broken encoding, wrong number of columns) keeps its place in the output and says why.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from fastkd.data.files import check_output_file, is_special, reading
from fastkd.data.input_format import encode
from fastkd.data.text_counts import TextCounts
from fastkd.inference.answers import (
    BadRowError,
    Prediction,
    average_layers,
    exits_in_order,
    output_stream,
    writer_of,
)
from fastkd.inference.row_reader import STANDARD_STREAM, InputRow, format_of, input_rows, read_rows
from fastkd.model.tokenizers import length_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastkd.engines.stream import Stream, StreamRow
    from fastkd.exits.drift import DriftMonitor
    from fastkd.model.modeling import EarlyExitForSequenceClassification

BAD_ROWS = ("mark", "stop")
WINDOW = 1024  # rows that are read, tokenised and sorted by length together

_WATCHED_TOGETHER = 32  # rows that a monitor runs to full depth in one batch
_REPORTED = 20  # bad rows listed by line; the rest are counted


@dataclass
class PredictSummary:
    """What a run of `predict_file` did."""

    rows: int = 0
    bad_rows: int = 0
    problems: list[str] = field(default_factory=list)
    exits: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    texts: TextCounts = field(default_factory=TextCounts)

    @property
    def average_layers(self) -> float | None:
        return average_layers(self.exits)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "problems": self.problems,
            "average_layers": self.average_layers,
            "exits_per_layer": exits_in_order(self.exits),
            "seconds": round(self.seconds, 3),
            **self.texts.to_dict(),
        }


def predict(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    *,
    speed: float | None = None,
    criterion: str | None = None,
    top_n: int | None = None,
    exit_layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    window: int = WINDOW,
    monitor: DriftMonitor | None = None,
    counts: TextCounts | None = None,
) -> Iterator[Prediction]:
    """Answer rows in input order.

    Args:
        model: in evaluation mode on its device.
        tokenizer: of the model.
        rows: from `read_rows`, or of any kind that `input_rows` takes.
        speed: FastBERT's speed in [0, 1]; None takes the model's.
        criterion: uncertainty criterion; None takes the model's.
        top_n: classes that the "top_n" criterion looks at.
        exit_layers: after which layers to decide; None takes all that have a head.
        batch_size: rows padded to one batch, one window after the other; None leaves it to the stream engine, which
            gathers as many tokens as run well (`EarlyExitForSequenceClassification.stream`).
        max_length: tokens after which a text is cut; None takes the tokenizer's limit.
        window: rows that are read, tokenised and sorted by length together.
        monitor: of `model`; watches rows by their line number and changes no answer. It brings its own speed, criterion
            and top_n.
        counts: counts the texts, where given.

    Warns:
        CalibrationWarning: the model's certificate is for something else than what these rows are answered with.

    Raises:
        ValueError: `batch_size` or `window` is not positive; a monitor together with what it brings; what
            `model.forward` raises.
    """
    for argument, value in (("batch_size", batch_size), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}: got {value}, expected at least 1")
    exits: dict[str, Any] = {"speed": speed, "criterion": criterion, "top_n": top_n, "exit_layers": exit_layers}
    rows = input_rows(rows)
    if monitor is None:
        if model.config.certificate is not None:
            from fastkd.exits.certificate import warn_if_uncertified  # brings scipy

            warn_if_uncertified(model, **exits)
        return _predict(model, tokenizer, rows, batch_size, max_length, window, exits, counts or TextCounts())
    if any(value is not None for value in exits.values()):
        raise ValueError(
            "speed, criterion, top_n, exit_layers: they come from the monitor; pass them to DriftMonitor instead"
        )
    watched: dict[int, InputRow] = {}
    remembered = _remember_watched(rows, monitor, watched)
    answers = _predict(
        model, tokenizer, remembered, batch_size, max_length, window, monitor.exits, counts or TextCounts()
    )
    return _compare_watched(answers, monitor, watched, tokenizer, max_length or length_limit(model, tokenizer))


def _predict(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[InputRow],
    batch_size: int | None,
    max_length: int | None,
    window: int,
    exits: dict[str, Any],
    counts: TextCounts,
) -> Iterator[Prediction]:
    if batch_size is None:
        unanswered: deque[int] = deque()
        noted = _note_lines(rows, unanswered)
        stream = model.stream(noted, tokenizer, max_length=max_length, look_ahead=window, **exits)
        stream.count_texts(counts)
        return _predict_stream(stream, unanswered)
    model.exit_rule(**exits)
    return _predict_batches(
        model, tokenizer, rows, batch_size, max_length or length_limit(model, tokenizer), window, exits, counts
    )


def _note_lines(rows: Iterable[InputRow], lines: deque[int]) -> Iterator[InputRow]:
    for row in rows:
        lines.append(row.line)
        yield row


def _predict_stream(stream: Stream, unanswered: deque[int]) -> Iterator[Prediction]:
    """The answers of a stream; if it breaks off, by Ctrl-C for example, also the ready ones behind rows that wait.

    Args:
        stream: not yet iterated.
        unanswered: line numbers of what the stream has read and not yet given, in order.
    """
    try:
        for row in stream:
            unanswered.popleft()
            yield _of_stream(row)
    except GeneratorExit:
        raise
    except BaseException:
        yield from _ready(stream, unanswered)
        raise


def _ready(stream: Stream, unanswered: Iterable[int]) -> Iterator[Prediction]:
    """The finished answers, and in the place of rows that wait before one of them a prediction that says so."""
    finished = {row.line: row for row in stream.finished()}
    for line in unanswered:
        if not finished:
            return
        row = finished.pop(line, None)
        yield Prediction(line, problem="not answered before the run broke off") if row is None else _of_stream(row)


def _of_stream(row: StreamRow) -> Prediction:
    return Prediction(row.line, row.label, row.score, row.exit_layer, row.problem)


def _predict_batches(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[InputRow],
    batch_size: int,
    max_length: int,
    window: int,
    exits: dict[str, Any],
    counts: TextCounts,
) -> Iterator[Prediction]:
    remaining = iter(rows)
    while block := list(islice(remaining, window)):
        good = [row for row in block if row.problem is None]
        answers = _answer(model, tokenizer, good, batch_size, max_length, exits, counts)
        for row in block:
            yield answers.get(row.line) or Prediction(row.line, problem=row.problem)


def _remember_watched(
    rows: Iterable[InputRow], monitor: DriftMonitor, watched: dict[int, InputRow]
) -> Iterator[InputRow]:
    for row in rows:
        if row.problem is None and monitor.watches(row.line):
            watched[row.line] = row
        yield row


def _compare_watched(
    answers: Iterable[Prediction],
    monitor: DriftMonitor,
    watched: dict[int, InputRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Iterator[Prediction]:
    """Pass the answers on; run watched rows to full depth, some together, whatever engine gave the answers."""
    passed = 0
    waiting: dict[int, str | float | None] = {}

    def compare() -> None:
        chosen = [watched.pop(line) for line in waiting]
        exits = {**monitor.exits, "speed": 0.0}
        full = _answer(monitor.model, tokenizer, chosen, _WATCHED_TOGETHER, max_length, exits)
        monitor.record(passed, list(waiting.values()), [full[line].label for line in waiting])
        waiting.clear()

    for answer in answers:
        passed += answer.problem is None
        if answer.line in watched:
            if answer.problem is None:
                waiting[answer.line] = answer.label
            else:
                del watched[answer.line]
        if len(waiting) == _WATCHED_TOGETHER:
            compare()
            passed = 0
        yield answer
    compare()


def predict_file(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    destination: str,
    *,
    input_format: str | None = None,
    text_a: str | None = None,
    text_b: str | None = None,
    output_format: str | None = None,
    bad_rows: str = "mark",
    on_progress: Callable[[int], None] = lambda rows: None,
    **options: Any,
) -> PredictSummary:
    """Answer a file, or "-" for standard input, into a file, or "-" for standard output.

    A file appears under its name only when it is whole. If the run breaks off, by Ctrl-C for example, the answers so
    far stay beside it, as NAME.partial.SUFFIX, and a warning says so; rows before the last of them that have no answer
    yet keep their line, with the reason in its place. TSV output has the columns label,
    probability, exit_layer and error; JSONL the same keys.

    Args:
        model: as for `predict`, as are `tokenizer` and `options`.
        tokenizer: of the model.
        source: path or "-".
        destination: path or "-".
        input_format: one of `fastkd.inference.row_reader.FORMATS`; default by suffix, or by the first line of
            standard input.
        text_a, text_b: names of the columns of the texts; default: the usual ones.
        output_format: "tsv" or "jsonl"; default by suffix, TSV on standard output.
        bad_rows: "mark" leaves a row without answer and says why; "stop" raises at the first.
        on_progress: called with the number of rows done so far.
        options: of `predict`.

    Raises:
        FileNotFoundError: no file `source`.
        ValueError: an empty or unreadable input, an unknown format or policy.
        BadRowError: a bad row under "stop".
    """
    check_files(source, destination, input_format, output_format, bad_rows)
    form = format_of(source, input_format)
    write = writer_of(destination, output_format)
    summary, started = PredictSummary(), time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(reading(source))
        name = "standard input" if source == STANDARD_STREAM else source
        rows = read_rows(stack.enter_context(_opened(source)), form, name, text_a=text_a, text_b=text_b)
        # an output is opened only now that a first row is read and the options are checked: bad input leaves nothing
        checked = _checked(chain([next(rows)], rows), bad_rows, name)
        answers = predict(model, tokenizer, checked, counts=summary.texts, **options)
        output = stack.enter_context(output_stream(destination))
        write(output, None)
        for prediction in answers:
            write(output, prediction)
            _count(summary, prediction)
            on_progress(summary.rows)
    summary.seconds = time.perf_counter() - started
    return summary


def check_files(
    source: str, destination: str, input_format: str | None, output_format: str | None, bad_rows: str
) -> None:
    """Find what is wrong with the arguments of `predict_file` before a model is loaded.

    Raises:
        FileNotFoundError: no file `source`.
        IsADirectoryError: `destination` is a folder.
        ValueError: an empty input, an unknown format or policy; `destination` is `source`.
    """
    if bad_rows not in BAD_ROWS:
        raise ValueError(f"bad_rows: got {bad_rows!r}, expected one of {', '.join(BAD_ROWS)}")
    format_of(source, input_format)
    if destination != STANDARD_STREAM:
        with reading(source):
            check_output_file(destination)
    writer_of(destination, output_format)
    if source == STANDARD_STREAM or is_special(source):
        return
    if not Path(source).is_file():
        raise FileNotFoundError(f"input: there is no file {source}")
    if Path(source).stat().st_size == 0:
        raise ValueError(f"input: {source} is empty; expected at least one sentence")


def _answer(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[InputRow],
    batch_size: int,
    max_length: int,
    exits: dict[str, Any],
    counts: TextCounts | None = None,
) -> dict[int, Prediction]:
    """The prediction of each row by its line number."""
    encoded = _encode(tokenizer, rows, max_length, counts)
    by_length = sorted(range(len(rows)), key=lambda index: len(encoded[index]["input_ids"]))
    answers = {}
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = tokenizer.pad([encoded[index] for index in chosen], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model(**batch, **exits)
        for index, logits, layer in zip(chosen, output.logits.float(), output.exit_layer.tolist(), strict=True):
            line = rows[index].line
            answers[line] = _prediction(model, line, logits, layer)
    return answers


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: list[InputRow], max_length: int, counts: TextCounts | None
) -> list[dict[str, list[int]]]:
    """Token ids of each row; pairs and single texts may be mixed."""
    encoded: list[dict[str, list[int]]] = [{}] * len(rows)
    for is_pair in (False, True):
        chosen = [index for index, row in enumerate(rows) if (row.text_b is not None) == is_pair]
        if not chosen:
            continue
        second = [rows[index].text_b for index in chosen] if is_pair else None
        batch = encode(tokenizer, [rows[index].text_a for index in chosen], second, max_length, counts=counts)
        for position, index in enumerate(chosen):
            encoded[index] = {name: values[position] for name, values in batch.items()}
    return encoded


def _prediction(
    model: EarlyExitForSequenceClassification, line: int, logits: torch.Tensor, exit_layer: int
) -> Prediction:
    if not logits.isfinite().all():
        from fastkd.engines.stream import NOT_FINITE

        return Prediction(line, problem=NOT_FINITE)
    if logits.numel() == 1:
        return Prediction(line, logits.item(), None, exit_layer)
    probabilities = logits.softmax(-1)
    best = int(probabilities.argmax())
    assert model.config.id2label is not None
    return Prediction(line, str(model.config.id2label[best]), float(probabilities[best]), exit_layer)  # type: ignore[index]


def _checked(rows: Iterable[InputRow], bad_rows: str, name: str) -> Iterator[InputRow]:
    for row in rows:
        if row.problem is not None and bad_rows == "stop":
            raise BadRowError(f"{name}, line {row.line}: {row.problem}, or pass --bad-rows mark to answer all others")
        yield row


def _count(summary: PredictSummary, prediction: Prediction) -> None:
    summary.rows += 1
    if prediction.exit_layer is not None:
        summary.exits[prediction.exit_layer] += 1
        return
    summary.bad_rows += 1
    if len(summary.problems) < _REPORTED:
        summary.problems.append(f"line {prediction.line}: {prediction.problem}")


def _opened(source: str) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if source == STANDARD_STREAM else Path(source).open("rb")
