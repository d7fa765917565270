"""Engine `packed`: an encoder on packed tokens, so that padding costs nothing.

The modules of transformers stay the owners of the weights. Layers without hooks, adapters or patches are run from their
parts:

* queries, keys and values are one product; the joined copy of their weights is made again when a parameter changes;
* sums and normalisations are one pass (`fastkd_kernels.add_layer_norm`);
* on a CPU, weights are rearranged once for oneDNN, the activation is inside its product, and row counts are rounded up
  to a few sizes, because oneDNN prepares a primitive for every new one.

Any other layer runs its own `forward`, with the attention that this file registers with transformers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import fastkd_kernels as fk
from fastkd.encoders import families
from fastkd.engines.batch import warn_about_nan
from fastkd.engines.compaction_cost import CompactionCost, fit
from fastkd.exits.rule import head_speeds

if TYPE_CHECKING:
    from fastkd.model.modeling import EarlyExitForSequenceClassification

ATTENTION = "fastkd_packed"
"""The name under which the packed attention is registered with transformers."""

_USUAL_LENGTH = 32  # tokens of the sequences on which costs are measured


def bucket(rows: int) -> int:
    """`rows` rounded up to one of few sizes: by at most 15 below 64, 31 below 256 and 63 above."""
    step = 16 if rows <= 64 else 32 if rows <= 256 else 64
    return -(-rows // step) * step


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
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)


def bounds(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """cu_seqlens [B + 1] int32 of sequences of these lengths."""
    total, ends = 0, [0]
    for length in lengths:
        total += length
        ends.append(total)
    return torch.tensor(ends, dtype=torch.int32, device=device)


def supports(model: EarlyExitForSequenceClassification) -> bool:
    """Whether packed tokens beat padded batches: on a CPU, with layers that run from their parts."""
    return model.device.type == "cpu" and runs_from_parts(model)


def runs_from_parts(model: EarlyExitForSequenceClassification) -> bool:
    """Whether our kernels, and on a CPU oneDNN, take the dtype of the model where it is."""
    parameter = next(model.parameters())
    device = parameter.device.type
    if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return False
    takes_dtype = _onednn_multiplies(parameter.dtype) if device == "cpu" else parameter.dtype == torch.bfloat16
    return takes_dtype and fk.missing_kernels(("varlen_attention", "layer_norm", "packed"), device) is None


def is_capturable(model: EarlyExitForSequenceClassification) -> bool:
    """Whether a CUDA graph can hold packed layers: attention in another dtype or head size waits for the lengths."""
    config = model.config.backbone
    head_size = config.hidden_size // config.num_attention_heads
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.float16, torch.bfloat16)
        and head_size % 8 == 0
        and fk.missing_kernels(("varlen_attention", "packed", "student_head", "exit_gate"), "cuda") is None
    )


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


# Linear layers


class JoinedLinear:
    """One or several linear layers of the same input as one product; the weights of a single one are not copied."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._modules = modules
        self._stamp: fk.ParameterStamp | None = None
        self._weight: Any = None
        self._bias: Tensor | None = None

    def refresh(self) -> None:
        """Join the weights again if they changed since the last time."""
        parameters = [p for module in self._modules for p in (module.weight, module.bias) if p is not None]
        if self._stamp is not None and self._stamp.is_current(parameters):
            return
        stamp = fk.ParameterStamp(parameters)
        with torch.no_grad():
            weights: list[Tensor] = [module.weight for module in self._modules]
            biases: list[Tensor] = [module.bias for module in self._modules if module.bias is not None]
            self._weight = self._prepared((torch.cat(weights) if len(weights) > 1 else weights[0]).detach())
            self._bias = (torch.cat(biases) if len(biases) > 1 else biases[0]).detach() if biases else None
        self._stamp = stamp

    def _prepared(self, weight: Tensor) -> Tensor:
        return weight

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self._weight, self._bias)


class PackedLinear(JoinedLinear):
    """The same with a copy of the weights that is rearranged for oneDNN, and an activation inside the product."""

    def __init__(self, modules: Sequence[nn.Linear], activation: tuple[str, str] = ("none", "")) -> None:
        super().__init__(modules)
        self._activation = activation

    def _prepared(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, rows: Tensor) -> Tensor:
        attribute, algorithm = self._activation
        return torch.ops.mkldnn._linear_pointwise.default(rows, self._weight, self._bias, attribute, [], algorithm)


