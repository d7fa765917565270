"""Engine `stream_batches`: batches of tensors in, batches of tensors out, and nothing on the host row by row.

As in the engine `stream`, survivors of many batches wait at their layer, packed, until enough tokens have gathered for
a run that is as efficient as the first layer's. But a GPU answers a row in a few microseconds, less than the host needs
to look at it. Therefore a run is the layers up to the next head, that head with its gate, and the compaction of what
stays; on a GPU it is one CUDA graph, captured once for each size and replayed from then on. And while the device is
busy with run k, the host settles run k - 1 (reads which rows stay, and queues them) and launches run k + 1:

    host    | launch 1 | launch 2 |  waits   | settle 1 | launch 3 |  waits   | settle 2 | launch 4 | ...
    device             |------- run 1 -------|------------- run 2 ------------|----------- run 3 -------

Run 2 begins when run 1 ends, because it was launched before run 1 was settled. So rows that stay in run 1 go on in
run 3 at the earliest, and two lanes of memory take turns. Answers lie in a record on the device and are handed out
batch by batch, in the order of the input.

A run is rounded up with sequences of one token, which answer into a row of the record that nothing reads.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd.encoders import families
from fastkd.encoders.layout import TokenLayout
from fastkd.engines.batch import warn_about_nan
from fastkd.engines.cuda_graphs import CudaGraphs, Recent, Recorder, Turns, autocast_dtype, capture, obstacle, on
from fastkd.engines.graphs import round_up_rows, rows_of
from fastkd.engines.output import EarlyExitOutput, fields_of
from fastkd.engines.packed import is_right_padded
from fastkd.engines.packed_encoder import encoder_of, is_capturable
from fastkd.engines.protocol import ExitModel
from fastkd.engines.schedule import Schedule
from fastkd.exits.rule import ExitRule

TOKEN_STEP = 64
"""The tokens of a run are rounded up to multiples of this, and less finely from nine of them on."""
TOKENS_PER_RUN = {"cpu": 4096, "cuda": 16384}
"""A CPU is busy with few tokens; on a GPU a run has to take longer than the host needs to prepare one."""
MAX_RUNS = 256
"""Captured runs that each lane keeps; of more, those that were not used for longest are forgotten."""


def size_of_run(tokens: int) -> int:
    """`tokens` rounded up to one of few sizes, by less than a quarter above eight steps."""
    return round_up_rows(-(-tokens // TOKEN_STEP)) * TOKEN_STEP


@dataclass
class BatchStreamStatistics:
    """How often each stage ran, on how many tokens that belong to rows, and on how many in all."""

    runs: list[int]
    tokens: list[int]
    rounded: list[int]


@dataclass
class _Run:
    """One captured run of one stage at one size; `survivors` and `count` are None after the last layer."""

    replay: Callable[[], None] = lambda: None
    survivors: Tensor | None = None  # [S] int32
    count: Tensor | None = None  # [1] int32
    read: Sequence[Tensor] = ()  # copies of weights that the replay reads


@dataclass
class _Lane:
    """What a run needs of its own until it is settled; two lanes take turns."""

    plan: Tensor  # int32: cu_seqlens [S + 1], and from `_rows_at` on the row of the record of each sequence [S]
    kept: Tensor  # [R, H] hidden states of the sequences that stay
    plan_on_host: Tensor  # pinned, as the next two
    count_on_host: Tensor  # [1] int32
    survivors_on_host: Tensor  # [S] int32
    finished: torch.cuda.Event | None  # None on a CPU
    runs: Recent[tuple[Any, ...], _Run] = field(default_factory=lambda: Recent(MAX_RUNS))


class _Kind(NamedTuple):
    """What streams have in common that may use the same memory and graphs."""

    tokens_per_run: int
    rows: int
    criterion: str
    top_n: int | None
    layers: tuple[int, ...]


@dataclass
class _Memory:
    """What the runs of one stream read and write; graphs know it by its addresses."""

    inputs: Tensor  # [3, R] int64: numbers of tokens, their positions and their segments
    waiting: list[Tensor]  # before each stage but the first, [3 R, H]
    thresholds: Tensor  # [stages, rows + 1] float32 by row of the record
    record: fk.ExitRecord  # rows + 1, the last one for sequences that only fill a run up
    lanes: tuple[_Lane, _Lane]
    recorder: Recorder
    turns: Turns
    added: np.ndarray[Any, Any]  # [S] how many sequences fill up a run of 1, 2, ... of them

    @property
    def rows(self) -> int:
        return self.record.exit_layer.shape[0] - 1


@dataclass
class _Flight:
    """A run that is on its way."""

    stage: int
    lane: _Lane
    lengths: np.ndarray[Any, Any]
    slots: np.ndarray[Any, Any]
    run: _Run


class _Queue:
    """The sequences that wait before one stage: their lengths and their rows of the record."""

    def __init__(self) -> None:
        self.lengths = np.empty(0, dtype=np.int64)
        self.slots = np.empty(0, dtype=np.int64)
        self.tokens = 0

    def push(self, lengths: np.ndarray[Any, Any], slots: np.ndarray[Any, Any]) -> None:
        self.lengths = np.concatenate([self.lengths, lengths])
        self.slots = np.concatenate([self.slots, slots])
        self.tokens += int(lengths.sum())

    def take(self, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        lengths, slots = self.lengths[:count], self.slots[:count]
        self.lengths, self.slots = self.lengths[count:], self.slots[count:]
        self.tokens -= int(lengths.sum())
        return lengths, slots


@dataclass(frozen=True)
class _Batch:
    """Rows of the record that belong to one batch of the input."""

    first: int
    rows: int


class BatchStream(Iterator[EarlyExitOutput]):
    """The answers to batches, in their order; made by `EarlyExitForSequenceClassification.stream_batches`.

    An error of the input is raised after everything read before it was answered. Any other error, and Ctrl-C, end the
    stream. Threads may share it: each answer is given once, and no two of them work at a time.
    """

    def __init__(
        self,
        model: ExitModel,
        batches: Iterable[Mapping[str, Tensor] | None],
        *,
        rule: ExitRule,
        tokens_per_run: int | None = None,
        max_rows_waiting: int = 16384,
        recorder: Recorder | None = None,
    ) -> None:
        """See `EarlyExitForSequenceClassification.stream_batches`; `recorder` says how a run is captured."""
        if model.training:
            raise ValueError("model: is in training mode, where no row leaves early; call model.eval() first")
        if rule.leaves_early and rule.criterion not in fk.CRITERIA:
            raise ValueError(
                f"criterion: got {rule.criterion!r}, which waits for the host; use model.stream, or one of "
                f"{', '.join(fk.CRITERIA)}"
            )
        if max_rows_waiting < 1:
            raise ValueError(f"max_rows_waiting: got {max_rows_waiting}, expected at least 1")
        self._device = model.device
        if tokens_per_run is None:
            tokens_per_run = TOKENS_PER_RUN.get(self._device.type, TOKENS_PER_RUN["cpu"])
        self._schedule = Schedule(tokens_per_run, len(rule.stages) * tokens_per_run)
        self._model = model
        self._encoder = encoder_of(model)
        self._encoder.check()
        self._rule = rule
        self._stages = rule.stages
        self._kind = _Kind(tokens_per_run, max_rows_waiting, rule.criterion, rule.top_n, rule.layers)
        with torch.inference_mode(False), torch.no_grad():
            self._stamp = fk.ParameterStamp(list(model.parameters()))
            self._memory = _take_memory(model, self._kind, recorder)
        with self._memory.turns.take(), torch.inference_mode(False), torch.no_grad():
            self._memory.thresholds.copy_(torch.tensor([*rule.thresholds, 0.0])[:, None])
            self._checksum = torch.zeros((), device=self._device)
        self._batches = iter(batches)
        self._error: Exception | None = None
        self._ended = False
        self._first_position = families.first_position(model.config.backbone)
        self._columns: Tensor | None = None
        self._read_rows: tuple[Tensor, np.ndarray[Any, Any]] | None = None
        self._waiting: deque[_Batch] = deque()
        self._unanswered = np.zeros(self._memory.rows, dtype=np.int64)  # of the batch that begins at this row
        self._batch_of = np.zeros(self._memory.rows, dtype=np.int64)  # the first row of its batch
        self._inputs: deque[Tensor] = deque()
        self._queues = [_Queue() for _ in self._stages]
        self._in_flight: _Flight | None = None
        self.statistics = BatchStreamStatistics(*([0] * len(self._stages) for _ in range(3)))

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> EarlyExitOutput:
        try:
            # outside of inference mode, because its tensors could not be written to by later calls without it
            with self._memory.turns.take(), torch.inference_mode(False), torch.no_grad():
                while not (self._waiting and self._is_answered(self._waiting[0])):
                    if not self._advance():
                        self._finish()
                return self._hand_out(self._waiting.popleft())
        except BaseException:
            self._ended, self._in_flight, self._read_rows = True, None, None
            self._queues = []
            self._waiting.clear()
            raise

    def _finish(self) -> None:
        """All is answered: say what went wrong, if anything did, and stop."""
        if self._queues:
            warn_about_nan([self._checksum])
            if self._stamp.is_current():
                _give_back(self._model, self._kind, self._memory)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    # Rows of the record

    def _is_answered(self, batch: _Batch) -> bool:
        return batch.rows == 0 or self._unanswered[batch.first] == 0

    def _hand_out(self, batch: _Batch) -> EarlyExitOutput:
        record = rows_of(self._memory.record, slice(batch.first, batch.first + batch.rows))
        # whether it is a number is asked at the end: here the host would wait for the run that is on its way
        self._checksum += record.uncertainty.sum()
        return EarlyExitOutput(**fields_of(record))

    def _free_rows(self, rows: int) -> int | None:
        """The first of `rows` consecutive rows of the record that no batch uses; None where there are none."""
        if not self._waiting:
            return 0
        oldest, newest = self._waiting[0], self._waiting[-1]
        end = newest.first + newest.rows
        if newest.first < oldest.first:
            return end if end + rows <= oldest.first else None
        if end + rows <= self._memory.rows:
            return end
        return 0 if rows <= oldest.first else None

    # Steps

    def _advance(self) -> bool:
        """Launch a run, settle one, or read a batch; False where nothing is left to do."""
        self._queue_rows()
        queue = self._next_queue()
        full = queue is not None and self._queues[queue].tokens >= self._schedule.tokens_per_run
        if queue is not None and (full or self._in_flight is None):
            self._turn(queue)
        elif queue is None and not self._ended and self._read_rows is None:
            if not self._read():
                self._turn(self._oldest_queue() if self._in_flight is None else None)
        elif self._in_flight is not None:
            self._turn(None)
        else:
            return False
        return True

    def _turn(self, queue: int | None) -> None:
        """Launch a run, where a queue is named, and settle the one before it."""
        before, self._in_flight = self._in_flight, None if queue is None else self._launch(queue)
        if before is not None:
            self._settle(before)

    def _next_queue(self) -> int | None:
        tokens = [queue.tokens for queue in self._queues]
        # a full queue comes first, so that no queue ever holds more than three runs
        is_full = any(waiting >= self._schedule.tokens_per_run for waiting in tokens)
        overdue = None if is_full or self._read_rows is None else self._oldest_queue()
        return self._schedule.next_queue(tokens, input_ended=self._ended, overdue=overdue)

    def _oldest_queue(self) -> int | None:
        """Where rows of the oldest batch wait; None where there is none, or all of them are on their way."""
        if not self._waiting:
            return None
        oldest = self._waiting[0].first
        holding = (number for number, queue in enumerate(self._queues) if (self._batch_of[queue.slots] == oldest).any())
        return next(holding, None)

    def _read(self) -> bool:
        """Read a batch; False where the input has nothing right now."""
        try:
            batch = next(self._batches)
        except StopIteration:
            self._ended = True
            return True
        except Exception as error:
            self._ended, self._error = True, error
            return True
        if batch is None:
            return False
        columns, lengths = self._packed(batch)
        if len(lengths) > self._memory.rows:
            raise ValueError(
                f"batches: got one of {len(lengths)} rows, expected at most max_rows_waiting, {self._memory.rows}"
            )
        self._read_rows = columns, lengths
        return True

    def _packed(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, np.ndarray[Any, Any]]:
        """Tokens, positions and segments [3, N] of a padded batch on the device of the model, and lengths [B]."""
        input_ids, segments = batch["input_ids"], batch.get("token_type_ids")
        mask = self._model.check_input(input_ids, batch.get("attention_mask"))
        if mask is not None and not is_right_padded(mask):
            raise ValueError("attention_mask: got padding before a token, expected it on the right only")
        rows, tokens = input_ids.shape
        others = self._usual_columns(input_ids)
        if segments is None:
            columns = torch.cat([input_ids[None], others])
        else:
            columns = torch.stack([input_ids, others[0], segments])
        if mask is None:
            columns, lengths = columns.flatten(1), np.full(rows, tokens, dtype=np.int64)
        else:
            columns, lengths = columns[:, mask], mask.sum(1).cpu().numpy()
        if self._device.type == "cuda" and columns.device.type == "cpu":
            columns = columns.pin_memory()  # else the copy waits for the run that is on its way
        return columns.to(self._device, non_blocking=True), lengths

    def _usual_columns(self, input_ids: Tensor) -> Tensor:
        """Positions, and segments that are all 0, of a batch like `input_ids` [B, T]: [2, B, T]."""
        before = self._columns
        if before is None or before.shape[1:] != input_ids.shape or before.device != input_ids.device:
            first = self._first_position
            columns = input_ids.new_zeros(2, *input_ids.shape, dtype=torch.int64)
            columns[0] = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
            self._columns = columns
            return columns
        return before

    def _queue_rows(self) -> None:
        """Give the batch that was read its rows of the record, if enough are free."""
        if self._read_rows is None:
            return
        columns, lengths = self._read_rows
        first = self._free_rows(len(lengths))
        if first is None:
            return
        slots = np.arange(first, first + len(lengths))
        self._read_rows = None
        self._waiting.append(_Batch(first, len(lengths)))
        if len(lengths) == 0:
            return
        self._batch_of[slots], self._unanswered[first] = first, len(lengths)
        if self._rule.criterion == "patience":
            self._memory.record.forget(slice(first, first + len(lengths)))
        thresholds = self._thresholds_of(len(lengths))
        if thresholds is not None:
            self._memory.thresholds[:, first : first + len(lengths)].copy_(thresholds)
        self._inputs.append(columns)
        self._queues[0].push(lengths, slots)

    def _thresholds_of(self, rows: int) -> Tensor | None:
        """Thresholds [stages, rows] of the next `rows` rows; None for those of the rule."""
        return None

    def _launch(self, stage: int) -> _Flight:
        queue, memory = self._queues[stage], self._memory
        lane = memory.lanes[sum(self.statistics.runs) % 2]
        lengths, slots = queue.take(self._fitting(queue.lengths))
        used, longest = int(lengths.sum()), int(lengths.max())
        added = int(memory.added[len(lengths) - 1])
        tokens, sequences = size_of_run(used + added), len(lengths) + added
        self._write_plan(lane, lengths, slots, sequences)
        if stage == 0:
            self._take_inputs(used)
        run = self._captured(lane, stage, tokens, sequences, 1 << (longest - 1).bit_length())
        if self._stamp.memory_was_freed and isinstance(memory.recorder, CudaGraphs):
            raise RuntimeError("model: its weights were moved or replaced while the stream ran; start another stream")
        run.replay()
        if run.survivors is not None and run.count is not None:
            lane.count_on_host.copy_(run.count, non_blocking=True)
            lane.survivors_on_host[:sequences].copy_(run.survivors, non_blocking=True)
        if lane.finished is not None:
            lane.finished.record()
        if stage:
            _move_to_front(memory.waiting[stage - 1], used, queue.tokens)
        statistics = self.statistics
        statistics.runs[stage] += 1
        statistics.tokens[stage] += used
        statistics.rounded[stage] += tokens
        return _Flight(stage, lane, lengths, slots, run)

    def _fitting(self, lengths: np.ndarray[Any, Any]) -> int:
        """How many of the first sequences, rounded up, have as many tokens as a run; at least one."""
        totals = lengths.cumsum()
        totals += self._memory.added[: len(lengths)]
        fitting = np.flatnonzero(totals <= self._schedule.tokens_per_run)
        return int(fitting[-1]) + 1 if len(fitting) else 1

    def _write_plan(
        self, lane: _Lane, lengths: np.ndarray[Any, Any], slots: np.ndarray[Any, Any], sequences: int
    ) -> None:
        count, rows_at = len(lengths), _rows_at(sequences)
        size = rows_at + sequences
        plan = lane.plan_on_host.numpy()
        ends, rows = plan[: sequences + 1], plan[rows_at:size]
        ends[0] = 0
        lengths.cumsum(out=ends[1 : count + 1])
        ends[count + 1 :] = ends[count] + np.arange(1, sequences - count + 1)
        rows[:count], rows[count:] = slots, self._memory.rows
        lane.plan[:size].copy_(lane.plan_on_host[:size], non_blocking=True)

    def _take_inputs(self, tokens: int) -> None:
        """Copy the first `tokens` tokens that wait to where the first stage reads them."""
        done = 0
        while done < tokens:
            columns = self._inputs.popleft()
            here = min(columns.shape[1], tokens - done)
            self._memory.inputs[:, done : done + here].copy_(columns[:, :here])
            done += here
            if here < columns.shape[1]:
                self._inputs.appendleft(columns[:, here:])

    def _settle(self, flight: _Flight) -> None:
        """Wait for a run, note which rows were answered, and queue the others; the device is busy with the next one."""
        lane, count = flight.lane, len(flight.lengths)
        if lane.finished is not None:
            lane.finished.synchronize()
        kept = np.empty(0, dtype=np.int64)
        if flight.run.count is not None:
            survivors = lane.survivors_on_host[: int(lane.count_on_host)].numpy()
            # sequences that fill up a run come last, and where they stay does not matter
            kept = survivors[survivors < count]
        leaving = np.ones(count, dtype=bool)
        leaving[kept] = False
        np.subtract.at(self._unanswered, self._batch_of[flight.slots[leaving]], 1)
        if len(kept) == 0:
            return
        lengths = flight.lengths[kept]
        queue, tokens = self._queues[flight.stage + 1], int(lengths.sum())
        self._memory.waiting[flight.stage][queue.tokens : queue.tokens + tokens].copy_(lane.kept[:tokens])
        queue.push(lengths, flight.slots[kept])

    # Runs

    def _captured(self, lane: _Lane, stage: int, tokens: int, sequences: int, longest: int) -> _Run:
        key = (stage, tokens, sequences, longest, autocast_dtype(self._device))
        found = lane.runs.find(key)
        if found is not None:
            return found
        run = _Run()

        def record() -> None:
            run.survivors, run.count = self._run_stage(lane, stage, tokens, sequences, longest)

        run.replay = capture(self._memory.recorder, record, self._memory.record)
        run.read = self._encoder.copies
        lane.runs.keep(key, run)
        return run

    def _run_stage(
        self, lane: _Lane, stage: int, tokens: int, sequences: int, longest: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The layers of a stage on `tokens` tokens, its head and compaction; survivors and their number."""
        memory, model, encoder, rule = self._memory, self._model, self._encoder, self._rule
        rows_at = _rows_at(sequences)
        cu_seqlens, row_ids = lane.plan[: sequences + 1], lane.plan[rows_at : rows_at + sequences]
        layout = TokenLayout(cu_seqlens=cu_seqlens, max_seqlen=longest)
        with torch.no_grad():
            if stage == 0:
                hidden_states = encoder.embed_rows(*memory.inputs[:, :tokens])
            else:
                hidden_states = memory.waiting[stage - 1][:tokens]
            hidden_states = encoder.run_layers(self._stages[stage], hidden_states, layout)
        layer = self._stages[stage][-1]
        if layer == rule.last_layer:
            model.answer(hidden_states, layout, rule, record=memory.record, row_ids=row_ids)
            return None, None
        thresholds = memory.thresholds[stage].index_select(0, row_ids)
        decided = model.decide(
            layer, hidden_states, layout, rule, record=memory.record, row_ids=row_ids, thresholds=thresholds
        )
        fk.compact_packed([hidden_states], cu_seqlens, decided.survivors, decided.count, out=[lane.kept])
        return decided.survivors, decided.count


