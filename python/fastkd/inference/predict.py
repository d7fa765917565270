"""Answers for a stream of sentences: read, tokenise, sort by length, run with early exit, write in input order.

How many rows are in memory is bounded, so files of any size and endless pipes can be answered. A row that cannot be
answered (empty text, broken encoding, wrong number of columns) keeps its place in the output and says why.
"""

from __future__ import annotations

import codecs
import json
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import torch

from fastkd.data.columns import PAIR_COLUMNS, TEXT_COLUMNS
from fastkd.data.files import atomic_path
from fastkd.data.input_format import encode
from fastkd.encoders.families import longest_input

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastkd.engines.stream import Stream, StreamRow
    from fastkd.exits.drift import DriftMonitor
    from fastkd.model.modeling import EarlyExitForSequenceClassification

FORMATS = ("tsv", "jsonl", "text")
BAD_ROWS = ("mark", "stop")
STANDARD_STREAM = "-"

_SUFFIXES = {".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text"}
_LONGEST_LINE = 1 << 20  # bytes; a longer line is no sentence and would break the promise of bounded memory
_WATCHED_TOGETHER = 32  # rows that a monitor runs to full depth in one batch
_REPORTED = 20  # bad rows listed by line; the rest are counted


class BadRowError(ValueError):
    """A row cannot be answered and the caller asked to stop there."""


@dataclass(frozen=True)
class InputRow:
    """One row as read: its line number from 1, and either its texts or the problem with it."""

    line: int
    text_a: str = ""
    text_b: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Prediction:
    """One answer. `label`, `probability` and `exit_layer` are None where `problem` says why there is none.

    With a regression model `label` is the predicted number and `probability` is None.
    """

    line: int
    label: str | float | None = None
    probability: float | None = None
    exit_layer: int | None = None
    problem: str | None = None


@dataclass
class PredictSummary:
    """What a run of `predict_file` did."""

    rows: int = 0
    bad_rows: int = 0
    problems: list[str] = field(default_factory=list)
    exits: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def average_layers(self) -> float | None:
        answered = self.exits.total()
        return sum(layer * count for layer, count in self.exits.items()) / answered if answered else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "problems": self.problems,
            "average_layers": self.average_layers,
            "exits_per_layer": {str(layer): self.exits[layer] for layer in sorted(self.exits)},
            "seconds": round(self.seconds, 3),
        }


def format_of(path: str, stated: str | None = None) -> str | None:
    """The row format of a file: as stated, else by suffix; None for a stream that must be looked at.

    Raises:
        ValueError: an unknown format, or a suffix that tells none.
    """
    if stated is not None:
        if stated not in FORMATS:
            raise ValueError(f"format: got {stated!r}, expected one of {', '.join(FORMATS)}")
        return stated
    if path == STANDARD_STREAM:
        return None
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"format: cannot tell the format of {path!r} from its suffix {suffix!r}; name the file "
            f"{', '.join(_SUFFIXES)} or pass --format {'|'.join(FORMATS)}"
        )
    return _SUFFIXES[suffix]


def read_rows(stream: BinaryIO, form: str | None = None, name: str = "input") -> Iterator[InputRow]:
    """Read rows one by one.

    Args:
        stream: UTF-8 bytes. TSV has a header that names the text columns as in `fastkd.data.columns` (text_a and
            perhaps text_b; no quoting; other columns are ignored), JSONL one object a line with these keys, text one
            sentence a line.
        form: one of `FORMATS`; None looks at the first line.
        name: of the file, for messages.

    Raises:
        ValueError: nothing in the stream, or a TSV header without a text column.
    """
    lines = _lines(stream)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{name} is empty; expected at least one sentence")
    form = form or _guess(first)
    if form == "tsv":
        yield from _tsv_rows(first, lines, name)
        return
    parse = _json_row if form == "jsonl" else _text_row
    yield parse(1, first)
    for number, line in enumerate(lines, start=2):
        yield parse(number, line)