def _linear_on(device: torch.device) -> type[JoinedLinear]:
    return PackedLinear if device.type == "cpu" else JoinedLinear


_FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "tanh gelu": ("gelu", "tanh"), "relu": ("relu", "")}


def _fused_activation(activation: Callable[[Tensor], Tensor]) -> tuple[str, str] | None:
    """How oneDNN calls an activation, found out by what it does; None where it has no such one."""
    probe = torch.linspace(-4, 4, 65)
    for name, exact in (
        ("gelu", F.gelu(probe)),
        ("tanh gelu", F.gelu(probe, approximate="tanh")),
        ("relu", probe.relu()),
    ):
        if torch.allclose(activation(probe), exact, rtol=0, atol=1e-6):
            return _FUSED_ACTIVATIONS[name]
    return None


# Layers


class _LayerFromParts:
    """One encoder layer on packed rows, run from its parts."""

    def __init__(self, parts: families.LayerParts, heads: int, linear: type[JoinedLinear]) -> None:
        self._parts = parts
        self._device = parts.query.weight.device
        self._heads = heads
        self._activation: Callable[[Tensor], Tensor] | None = parts.activation
        self._project = linear([parts.query, parts.key, parts.value])
        self._output = linear([parts.output])
        self._expand = linear([parts.expand])
        self._contract = linear([parts.contract])
        fused = _fused_activation(parts.activation) if linear is PackedLinear else None
        if fused is not None:
            self._expand, self._activation = PackedLinear([parts.expand], fused), None

    def runs(self, parts: families.LayerParts) -> bool:
        """Whether it was made for these modules where they are now."""
        return self._parts == parts and self._device == parts.query.weight.device

    def refresh(self) -> None:
        for linear in (self._project, self._output, self._expand, self._contract):
            linear.refresh()

    def __call__(self, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The layer's output [R, H]; rows behind the last sequence stay finite."""
        query, key, value = self._queries_keys_values(hidden_states)
        attended = fk.varlen_attention(query, key, value, cu_seqlens, max_seqlen)
        return self._after_attention(attended.flatten(1), hidden_states)

    def padded(self, hidden_states: Tensor, layer_mask: Tensor | None) -> Tensor:
        """The layer's output [B, T, H] of padded sequences; `layer_mask` bool [B, 1, T, T] or None."""
        rows = hidden_states.flatten(0, 1)
        query, key, value = (
            tensor.unflatten(0, hidden_states.shape[:2]).transpose(1, 2) for tensor in self._queries_keys_values(rows)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=layer_mask)
        return self._after_attention(attended.transpose(1, 2).reshape(rows.shape), rows).view_as(hidden_states)

    def _queries_keys_values(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Each [R, heads, head size]."""
        return self._project(rows).view(rows.shape[0], 3, self._heads, -1).unbind(1)

    def _after_attention(self, attended: Tensor, rows: Tensor) -> Tensor:
        middle = _add_norm(self._output(attended), rows, self._parts.attention_norm)
        expanded = self._expand(middle)
        if self._activation is not None:
            expanded = self._activation(expanded)
        return _add_norm(self._contract(expanded), middle, self._parts.feed_forward_norm)


def _add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The normalised sum, written over x."""
    return fk.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, out=x)


def _is_plain(layer: nn.Module, parts: families.LayerParts) -> bool:
    """Whether running the parts is all that running the layer does: no adapters, quantised weights, hooks, patches."""
    linear = (parts.query, parts.key, parts.value, parts.output, parts.expand, parts.contract)
    norms = (parts.attention_norm, parts.feed_forward_norm)
    return (
        all(type(module) is nn.Linear for module in linear)
        and all(type(module) is nn.LayerNorm and module.bias is not None for module in norms)
        and all(_is_untouched(module) for module in layer.modules())
    )


def _is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's `forward` and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class _ModuleLayer:
    """One encoder layer on packed rows, run by transformers with the attention registered here."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return self._layer(hidden_states[None], None, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)[0]

    def padded(self, hidden_states: Tensor, layer_mask: Tensor | None) -> Tensor:
        return self._layer(hidden_states, layer_mask)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface on packed tokens: query, key, value [1, heads, N, head_size]."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return fk.varlen_attention(query, key, value, cu_seqlens, max_seqlen, scaling)[None], None


AttentionInterface.register(ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


# Encoders


class PackedEncoder:
    """The encoder of one early-exit model on packed tokens; made by `encoder_of`, which keeps it."""

    def __init__(self, model: EarlyExitForSequenceClassification) -> None:
        self._backbone: Any = model.backbone
        self._modules = list(model.layers)
        self.layers_of = [id(layer) for layer in self._modules]
        self._family = families.family_of(model.config.backbone.model_type)
        self._config = model.config.backbone
        self._layers: list[_LayerFromParts | _ModuleLayer] = []
        self._tables: tuple[nn.Embedding, ...] | None = None

    @property
    def is_faster(self) -> bool:
        """Whether every layer runs from its parts, which is where packed tokens beat padded batches."""
        return all(isinstance(layer, _LayerFromParts) for layer in self._layers)

    def compaction_pays(self, tokens: int, kept: int, layers: int) -> bool:
        """Whether dropping all but `kept` of `tokens` tokens before the next `layers` layers saves time."""
        return self._compaction_cost.pays(bucket(tokens), bucket(kept), layers)

    @cached_property
    def _compaction_cost(self) -> CompactionCost:
        """Measured when it is asked for the first time."""
        device, dtype = self._backbone.device, self._backbone.dtype

        def hidden_states(tokens: int) -> Tensor:
            return torch.zeros(tokens, self._config.hidden_size, dtype=dtype, device=device)

        def cu_seqlens(tokens: int) -> Tensor:
            return bounds([_USUAL_LENGTH] * (tokens // _USUAL_LENGTH), device)

        def run_layer(tokens: int) -> None:
            self.layer(1, hidden_states(tokens), cu_seqlens(tokens), _USUAL_LENGTH)

        def compact(tokens: int) -> None:
            everyone = torch.arange(tokens // _USUAL_LENGTH, dtype=torch.int32, device=device)
            _compact(hidden_states(tokens), cu_seqlens(tokens), everyone, tokens)

        with self.running():
            return CompactionCost(layer=fit(run_layer, device), compaction=fit(compact, device))

    def refresh(self, from_parts: bool) -> None:
        """Take note of modules and parameters that changed; `from_parts` where `runs_from_parts` allows it."""
        self._tables = families.embedding_tables(self._backbone.embeddings)
        previous: Sequence[_LayerFromParts | _ModuleLayer | None] = self._layers or [None] * len(self._modules)
        self._layers = [
            self._runner(layer, before, from_parts) for layer, before in zip(self._modules, previous, strict=True)
        ]

    def _runner(
        self, layer: nn.Module, before: _LayerFromParts | _ModuleLayer | None, from_parts: bool
    ) -> _LayerFromParts | _ModuleLayer:
        parts = self._family.parts(layer) if from_parts else None
        if parts is None or not _is_plain(layer, parts):
            return before if isinstance(before, _ModuleLayer) else _ModuleLayer(layer)
        if not isinstance(before, _LayerFromParts) or not before.runs(parts):
            before = _LayerFromParts(parts, self._config.num_attention_heads, _linear_on(self._backbone.device))
        before.refresh()
        return before

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the calls below: no gradients, and the registered attention where transformers' modules run."""
        previous = self._config._attn_implementation
        needs_attention = any(isinstance(layer, _ModuleLayer) for layer in self._layers)
        if needs_attention:
            self._config._attn_implementation = ATTENTION
        try:
            with torch.no_grad():
                yield
        finally:
            if needs_attention:
                self._config._attn_implementation = previous

    def embed(self, tokens: PackedTokens, out: Tensor | None = None) -> Tensor:
        """Hidden states before the first layer, [R, H]; R is N rounded up by `bucket`, and the rows added are finite.

        Args:
            tokens: on the device of the model.
            out: [R, H] to write into.
        """
        added = bucket(tokens.input_ids.shape[0]) - tokens.input_ids.shape[0]
        input_ids = F.pad(tokens.input_ids, (0, added), value=self._config.pad_token_id or 0)
        segments = tokens.token_type_ids
        segments = torch.zeros_like(input_ids) if segments is None else F.pad(segments, (0, added))
        return self.embed_rows(input_ids, self._positions(tokens, input_ids.shape[0]), segments, out)

    def embed_rows(self, input_ids: Tensor, positions: Tensor, segments: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden states [R, H] of rows whose positions and segments are known; all [R] int64."""
        if self._tables is None:
            hidden_states = self._family.embed(self._backbone, input_ids[None], segments[None], positions[None], None)[
                0
            ]
            return hidden_states if out is None else out.copy_(hidden_states)
        norm = self._backbone.embeddings.LayerNorm
        indices = (input_ids, positions, segments)[: len(self._tables)]
        tables = [table.weight for table in self._tables]
        project = getattr(self._backbone, "embeddings_project", None)
        if project is None:
            return fk.embed_layer_norm(tables, indices, norm.weight, norm.bias, norm.eps, out)
        hidden_states = project(fk.embed_layer_norm(tables, indices, norm.weight, norm.bias, norm.eps))
        return hidden_states if out is None else out.copy_(hidden_states)

    def layer(self, number: int, hidden_states: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The output of layer `number` (1 is the first) for packed rows [R, H]."""
        return self._layers[number - 1](hidden_states, cu_seqlens, max_seqlen)

    def padded_layer(self, number: int, hidden_states: Tensor, layer_mask: Tensor | None) -> Tensor:
        """The output of layer `number` for padded sequences [B, T, H]; `layer_mask` bool [B, 1, T, T] or None."""
        return self._layers[number - 1].padded(hidden_states, layer_mask)

    def _positions(self, tokens: PackedTokens, rows: int) -> Tensor:
        first = families.first_position(self._config)
        device = tokens.input_ids.device
        starts = tokens.cu_seqlens[:-1].long()
        lengths = torch.tensor(tokens.lengths, device=device)
        used = tokens.input_ids.shape[0]
        position = torch.arange(first, first + used, device=device)
        position -= torch.repeat_interleave(starts, lengths, output_size=used)
        return F.pad(position, (0, rows - used), value=first)


_encoders: weakref.WeakKeyDictionary[nn.Module, PackedEncoder] = weakref.WeakKeyDictionary()


def encoder_of(model: EarlyExitForSequenceClassification) -> PackedEncoder:
    """The packed encoder of `model`, with its copies of the weights up to date."""
    encoder = _encoders.get(model)
    if encoder is None or encoder.layers_of != [id(layer) for layer in model.layers]:
        encoder = _encoders[model] = PackedEncoder(model)
    encoder.refresh(from_parts=runs_from_parts(model))
    return encoder


# One padded batch


def is_right_padded(attention_mask: Tensor) -> bool:
    """Whether no token of a [B, T] mask follows padding; on a GPU this waits for the device."""
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


@torch.no_grad()
def run(
    model: EarlyExitForSequenceClassification,
    encoder: PackedEncoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    speed: float | Sequence[float],
    criterion: str,
    top_n: int | None,
    decision_layers: Sequence[int],
) -> fk.ExitRecord:
    """Answer every sequence of a right-padded batch at the first head that is certain enough.

    Sequences that left are dropped where that is cheaper than running them on; their answers are safe either way.

    Args:
        model: in evaluation mode.
        encoder: of the model, from `encoder_of`.
        input_ids, token_type_ids: [B, T].
        attention_mask: [B, T] bool, True where a token counts, on the right only; None where nothing is padded.
        speed: as in `fastkd.exits.rule.head_speeds`.
        criterion, top_n: as in `fastkd.exits.criteria`.
        decision_layers: the layers whose heads decide, the last layer last.

    Returns:
        The logits, uncertainty and exit layer of all B sequences.
    """
    tokens = packed_tokens(input_ids, attention_mask, token_type_ids)
    record = fk.ExitRecord.allocate(len(tokens.lengths), model.config.num_classes, input_ids.device)
    if not tokens.lengths:
        return record
    lengths, cu_seqlens = list(tokens.lengths), tokens.cu_seqlens
    row_ids = torch.arange(len(lengths), dtype=torch.int32, device=input_ids.device)
    heads, last = model.heads_by_layer, decision_layers[-1]
    speeds = head_speeds(speed, model.exit_layers)
    left: set[int] = set()
    checksums = []
    with encoder.running():
        hidden_states = encoder.embed(tokens)
        before, after = [0, *decision_layers[:-1]], [*decision_layers[1:], last]
        for start, end, following in zip(before, decision_layers, after, strict=True):
            for number in range(start + 1, end + 1):
                hidden_states = encoder.layer(number, hidden_states, cu_seqlens, max(lengths))
            used = hidden_states[: sum(lengths)]
            if end == last:
                checksums.append(
                    answer_all(model, heads[end], used, cu_seqlens, criterion, top_n, row_ids, record, end)
                )
                break
            limit: float | Tensor = speeds[end]
            if left:
                # at speed 0 nobody leaves, so that those who left keep their answers
                limit = torch.tensor([0.0 if row in left else limit for row in range(len(lengths))], device=used.device)
            decided = model.decide(
                heads[end], used, None, limit, criterion, top_n,
                row_ids=row_ids, record=record, layer=end, cu_seqlens=cu_seqlens,
            )  # fmt: skip
            checksums.append(decided.uncertainty.sum())
            waiting = [row for row in decided.kept().tolist() if row not in left]
            if not waiting:
                break
            if len(waiting) == len(lengths):
                continue
            kept = [lengths[row] for row in waiting]
            # the last head answers whoever is there
            if following == last or encoder.compaction_pays(sum(lengths), sum(kept), following - end):
                survivors = torch.tensor(waiting, dtype=torch.int32, device=row_ids.device)
                hidden_states, cu_seqlens = _compact(used, cu_seqlens, survivors, sum(kept))
                (row_ids,) = fk.compact([row_ids], survivors)
                lengths, left = kept, set()
            else:
                left = set(range(len(lengths))).difference(waiting)
    warn_about_nan(checksums)
    return record


def _compact(hidden_states: Tensor, cu_seqlens: Tensor, survivors: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The `survivors`, of `tokens` tokens together, with the rows that `bucket` adds; and their bounds."""
    room = hidden_states.new_zeros(bucket(tokens), hidden_states.shape[1])
    (kept,), kept_bounds = fk.compact_packed([hidden_states], cu_seqlens, survivors, out=[room])
    return kept, kept_bounds


def answer_all(
    model: EarlyExitForSequenceClassification,
    head: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    criterion: str,
    top_n: int | None,
    row_ids: Tensor,
    record: fk.ExitRecord,
    layer: int,
) -> Tensor:
    """Write the answers of the last head for every sequence; returns the sum of the uncertainties."""
    if record.logits.shape[1] == 1:
        logits = head.packed(hidden_states, cu_seqlens)
        uncertainty = torch.zeros(logits.shape[0], device=logits.device)  # a regression knows none
    else:
        decided = model.decide(
            head,
            hidden_states,
            None,
            0.0,
            criterion,
            top_n,
            row_ids=row_ids,
            record=record,
            layer=layer,
            cu_seqlens=cu_seqlens,
        )
        logits, uncertainty = decided.logits, decided.uncertainty
    record.write(row_ids, logits, uncertainty, layer)
    return uncertainty.sum()


def packed_tokens(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> PackedTokens:
    """A right-padded batch [B, T] without its padding; a GPU is waited for, to learn the lengths."""
    batch, padded = input_ids.shape
    if attention_mask is None:
        lengths = torch.full((batch,), padded, dtype=torch.int32, device=input_ids.device)
    else:
        lengths = attention_mask.sum(1, dtype=torch.int32)
    on_host = lengths.tolist()
    columns = [input_ids] if token_type_ids is None else [input_ids, token_type_ids]
    packed, cu_seqlens = fk.pack(columns, lengths, total=sum(on_host))
    return PackedTokens(packed[0], packed[1] if len(packed) > 1 else None, on_host, cu_seqlens)
