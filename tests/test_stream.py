"""The stream engine: the answers of one-by-one forward passes, in order, whatever happens on the way."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import WORDS, clear_speed, early_exit_model, one_thread, random_batch, row_of, tokenizer_of
from torch import nn

import fastkd
import fastkd_kernels as fk
from fastkd.engines import plan, stream_reader
from fastkd.engines.packed_encoder import encoder_of, round_up_tokens
from fastkd.engines.stream import Stream, StreamRow, _Queue
from fastkd.engines.stream_reader import EncodedRow

__all__ = ["one_thread"]


def encoded_rows(count: int = 60, seed: int = 5) -> list[dict[str, Any]]:
    inputs = random_batch(rows=count, seed=seed)
    return [{name: values[0].tolist() for name, values in row_of(inputs, row).items()} for row in range(count)]


def one_by_one(
    model: fastkd.EarlyExitForSequenceClassification, rows: list[dict[str, Any]], **options: Any
) -> list[Any]:
    answers = []
    for row in rows:
        output = model(**{name: torch.tensor([values]) for name, values in row.items()}, **options)
        answers.append((model.config.id2label[int(output.logits.argmax())], int(output.exit_layer)))
    return answers


def answers_of(rows: list[StreamRow]) -> list[Any]:
    return [(row.label, row.exit_layer) for row in rows]


def speed_of(model: fastkd.EarlyExitForSequenceClassification, rows: list[dict[str, Any]]) -> float:
    """A speed that rounding cannot reach."""
    with torch.no_grad():
        logits = torch.cat([model.all_exit_logits(**{n: torch.tensor([v]) for n, v in row.items()}) for row in rows])
    log = logits.double().log_softmax(-1)
    return clear_speed(-(log.exp() * log).sum(-1) / torch.tensor(float(logits.shape[-1])).log())


def sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(9)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


@pytest.mark.parametrize("num_labels", [2, 3, 40])
@pytest.mark.parametrize(("tokens_per_run", "look_ahead"), [(1, 1), (64, 7), (100000, 256)])
def test_same_answers_as_one_by_one(num_labels: int, tokens_per_run: int, look_ahead: int) -> None:
    model, rows = early_exit_model(num_labels=num_labels), encoded_rows()
    speed = speed_of(model, rows)
    stream = model.stream(
        rows, speed=speed, tokens_per_run=tokens_per_run, max_tokens_in_flight=100000, look_ahead=look_ahead
    )
    result = list(stream)
    assert answers_of(result) == one_by_one(model, rows, speed=speed)
    assert [row.line for row in result] == list(range(1, len(rows) + 1))
    assert len({row.exit_layer for row in result}) > 1
    assert stream.statistics.rows_read == stream.statistics.rows_answered == len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_same_answers_as_padded_batches_on_the_device(dtype: torch.dtype) -> None:
    """Where there is a GPU, by the kernels that a stream runs there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, rows = early_exit_model(num_labels=4), encoded_rows(80)
    speed = speed_of(model, rows)
    nn.Module.to(model, device=device, dtype=dtype)
    expected = []
    for row in rows:
        batch = {name: torch.tensor([values], device=device) for name, values in row.items()}
        output = model(**batch, speed=speed, engine="batch")
        expected.append((model.config.id2label[int(output.logits.argmax())], int(output.exit_layer)))
    given = answers_of(list(model.stream(rows, speed=speed, tokens_per_run=100)))
    same = sum(answer == other for answer, other in zip(given, expected, strict=True))
    # rounding to 8 bits moves a few rows across the speed, or to another class
    assert same >= (80 if dtype == torch.float32 else 72)
    assert len({layer for _, layer in given}) > 2


@pytest.mark.parametrize("options", [{"criterion": "patience"}, {"criterion": "top_n", "top_n": 2}, {"speed": 0.0}])
def test_every_criterion_and_the_full_model(options: dict[str, Any]) -> None:
    model, rows = early_exit_model(num_labels=4), encoded_rows()
    options = {"speed": 0.5, **options}
    assert answers_of(list(model.stream(rows, tokens_per_run=50, **options))) == one_by_one(model, rows, **options)


def test_scores_and_uncertainties() -> None:
    model, rows = early_exit_model(), encoded_rows(5)
    for row, source in zip(model.stream(rows, speed=0.0), rows, strict=True):
        output = model(**{name: torch.tensor([values]) for name, values in source.items()}, speed=0.0)
        assert row.score == pytest.approx(output.logits.softmax(-1).max().item(), abs=1e-5)
        assert row.uncertainty == pytest.approx(output.uncertainty.item(), abs=1e-5)


