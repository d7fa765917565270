"""`PreparedStage`: encoder layers, the head behind them and its gate on packed rows as one call on a CPU.

The embedding may come before them. It is `embed_layer_norm`, `encoder_layers`, a student head and `exit_gate`, bit for
bit; what is saved is crossing into C++ and PyTorch's dispatcher for each of them, which costs a short row more than a
layer does. `PreparedRun` is all stages of a model as one call: rows that leave are dropped between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from fastkd_kernels import _eager, _extension
from fastkd_kernels._arguments import dense, mark_written
from fastkd_kernels.checks import check_choice
from fastkd_kernels.ops.encoder_layer import PackedEncoderLayer, encoder_layers
from fastkd_kernels.ops.exit_gate import CRITERIA, ExitRecord, exit_gate
from fastkd_kernels.ops.layer_norm import PreparedEmbedding
from fastkd_kernels.ops.packed import compact_packed
from fastkd_kernels.ops.student_head import PreparedStudentHead

_eager_stage = _eager.find("packed_stage")
_eager_run = _eager.find("packed_run")


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of the extension, seen by torch's profiler as the dispatcher's ops are, with its errors typed."""
    try:
        if not torch.autograd._profiler_enabled():
            return function(*arguments)
        with record_function(f"fastkd_kernels::{function.__name__}"):
            return function(*arguments)
    except RuntimeError as error:
        raise _extension.as_typed_error(error) from None


class StageOutput(NamedTuple):
    """What a stage of an encoder gives."""

    hidden_states: Tensor
    """[R, H] after its last layer."""
    logits: Tensor
    """[B, C] float32."""
    uncertainty: Tensor
    """[B] float32; NaN where the logits hold a NaN."""
    staying: list[int]
    """The sequences that stay, ascending."""


class PreparedStage:
    """Layers and a head made ready, once, for packed sequences on a CPU; inference only.

    Args:
        layers: from `pack_encoder_layer`; at least one.
        head: behind them.
        embedding: before them; without it the stage takes hidden states.

    Raises:
        ValueError: no layers.
    """

    def __init__(
        self,
        layers: Sequence[PackedEncoderLayer],
        head: PreparedStudentHead,
        embedding: PreparedEmbedding | None = None,
    ) -> None:
        if not layers:
            raise ValueError("layers: got none, expected at least one")
        self._layers, self._head, self._embedding = tuple(layers), head, embedding
        packed = [layer.packed for layer in layers if layer.packed is not None]
        rotary = [layer.rotary for layer in layers if layer.rotary is not None]
        self._parts = packed, rotary, head.weights
        is_packed = len(packed) == len(layers) and all(layer.hidden_dtype == head.dtype for layer in layers)
        self._direct = _eager_stage if is_packed else None

    @property
    def is_direct(self) -> bool:
        """Whether it is one call; else it is its ops one by one."""
        return self._direct is not None

    def __call__(
        self,
        rows: Tensor | Sequence[Tensor],
        cu_seqlens: Tensor,
        speed: float | Tensor,
        criterion: str = "entropy",
        row_ids: Tensor | None = None,
        top_n: int | None = None,
        *,
        record: ExitRecord | None = None,
        layer: int | None = None,
    ) -> StageOutput:
        """Run the stage; `speed`, `criterion`, `row_ids`, `top_n`, `record` and `layer` are those of `exit_gate`.

        Args:
            rows: hidden states [R, H], contiguous, of the layers' dtype; with an embedding what each of its tables is
                asked for, [N] int64 each, contiguous.
            cu_seqlens: [B + 1] int32, rising from 0 to at most R or N; no sequence is empty.

        Raises:
            ValueError, TypeError, IndexError: as `encoder_layers`, `exit_gate` and `embed_layer_norm`.
        """
        is_recorded = record is not None and layer is not None
        if self._direct is None or (record is not None) != is_recorded or not self._takes_directly(rows):
            return self._one_by_one(rows, cu_seqlens, speed, criterion, row_ids, top_n, record, layer)
        check_choice("criterion", criterion, CRITERIA)
        recorded = None
        if record is not None:
            tensors = (record.logits, record.uncertainty, record.exit_layer, record.history)
            recorded = (*tensors, row_ids, layer)
        threshold = dense(speed.to(torch.float32)) if isinstance(speed, Tensor) else float(speed)
        result = _call(
            self._direct, self._entered(rows), self._parts, cu_seqlens, threshold, CRITERIA.index(criterion),
            top_n or 0, recorded,
        )  # fmt: skip
        if recorded is not None:
            mark_written(tensors)
        return StageOutput(*result)

    def _takes_directly(self, rows: Tensor | Sequence[Tensor]) -> bool:
        """Whether these rows are for its one call, which nothing may watch."""
        if isinstance(rows, Tensor) != (self._embedding is None):
            return False
        wants_gradient = isinstance(rows, Tensor) and rows.requires_grad and torch.is_grad_enabled()
        return not wants_gradient and _eager.is_unwatched()

    def _entered(self, rows: Tensor | Sequence[Tensor]) -> Any:
        """The rows as the extension takes them."""
        embedding = self._embedding
        return rows if embedding is None else (embedding.tables, list(rows), *embedding.norm)

    def _one_by_one(
        self,
        rows: Tensor | Sequence[Tensor],
        cu_seqlens: Tensor,
        speed: float | Tensor,
        criterion: str,
        row_ids: Tensor | None,
        top_n: int | None,
        record: ExitRecord | None,
        layer: int | None,
    ) -> StageOutput:
        """The same by the ops themselves."""
        if isinstance(rows, Tensor):
            if self._embedding is not None:
                raise TypeError("rows: got a tensor, expected one tensor of indices for each embedding table")
            hidden_states = rows
        else:
            if self._embedding is None:
                raise TypeError(
                    f"rows: got {type(rows).__name__}, expected hidden states, because the stage has no embedding"
                )
            hidden_states = self._embedding(rows)
        hidden_states = encoder_layers(hidden_states, cu_seqlens, self._layers)
        logits = self._head(hidden_states, cu_seqlens)
        decided = exit_gate(logits, speed, criterion, row_ids, top_n, record=record, layer=layer)
        return StageOutput(hidden_states, logits, decided.uncertainty, decided.kept().tolist())


