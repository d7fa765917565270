"""The rankings of a server: one query after the other, in steps short enough that others can have theirs in between.

The documents of a query are judged by each other, so queries share no runs; each is several documents, whose runs are
full by themselves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastkd.engines.protocol import ExitModel
from fastkd.engines.rank import RankRun, ScoredRows
from fastkd.engines.request_stream import StreamStep
from fastkd.engines.stream_reader import EncodedRow
from fastkd.exits.ranking import RankRule
from fastkd.exits.scores import Score


@dataclass(eq=False)
class RankRequest:
    """A query with its documents that somebody waits for."""

    rows: Sequence[EncodedRow]
    """Query and document together; `position` counts from 0."""
    rule: RankRule
    score: Score
    is_cancelled: bool = False
    """Set from any thread; what is not yet running of it never runs."""
    started: float | None = None
    """When its first step began."""
    caller: Any = None
    """Whatever tells its maker who waits for it."""

    @property
    def count(self) -> int:
        """Of its documents."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)


class RankAnswer(NamedTuple):
    """What became of a request."""

    request: RankRequest
    found: ScoredRows | None
    """None where it was cancelled."""
    error: BaseException | None = None
    """What the model raised."""


class RankRequests:
    """Ranks in the order of arrival; `add` may be called from any thread, `step` from one."""

    def __init__(
        self, model: ExitModel, *, tokens_per_run: int = 1024, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nothing waits yet.

        Args:
            model: in evaluation mode.
            tokens_per_run: a step computes so many tokens in one layer, or fewer in several; one layer at least.
            clock: seconds.
        """
        self._model, self._tokens_per_run, self._clock = model, tokens_per_run, clock
        self._waiting: deque[RankRequest] = deque()
        self._run: RankRun | None = None  # of the first that waits

    def add(self, request: RankRequest) -> None:
        self._waiting.append(request)

    @property
    def is_idle(self) -> bool:
        """Whether no request is on its way."""
        return not self._waiting

    def waiting(self) -> list[RankRequest]:
        """Every request on its way."""
        return list(self._waiting)

    def step(self) -> tuple[StreamStep, RankAnswer | None]:
        """Compute some layers of the first request, or give it up where it was cancelled."""
        request = self._waiting[0]
        if request.is_cancelled:
            return StreamStep(), self._end(RankAnswer(request, None))
        before = self._clock()
        request.started = before if request.started is None else request.started
        try:
            if self._run is None:
                self._run = RankRun(self._model, request.rows, request.rule, request.score, self._tokens_per_run)
            run, rows, done = self._run, len(self._run.left), self._run.layer
            tokens = sum(row.tokens for row in run.left)
            run.step(max(1, self._tokens_per_run // tokens))
        except Exception as error:
            return StreamStep(), self._end(RankAnswer(request, None, error))
        step = StreamStep([], run.layer, run.layer - done, rows, tokens, self._clock() - before)
        return step, self._end(RankAnswer(request, run.found)) if run.is_done else None

    def _end(self, answer: RankAnswer) -> RankAnswer:
        self._waiting.popleft()
        self._run = None
        return answer