def test_regression() -> None:
    model, rows = early_exit_model(num_labels=1), encoded_rows(5)
    for row, source in zip(model.stream(rows), rows, strict=True):
        expected = model(**{name: torch.tensor([values]) for name, values in source.items()}).logits.item()
        assert row.label == pytest.approx(expected, abs=1e-5)
        assert (row.score, row.exit_layer, row.uncertainty) == (None, 4, None)
    with pytest.raises(ValueError, match="regression"):
        model.stream(rows, speed=0.5, criterion="entropy")


def test_exit_layers_at_run_time() -> None:
    model, rows = early_exit_model(), encoded_rows()
    result = list(model.stream(rows, speed=0.9, exit_layers=[2]))
    assert {row.exit_layer for row in result} <= {2, 4}
    assert any(row.exit_layer == 2 for row in result)
    with pytest.raises(ValueError, match=r"exit_layers: got 9, but this model has heads after \[1, 2, 3, 4\]"):
        model.stream(rows, exit_layers=[9])


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0])
def test_a_row_alone_is_answered_as_a_call_is(speed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = early_exit_model(num_labels=3), encoded_rows(4)
    monkeypatch.setattr(Stream, "_run", None)
    for row in rows:
        expected = model(**{name: torch.tensor([values]) for name, values in row.items()}, speed=speed)
        stream = model.stream([row], speed=speed)
        (answer,) = stream
        assert answer.label == model.config.id2label[int(expected.logits.argmax())]
        assert answer.exit_layer == int(expected.exit_layer)
        assert answer.uncertainty == pytest.approx(float(expected.uncertainty), abs=1e-5)
        assert stream.statistics.rows_answered == 1
        assert sum(stream.statistics.runs) == (1 if speed == 0 else answer.exit_layer)
        assert len(stream._slots._free) == stream._slots.record.exit_layer.shape[0]


def test_a_row_alone_whose_head_changed_is_answered_by_the_new_one() -> None:
    model, (row,) = early_exit_model(num_labels=3), encoded_rows(1)
    stream = model.stream([row])
    with torch.no_grad():
        model.last_head.out_proj.bias.add_(50 * torch.eye(3)[1])
    assert [answer.label for answer in stream] == ["LABEL_1"]


def test_memory_is_bounded_and_input_is_read_as_needed() -> None:
    model, source = early_exit_model(), encoded_rows(200)
    read = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal read
        for row in source:
            read += 1
            yield row

    stream = model.stream(rows(), speed=0.3, tokens_per_run=40, max_tokens_in_flight=80, look_ahead=4)
    next(stream)
    assert read < 60
    assert len(list(stream)) == 199
    # one window of 4 rows of at most 11 tokens may be on top
    assert stream.statistics.max_tokens_in_flight < 80 + 44


def test_later_layers_run_on_full_batches() -> None:
    model, rows = early_exit_model(), encoded_rows(400)
    stream = model.stream(rows, speed=speed_of(model, rows[:60]), tokens_per_run=200)
    list(stream)
    runs, tokens = stream.statistics.runs, stream.statistics.tokens
    # a run ends before the first row, of at most 11 tokens, that would not fit
    for ran, count in zip(runs[1:], tokens[1:], strict=True):
        assert ran <= count / (200 - 10) + 1


def test_runs_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a primitive and a kernel for every number of rows: with runs of any size memory grows for hours."""
    model, rows = early_exit_model(), encoded_rows(2000)
    stream = model.stream(rows, speed=speed_of(model, rows[:60]), tokens_per_run=256, look_ahead=64)
    sizes: dict[tuple[int, ...], list[int]] = {}
    run_layers = type(stream._encoder).run_layers

    def recorded(self: Any, layers: Any, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        sizes.setdefault(tuple(layers), []).append(hidden_states.shape[0])
        return run_layers(self, layers, hidden_states, *rest, **named)

    monkeypatch.setattr(type(stream._encoder), "run_layers", recorded)
    while not stream._reader.ended:
        next(stream)
    assert len(sizes) == 4
    for of_layers in sizes.values():
        assert len(of_layers) > 3
        assert set(of_layers) == {256}


def test_a_queue_gives_back_what_was_put_in_with_the_rows_that_are_added() -> None:
    draw, queue, waiting = random.Random(1), _Queue(), torch.zeros(0, 3)
    row = EncodedRow(0, 1, 1, [1], None, 0.0)
    for number in range(2000):
        if queue.tokens > 150 or (queue.tokens and draw.random() < 0.5):
            taken = draw.randint(1, queue.tokens)
            given = queue.hidden_states(taken)
            assert given.shape[0] == round_up_tokens(taken)
            assert torch.equal(given[:taken], waiting[:taken])
            assert given.isfinite().all()
            queue.drop(taken, taken)
            waiting = waiting[taken:]
            continue
        tokens = draw.randint(1, 150)
        arriving = torch.full((tokens, 3), float(number))
        queue.room_for(tokens, arriving).copy_(arriving)
        queue.push([row] * tokens, [0] * tokens, tokens)
        waiting = torch.cat([waiting, arriving])
    assert queue._memory is not None
    assert queue._memory.shape[0] < 2000


@pytest.mark.parametrize("kind", ["pairs", "dataset", "iterable dataset"])
def test_pairs_of_texts(kind: str) -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    texts, second = sentences(12), sentences(24)[12:]
    rows: Any = list(zip(texts, second, strict=True))
    expected = [one_by_one(model, [dict(tokenizer(*pair))], speed=0.5)[0] for pair in rows]
    if kind != "pairs":
        datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
        rows = datasets.Dataset.from_dict({"sentence1": texts, "sentence2": second, "label": [0] * 12})
        rows = rows.to_iterable_dataset() if kind == "iterable dataset" else rows
    assert answers_of(list(model.stream(rows, tokenizer, speed=0.5))) == expected


def test_texts() -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    texts = sentences(12)
    single = [one_by_one(model, [dict(tokenizer(text))], speed=0.5)[0] for text in texts]
    for rows in (texts, [{"text": text} for text in texts], (text for text in texts)):
        assert answers_of(list(model.stream(rows, tokenizer, speed=0.5))) == single


def test_a_poisoned_row_is_reported_with_its_line_and_the_rest_goes_on() -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    good = sentences(3)
    rows: list[Any] = [
        good[0], "  ", {"text": None}, {"no": "text"}, 5, "caf\udce9", good[1],
        SimpleNamespace(line=70, problem="byte 0xff is not UTF-8", text_a=""), {"input_ids": []}, good[2],
    ]  # fmt: skip
    result = list(model.stream(rows, tokenizer, speed=0.5))
    assert [row.line for row in result] == [1, 2, 3, 4, 5, 6, 7, 70, 9, 10]
    assert [row.label is not None for row in result] == [True] + [False] * 5 + [True, False, False, True]
    assert all((row.problem is None) == (row.label is not None) for row in result)
    assert result[7].problem == "byte 0xff is not UTF-8"
    assert "no text column among no" in result[3].problem
    assert "0 tokens, expected 1 to" in result[8].problem


def test_texts_that_are_too_long_are_cut_or_reported() -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    rows = ["good " * 200, "good film"]
    assert all(row.problem is None for row in model.stream(rows, tokenizer, speed=0.5))
    reported = list(model.stream(rows, tokenizer, speed=0.5, truncate=False))
    assert reported[0].problem == "202 tokens, expected 1 to 66"
    assert reported[1].label is not None
    with pytest.raises(ValueError, match="max_length: got 67, expected 1 to 66"):
        model.stream(rows, tokenizer, max_length=67)


def test_a_tokenizer_that_fails_for_one_text() -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")

    def picky(texts: list[str], *arguments: Any, **options: Any) -> Any:
        if any("dull" in text for text in texts):
            raise RuntimeError("cannot tokenise 'dull'")
        return tokenizer(texts, *arguments, **options)

    picky.model_max_length = 60  # type: ignore[attr-defined]
    result = list(model.stream(["good film", "dull film", "great"], picky, speed=0.5))  # type: ignore[arg-type]
    assert [row.problem for row in result] == [None, "cannot tokenise 'dull'", None]


def test_an_error_of_the_input_comes_after_all_that_was_read() -> None:
    model, rows = early_exit_model(), encoded_rows(30)

    def failing() -> Iterator[dict[str, Any]]:
        yield from rows
        raise OSError("the disk is gone")

    answered: list[StreamRow] = []
    with pytest.raises(OSError, match="the disk is gone"):
        answered.extend(model.stream(failing(), speed=0.5, tokens_per_run=50))
    assert answers_of(answered) == one_by_one(model, rows, speed=0.5)


class Interrupts:
    """Ctrl-C at the chosen places, counted from 0, among all where Python runs a signal handler inside of a stream.

    Those are the beginning of a Python function, the end of a C function, and each line, for loops. The lines that give
    an answer away make no call, so no handler runs between them.
    """

    FILES = ("stream.py", "stream_reader.py", "schedule.py")
    GIVING = ("__next__", "finished")

    def __init__(self, *at: int) -> None:
        self.at = set(at)
        self.places: list[tuple[str, int, str]] = []

    def once_each(self) -> list[int]:
        """A time when each place was passed, the first and the last in turn."""
        first = {place: number for number, place in reversed(list(enumerate(self.places)))}
        last = {place: number for number, place in enumerate(self.places)}
        return [(first, last)[turn % 2][place] for turn, place in enumerate(first)]

    def _place(self, frame: FrameType, event: str) -> None:
        self.places.append((frame.f_code.co_qualname, frame.f_lineno, event))
        if len(self.places) - 1 in self.at:
            raise KeyboardInterrupt

    def _in_stream(self, frame: FrameType) -> bool:
        return frame.f_code.co_filename.endswith(tuple(f"engines/{name}" for name in self.FILES))

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if not self._in_stream(frame):
            return
        if event == "call" or (event == "c_return" and frame.f_code.co_name not in self.GIVING):
            self._place(frame, event)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not self._in_stream(frame) or frame.f_code.co_name in self.GIVING:
            return None
        if event == "line":
            self._place(frame, event)
        return self._trace

    def __call__(self, work: Callable[[], StreamRow | None]) -> StreamRow | None:
        if self.at and len(self.places) > max(self.at):
            return work()
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            return work()
        finally:
            sys.settrace(None)
            sys.setprofile(None)


def answered_through(stream: Any, interrupts: Interrupts) -> list[StreamRow]:
    """The answers of a stream that is iterated on after every interrupt."""
    answered: list[StreamRow] = []
    while True:
        try:
            row = interrupts(partial(next, stream, None))
        except KeyboardInterrupt:
            continue
        if row is None:
            return answered
        answered.append(row)


def small_stream(model: fastkd.EarlyExitForSequenceClassification, rows: Any, **options: Any) -> Any:
    return model.stream(rows, tokenizer_of("bert"), speed=0.05, tokens_per_run=16, look_ahead=3, **options)


@pytest.fixture(scope="module")
def mixed_input() -> list[Any]:
    return [*sentences(4), "", ("the film", "was fun"), *sentences(2)]


@pytest.mark.slow
@torch.enable_grad()  # a burst of interrupts may end before the stream has given gradients back
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_every_place_loses_and_repeats_no_row(mixed_input: list[Any]) -> None:
    model = early_exit_model()
    counting = Interrupts()
    expected = answered_through(small_stream(model, mixed_input), counting)
    assert [row.line for row in expected] == list(range(1, len(mixed_input) + 1))
    places = counting.once_each()
    assert len(places) > 150
    for number, at in enumerate(places):
        burst = 12 if number % 6 == 0 else 1
        given = answered_through(small_stream(model, mixed_input), Interrupts(*range(at, at + burst)))
        assert [row[:2] for row in given] == [row[:2] for row in expected], (at, burst)
        assert [row.exit_layer for row in given] == [row.exit_layer for row in expected], (at, burst)
        assert burst > 1 or torch.is_grad_enabled(), at


@pytest.mark.parametrize("where", ["tokenizer", "embed", "run_layers", "decide", "compact_packed", "answer"])
@pytest.mark.parametrize("burst", [1, 12])
def test_ctrl_c_in_every_call_to_the_outside_loses_no_row(
    where: str, burst: int, mixed_input: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, at = early_exit_model(), 0, 10**9

    def interrupted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            result = call(*arguments, **options)
            calls += 1
            if at <= calls - 1 < at + burst:
                raise KeyboardInterrupt
            return result

        return counted

    owner = {"compact_packed": fk, "tokenizer": stream_reader}.get(where, plan._PlannedHeads)
    encoder = encoder_of(model)
    if where in ("embed", "run_layers"):
        owner = encoder
    name = "encode" if where == "tokenizer" else where
    monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    expected = list(small_stream(model, mixed_input))
    total = calls
    assert total > 0
    for start in range(total):
        calls, at = 0, start
        given = answered_through(small_stream(model, mixed_input), Interrupts())
        assert [row[:2] for row in given] == [row[:2] for row in expected], start


def test_ctrl_c_inside_of_a_generator_is_told_and_inside_of_an_iterator_loses_nothing(
    mixed_input: list[Any],
) -> None:
    """Python ends a generator that raises, so what it had not given is gone: never as if the input had ended there."""
    model = early_exit_model()

    def generator() -> Iterator[Any]:
        yield from mixed_input[:5]
        raise KeyboardInterrupt

    class Reader(Iterator[Any]):
        def __init__(self) -> None:
            self.rows, self.calls = iter(mixed_input), 0

        def __next__(self) -> Any:
            self.calls += 1
            if self.calls == 6:
                raise KeyboardInterrupt
            return next(self.rows)

    stream = small_stream(model, generator())
    answered: list[StreamRow] = []
    with pytest.raises(KeyboardInterrupt):
        answered.extend(stream)
    with pytest.raises(RuntimeError, match="rows: an interrupt ended the input"):
        answered.extend(stream)
    assert [row.line for row in answered] == [1, 2, 3, 4, 5]
    given = answered_through(small_stream(model, Reader()), Interrupts())
    assert [row.line for row in given] == list(range(1, len(mixed_input) + 1))


def test_finished_after_ctrl_c_and_going_on_give_every_row_once(mixed_input: list[Any]) -> None:
    model, rows = early_exit_model(), mixed_input
    for at in range(0, 1500, 83):
        stream, interrupts = small_stream(model, rows), Interrupts(at)
        given: list[StreamRow] = []
        try:
            while (row := interrupts(partial(next, stream, None))) is not None:
                given.append(row)
        except KeyboardInterrupt:
            given += stream.finished()
        given += list(stream)
        assert sorted(row.line for row in given) == list(range(1, len(rows) + 1)), at


def test_finished_gives_what_is_ready_behind_a_row_that_waits() -> None:
    model, rows = early_exit_model(), encoded_rows()
    speed = speed_of(model, rows)
    stream = model.stream(rows, speed=speed, tokens_per_run=60, look_ahead=8)
    first = next(stream)
    ready = stream.finished()
    assert [first.line, *[row.line for row in ready]] == sorted({first.line, *[row.line for row in ready]})
    assert stream.finished() == []
    assert all(row.label is not None for row in ready)
    rest = list(stream)
    by_line = {row.line: row for row in (first, *ready, *rest)}
    assert len(by_line) == 1 + len(ready) + len(rest) == len(rows)
    assert answers_of([by_line[line] for line in sorted(by_line)]) == one_by_one(model, rows, speed=speed)


def test_a_deadline_answers_although_queues_are_not_full() -> None:
    model, source = early_exit_model(), encoded_rows(3)
    now = 0.0
    nothing_more = threading.Event()

    def rows() -> Iterator[dict[str, Any] | None]:
        nonlocal now
        yield from source
        for _ in range(50):
            now += 1.0
            yield None
        nothing_more.set()

    stream = fastkd.engines.stream.Stream(model, rows(), rule=model.exit_rule(0.0), deadline=5.0, clock=lambda: now)
    next(stream)
    assert 5.0 <= now <= 7.0
    assert not nothing_more.is_set()


def test_an_early_row_that_waits_does_not_pile_up_answers() -> None:
    """One row that never leaves, then many that leave at once: the answers behind it are bounded."""
    model, rows = early_exit_model(), encoded_rows(300)
    exits = [layer for _, layer in one_by_one(model, rows, speed=0.5)]
    rows = [rows[exits.index(4)], *[row for row, layer in zip(rows, exits, strict=True) if layer == 1]]
    rule = model.exit_rule(0.5)
    stream = fastkd.engines.stream.Stream(model, rows, rule=rule, tokens_per_run=50, look_ahead=4, max_rows_waiting=20)
    most = 0
    for _ in range(len(rows)):
        next(stream)
        most = max(most, len(stream._answers))
    assert most <= 20 + 50


def test_bad_arguments_raise_at_once() -> None:
    model, rows = early_exit_model(), encoded_rows(2)
    with pytest.raises(ValueError, match="speed: got 2"):
        model.stream(rows, speed=2)
    with pytest.raises(ValueError, match="look_ahead: got 0"):
        model.stream(rows, look_ahead=0)
    with pytest.raises(ValueError, match="max_tokens_in_flight: got 10"):
        model.stream(rows, max_tokens_in_flight=10)
    with pytest.raises(ValueError, match="never trained"):
        early_exit_model(exits_trained=False).stream(rows, speed=0.5)
    with pytest.raises(ValueError, match="training mode"):
        early_exit_model().train().stream(rows)
    with pytest.raises(ValueError, match="tokenizer: got None"):
        list(model.stream(["a text"]))


def test_an_empty_input() -> None:
    assert list(early_exit_model().stream([], speed=0.5)) == []
