"""Engine `graphs`: on a GPU, everything up to the next decision is one CUDA graph, which costs the host one launch.

A stage is the layers up to the next head, that head with its gate, and the compaction of what stays. Each stage is
captured once for each number of rows, rounded up, and replayed from then on; between two stages the host reads one
number, how many rows are left. Rows that only fill up a stage belong to a row of the record that nothing reads, and
always leave.

Weights may change: stages are captured again when `fastkd_kernels.ParameterStamp` sees it. What is hooked to modules
runs while a stage is captured and not when it is replayed.
"""

from __future__ import annotations

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
from fastkd.engines.packed_encoder import encoder_of
from fastkd.engines.protocol import ExitModel
from fastkd.exits.rule import ExitRule

TOKEN_STEP = 32
"""Lengths are padded to multiples of this."""
MAX_SHAPES = 16
"""Input shapes whose stages are kept; of more, those that came first are forgotten."""

Recorder = Callable[[Callable[[], Any]], Callable[[], None]]
"""Turns a function without arguments into what replays it on the same memory."""


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
        if recorder is None and model.device.type != "cuda":
            raise ValueError(f"model: got one on {model.device}, CUDA graphs need a CUDA device; use the batch engine")
        attention = model.backbone.config._attn_implementation
        if attention != "sdpa":
            raise ValueError(
                f"model: got attention implementation {attention!r}, the graphs engine needs 'sdpa'; call "
                "model.set_attn_implementation('sdpa') or use the batch engine"
            )
        self._reference = weakref.ref(model)
        self._recorder = CudaGraphs() if recorder is None else recorder
        self._memories: dict[tuple[Any, ...], _Memory] = {}
        self._parameters = list(model.parameters())
        self._stamp = fk.ParameterStamp(self._parameters)

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
        # outside of inference mode, because its tensors could not be written to by later calls without it
        with torch.inference_mode(False), torch.no_grad():
            memory = self._memory(inputs, rule)
            self._fill(memory, inputs, rule, thresholds)
            rows = input_ids.shape[0]
            for number in range(len(rule.stages)):
                stage = self._stage(memory, number, round_up_rows(rows), rule)
                stage.replay()
                if number == 0 and not self._is_current():
                    return self.run(
                        input_ids, attention_mask, rule, token_type_ids=token_type_ids, thresholds=thresholds
                    )
                if stage.count is None:
                    break
                rows = int(stage.count)
                if rows == 0:
                    break
            answers = rows_of(memory.record, slice(input_ids.shape[0]))
            if rows:
                warn_about_nan([answers.uncertainty.sum()])
            return answers

    def _is_current(self) -> bool:
        """Whether no weight changed; else everything is forgotten, because a graph holds heads folded and addresses.

        Asked while the device is busy with the first stage, where it costs no time.
        """
        if self._stamp.is_current(self._parameters):
            return True
        self._memories.clear()
        self._parameters = list(self._model.parameters())
        self._stamp = fk.ParameterStamp(self._parameters)
        return False

    def _memory(self, inputs: _Inputs, rule: ExitRule) -> _Memory:
        batch, longest = inputs.input_ids.shape
        rows, tokens = round_up_rows(batch), self._padded(longest)
        masked = inputs.attention_mask is not None or tokens > longest
        segmented = inputs.token_type_ids is not None
        key = (rows, tokens, masked, segmented, rule.criterion, rule.top_n, rule.layers)
        if key not in self._memories:
            if len(self._memories) == MAX_SHAPES:
                self._memories.pop(next(iter(self._memories)))
            self._memories[key] = self._allocate(len(rule.stages), rows, tokens, masked, segmented)
        return self._memories[key]

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
        is_last = number == len(rule.stages) - 1
        count = None if is_last else torch.zeros(1, dtype=torch.int32, device=self._model.device)

        def run() -> None:
            staying = self._run_stage(memory, number, rows, rule)
            if count is not None and staying is not None:
                count.copy_(staying)

        return _Stage(capture(self._recorder, run, memory.record), count)

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


def capture(recorder: Recorder, run: Callable[[], Any], record: fk.ExitRecord) -> Callable[[], None]:
    """What replays `run`, which decides with `record`."""
    # recording may run it, and what was said before is all that it both reads and writes
    history = record.history.clone()
    replay = recorder(run)
    record.history.copy_(history)
    return replay


def rows_of(record: fk.ExitRecord, rows: slice) -> fk.ExitRecord:
    """Copies of these rows."""
    fields = (record.logits, record.uncertainty, record.exit_layer, record.history)
    return fk.ExitRecord(*(tensor[rows].clone() for tensor in fields))


class CudaGraphs:
    """Captures into CUDA graphs that share one memory pool: they are never replayed at the same time."""

    WARM_UPS = 2

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Any]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


_engines: weakref.WeakKeyDictionary[ExitModel, GraphEngine] = weakref.WeakKeyDictionary()


def engine_of(model: ExitModel) -> GraphEngine:
    """The engine of a model, made at its first use and kept as long as the model."""
    engine = _engines.get(model)
    if engine is None:
        engine = _engines[model] = GraphEngine(model)
    return engine
