"""The policy of the stream engine, and what it promises whatever the rows do."""

from __future__ import annotations

import itertools
import random

import pytest

from fastkd.engines.schedule import Schedule

SCHEDULE = Schedule(tokens_per_run=100, max_tokens_in_flight=250)


@pytest.mark.parametrize(
    ("tokens", "input_ended", "overdue", "expected"),
    [
        ([0, 0, 0], False, None, None),
        ([99, 0, 0], False, None, None),
        ([100, 0, 0], False, None, 0),
        ([100, 0, 120], False, None, 2),
        ([100, 101, 99], False, None, 1),
        ([90, 80, 80], False, None, 0),
        ([80, 85, 85], False, None, 2),
        ([90, 80, 79], False, None, None),
        ([0, 3, 70], True, None, 1),
        ([5, 3, 70], True, None, 0),
        ([0, 0, 0], True, None, None),
        ([100, 0, 7], False, 2, 2),
        ([100, 0, 0], False, 2, 0),
    ],
)
def test_rules(tokens: list[int], input_ended: bool, overdue: int | None, expected: int | None) -> None:
    assert SCHEDULE.next_queue(tokens, input_ended=input_ended, overdue=overdue) == expected


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="tokens_per_run: got 0"):
        Schedule(0, 10)
    with pytest.raises(ValueError, match="max_tokens_in_flight: got 9, expected at least tokens_per_run, 10"):
        Schedule(10, 9)


@pytest.mark.parametrize("stays", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("max_tokens_in_flight", [250, 450])
def test_everything_leaves_memory_is_bounded_and_runs_are_full(stays: float, max_tokens_in_flight: int) -> None:
    """A simulation: rows of 1 to 9 tokens arrive 5 at a time; each passes a stage with probability `stays`."""
    schedule = Schedule(100, max_tokens_in_flight)
    draw = random.Random(3)
    queues: list[list[int]] = [[], [], [], []]
    arriving, left, partial, most = 4000, 0, 0, 0
    while True:
        tokens = [sum(queue) for queue in queues]
        most = max(most, sum(tokens))
        number = schedule.next_queue(tokens, input_ended=arriving == 0)
        if number is None:
            if arriving == 0:
                break
            queues[0] += [draw.randint(1, 9) for _ in range(5)]
            arriving -= 5
            continue
        partial += tokens[number] < 100 and arriving > 0
        fitting = sum(total <= 100 for total in itertools.accumulate(queues[number]))
        batch, queues[number] = queues[number][: max(1, fitting)], queues[number][max(1, fitting) :]
        staying = [row for row in batch if number + 1 < len(queues) and draw.random() < stays]
        left += len(batch) - len(staying)
        if staying:
            queues[number + 1] += staying
    assert left == 4000
    assert most < max_tokens_in_flight + 5 * 9
    if max_tokens_in_flight >= 4 * 100:  # room for a queue before each stage
        assert partial == 0
