"""The engine of a server: the answers of one-by-one forward passes, whatever arrives, goes away or fails meanwhile."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_stream import encoded_rows, one_by_one, speed_of
from tiny_models import early_exit_model, one_thread

import fastkd
from fastkd.engines.request_stream import RequestAnswer, RequestStream, StreamRequest

__all__ = ["one_thread"]

Model = fastkd.EarlyExitForSequenceClassification
STAYS = 1e-6
"""A speed at which every head is asked and no row leaves."""


def request_of(model: Model, row: dict[str, Any], **options: Any) -> StreamRequest:
    more = {name: options.pop(name) for name in ("due", "expires", "caller") if name in options}
    return StreamRequest(row["input_ids"], row.get("token_type_ids"), model.exit_rule(**options), **more)


def stream_of(model: Model, **options: Any) -> RequestStream:
    speed = 1.0 if model.config.exits_trained else 0.0
    return RequestStream(model, rule=model.exit_rule(speed), **options)


def run(stream: RequestStream, requests: list[StreamRequest], *, at_most: int = 8) -> list[RequestAnswer]:
    """All answers, where up to so many requests arrive between two steps."""
    coming, answers, draw = list(requests), [], random.Random(1)
    while coming or not stream.is_idle:
        count = draw.randint(1, at_most)
        stream.add(coming[:count])
        coming = coming[count:]
        answers += stream.step().answers
    return answers


def of(answers: list[RequestAnswer]) -> dict[Any, Any]:
    return {answer.request.caller: answer.row and (answer.row.label, answer.row.exit_layer) for answer in answers}


@pytest.mark.parametrize("tokens_per_run", [1, 64, 4096])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_each_row_has_a_rule_of_its_own(family: str, tokens_per_run: int) -> None:
    model, rows = early_exit_model(family, num_labels=3), encoded_rows()
    if family == "roberta":
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    rules = [
        {"speed": speed_of(model, rows)},
        {"speed": 0.0},
        {"speed": 0.5, "criterion": "patience"},
        {"speed": 0.4, "criterion": "margin"},
        {"speed": 0.6, "criterion": "top_n", "top_n": 2},
    ]
    options = [rules[number % len(rules)] for number in range(len(rows))]
    expected = [one_by_one(model, [row], **how)[0] for row, how in zip(rows, options, strict=True)]
    stream = stream_of(model, tokens_per_run=tokens_per_run)
    answers = run(
        stream,
        [request_of(model, row, **how, caller=i) for i, (row, how) in enumerate(zip(rows, options, strict=True))],
    )
    assert [of(answers)[number] for number in range(len(rows))] == expected
    assert len({layer for _, layer in expected}) > 1
    # nothing is kept of what was answered
    assert not stream._unanswered
    assert not stream._answers
    assert not stream._inbox.read


def test_an_answer_has_the_logits_and_uncertainty_of_its_own_criterion() -> None:
    model, rows = early_exit_model(num_labels=3), encoded_rows(9)
    ways = [{"speed": 0.0, "criterion": name} for name in ("entropy", "margin", "max_prob")]
    answers = run(stream_of(model), [request_of(model, row, **ways[i % 3], caller=i) for i, row in enumerate(rows)])
    for answer in answers:
        number = answer.request.caller
        batch = {name: torch.tensor([values]) for name, values in rows[number].items()}
        expected = model(**batch, **ways[number % 3])
        assert answer.row is not None
        assert answer.row.uncertainty == pytest.approx(float(expected.uncertainty), abs=1e-5)
        assert answer.logits == pytest.approx(expected.logits[0].tolist(), abs=1e-5)


def test_a_regression_is_answered_by_agreement() -> None:
    model, rows = early_exit_model(num_labels=1), encoded_rows(20)
    answers = run(stream_of(model), [request_of(model, row, speed=0.3, caller=i) for i, row in enumerate(rows)])
    for answer in answers:
        batch = {name: torch.tensor([values]) for name, values in rows[answer.request.caller].items()}
        expected = model(**batch, speed=0.3)
        assert answer.row is not None
        assert (answer.row.label, answer.row.exit_layer) == (
            pytest.approx(float(expected.logits), abs=1e-5), int(expected.exit_layer)
        )  # fmt: skip


def test_rows_of_two_speeds_by_patience_remember_what_they_were_asked() -> None:
    """A speed list skips a head; its rows share runs with others that are asked there."""
    model, rows = early_exit_model(num_labels=3), encoded_rows(30)
    heads = len(model.exit_layers) - 1
    ways = [{"speed": 0.5}, {"speed": [0.0] + [0.7] * (heads - 1)}]
    options = [{"criterion": "patience", **ways[number % 2]} for number in range(len(rows))]
    expected = {i: one_by_one(model, [row], **how)[0] for i, (row, how) in enumerate(zip(rows, options, strict=True))}
    requests = [request_of(model, row, **how, caller=i) for i, (row, how) in enumerate(zip(rows, options, strict=True))]
    assert of(run(stream_of(model), requests, at_most=30)) == expected


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_what_is_cancelled_costs_nothing_that_is_not_yet_running(steps: int) -> None:
    model, rows = early_exit_model(num_labels=3), encoded_rows(24)
    expected = one_by_one(model, rows, speed=STAYS)
    stream = stream_of(model, tokens_per_run=100000)
    requests = [request_of(model, row, speed=STAYS, caller=i) for i, row in enumerate(rows)]
    stream.add(requests)
    for _ in range(steps):
        assert not stream.step().answers
    stream.cancel(requests[::2])
    following = stream.step()
    assert {answer.request.caller for answer in following.answers if answer.row is None} == set(range(0, 24, 2))
    assert following.rows == 12
    answers = of(run(stream, []))
    assert answers == {number: expected[number] for number in range(1, 24, 2)}
    assert len(stream._slots._free) == stream._slots.record.exit_layer.shape[0]


def test_what_nobody_waits_for_any_more_never_begins() -> None:
    model, rows, now = early_exit_model(num_labels=3), encoded_rows(3), [0.0]
    stream = stream_of(model, clock=lambda: now[0])
    early, late, patient = (
        request_of(model, row, speed=STAYS, due=due, expires=expires, caller=name)
        for row, due, expires, name in zip(rows, (5.0, 1.0, 1.0), (True, True, False), "abc", strict=True)
    )
    stream.add([early, late, patient])
    now[0] = 2.0
    answers = {**of(stream.step().answers), **of(run(stream, []))}
    assert answers["b"] is None
    assert answers["a"] is not None
    assert answers["c"] is not None
    assert late.started is None
    assert not late.is_cancelled


def test_what_has_begun_is_answered_although_it_is_late() -> None:
    model, rows, now = early_exit_model(num_labels=3), encoded_rows(1), [0.0]
    stream = stream_of(model, clock=lambda: now[0])
    without_plan(stream).add([request_of(model, rows[0], speed=STAYS, due=1.0, expires=True, caller=0)])
    stream.step()
    now[0] = 9.0
    assert of(run(stream, []))[0] is not None


def test_a_row_that_can_only_just_be_answered_in_time_runs_first() -> None:
    model, rows, now = early_exit_model(num_labels=3), encoded_rows(12), [0.0]
    stream = stream_of(model, tokens_per_run=100000, clock=lambda: now[0])
    without_plan(stream).add([request_of(model, rows[0], speed=STAYS, due=math.inf)])
    stream.step()
    now[0] = 1.0
    stream.add([request_of(model, rows[0], speed=STAYS, due=9.0), request_of(model, rows[1], speed=STAYS)])
    assert stream.step().layer == 2
    now[0] = 9.0
    assert stream.step().layer == 1


def test_a_fuller_queue_runs_first_until_what_is_left_elsewhere_has_waited_long() -> None:
    model, rows, now = early_exit_model(num_labels=3), encoded_rows(12), [0.0]
    stream = stream_of(model, tokens_per_run=100000, clock=lambda: now[0])
    without_plan(stream).add([request_of(model, rows[0], speed=STAYS)])
    stream.step()
    now[0] = 1.0
    stream.add([request_of(model, row, speed=STAYS) for row in rows[1:]])
    stream._read()
    now[0] = 1.9
    # so that the others catch up
    assert stream._next_stage() == 0
    now[0] = 1.1
    assert stream._next_stage() == 1


def test_deadlines_order_what_waits_before_the_first_layer() -> None:
    model, rows = early_exit_model(num_labels=3), encoded_rows(6)
    stream = stream_of(model, tokens_per_run=1, clock=lambda: 0.0)
    requests = [request_of(model, row, speed=STAYS, due=9.0 - number) for number, row in enumerate(rows)]
    stream.add(requests)
    stream.step()
    assert [request.started is not None for request in requests] == [False] * 5 + [True]


def breaking(stream: RequestStream, monkeypatch: pytest.MonkeyPatch, at_call: int) -> None:
    decide: Callable[..., Any] = stream._decide
    calls = iter(range(1000))

    def broken(*arguments: Any) -> Any:
        if next(calls) == at_call:
            raise RuntimeError("out of memory")
        return decide(*arguments)

    monkeypatch.setattr(stream, "_decide", broken)


def test_a_run_that_fails_takes_its_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = early_exit_model(num_labels=3), encoded_rows(40)
    expected = one_by_one(model, rows, speed=STAYS)
    stream = stream_of(model, tokens_per_run=40)
    breaking(stream, monkeypatch, at_call=3)
    answers = run(stream, [request_of(model, row, speed=STAYS, caller=i) for i, row in enumerate(rows)])
    failed = {answer.request.caller for answer in answers if answer.error is not None}
    assert 0 < len(failed) < 40
    assert len(answers) == 40
    right = {i: answer for i, answer in enumerate(expected) if i not in failed}
    assert {i: answer for i, answer in of(answers).items() if i not in failed} == right


def test_a_rule_that_asks_other_heads_is_refused() -> None:
    model = early_exit_model(num_labels=3)
    stream = RequestStream(model, rule=model.exit_rule(0.0))
    with pytest.raises(ValueError, match="expected some of"):
        stream.add([request_of(model, encoded_rows(1)[0], speed=0.5)])


def layers_of_steps(stream: RequestStream) -> list[tuple[int | None, int]]:
    """The last layer and the stages of each step until nothing waits."""
    steps = []
    while not stream.is_idle:
        step = stream.step()
        steps.append((step.layer, step.runs))
    return steps


def without_plan(stream: RequestStream) -> RequestStream:
    """As where the model has none: with modules that the engines do not know."""
    stream._plan = None
    return stream


def test_rows_that_have_the_processor_for_themselves_stop_only_where_one_may_leave() -> None:
    model, row = early_exit_model(num_labels=3), encoded_rows(1)[0]
    last, heads = model.num_layers, len(model.exit_layers)
    stream = without_plan(stream_of(model))
    stream.add([request_of(model, row, speed=0.0)])
    assert layers_of_steps(stream) == [(last, heads)]
    stream.add([request_of(model, row, speed=STAYS)])
    assert layers_of_steps(stream) == [(layer, 1) for layer in model.exit_layers]
    # as long as others are, a run is one stage; so is one of as many tokens as a run may have
    stream.add([request_of(model, row, speed=0.0), request_of(model, row, speed=STAYS)])
    assert layers_of_steps(stream) == [(layer, 1) for layer in model.exit_layers]
    short = without_plan(stream_of(model, tokens_per_run=2 * len(row["input_ids"])))
    short.add([request_of(model, row, speed=0.0)])
    assert [runs for _, runs in layers_of_steps(short)] == [2] * (heads // 2)
    assert [*stream.statistics.runs] == [3] * heads


def test_a_run_that_nobody_leaves_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = early_exit_model(num_labels=3), encoded_rows(1)[0]
    monkeypatch.setattr("fastkd_kernels.compact_packed", None)
    stream = without_plan(stream_of(model))
    stream.add([request_of(model, row, speed=STAYS)])
    assert len(layers_of_steps(stream)) == len(model.exit_layers)


@pytest.mark.parametrize("criterion", ["entropy", "margin", "patience"])
@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0])
def test_a_row_alone_gets_the_answer_of_a_call(speed: float, criterion: str) -> None:
    model, rows = early_exit_model(num_labels=3), encoded_rows(4)
    stream = stream_of(model)
    for row in rows:
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        with torch.no_grad():
            expected = model(**batch, speed=speed, criterion=criterion)
        stream.add([request_of(model, row, speed=speed, criterion=criterion)])
        (answer,) = (answer for _ in range(9) if not stream.is_idle for answer in stream.step().answers)
        assert answer.row is not None
        assert answer.row.exit_layer == int(expected.exit_layer)
        assert answer.row.uncertainty == pytest.approx(float(expected.uncertainty), abs=1e-5)
        assert answer.logits == pytest.approx(expected.logits[0].tolist(), abs=1e-5)
        assert answer.row.score == pytest.approx(float(expected.logits.softmax(-1).max()), abs=1e-5)
    assert stream.is_idle
    assert not stream._unanswered
    assert len(stream._slots._free) == stream._slots.record.exit_layer.shape[0]


def test_a_row_alone_is_one_step_where_the_plan_answers() -> None:
    model, row = early_exit_model(num_labels=3), encoded_rows(1)[0]
    stream = stream_of(model)
    stream.add([request_of(model, row, speed=STAYS)])
    assert layers_of_steps(stream) == [(model.num_layers, len(model.exit_layers))]
    # what changed since the plan was made is noticed
    with torch.no_grad():
        model.last_head.out_proj.bias.add_(5 * torch.eye(3)[1])
    stream.add([request_of(model, row, speed=0.0)])
    answers = run(stream, [])
    assert [answer.row and answer.row.label for answer in answers] == ["LABEL_1"]
