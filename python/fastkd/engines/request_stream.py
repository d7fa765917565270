"""Engine for a server: rows of many requests share runs at every depth, each with a rule and a deadline of its own.

It is the stream engine without an order of answers: rows come when they come, and an answer is given in the step in
which its row leaves. Each step reads what has arrived and then runs one queue:

    1. where a row can only just be answered in time, the queue of the one that is due first
    2. else the queue with the largest tokens x age^2, where tokens are those of its next run, and age is that of its
       oldest row: large runs cost less a token, and nothing waits for ever. Of equals the deepest

Without the age a few rows that are left over deep down would wait until they are many; the deepest or the oldest first
would make more runs of few tokens.

Nothing waits for company while the processor is idle. Rows that have it for themselves run on through the layers after
which none of them may leave, up to a full run's work: queues between would only cost time. One row alone is answered
by the plan of the model, as a call answers it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd.encoders.layout import TokenLayout
from fastkd.engines.batch import warn_about_nan
from fastkd.engines.packed import PackedHeads
from fastkd.engines.packed_encoder import cumulative_lengths
from fastkd.engines.protocol import ExitModel
from fastkd.engines.stream import Stream, StreamRow, _prefix, _Queue
from fastkd.engines.stream_reader import EncodedRow
from fastkd.exits.rule import ExitRule

_MOST_RULES = 1024  # kept, of all that clients may think of
_REMEMBERS = ("patience", "agreement")  # criteria that keep a memory of each row in the record


@dataclass(eq=False)
class StreamRequest:
    """A row that somebody waits for."""

    input_ids: Sequence[int]
    token_type_ids: Sequence[int] | None
    rule: ExitRule
    due: float = math.inf
    """By the stream's clock."""
    expires: bool = False
    """Whether nobody wants the answer after `due`, unless the row has begun by then."""
    is_cancelled: bool = False
    """Set from any thread; what is not yet running of it never runs."""
    started: float | None = None
    """When its first run began."""
    caller: Any = None
    """Whatever tells its maker who waits for it."""

    @property
    def count(self) -> int:
        """Of its rows."""
        return 1

    @property
    def tokens(self) -> int:
        return len(self.input_ids)


class RequestAnswer(NamedTuple):
    """What became of a request."""

    request: StreamRequest
    row: StreamRow | None
    """None where it was cancelled, or expired."""
    logits: list[float] | None = None
    error: BaseException | None = None
    """What the model raised in the run that the row was in."""


@dataclass
class StreamStep:
    """One step of the stream."""

    answers: list[RequestAnswer] = field(default_factory=list)
    layer: int | None = None
    """The last layer that ran; None where nothing did."""
    runs: int = 1
    """Over how many queues' layers it went."""
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0


class _Inbox(Iterator[Any]):
    """Requests on their way into the stream; None where there is none right now."""

    def __init__(self) -> None:
        self.arrived: deque[StreamRequest] = deque()
        self.read: dict[int, StreamRequest] = {}
        self._count = 0

    def __next__(self) -> Any:
        try:
            request = self.arrived.popleft()
        except IndexError:
            return None
        self.read[self._count] = request
        self._count += 1
        return {"input_ids": request.input_ids, "token_type_ids": request.token_type_ids}


