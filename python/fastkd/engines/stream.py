"""Engine `stream`: runs that rows from all over the input share, so that processors stay busy although rows leave.

After an exit a batch is small. Here the survivors of many batches wait at their layer, packed, until enough tokens have
gathered for a run that is as efficient as the first layer's. Answers come in the order of the input, and what waits is
bounded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import fastkd_kernels as fk
from fastkd.data.columns import USUAL, Columns
from fastkd.data.text_counts import TextCounts
from fastkd.encoders.layout import TokenLayout
from fastkd.engines.batch import warn_about_nan
from fastkd.engines.packed import PackedHeads
from fastkd.engines.packed_encoder import (
    MOST_ADDED,
    cumulative_lengths,
    encoder_of,
    round_up_tokens,
)
from fastkd.engines.padded_runs import PaddedRuns
from fastkd.engines.plan import current_plan_of
from fastkd.engines.protocol import ExitModel
from fastkd.engines.schedule import Schedule
from fastkd.engines.stream_reader import EncodedRow, StreamReader, longest_row, packed_rows
from fastkd.exits.rule import ExitRule

NOT_FINITE = "the model's answer is not a finite number; try float32 or bfloat16 weights"


class StreamRow(NamedTuple):
    """One answer, or the reason why there is none.

    Attributes:
        line: number of the row in the input, from 1 (its own `line`, where the row has one).
        label: name of the class; for regression the predicted number; None where `problem` says why.
        score: probability of the label; None for regression.
        exit_layer: 1 after the first layer.
        uncertainty: at that layer; None for regression.
        problem: why the row was not answered.
    """

    line: int
    label: str | float | None = None
    score: float | None = None
    exit_layer: int | None = None
    uncertainty: float | None = None
    problem: str | None = None


@dataclass
class StreamStatistics:
    """What a stream has done so far."""

    rows_read: int = 0
    rows_answered: int = 0
    tokens_read: int = 0
    max_tokens_in_flight: int = 0
    runs: list[int] = field(default_factory=list)
    """How often each stage ran."""
    tokens: list[int] = field(default_factory=list)
    """How many tokens each stage ran on."""


class _Queue:
    """Sequences that wait before one stage, with their packed hidden states (none before the first layer)."""

    def __init__(self) -> None:
        self.rows: list[EncodedRow] = []
        self.slots: list[int] = []
        self.tokens = 0
        self._memory: Tensor | None = None
        self._start = 0  # of what waits in the memory

    def hidden_states(self, tokens: int) -> Tensor:
        """Those of the first `tokens` tokens, with the rows that `round_up_tokens` adds."""
        assert self._memory is not None
        return self._memory[self._start : self._start + round_up_tokens(tokens)]

    def room_for(self, tokens: int, like: Tensor) -> Tensor:
        """Memory behind the sequences that wait, for `tokens` more; what waits is moved where there is none."""
        needed = self.tokens + tokens
        if self._memory is None or self._memory.shape[0] < self._start + needed + MOST_ADDED:
            moved = like.new_zeros(needed * 2 + MOST_ADDED, like.shape[1])
            if self._memory is not None:
                moved[: self.tokens] = self._memory[self._start : self._start + self.tokens]
            self._memory, self._start = moved, 0
        return self._memory[self._start + self.tokens : self._start + needed]

    def adopt(self, hidden_states: Tensor) -> None:
        """Take the output of a run [R, H], all of whose rows are pushed next, as it is; only while nothing waits."""
        self._memory, self._start = hidden_states, 0

    def push(self, rows: Sequence[EncodedRow], slots: Sequence[int], tokens: int) -> None:
        self.rows.extend(rows)
        self.slots.extend(slots)
        self.tokens += tokens

    def drop(self, count: int, tokens: int) -> None:
        """Forget the first `count` rows, of `tokens` tokens."""
        del self.rows[:count], self.slots[:count]
        self.tokens -= tokens
        self._start = self._start + tokens if self.tokens else 0


class _Slots:
    """Rows of the exit record, one for each sequence in flight; the record grows with them."""

    def __init__(self, num_labels: int, device: torch.device) -> None:
        self._free: list[int] = []
        self.record = fk.ExitRecord.allocate(0, num_labels, device)

    def take(self, count: int) -> list[int]:
        if count > len(self._free):
            self._grow(count - len(self._free))
        taken = self._free[-count:]
        del self._free[-count:]
        self.record.forget(taken)
        return taken

    def give_back(self, slots: Iterable[int]) -> None:
        self._free.extend(slots)

    def give_all_back(self) -> None:
        self._free = list(reversed(range(self.record.exit_layer.shape[0])))

    def _grow(self, missing: int) -> None:
        old = self.record
        size = old.exit_layer.shape[0]
        added = max(missing, size, 256)
        new = fk.ExitRecord.allocate(size + added, old.logits.shape[1], old.logits.device)
        for name in ("logits", "uncertainty", "exit_layer", "history"):
            getattr(new, name)[:size] = getattr(old, name)
        self.record = new
        self._free.extend(reversed(range(size, size + added)))


class Stream(Iterator[StreamRow]):
    """The answers to an input of any length, in its order; made by `EarlyExitForSequenceClassification.stream`.

    An error of the input is raised after everything read before it was answered. Ctrl-C, and an error of the model,
    are raised at once and lose nothing: iterating again goes on, and `finished()` gives what was already answered.
    Where Ctrl-C comes inside the input, and so ends it (Python ends a generator that raises), iterating again answers
    what was read and then raises RuntimeError.

    What is true is in the reader, `_unanswered`, `_answers`, `_given_early` and `_next`, and each of them changes in
    one step that no interrupt can split. All else is derived: after a step that was broken off it is made anew.
    """

    def __init__(
        self,
        model: ExitModel,
        rows: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        rule: ExitRule,
        columns: Columns = USUAL,
        max_length: int | None = None,
        truncate: bool = True,
        tokens_per_run: int = 4096,
        max_tokens_in_flight: int = 65536,
        look_ahead: int = 256,
        deadline: float | None = None,
        max_rows_waiting: int = 65536,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See `EarlyExitForSequenceClassification.stream`."""
        if model.training:
            raise ValueError("model: is in training mode, where no row leaves early; call model.eval() first")
        config = model.config
        self._model = model
        self._rule = rule
        for argument, value in (("look_ahead", look_ahead), ("max_rows_waiting", max_rows_waiting)):
            if value < 1:
                raise ValueError(f"{argument}: got {value}, expected at least 1")
        self._schedule = Schedule(tokens_per_run, max_tokens_in_flight)
        self._stages = rule.stages
        self._reader = StreamReader(rows, tokenizer, longest_row(config, tokenizer, max_length), truncate, columns)
        self._look_ahead = look_ahead
        self._deadline = deadline
        self._max_rows_waiting = max_rows_waiting
        self._clock = clock
        self._queues = [_Queue() for _ in self._stages]
        self._device = model.device
        self._slots = _Slots(config.num_classes, self._device)
        self._unanswered: dict[int, EncodedRow] = {}
        self._answers: dict[int, StreamRow] = {}
        self._given_early: set[int] = set()
        self._next = 0
        self._is_whole = True
        self._plan = current_plan_of(model)
        packed = self._plan.encoder if self._plan is not None else encoder_of(model) if config.has_fast_paths else None
        self._encoder = PaddedRuns(model) if packed is None or not packed.can_run else packed
        self._names = dict(config.id2label or {})
        stages = len(self._stages)
        self.statistics = StreamStatistics(runs=[0] * stages, tokens=[0] * stages)

    def __iter__(self) -> Stream:
        return self

    def count_texts(self, counts: TextCounts) -> None:
        """Count in `counts` what the tokenizer cannot read, and what it cuts, from now on."""
        self._reader.counts = counts

    def __next__(self) -> StreamRow:
        if not self._has_next():
            self._reader.raise_error()
            raise StopIteration
        # without a call from here on, so that no interrupt comes between the answer's leaving and its arrival
        answer = self._answers[self._next]
        del self._answers[self._next]
        self._next += 1
        return answer

    def _has_next(self) -> bool:
        """Work until the next answer is ready; False where there is none any more."""
        wants_grad = torch.is_grad_enabled()
        try:
            self._mend()
            while self._next not in self._answers:
                if self._next in self._given_early:
                    # in this order: a number that stays in the set is harmless, one that is missed would be waited for
                    self._next += 1
                    self._given_early.discard(self._next - 1)
                elif not self._advance():
                    return False
        except BaseException:
            # an interrupt inside the end of no_grad would leave the caller without gradients
            torch.set_grad_enabled(wants_grad)
            raise
        return True

    def finished(self) -> list[StreamRow]:
        """The answers that are ready but were not yet given, in input order; rows before them may still wait."""
        self._mend()
        ready = [self._answers[position] for position in sorted(self._answers)]
        given_early = self._given_early.union(self._answers)
        self._given_early, self._answers = given_early, {}
        return ready

    def _is_answered(self, position: int) -> bool:
        return position < self._next or position in self._answers or position in self._given_early

    def _mend(self) -> None:
        """After a step that was broken off: rows without an answer wait before the first layer again.

        Their hidden states may be lost. What the reader has not let go of it gives once more.
        """
        if self._is_whole:
            return
        first_unread = self._reader.position
        self._answers = {position: row for position, row in self._answers.items() if position < first_unread}
        self._unanswered = {
            position: row
            for position, row in self._unanswered.items()
            if position < first_unread and not self._is_answered(position)
        }
        self._slots.give_all_back()
        self._queues = [_Queue() for _ in self._stages]
        self._enqueue(sorted(self._unanswered.values(), key=attrgetter("tokens")))
        self._is_whole = True

    def _enqueue(self, rows: Sequence[EncodedRow]) -> None:
        self._queues[0].push(rows, self._slots.take(len(rows)), sum(row.tokens for row in rows))

    def _advance(self) -> bool:
        """Run one queue or read some input; False where neither is left."""
        tokens = [queue.tokens for queue in self._queues]
        queue = self._schedule.next_queue(tokens, input_ended=self._reader.ended, overdue=self._overdue())
        if queue is None and self._reader.ended:
            return False
        self._is_whole = False
        if queue is None:
            self._read()
        elif not self._answer_alone(queue):
            self._run(queue)
        self._is_whole = True
        return True

    def _answer_alone(self, stage: int) -> bool:
        """Answer the only row that is left as a call of the model does, which costs less; False where it is not so."""
        if stage > 0 or len(self._unanswered) > 1 or not self._reader.ended:
            return False
        (row,) = self._queues[0].rows
        found = self._planned_answer(row, self._rule)
        if found is None:
            return False
        self._answers.update(self._stream_rows([row], **found))
        del self._unanswered[row.position]
        self._count_alone(row, found["layers"][0])
        return True

    def _planned_answer(self, row: EncodedRow, rule: ExitRule) -> dict[str, Any] | None:
        """`logits`, `layers` and `uncertainties` of a row before the first layer; None where no plan answers so."""
        plan = self._plan
        too_long = row.tokens * len(self._stages) > self._schedule.tokens_per_run
        if plan is None or too_long or not plan.answers_at_once(rule):
            return None
        segments = None if row.token_type_ids is None else torch.tensor([row.token_type_ids])
        with torch.no_grad():
            tokens = plan.pack(torch.tensor([row.input_ids]), None, segments)
            found = None if tokens is None else plan.answer(self._model, tokens, rule)
        if found is None:
            return None
        layers, uncertainties = found["exit_layer"].tolist(), found["uncertainty"].tolist()
        return {"logits": found["logits"].float(), "layers": layers, "uncertainties": uncertainties}

    def _count_alone(self, row: EncodedRow, layer: int) -> int:
        """Let go of a row that the plan answered; the stage after which it left."""
        self._slots.give_back(self._queues[0].slots)
        self._queues[0].drop(1, row.tokens)
        last = next(number for number, layers in enumerate(self._stages) if layer in layers)
        for ran in range(last + 1):
            self.statistics.runs[ran] += 1
            self.statistics.tokens[ran] += row.tokens
        self.statistics.rows_answered += 1
        return last

    def _overdue(self) -> int | None:
        """The queue of the oldest row, where its deadline has passed or too many answers wait behind it."""
        too_many = len(self._answers) >= self._max_rows_waiting
        if self._deadline is None and not too_many:
            return None
        waiting = ((row.position, row.since, number) for number, q in enumerate(self._queues) for row in q.rows)
        _, since, number = min(waiting, default=(None, math.inf, None))
        is_late = self._deadline is not None and self._clock() - since >= self._deadline
        return number if is_late or too_many else None

    def _read(self) -> None:
        encoded, problems = self._reader.read(self._look_ahead, self._clock())
        # nothing is padded, but what attention does for one run may depend on the longest sequence in it
        encoded.sort(key=attrgetter("tokens"))
        self._unanswered.update({row.position: row for row in encoded})
        self._answers.update({problem.position: StreamRow(problem.line, problem=problem.text) for problem in problems})
        self._reader.forget()
        self._enqueue(encoded)
        statistics = self.statistics
        statistics.rows_read = self._reader.position
        statistics.tokens_read += sum(row.tokens for row in encoded)
        in_flight = sum(queue.tokens for queue in self._queues)
        statistics.max_tokens_in_flight = max(statistics.max_tokens_in_flight, in_flight)

    def _run(self, stage: int, last: int | None = None) -> None:
        """Run what waits before a stage, through that and those up to `last`, between which no row leaves."""
        queue, last = self._queues[stage], stage if last is None else last
        # runs of any size would make oneDNN keep a kernel for each: it forgets none
        count = _prefix(queue.rows, self._schedule.tokens_per_run)
        rows, slots = queue.rows[:count], queue.slots[:count]
        lengths = [row.tokens for row in rows]
        tokens = sum(lengths)
        cu_seqlens = cumulative_lengths(lengths, self._device)
        layout = TokenLayout(cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
        with torch.no_grad():
            starts = stage == 0 or self._encoder.reads_tokens
            encoded = packed_rows(rows, self._device) if starts else None
            layers = range(self._stages[stage].start, self._stages[last].stop)
            hidden_states = self._encoder.run(layers, encoded, self._waiting(stage, tokens), layout)
            survivors = self._decide(last, hidden_states[:tokens], layout, rows, slots)
        self._move_on(last, hidden_states, cu_seqlens, rows, slots, survivors)
        queue.drop(count, tokens)
        for ran in range(stage, last + 1):
            self.statistics.runs[ran] += 1
            self.statistics.tokens[ran] += tokens

    def _waiting(self, stage: int, tokens: int) -> Tensor | None:
        """Packed hidden states before a stage, with the rows that `round_up_tokens` adds; None before the first."""
        return None if stage == 0 else self._queues[stage].hidden_states(tokens)

    def _decide(
        self,
        stage: int,
        hidden_states: Tensor,
        layout: TokenLayout,
        rows: Sequence[EncodedRow],
        slots: Sequence[int],
    ) -> Tensor:
        """Survivors, as sequence numbers of the run; the answers of the others are in the record."""
        row_ids = torch.tensor(slots, dtype=torch.int32, device=self._device)
        layer, record = self._stages[stage][-1], self._slots.record
        heads = self._heads_after(layer)
        if stage == len(self._stages) - 1:
            uncertainty = heads.answer(hidden_states, layout, self._rule, record=record, row_ids=row_ids)
            warn_about_nan([uncertainty.sum()])
            return row_ids[:0]
        thresholds = self._thresholds_of(layer, rows)
        return heads.decide(
            layer, hidden_states, layout, self._rule, record=record, row_ids=row_ids, thresholds=thresholds
        ).kept()

    def _heads_after(self, layer: int) -> PackedHeads:
        """What decides there: those of the plan, which are prepared, or of the model."""
        return self._model if self._plan is None else self._plan.heads_of(self._model, layer)

    def _thresholds_of(self, layer: int, rows: Sequence[EncodedRow]) -> Tensor | None:
        """Thresholds [B] of these rows after `layer`; None for that of the rule."""
        return None

    def _move_on(
        self,
        stage: int,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        rows: Sequence[EncodedRow],
        slots: Sequence[int],
        survivors: Tensor,
    ) -> None:
        """Put the survivors of a run into the next queue and the answers of the others where `__next__` finds them.

        `hidden_states` are those of the run [R, H], with the rows that `round_up_tokens` added.
        """
        kept = survivors.tolist()
        staying = set(kept)
        leaving = [index for index in range(len(rows)) if index not in staying]
        answers = self._answered([rows[index] for index in leaving], [slots[index] for index in leaving])
        if kept:
            following = self._queues[stage + 1]
            tokens = sum(rows[index].tokens for index in kept)
            if leaving or following.rows:
                room = following.room_for(tokens, hidden_states)
                fk.compact_packed([hidden_states[: sum(row.tokens for row in rows)]], cu_seqlens, survivors, out=[room])
            else:
                following.adopt(hidden_states)
            following.push([rows[index] for index in kept], [slots[index] for index in kept], tokens)
        self._answers.update(answers)
        for position in answers:
            del self._unanswered[position]
        self._slots.give_back(slots[index] for index in leaving)
        self.statistics.rows_answered += len(leaving)

    def _answered(self, rows: Sequence[EncodedRow], slots: Sequence[int]) -> dict[int, StreamRow]:
        if not rows:
            return {}
        record = self._slots.record
        layers, uncertainties = record.exit_layer[slots].tolist(), record.uncertainty[slots].tolist()
        return self._stream_rows(rows, record.logits[slots].float(), layers, uncertainties)

    def _stream_rows(
        self, rows: Sequence[EncodedRow], logits: Tensor, layers: Sequence[int], uncertainties: Sequence[float]
    ) -> dict[int, StreamRow]:
        if logits.shape[1] == 1:
            numbers: list[float] = logits[:, 0].tolist()
            return {
                row.position: (
                    StreamRow(row.line, number, None, layer)
                    if math.isfinite(number)
                    else StreamRow(row.line, problem=NOT_FINITE)
                )
                for row, number, layer in zip(rows, numbers, layers, strict=True)
            }
        scores, classes = (values.tolist() for values in logits.softmax(-1).max(-1))
        names = self._names
        return {
            row.position: (
                StreamRow(row.line, names[label], score, layer, uncertainty)
                if math.isfinite(score)
                else StreamRow(row.line, problem=NOT_FINITE)
            )
            for row, label, score, layer, uncertainty in zip(rows, classes, scores, layers, uncertainties, strict=True)
        }


def _prefix(rows: Sequence[EncodedRow], tokens: int) -> int:
    """How many of the first rows have `tokens` tokens together, or just below; at least one."""
    totals = accumulate(row.tokens for row in rows)
    return max(1, next((index for index, total in enumerate(totals) if total > tokens), len(rows)))
