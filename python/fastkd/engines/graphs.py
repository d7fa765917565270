"""Engine `graphs`: on a GPU, everything up to the next decision is one CUDA graph, which costs the host one launch.

A stage is the layers up to the next head, that head with its gate, and the compaction of what stays. Each stage is
captured once for each number of rows, rounded up, and replayed from then on; between two stages the host reads one
number, how many rows are left. Rows that only fill up a stage belong to a row of the record that nothing reads, and
always leave.

Weights may change, move and go: stages are captured again when `fastkd_kernels.ParameterStamp` sees it. A model that
something is hooked to is called. What is hooked to it after its stages were captured waits for that.

Threads may share an engine: one batch runs at a time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd.encoders import families
from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.recording import EncoderInputs
from fastkd.engines.batch import warn_about_nan
from fastkd.engines.cuda_graphs import CudaGraphs, Recent, Recorder, Turns, autocast_dtype, capture, obstacle
from fastkd.engines.packed_encoder import encoder_of
from fastkd.engines.protocol import ExitModel
from fastkd.exits.rule import ExitRule

TOKEN_STEP = 32
"""Lengths are padded to multiples of this."""
MAX_SHAPES = 16
"""Input shapes whose stages are kept; of more, those that were not used for longest are forgotten."""


def round_up_rows(rows: int) -> int:
    """`rows` rounded up by less than a quarter: exact to 8, then four sizes for each power of two."""
    step = 1 << max((rows - 1).bit_length() - 3, 0)
    return -(-rows // step) * step


class _Inputs(NamedTuple):
    """The arguments of one run, as `GraphEngine.run` describes them."""

    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None


@dataclass
class _Stage:
    """One captured stage at one number of rows."""

    replay: Callable[[], None]
    count: Tensor | None  # [1] rows that stay; None after the last layer
    read: list[Tensor]  # copies of weights that the replay reads


@dataclass
class _Memory:
    """What the stages of one input shape read and write; graphs know it by its addresses.

    A stage reads one buffer of a pair and compacts into the other.
    """

    rows: int
    input_ids: Tensor  # [R, T]
    segments: Tensor | None  # [R, T]
    hidden_states: tuple[Tensor, Tensor]  # [R, T, H] each
    masks: tuple[Tensor, Tensor] | None  # [R, T] bool each
    row_ids: tuple[Tensor, Tensor]  # [R] int64 each
    first_ids: Tensor  # [R] int64, those of the first stage
    thresholds: Tensor  # [stages, R + 1] by row of the record
    record: fk.ExitRecord  # R + 1 rows, the last one for rows that only fill up a stage
    filled: int = 0  # how many rows `first_ids` numbers
    filled_thresholds: tuple[float, ...] | None = None  # what `thresholds` holds for every row
    stages: dict[tuple[int, int], _Stage] = field(default_factory=dict)


class GraphEngine:
    """Answers batches of one model; keeps captured stages and their memory as long as it lives.

    Args:
        model: in evaluation mode, with heads that were trained, attention implementation "sdpa"; not kept alive.
        recorder: how a stage is captured; default: CUDA graphs that share one memory pool.

    Raises:
        ValueError: without `recorder`, a model that is not on a GPU; an attention implementation other than "sdpa".
    """

    def __init__(self, model: ExitModel, recorder: Recorder | None = None) -> None:
        self._reference = weakref.ref(model)
        self._given = recorder
        self._turns = Turns(model.device)
        self._memories: Recent[tuple[Any, ...], _Memory] = Recent(MAX_SHAPES)
        self._start()

    def _start(self) -> None:
        """Take the model as it is now. What was captured is forgotten: a graph holds heads folded, and addresses."""
        self._memories.clear()
        model = self._model
        if self._given is None and model.device.type != "cuda":
            raise ValueError(f"model: got one on {model.device}, CUDA graphs need a CUDA device; use the batch engine")
        attention = model.backbone.config._attn_implementation
        if attention != "sdpa":
            raise ValueError(
                f"model: got attention implementation {attention!r}, the graphs engine needs 'sdpa'; call "
                "model.set_attn_implementation('sdpa') or use the batch engine"
            )
        self._turns.device = model.device
        self._recorder = CudaGraphs(model.device) if self._given is None else self._given
        self._stamp = fk.ParameterStamp(list(model.parameters()))

    @property
    def _model(self) -> ExitModel:
        model = self._reference()
        assert model is not None, "the model of this engine is gone"
        return model

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rule: ExitRule,
        *,
        token_type_ids: Tensor | None = None,
        thresholds: Tensor | None = None,
    ) -> fk.ExitRecord:
        """Answer every sequence at the first head that is certain enough; as engine `batch` does.

        Args:
            input_ids: [B, T] int64, B > 0.
            attention_mask: [B, T] bool, True where a token counts, or None where nothing is padded.
            rule: which heads are asked, and which rows leave there; with a criterion in `fastkd_kernels.CRITERIA`.
            token_type_ids: [B, T] int64, or None where all are of segment 0.
            thresholds: float32 [stages, B], one for each head and row, in the place of the rule's.

        Returns:
            The logits, uncertainty and exit layer of all B sequences, in memory of their own.
        """
        inputs = _Inputs(input_ids, attention_mask, token_type_ids)
        while True:
            # outside of inference mode, because its tensors could not be written to by later calls without it
            with self._turns.take(), torch.inference_mode(False), torch.no_grad():
                answers = self._answers(inputs, rule, thresholds)
                if answers is not None:
                    return answers
                self._start()

    def _answers(self, inputs: _Inputs, rule: ExitRule, thresholds: Tensor | None) -> fk.ExitRecord | None:
        """What `run` returns; None where the weights are not those that were captured."""
        # before a replay, which would read memory that may be gone
        if self._stamp.memory_was_freed:
            return None
        memory = self._memory(inputs, rule)
        self._fill(memory, inputs, rule, thresholds)
        rows = batch = inputs.input_ids.shape[0]
        for number in range(len(rule.stages)):
            stage = self._stage(memory, number, round_up_rows(rows), rule)
            stage.replay()
            # while the device is busy with the first stage, where it costs no time
            if number == 0 and not self._stamp.is_current():
                return None
            if stage.count is None:
                break
            rows = int(stage.count)
            if rows == 0:
                break
        answers = rows_of(memory.record, slice(batch))
        if rows:
            warn_about_nan([answers.uncertainty.sum()])
        return answers

    def _memory(self, inputs: _Inputs, rule: ExitRule) -> _Memory:
        batch, longest = inputs.input_ids.shape
        rows, tokens = round_up_rows(batch), self._padded(longest)
        masked = inputs.attention_mask is not None or tokens > longest
        segmented = inputs.token_type_ids is not None
        autocast = autocast_dtype(self._turns.device)
        key = (rows, tokens, masked, segmented, autocast, rule.criterion, rule.top_n, rule.layers)
        memory = self._memories.find(key)
        if memory is None:
            memory = self._allocate(len(rule.stages), rows, tokens, masked, segmented)
            self._memories.keep(key, memory)
        return memory

    def _padded(self, tokens: int) -> int:
        """Few lengths, so that few stages are captured."""
        padded = -(-tokens // TOKEN_STEP) * TOKEN_STEP
        return padded if padded <= families.longest_input(self._model.config.backbone) else tokens

    def _allocate(self, stages: int, rows: int, tokens: int, masked: bool, segmented: bool) -> _Memory:
        model, device = self._model, self._model.device
        shape = (rows, tokens, model.config.hidden_size)

        def twice(make: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
            return make(), make()

        return _Memory(
            rows=rows,
            input_ids=torch.zeros(rows, tokens, dtype=torch.int64, device=device),
            segments=torch.zeros(rows, tokens, dtype=torch.int64, device=device) if segmented else None,
            # zeros, because rows that fill up a stage have to be finite
            hidden_states=twice(lambda: torch.zeros(shape, dtype=model.dtype, device=device)),
            masks=twice(lambda: torch.ones(shape[:2], dtype=torch.bool, device=device)) if masked else None,
            row_ids=twice(lambda: torch.full((rows,), rows, dtype=torch.int64, device=device)),
            first_ids=torch.full((rows,), rows, dtype=torch.int64, device=device),
            thresholds=torch.ones(stages, rows + 1, device=device),
            record=fk.ExitRecord.allocate(rows + 1, model.config.num_classes, device),
        )

    def _fill(self, memory: _Memory, inputs: _Inputs, rule: ExitRule, thresholds: Tensor | None) -> None:
        input_ids, attention_mask, token_type_ids = inputs
        rows, tokens = input_ids.shape
        memory.input_ids[:rows, :tokens].copy_(input_ids)
        if tokens < memory.input_ids.shape[1]:
            memory.input_ids[:rows, tokens:].fill_(self._model.config.backbone.pad_token_id or 0)
        if memory.segments is not None:
            assert token_type_ids is not None
            memory.segments[:rows, :tokens].copy_(token_type_ids)
        if memory.masks is not None:
            mask = memory.masks[0][:rows]
            mask[:, tokens:].fill_(False)
            if attention_mask is None:
                mask[:, :tokens].fill_(True)
            else:
                mask[:, :tokens].copy_(attention_mask)
        if memory.filled != rows:
            torch.arange(rows, out=memory.first_ids[:rows])
            memory.first_ids[rows:].fill_(memory.rows)
            memory.filled = rows
        if thresholds is not None:
            memory.thresholds[:, :rows].copy_(thresholds)
            memory.filled_thresholds = None
        elif memory.filled_thresholds != rule.thresholds:
            memory.thresholds[:, :-1].copy_(torch.tensor([*rule.thresholds, 0.0])[:, None])
            memory.filled_thresholds = rule.thresholds

    def _stage(self, memory: _Memory, number: int, rows: int, rule: ExitRule) -> _Stage:
        stage = memory.stages.get((number, rows))
        if stage is None:
            stage = memory.stages[number, rows] = self._capture(memory, number, rows, rule)
        return stage

    def _capture(self, memory: _Memory, number: int, rows: int, rule: ExitRule) -> _Stage:
        model = self._model
        if isinstance(self._recorder, CudaGraphs):
            problem = obstacle(model)
            if problem is not None:
                self._recorder.refuse(problem)
        is_last = number == len(rule.stages) - 1
        count = None if is_last else torch.zeros(1, dtype=torch.int32, device=model.device)

        def run() -> None:
            staying = self._run_stage(memory, number, rows, rule)
            if count is not None and staying is not None:
                count.copy_(staying)

        replay = capture(self._recorder, run, memory.record)
        return _Stage(replay, count, encoder_of(model).copies)

    def _run_stage(self, memory: _Memory, number: int, rows: int, rule: ExitRule) -> Tensor | None:
        """A stage on the first `rows` rows: its layers, head and compaction.

        Returns:
            How many rows stay, [1]; None after the last layer.
        """
        model, stage = self._model, rule.stages[number]
        source, target = number % 2, (number + 1) % 2
        mask = None if memory.masks is None else memory.masks[source][:rows]
        row_ids = (memory.row_ids[source] if number else memory.first_ids)[:rows]
        hidden_states = memory.hidden_states[source][:rows]
        if number == 0:
            segments = None if memory.segments is None else memory.segments[:rows]
            hidden_states, _ = model.start(EncoderInputs(memory.input_ids[:rows], token_type_ids=segments))
            if rule.criterion == "patience":
                memory.record.forget()
        layer_mask = None if mask is None else mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        layout = TokenLayout(mask, layer_mask)
        hidden_states = encoder_of(model).run_layers(stage, hidden_states, layout)
        if stage[-1] == rule.last_layer:
            model.answer(hidden_states, layout, rule, record=memory.record, row_ids=row_ids)
            return None
        thresholds = memory.thresholds[number].index_select(0, row_ids)
        decided = model.decide(
            stage[-1], hidden_states, layout, rule, record=memory.record, row_ids=row_ids, thresholds=thresholds
        )
        memory.row_ids[target].fill_(memory.rows)
        kept = [hidden_states, row_ids] if mask is None else [hidden_states, row_ids, mask]
        out = [memory.hidden_states[target], memory.row_ids[target]]
        if memory.masks is not None:
            out.append(memory.masks[target])
        fk.compact(kept, decided.survivors, decided.count, out=out)
        return decided.count


def rows_of(record: fk.ExitRecord, rows: slice) -> fk.ExitRecord:
    """Copies of these rows."""
    fields = (record.logits, record.uncertainty, record.exit_layer, record.history)
    return fk.ExitRecord(*(tensor[rows].clone() for tensor in fields))


_engines: weakref.WeakKeyDictionary[ExitModel, GraphEngine] = weakref.WeakKeyDictionary()
_engines_lock = threading.Lock()


def engine_of(model: ExitModel) -> GraphEngine:
    """The engine of a model, made at its first use and kept as long as the model."""
    with _engines_lock:
        engine = _engines.get(model)
        if engine is None:
            engine = _engines[model] = GraphEngine(model)
        return engine