def predict(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[InputRow],
    *,
    speed: float | None = None,
    criterion: str | None = None,
    top_n: int | None = None,
    exit_layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    window: int = 1024,
    monitor: DriftMonitor | None = None,
) -> Iterator[Prediction]:
    """Answer rows in input order.

    Args:
        model: in evaluation mode on its device.
        tokenizer: of the model.
        rows: from `read_rows`.
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
    if monitor is None:
        if model.config.certificate is not None:
            from fastkd.exits.certificate import warn_if_uncertified  # brings scipy

            warn_if_uncertified(model, **exits)
        return _predict(model, tokenizer, rows, batch_size, max_length, window, exits)
    if any(value is not None for value in exits.values()):
        raise ValueError(
            "speed, criterion, top_n, exit_layers: the monitor brings them; give them to DriftMonitor instead"
        )
    watched: dict[int, InputRow] = {}
    remembered = _remember_watched(rows, monitor, watched)
    answers = _predict(model, tokenizer, remembered, batch_size, max_length, window, monitor.exits)
    return _compare_watched(answers, monitor, watched, tokenizer, max_length or length_limit(model, tokenizer))


def _predict(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[InputRow],
    batch_size: int | None,
    max_length: int | None,
    window: int,
    exits: dict[str, Any],
) -> Iterator[Prediction]:
    if batch_size is None:
        unanswered: deque[int] = deque()
        noted = _note_lines(rows, unanswered)
        stream = model.stream(noted, tokenizer, max_length=max_length, look_ahead=window, **exits)
        return _predict_stream(stream, unanswered)
    model.exit_rule(**exits)
    return _predict_batches(
        model, tokenizer, rows, batch_size, max_length or length_limit(model, tokenizer), window, exits
    )


def _note_lines(rows: Iterable[InputRow], lines: deque[int]) -> Iterator[InputRow]:
    for row in rows:
        lines.append(row.line)
        yield row


def _predict_stream(stream: Stream, unanswered: deque[int]) -> Iterator[Prediction]:
    """The answers of a stream; where it breaks off, Ctrl-C for one, also those that are ready behind rows that wait.

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
) -> Iterator[Prediction]:
    remaining = iter(rows)
    while block := list(islice(remaining, window)):
        good = [row for row in block if row.problem is None]
        answers = _answer(model, tokenizer, good, batch_size, max_length, exits)
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
    output_format: str | None = None,
    bad_rows: str = "mark",
    on_progress: Callable[[int], None] = lambda rows: None,
    **options: Any,
) -> PredictSummary:
    """Answer a file, or "-" for standard input, into a file, or "-" for standard output.

    A file appears under its name only when it is whole. Where something breaks the run off, Ctrl-C for one, the answers
    so far are kept beside it, as NAME.partial.SUFFIX, and a warning says so; rows that were still on their way before
    the last of them keep their line, with the reason in place of the answer. TSV output has the columns label,
    probability, exit_layer and error; JSONL the same keys.

    Args:
        model: as for `predict`, as are `tokenizer` and `options`.
        tokenizer: of the model.
        source: path or "-".
        destination: path or "-".
        input_format: one of `FORMATS`; default by suffix, or by the first line of standard input.
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
    write = _writer(destination, output_format)
    summary, started = PredictSummary(), time.perf_counter()
    with ExitStack() as stack:
        name = "standard input" if source == STANDARD_STREAM else source
        rows = read_rows(stack.enter_context(_opened(source)), form, name)
        # an output is opened only now that a first row is read and the options are checked: bad input leaves nothing
        checked = _checked(chain([next(rows)], rows), bad_rows, name)
        answers = predict(model, tokenizer, checked, **options)
        output = stack.enter_context(_output(destination))
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
        ValueError: an empty input, an unknown format or policy.
    """
    if bad_rows not in BAD_ROWS:
        raise ValueError(f"bad_rows: got {bad_rows!r}, expected one of {', '.join(BAD_ROWS)}")
    format_of(source, input_format)
    _writer(destination, output_format)
    if destination != STANDARD_STREAM and Path(destination).is_dir():
        raise IsADirectoryError(f"output: {destination} is a folder; give the name of a file in it")
    if source == STANDARD_STREAM:
        return
    if not Path(source).is_file():
        raise FileNotFoundError(f"input: there is no file {source}")
    if Path(source).stat().st_size == 0:
        raise ValueError(f"input: {source} is empty; expected at least one sentence")


