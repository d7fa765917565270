"""Passes of several contestants in turns, so that a busy machine slows all alike. Needs neither models nor rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)


def interleaved(
    contestants: Mapping[Name, Callable[[], Any]],
    repeats: int,
    on_pass: Callable[[Name], None] = lambda name: None,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[Name, list[float]], dict[Name, Any]]:
    """Seconds of `repeats` passes of each contestant, and its last answer.

    A first round warms up and is not counted. Each round starts with the next contestant, so that none always runs
    after the same neighbour.
    """
    names = list(contestants)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    answers: dict[Name, Any] = {}
    for number in range(repeats + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            synchronise()
            started = clock()
            answers[name] = contestants[name]()
            synchronise()
            elapsed = clock() - started
            if number:
                seconds[name].append(elapsed)
            on_pass(name)
    return seconds, answers