def _rows_at(sequences: int) -> int:
    """Where the rows begin in a plan: Triton compiles a kernel again for an address that is no multiple of 16 bytes."""
    return -(-(sequences + 1) // 4) * 4


def _move_to_front(rows: Tensor, start: int, count: int) -> None:
    """rows[:count] = rows[start : start + count], which may overlap."""
    if count:
        rest = rows[start : start + count]
        rows[:count].copy_(rest if count <= start else rest.clone())


# Memory, which outlives a stream together with its graphs


@dataclass
class _Kept:
    """Memories of one model that no stream uses, and what its parameters were when their graphs were captured."""

    stamp: fk.ParameterStamp
    memories: Recent[_Kind, _Memory] = field(default_factory=lambda: Recent(_MOST_KEPT))


_MOST_KEPT = 4
_kept: weakref.WeakKeyDictionary[ExitModel, _Kept] = weakref.WeakKeyDictionary()
_kept_lock = threading.Lock()


def _take_memory(model: ExitModel, kind: _Kind, recorder: Recorder | None) -> _Memory:
    if recorder is not None:
        return _allocate(model, kind, recorder)
    if not is_capturable(model) or obstacle(model) is not None:
        return _allocate(model, kind, _plain_calls)
    with _kept_lock:
        kept = _kept.get(model)
        if kept is None or not kept.stamp.is_current(list(model.parameters())):
            kept = _kept[model] = _Kept(fk.ParameterStamp(list(model.parameters())))
        memory = kept.memories.pop(kind, None)
    return _allocate(model, kind, CudaGraphs(model.device)) if memory is None else memory


def _give_back(model: ExitModel, kind: _Kind, memory: _Memory) -> None:
    if not isinstance(memory.recorder, CudaGraphs) or memory.recorder.calls_instead:
        return  # plain calls are quick to make, and would keep the model alive
    with _kept_lock:
        kept = _kept.get(model)
        if kept is not None and kept.stamp.is_current(list(model.parameters())):
            kept.memories.keep(kind, memory)


def _plain_calls(run: Callable[[], Any]) -> Callable[[], None]:
    return run


def _allocate(model: ExitModel, kind: _Kind, recorder: Recorder) -> _Memory:
    # pinned memory would otherwise start the current GPU, which may be another one
    with on(model.device):
        return _allocate_on_device(model, kind, recorder)


def _allocate_on_device(model: ExitModel, kind: _Kind, recorder: Recorder) -> _Memory:
    device, hidden = model.device, model.config.hidden_size
    # a row longer than a run is a run of its own
    most = max(kind.tokens_per_run, families.longest_input(model.config.backbone))
    tokens, sequences = size_of_run(most), round_up_rows(most)
    pinned = device.type == "cuda"

    def lane() -> _Lane:
        return _Lane(
            plan=torch.zeros(_rows_at(sequences) + sequences, dtype=torch.int32, device=device),
            kept=torch.zeros(tokens, hidden, dtype=model.dtype, device=device),
            plan_on_host=torch.zeros(_rows_at(sequences) + sequences, dtype=torch.int32, pin_memory=pinned),
            count_on_host=torch.zeros(1, dtype=torch.int32, pin_memory=pinned),
            survivors_on_host=torch.zeros(sequences, dtype=torch.int32, pin_memory=pinned),
            finished=torch.cuda.Event() if device.type == "cuda" else None,
        )

    return _Memory(
        inputs=torch.zeros(3, tokens, dtype=torch.int64, device=device),
        # zeros, because rows that fill a run up have to be finite
        waiting=[torch.zeros(3 * tokens, hidden, dtype=model.dtype, device=device) for _ in kind.layers[1:]],
        thresholds=torch.ones(len(kind.layers), kind.rows + 1, device=device),
        record=fk.ExitRecord.allocate(kind.rows + 1, model.config.num_classes, device),
        lanes=(lane(), lane()),
        recorder=recorder,
        turns=Turns(device),
        added=np.array([round_up_rows(count) - count for count in range(1, sequences + 1)]),
    )