def length_limit(model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens a text may have: the tokenizer's limit, and never more than the model has positions for."""
    return min(tokenizer.model_max_length, longest_input(model.config.backbone))


def _answer(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[InputRow],
    batch_size: int,
    max_length: int,
    exits: dict[str, Any],
) -> dict[int, Prediction]:
    """The prediction of each row by its line number."""
    encoded = _encode(tokenizer, rows, max_length)
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


def _encode(tokenizer: PreTrainedTokenizerBase, rows: list[InputRow], max_length: int) -> list[dict[str, list[int]]]:
    """Token ids of each row; pairs and single texts may be mixed."""
    encoded: list[dict[str, list[int]]] = [{}] * len(rows)
    for is_pair in (False, True):
        chosen = [index for index, row in enumerate(rows) if (row.text_b is not None) == is_pair]
        if not chosen:
            continue
        second = [rows[index].text_b for index in chosen] if is_pair else None
        batch = encode(tokenizer, [rows[index].text_a for index in chosen], second, max_length)
        for position, index in enumerate(chosen):
            encoded[index] = {name: values[position] for name, values in batch.items()}
    return encoded


def _prediction(
    model: EarlyExitForSequenceClassification, line: int, logits: torch.Tensor, exit_layer: int
) -> Prediction:
    if not logits.isfinite().all():
        return Prediction(line, problem="the model's answer is not a finite number; try float32 or bfloat16 weights")
    if logits.numel() == 1:
        return Prediction(line, logits.item(), None, exit_layer)
    probabilities = logits.softmax(-1)
    best = int(probabilities.argmax())
    assert model.config.id2label is not None
    return Prediction(line, str(model.config.id2label[best]), float(probabilities[best]), exit_layer)  # type: ignore[index]


def _checked(rows: Iterable[InputRow], bad_rows: str, name: str) -> Iterator[InputRow]:
    for row in rows:
        if row.problem is not None and bad_rows == "stop":
            raise BadRowError(
                f"{name}, line {row.line}: {row.problem}; correct the row, or pass --bad-rows mark to answer all others"
            )
        yield row


def _count(summary: PredictSummary, prediction: Prediction) -> None:
    summary.rows += 1
    if prediction.exit_layer is not None:
        summary.exits[prediction.exit_layer] += 1
        return
    summary.bad_rows += 1
    if len(summary.problems) < _REPORTED:
        summary.problems.append(f"line {prediction.line}: {prediction.problem}")


# Reading


def _opened(source: str) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if source == STANDARD_STREAM else Path(source).open("rb")


def _lines(stream: BinaryIO) -> Iterator[str | InputRow]:
    """Decoded lines without their ending; an `InputRow` with the problem where a line cannot be had."""
    number = 0
    while raw := stream.readline(_LONGEST_LINE):
        number += 1
        if len(raw) == _LONGEST_LINE and not raw.endswith(b"\n"):
            while (rest := stream.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield InputRow(number, problem=f"longer than {_LONGEST_LINE} bytes; a row is one sentence or pair")
            continue
        raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        try:
            yield raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            yield InputRow(number, problem=f"byte 0x{raw[error.start]:02x} is not UTF-8; convert the file to UTF-8")


def _guess(first: str | InputRow) -> str:
    if isinstance(first, InputRow):
        return "text"
    if first.lstrip().startswith("{"):
        return "jsonl"
    return "tsv" if _text_columns(first.split("\t")) else "text"


def _text_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The one or two columns that hold the text, by the names in `fastkd.data.columns`; empty where there is none."""
    known = {column.strip().lower(): column for column in columns}
    for names in (*PAIR_COLUMNS, *((name,) for name in TEXT_COLUMNS)):
        if all(name in known for name in names):
            return tuple(known[name] for name in names)
    return ()


def _tsv_rows(header: str | InputRow, lines: Iterator[str | InputRow], name: str) -> Iterator[InputRow]:
    columns = [] if isinstance(header, InputRow) else header.split("\t")
    texts = _text_columns(columns)
    if not texts:
        raise ValueError(
            f"{name}, line 1: the header has no text column; expected {TEXT_COLUMNS[0]} (and {PAIR_COLUMNS[0][1]} for "
            "pairs), separated by tabs; for one sentence a line pass --format text"
        )
    indices = [columns.index(text) for text in texts]
    is_empty = True
    for number, line in enumerate(lines, start=2):
        is_empty = False
        if isinstance(line, InputRow):
            yield line
            continue
        fields = line.split("\t")
        if len(fields) != len(columns):
            yield InputRow(number, problem=f"{len(fields)} columns, expected {len(columns)} ({', '.join(columns)})")
            continue
        yield _row(number, [fields[index] for index in indices], texts)
    if is_empty:
        raise ValueError(f"{name} has a header and no rows; expected at least one sentence")


def _json_row(number: int, line: str | InputRow) -> InputRow:
    if isinstance(line, InputRow):
        return line
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return InputRow(number, problem=f"not JSON ({error})")
    # a null second text is how writers of mixed files mark a single one
    given = {key: text for key, text in value.items() if text is not None} if isinstance(value, dict) else {}
    texts = _text_columns(list(given))
    if not texts:
        return InputRow(number, problem=f'no text; expected an object such as {{"{TEXT_COLUMNS[0]}": "..."}}')
    return _row(number, [given[name] for name in texts], texts)


def _text_row(number: int, line: str | InputRow) -> InputRow:
    return line if isinstance(line, InputRow) else _row(number, [line], ("text",))


def _row(number: int, texts: Sequence[Any], names: Sequence[str]) -> InputRow:
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            return InputRow(number, problem=f"{name} is a JSON {type(text).__name__}, expected a string")
        if not text.strip():
            return InputRow(number, problem=f"{name} is empty" if len(names) > 1 or name != "text" else "empty line")
    return InputRow(number, *texts)


# Writing


@contextmanager
def _output(destination: str) -> Iterator[IO[str]]:
    if destination == STANDARD_STREAM:
        yield sys.stdout
        sys.stdout.flush()
        return
    with atomic_path(destination) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        try:
            yield stream
        except BadRowError:
            raise  # the caller asked for everything or nothing
        except BaseException:
            stream.flush()
            partial = _partial(destination)
            temporary.replace(partial)
            warnings.warn(f"{destination} was not finished: the answers so far are in {partial}", stacklevel=3)
            raise


def _partial(destination: str) -> Path:
    path = Path(destination)
    return path.with_suffix(f".partial{path.suffix}")


def _writer(destination: str, form: str | None) -> Callable[[IO[str], Prediction | None], None]:
    form = form or ("tsv" if destination == STANDARD_STREAM else format_of(destination))
    if form not in ("tsv", "jsonl"):
        raise ValueError(
            f"output: got format {form!r}, predictions are written as .tsv or .jsonl; name the output so, or pass "
            "--output-format tsv|jsonl"
        )
    return _write_tsv if form == "tsv" else _write_json


def _write_tsv(stream: IO[str], prediction: Prediction | None) -> None:
    if prediction is None:
        stream.write("label\tprobability\texit_layer\terror\n")
        return
    probability = None if prediction.probability is None else f"{prediction.probability:.6f}"
    fields = (prediction.label, probability, prediction.exit_layer, prediction.problem)
    # a label name or a problem may quote the input, whose tabs would add columns
    cells = ("" if value is None else str(value).replace("\t", " ").replace("\n", " ") for value in fields)
    stream.write("\t".join(cells) + "\n")


def _write_json(stream: IO[str], prediction: Prediction | None) -> None:
    if prediction is None:
        return
    answer: dict[str, Any] = {
        "label": prediction.label,
        "probability": prediction.probability,
        "exit_layer": prediction.exit_layer,
    }
    if prediction.problem is not None:
        answer["error"] = prediction.problem
    stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