class RunOutput(NamedTuple):
    """What a run through the stages of an encoder answers."""

    logits: Tensor
    """[B, C] float32, of the head that answered."""
    uncertainty: Tensor
    """[B] float32 there."""
    exit_layer: Tensor
    """[B] int32, the layer in front of that head."""
    has_nan: bool
    """Whether a head that was asked gave a NaN."""


class PreparedRun:
    """Stages made ready, once, to answer packed sequences one stage after the other; inference only.

    Behind every stage but the last, sequences whose uncertainty is at most its threshold leave; the last answers those
    that are there.

    Args:
        stages: at least one, each one call; only the first may hold an embedding.
        exit_layers: for each stage the number of its last layer, 1 for an encoder's first.
        thresholds: for each stage but the last, in [0, 1]; at 0 no sequence leaves.
        criterion, top_n: as of `exit_gate`.

    Raises:
        ValueError: no stages, or one that is not `is_direct`; another number of layers or thresholds; an embedding
            behind the first stage; an unknown criterion.
    """

    def __init__(
        self,
        stages: Sequence[PreparedStage],
        exit_layers: Sequence[int],
        thresholds: Sequence[float],
        criterion: str = "entropy",
        top_n: int | None = None,
    ) -> None:
        if not stages:
            raise ValueError("stages: got none, expected at least one")
        for number, stage in enumerate(stages):
            if not stage.is_direct:
                raise ValueError(
                    f"stages[{number}]: does not run as one call (is_direct is False); call its stages yourself"
                )
            if number and stage._embedding is not None:
                raise ValueError(f"stages[{number}]: has an embedding, but only the first stage may have one")
        if len(exit_layers) != len(stages):
            raise ValueError(f"exit_layers: got {len(exit_layers)} for {len(stages)} stages, expected one for each")
        if len(thresholds) != len(stages) - 1:
            raise ValueError(
                f"thresholds: got {len(thresholds)} for {len(stages)} stages, expected one for each but the last"
            )
        check_choice("criterion", criterion, CRITERIA)
        self._stages, self._exit_layers = tuple(stages), tuple(exit_layers)
        self._parts = tuple(stage._parts for stage in stages)
        self._thresholds = tuple(map(float, thresholds))
        self._criterion, self._top_n = criterion, top_n

    def __call__(self, rows: Tensor | Sequence[Tensor], cu_seqlens: Tensor) -> RunOutput:
        """Answer every sequence.

        Args:
            rows, cu_seqlens: as of the first stage.

        Raises:
            ValueError, TypeError, IndexError: as of `PreparedStage`.
        """
        first = self._stages[0]
        if not first._takes_directly(rows):
            return self._one_by_one(rows, cu_seqlens)
        assert _eager_run is not None
        result = _call(
            _eager_run, first._entered(rows), self._parts, cu_seqlens, self._thresholds, self._exit_layers,
            CRITERIA.index(self._criterion), self._top_n or 0,
        )  # fmt: skip
        return RunOutput(*result)

    def _one_by_one(self, rows: Tensor | Sequence[Tensor], cu_seqlens: Tensor) -> RunOutput:
        """The same by its stages."""
        row_ids = torch.arange(cu_seqlens.shape[0] - 1, dtype=torch.int32)
        record = ExitRecord.allocate(len(row_ids), self._stages[0]._head.num_labels)
        has_nan = False
        for stage, layer, threshold in zip(self._stages, self._exit_layers, (*self._thresholds, 0.0), strict=True):
            ran = stage(rows, cu_seqlens, threshold, self._criterion, row_ids, self._top_n, record=record, layer=layer)
            has_nan |= bool(ran.uncertainty.isnan().any())
            if layer == self._exit_layers[-1]:
                record.write(row_ids, ran.logits, ran.uncertainty, layer)
            elif not ran.staying:
                break
            else:
                survivors = torch.tensor(ran.staying, dtype=torch.int32)
                (rows,), cu_seqlens = compact_packed([ran.hidden_states], cu_seqlens, survivors)
                row_ids = row_ids[survivors.long()]
        return RunOutput(record.logits, record.uncertainty, record.exit_layer, has_nan)