class RequestStream(Stream):
    """Answers requests; `add` and `cancel` may be called from any thread, `step` from one."""

    def __init__(
        self,
        model: ExitModel,
        *,
        rule: ExitRule,
        tokens_per_run: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A stream for requests of any rule whose heads `rule` asks.

        Args:
            model: in evaluation mode.
            rule: names every layer after which a row of any request may leave.
            tokens_per_run: a queue with as many tokens is full.
            clock: seconds.

        Raises:
            ValueError: a model in training mode, or a run without tokens.
        """
        self._inbox = _Inbox()
        super().__init__(
            model, self._inbox, rule=rule, tokens_per_run=tokens_per_run,
            max_tokens_in_flight=max(65536, tokens_per_run), clock=clock,
        )  # fmt: skip
        self._done: list[RequestAnswer] = []
        self._some_cancelled = False
        self._pace = 0.0  # seconds of a run, lately
        self._thresholds: dict[ExitRule, tuple[float, ...]] = {}
        self._rules: dict[tuple[str, int | None], ExitRule] = {}

    def add(self, requests: Sequence[StreamRequest]) -> None:
        """Queue requests.

        Raises:
            ValueError: a rule that asks a head which the stream's rule does not ask.
        """
        for request in requests:
            asked = request.rule.layers
            if not set(asked) <= set(self._rule.layers):
                raise ValueError(
                    f"rule: asks the heads after {list(asked)}, expected some of {list(self._rule.layers)}"
                )
        self._inbox.arrived.extend(requests)

    def cancel(self, requests: Sequence[StreamRequest]) -> None:
        """Forget requests; a run that is on its way ends first. The step that forgets them gives them without a row."""
        for request in requests:
            request.is_cancelled = True
        self._some_cancelled = True

    @property
    def is_idle(self) -> bool:
        """Whether no request is on its way."""
        return not self._inbox.arrived and not self._inbox.read

    def waiting(self) -> list[StreamRequest]:
        """Every request on its way."""
        return [*self._inbox.read.values(), *self._inbox.arrived]

    def step(self) -> StreamStep:
        """Read what has arrived, and run one queue; what was answered or given up by that."""
        self._mend()
        while self._inbox.arrived:
            self._read()
        self._give_up()
        stage = self._next_stage()
        step = StreamStep() if stage is None else self._run_one(stage)
        step.answers, self._done = self._done, []
        # those of the base class, which nobody will ask for
        self._answers.clear()
        return step

    def _next_stage(self) -> int | None:
        overdue = self._overdue()
        if overdue is not None:
            return overdue
        now, most = self._clock(), self._schedule.tokens_per_run
        weights = [
            (min(queue.tokens, most) * (now - min(row.since for row in queue.rows)) ** 2, stage)
            for stage, queue in enumerate(self._queues)
            if queue.rows
        ]
        return max(weights)[1] if weights else None

    def _overdue(self) -> int | None:
        """The queue of the row that is due first, where it can only just be answered in time."""
        stages = len(self._queues)
        waiting = ((self._of(row).due, stage) for stage, queue in enumerate(self._queues) for row in queue.rows)
        due, stage = min(waiting, default=(math.inf, 0))
        return stage if self._clock() + self._pace * (stages - stage) >= due else None

    def _of(self, row: EncodedRow) -> StreamRequest:
        return self._inbox.read[row.position]

    def _run_one(self, stage: int) -> StreamStep:
        before = self._clock()
        queue = self._queues[stage]
        if stage == 0:
            self._sort_by_deadline(queue)
        running = queue.rows[: _prefix(queue.rows, self._schedule.tokens_per_run)]
        for row in running if stage == 0 else ():
            request = self._of(row)
            request.started = before if request.started is None else request.started
        self._is_whole = False
        try:
            last = self._run_alone(stage, running)
            if last is None:
                last = self._last_stage(stage, running)
                self._run(stage, last)
        except Exception as error:
            last = stage
            # what else waits is made whole by the next step
            for row in running:
                if self._unanswered.pop(row.position, None) is not None:
                    self._give(row, None, error=error)
        else:
            self._is_whole = True
        seconds, runs = self._clock() - before, last - stage + 1
        self._pace = 0.8 * self._pace + 0.2 * seconds / runs
        tokens = sum(row.tokens for row in running)
        return StreamStep([], self._stages[last][-1], runs, len(running), tokens, seconds)

    def _run_alone(self, stage: int, running: Sequence[EncodedRow]) -> int | None:
        """Answer the one row that waits as a call of the model does, which costs less; the stage after which it left.

        None where others wait, or the plan of the model does not answer by this rule.
        """
        if stage > 0 or len(self._unanswered) > 1 or self._inbox.arrived:
            return None
        (row,) = running[:1]
        found = self._planned_answer(row, self._of(row).rule)
        if found is None:
            return None
        answer = self._stream_rows([row], **found)[row.position]
        last = self._count_alone(row, found["layers"][0])
        del self._unanswered[row.position]
        self._give(row, answer, logits=found["logits"][0].tolist())
        return last

    def _last_stage(self, stage: int, running: Sequence[EncodedRow]) -> int:
        """Up to which stage these rows run without a stop: where nobody else waits, the next that asks one of them."""
        if len(running) < len(self._unanswered) or self._inbox.arrived:
            return stage
        most = self._schedule.tokens_per_run // sum(row.tokens for row in running)
        end = min(len(self._stages), stage + max(1, most)) - 1
        rules = {self._of(row).rule for row in running}
        asking = (s for s in range(stage, end) if any(self._thresholds_by_stage(rule)[s] > 0 for rule in rules))
        return next(asking, end)

    def _sort_by_deadline(self, queue: _Queue) -> None:
        """No hidden states lie before the first layer, so that any order will do."""
        order = sorted(range(len(queue.rows)), key=lambda index: self._of(queue.rows[index]).due)
        queue.rows, queue.slots = [queue.rows[i] for i in order], [queue.slots[i] for i in order]

    def _give(self, row: EncodedRow, answer: StreamRow | None, **more: Any) -> None:
        self._done.append(RequestAnswer(self._inbox.read.pop(row.position), answer, **more))

    def _give_up(self) -> None:
        """Forget what was cancelled, and what was to have begun by now."""
        now = self._clock()
        late = {
            row.position
            for row in self._queues[0].rows
            if (request := self._of(row)).expires and request.due <= now and request.started is None
        }
        if not late and not self._some_cancelled:
            return
        self._some_cancelled = False
        for stage, queue in enumerate(self._queues):
            gone = [i for i, row in enumerate(queue.rows) if row.position in late or self._of(row).is_cancelled]
            if gone:
                self._queues[stage] = self._without(queue, set(gone), has_states=stage > 0)

    def _without(self, queue: _Queue, gone: set[int], *, has_states: bool) -> _Queue:
        """What waits in a queue, but for the rows with these indices."""
        kept = [index for index in range(len(queue.rows)) if index not in gone]
        rest, tokens = _Queue(), sum(queue.rows[index].tokens for index in kept)
        if kept and has_states:
            states = queue.hidden_states(queue.tokens)[: queue.tokens]
            bounds = cumulative_lengths([row.tokens for row in queue.rows], self._device)
            survivors = torch.tensor(kept, dtype=torch.int32, device=self._device)
            fk.compact_packed([states], bounds, survivors, out=[rest.room_for(tokens, states)])
        rest.push([queue.rows[index] for index in kept], [queue.slots[index] for index in kept], tokens)
        self._slots.give_back(queue.slots[index] for index in sorted(gone))
        for index in sorted(gone):
            del self._unanswered[queue.rows[index].position]
            self._give(queue.rows[index], None)
        return rest

    # What the base class asks in a run

    def _decide(
        self,
        stage: int,
        hidden_states: Tensor,
        layout: TokenLayout,
        rows: Sequence[EncodedRow],
        slots: Sequence[int],
    ) -> Tensor:
        """Survivors of a run whose rows have rules of their own; each criterion in use is asked once."""
        requests = [self._of(row) for row in rows]
        row_ids = torch.tensor(slots, dtype=torch.int32, device=self._device)
        if stage == len(self._stages) - 1:
            self._answer(requests, hidden_states, layout, row_ids)
            return row_ids[:0]
        staying = list(range(len(rows)))
        heads = self._heads_after(self._stages[stage][-1])
        for rule, thresholds in self._questions(stage, requests):
            kept = self._ask(heads, stage, rule, thresholds, hidden_states, layout, row_ids)
            staying = kept if len(staying) == len(rows) else sorted({*staying} & {*kept})
        return torch.tensor(staying, dtype=torch.int32, device=self._device)

    def _questions(self, stage: int, requests: Sequence[StreamRequest]) -> Iterator[tuple[ExitRule, list[float]]]:
        """Each criterion by which a row may leave here, with the thresholds of all rows: 0 for those of others."""
        by_criterion: dict[ExitRule, list[float]] = {}
        for index, request in enumerate(requests):
            threshold = self._thresholds_by_stage(request.rule)[stage]
            if threshold > 0:
                rule = self._rule_of(request.rule)
                by_criterion.setdefault(rule, [0.0] * len(requests))[index] = threshold
        yield from by_criterion.items()

    def _ask(
        self,
        heads: PackedHeads,
        stage: int,
        rule: ExitRule,
        thresholds: list[float],
        hidden_states: Tensor,
        layout: TokenLayout,
        row_ids: Tensor,
    ) -> list[int]:
        """The rows that stay, as numbers in the run."""
        record = self._slots.record
        not_asked = [i for i, value in enumerate(thresholds) if value == 0] if rule.criterion in _REMEMBERS else []
        ids = row_ids[not_asked].long()
        before = record.history[ids] if not_asked else None
        decided = heads.decide(
            self._stages[stage][-1], hidden_states, layout, rule, record=record, row_ids=row_ids,
            thresholds=torch.tensor(thresholds, device=self._device),
        )  # fmt: skip
        if before is not None:
            record.history[ids] = before
        kept: list[int] = decided.kept().tolist()
        return kept

    def _answer(
        self, requests: Sequence[StreamRequest], hidden_states: Tensor, layout: TokenLayout, row_ids: Tensor
    ) -> None:
        """The last head answers all rows; each has the uncertainty of its own criterion."""
        record, heads = self._slots.record, self._heads_after(self._stages[-1][-1])
        rules = [self._rule_of(request.rule) for request in requests]
        if len(set(rules)) == 1:
            warn_about_nan([heads.answer(hidden_states, layout, rules[0], record=record, row_ids=row_ids).sum()])
            return
        uncertainty = torch.empty(len(rules), device=self._device)
        for rule in dict.fromkeys(rules):
            of_rule = torch.tensor([other == rule for other in rules], device=self._device)
            found = heads.answer(hidden_states, layout, rule, record=record, row_ids=row_ids)
            uncertainty = torch.where(of_rule, found.float(), uncertainty)
        record.uncertainty[row_ids.long()] = uncertainty
        warn_about_nan([uncertainty.sum()])

    def _rule_of(self, rule: ExitRule) -> ExitRule:
        """The stream's rule with the criterion of a request."""
        key = rule.criterion, rule.top_n
        if key not in self._rules:
            self._rules[key] = replace(self._rule, criterion=rule.criterion, top_n=rule.top_n)
        return self._rules[key]

    def _thresholds_by_stage(self, rule: ExitRule) -> tuple[float, ...]:
        if rule not in self._thresholds:
            if len(self._thresholds) >= _MOST_RULES:
                self._thresholds.clear()
            self._thresholds[rule] = tuple(rule.threshold(layer) for layer in self._rule.layers)
        return self._thresholds[rule]

    def _answered(self, rows: Sequence[EncodedRow], slots: Sequence[int]) -> dict[int, StreamRow]:
        if not rows:
            return {}
        answers = super()._answered(rows, slots)
        logits = self._slots.record.logits[slots].float().tolist()
        for row, of_row in zip(rows, logits, strict=True):
            self._give(row, answers[row.position], logits=of_row)
        return answers
