"""`PreparedStage`: encoder layers, the head behind them and its gate on packed rows as one call on a CPU.

The embedding may come before them. It is `embed_layer_norm`, `encoder_layers`, a student head and `exit_gate`, bit for
bit; what is saved is crossing into C++ and PyTorch's dispatcher for each of them, which costs a short row more than a
layer does.
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
from fastkd_kernels.ops.student_head import PreparedStudentHead

_eager_stage = _eager.find("packed_stage")


def _profiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same, seen by torch's profiler as the dispatcher's ops are."""

    def profiled(*arguments: Any) -> Any:
        with record_function("fastkd_kernels::packed_stage"):
            return run(*arguments)

    return profiled


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
        self._packed = [layer.packed for layer in layers if layer.packed is not None]
        self._rotary = [layer.rotary for layer in layers if layer.rotary is not None]
        is_packed = len(self._packed) == len(layers) and all(layer.hidden_dtype == head.dtype for layer in layers)
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
        given = rows if isinstance(rows, Tensor) else None
        is_recorded = record is not None and layer is not None
        if (
            self._direct is None
            or (given is None) != (self._embedding is not None)
            or (record is not None) != is_recorded
            or (given is not None and given.requires_grad and torch.is_grad_enabled())
            or not _eager.is_unwatched()
        ):
            return self._one_by_one(rows, cu_seqlens, speed, criterion, row_ids, top_n, record, layer)
        check_choice("criterion", criterion, CRITERIA)
        embedding = self._embedding
        entered: Any = given
        if embedding is not None:
            entered = (embedding.tables, list(rows), *embedding.norm)
        recorded = None
        if record is not None:
            tensors = (record.logits, record.uncertainty, record.exit_layer, record.history)
            recorded = (*tensors, row_ids, layer)
        threshold = dense(speed.to(torch.float32)) if isinstance(speed, Tensor) else float(speed)
        run = _profiled(self._direct) if torch.autograd._profiler_enabled() else self._direct
        try:
            result = run(
                entered, self._packed, self._rotary, self._head.weights, cu_seqlens, threshold,
                CRITERIA.index(criterion), top_n or 0, recorded,
            )  # fmt: skip
        except RuntimeError as error:
            raise _extension.as_typed_error(error) from None
        if recorded is not None:
            mark_written(tensors)
        return StageOutput(*result)

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
                raise TypeError("rows: got a tensor, expected one of indices for each table of the embedding")
            hidden_states = rows
        else:
            if self._embedding is None:
                raise TypeError(f"rows: got {type(rows).__name__}, expected hidden states, for there is no embedding")
            hidden_states = self._embedding(rows)
        hidden_states = encoder_layers(hidden_states, cu_seqlens, self._layers)
        logits = self._head(hidden_states, cu_seqlens)
        decided = exit_gate(logits, speed, criterion, row_ids, top_n, record=record, layer=layer)
        return StageOutput(hidden_states, logits, decided.uncertainty, decided.kept().tolist())
