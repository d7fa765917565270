"""`PackedEncoder`: the encoder of a model on packed tokens, and where that is faster than padded batches.

Row counts are rounded up to a few sizes, because on a CPU oneDNN prepares a primitive for every new one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd_kernels as fk
from fastkd.encoders import families
from fastkd.encoders.layout import TokenLayout
from fastkd.engines.compaction_cost import CompactionCost, fit
from fastkd.engines.packed_layers import Layer, LayerFromParts, current_layers, run_layers
from fastkd.engines.protocol import ExitModel

_USUAL_LENGTH = 32  # tokens of the sequences on which costs are measured

MOST_ADDED = 63
"""Rows that `round_up_tokens` adds at most."""


def round_up_tokens(tokens: int) -> int:
    """`tokens` rounded up to one of few sizes: by at most 15 below 64, 31 below 256 and 63 above."""
    step = 16 if tokens <= 64 else 32 if tokens <= 256 else 64
    return -(-tokens // step) * step


@dataclass(frozen=True)
class PackedTokens:
    """Sequences one behind the other.

    Attributes:
        input_ids: [N] int64.
        token_type_ids: [N] int64, or None where all are of segment 0.
        lengths: tokens of each of the B sequences, on the host.
        cu_seqlens: [B + 1] int32, sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].
    """

    input_ids: Tensor
    token_type_ids: Tensor | None
    lengths: Sequence[int]
    cu_seqlens: Tensor

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(cu_seqlens=self.cu_seqlens, max_seqlen=max(self.lengths, default=0))


def cumulative_lengths(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """cu_seqlens [B + 1] int32 of packed sequences of these lengths."""
    total, ends = 0, [0]
    for length in lengths:
        total += length
        ends.append(total)
    return torch.tensor(ends, dtype=torch.int32, device=device)


def supports(model: ExitModel) -> bool:
    """Whether packed tokens beat padded batches: on a CPU, with layers that run from their parts."""
    return runs_from_parts(model) and model.device.type == "cpu"


def runs_from_parts(model: ExitModel) -> bool:
    """Whether our kernels, and on a CPU oneDNN, take the dtype of the model where it is."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return False  # a replica of DataParallel, whose weights are no parameters
    device = parameter.device.type
    if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return False
    if device == "cpu":
        takes_dtype = fk.onednn_multiplies(parameter.dtype) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    else:
        takes_dtype = parameter.dtype == torch.bfloat16
    return takes_dtype and fk.missing_kernels(("varlen_attention", "layer_norm", "packed"), device) is None


def is_capturable(model: ExitModel) -> bool:
    """Whether a CUDA graph can hold packed layers: attention in another dtype or head size waits for the lengths."""
    config = model.config.backbone
    head_size = config.hidden_size // config.num_attention_heads
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and fk.missing_kernels(("varlen_attention", "packed", "student_head", "exit_gate"), "cuda") is None
    )


class PackedEncoder:
    """The encoder of one early-exit model on packed tokens; made by `encoder_of`, which keeps it."""

    def __init__(self, model: ExitModel) -> None:
        self._backbone: Any = model.backbone
        self._modules = list(model.layers)
        self.layers_of = [id(layer) for layer in self._modules]
        self._family = families.family_of(model.config.backbone.model_type)
        self._config = model.config.backbone
        self._layers: list[Layer] = []
        self._embeddings: families.EmbeddingParts | None = None

    reads_tokens = False
    """Whether runs after the first stage need the tokens."""

    @property
    def is_faster(self) -> bool:
        """Whether every layer runs from its parts, which is where packed tokens beat padded batches."""
        return all(isinstance(layer, LayerFromParts) for layer in self._layers)

    @property
    def can_run(self) -> bool:
        """Whether layers that do not run from their parts, if any, run by their own forward on packed tokens."""
        return self.is_faster or not self._family.is_replayed

    def check(self) -> None:
        """Raise ValueError where it cannot run."""
        if not self.can_run:
            raise ValueError(
                f"model: packed tokens need layers of {self._config.model_type!r} that run from their parts: in "
                "float32 or bfloat16 on a CPU, in bfloat16 on a GPU, without autocast, hooks, adapters or quantised "
                "weights; use engine='batch', or model.stream(rows)"
            )

    @property
    def layers_now(self) -> Sequence[Layer]:
        """What runs the layers, after the last `refresh`."""
        return tuple(self._layers)

    def use(self, layers: Sequence[Layer]) -> None:
        """Run these layers, which `layers_now` gave."""
        self._layers = list(layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self._backbone.dtype

    @property
    def copies(self) -> list[Tensor]:
        """What its layers read beside the parameters of the model; whoever captures them has to keep it."""
        return [tensor for layer in self._layers if isinstance(layer, LayerFromParts) for tensor in layer.copies]

    def compaction_pays(self, tokens: int, kept: int, layers: int) -> bool:
        """Whether dropping all but `kept` of `tokens` tokens before the next `layers` layers saves time."""
        if self._backbone.device.type == "meta":
            return True  # offloaded weights are elsewhere between calls, and fetching them costs more than any rows
        return self._compaction_cost.pays(round_up_tokens(tokens), round_up_tokens(kept), layers)

    @cached_property
    def _compaction_cost(self) -> CompactionCost:
        """Measured when it is asked for the first time."""
        device, dtype = self._backbone.device, self._backbone.dtype

        def packed(tokens: int) -> tuple[Tensor, TokenLayout]:
            cu_seqlens = cumulative_lengths([_USUAL_LENGTH] * (tokens // _USUAL_LENGTH), device)
            layout = TokenLayout(cu_seqlens=cu_seqlens, max_seqlen=_USUAL_LENGTH)
            return torch.zeros(tokens, self._config.hidden_size, dtype=dtype, device=device), layout

        def run_layer(tokens: int) -> None:
            self.layer(1, *packed(tokens))

        def compact(tokens: int) -> None:
            every_row = torch.arange(tokens // _USUAL_LENGTH, dtype=torch.int32, device=device)
            compact_rows(*packed(tokens), every_row, tokens)

        with torch.no_grad():
            return CompactionCost(layer=fit(run_layer, device), compaction=fit(compact, device))

    def refresh(self, from_parts: bool) -> None:
        """Take note of modules and parameters that changed; `from_parts` where `runs_from_parts` allows it."""
        self._embeddings = families.embedding_parts(self._backbone.embeddings)
        parts_of = partial(self._family.parts, self._backbone)
        self._layers = current_layers(self._modules, self._layers, parts_of, self._config, from_parts=from_parts)

    def prepared_embedding(self) -> fk.PreparedEmbedding | None:
        """The sum of the tables and its norm, for who knows when they change; None where there is more to do."""
        parts = self._embeddings
        if parts is None or getattr(self._backbone, "embeddings_project", None) is not None:
            return None
        norm = parts.norm
        return fk.PreparedEmbedding([table.weight for table in parts.tables], norm.weight, norm.bias, norm.eps)

    @property
    def embedded(self) -> tuple[int, ...]:
        """By what each table of the embeddings is asked, as `EmbeddingParts.inputs`; nothing where there is more."""
        return () if self._embeddings is None else self._embeddings.inputs

    def embed(self, tokens: PackedTokens, out: Tensor | None = None) -> Tensor:
        """Hidden states before the first layer, [R, H]; R is N rounded up, and the rows added are finite.

        Args:
            tokens: on the device of the model.
            out: [R, H] to write into.
        """
        added = round_up_tokens(tokens.input_ids.shape[0]) - tokens.input_ids.shape[0]
        input_ids = F.pad(tokens.input_ids, (0, added), value=self._config.pad_token_id or 0)
        segments = tokens.token_type_ids
        segments = torch.zeros_like(input_ids) if segments is None else F.pad(segments, (0, added))
        return self.embed_rows(input_ids, self._positions(tokens, input_ids.shape[0]), segments, out)

    def embed_rows(self, input_ids: Tensor, positions: Tensor, segments: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden states [R, H] of rows whose positions and segments are known; all [R] int64."""
        if self._embeddings is None:
            hidden_states = self._family.embed(self._backbone, input_ids[None], segments[None], positions[None], None)[
                0
            ]
            return hidden_states if out is None else out.copy_(hidden_states)
        norm = self._embeddings.norm
        indices = [(input_ids, positions, segments)[kind] for kind in self._embeddings.inputs]
        tables = [table.weight for table in self._embeddings.tables]
        project = getattr(self._backbone, "embeddings_project", None)
        if project is None:
            return fk.embed_layer_norm(tables, indices, norm.weight, norm.bias, norm.eps, out)
        hidden_states = project(fk.embed_layer_norm(tables, indices, norm.weight, norm.bias, norm.eps))
        return hidden_states if out is None else out.copy_(hidden_states)

    def run(self, numbers: range, tokens: PackedTokens | None, waiting: Tensor | None, layout: TokenLayout) -> Tensor:
        """Hidden states after these layers, [R, H], of tokens, or of rows that waited.

        Args:
            numbers: of the layers, from 1.
            tokens: of the rows; None where they waited and `reads_tokens` is false.
            waiting: [R, H] after the layer before these; None before the first.
            layout: of the rows.
        """
        if waiting is None:
            assert tokens is not None
            waiting = self.embed(tokens)
        return self.run_layers(numbers, waiting, layout)

    def run_layers(self, numbers: range, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        """The output of the last of these layers (1 is the first), packed [R, H] or padded [B, T, H] as its input."""
        return run_layers(self._layers[numbers.start - 1 : numbers.stop - 1], hidden_states, layout)

    def layer(self, number: int, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        return self._layers[number - 1](hidden_states, layout)

    def _positions(self, tokens: PackedTokens, rows: int) -> Tensor:
        first = families.first_position(self._config)
        device = tokens.input_ids.device
        starts = tokens.cu_seqlens[:-1].long()
        lengths = torch.tensor(tokens.lengths, device=device)
        used = tokens.input_ids.shape[0]
        position = torch.arange(first, first + used, device=device)
        position -= torch.repeat_interleave(starts, lengths, output_size=used)
        return F.pad(position, (0, rows - used), value=first)


_encoders: weakref.WeakKeyDictionary[ExitModel, PackedEncoder] = weakref.WeakKeyDictionary()


def encoder_of(model: ExitModel) -> PackedEncoder:
    """The packed encoder of `model`, with its copies of the weights up to date."""
    encoder = _encoders.get(model)
    if encoder is None or encoder.layers_of != [id(layer) for layer in model.layers]:
        encoder = _encoders[model] = PackedEncoder(model)
    encoder.refresh(from_parts=runs_from_parts(model))
    return encoder


def compact_rows(hidden_states: Tensor, layout: TokenLayout, survivors: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The `survivors`, of `tokens` tokens together, with the rows that `round_up_tokens` adds; and their cu_seqlens."""
    assert layout.cu_seqlens is not None
    room = hidden_states.new_zeros(round_up_tokens(tokens), hidden_states.shape[1])
    (kept,), cu_seqlens = fk.compact_packed([hidden_states], layout.cu_seqlens, survivors, out=[room])
    return kept, cu_seqlens
