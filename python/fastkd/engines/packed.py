"""Engine `packed`: one padded batch on packed tokens, so that padding costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.layout import TokenLayout
from fastkd.engines.batch import warn_about_nan
from fastkd.engines.packed_encoder import PackedEncoder, PackedTokens, compact_rows
from fastkd.engines.protocol import ExitModel
from fastkd.exits.rule import ExitRule


def is_right_padded(attention_mask: Tensor) -> bool:
    """Whether no token of a [B, T] mask follows padding; on a GPU this waits for the device."""
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


@torch.no_grad()
def run(
    model: ExitModel,
    encoder: PackedEncoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    rule: ExitRule,
) -> fk.ExitRecord:
    """Answer every sequence of a right-padded batch at the first head that is certain enough.

    Sequences that left are dropped where that is cheaper than running them on; their answers are safe either way.

    Args:
        model: in evaluation mode.
        encoder: of the model, from `encoder_of`.
        input_ids, token_type_ids: [B, T].
        attention_mask: [B, T] bool, True where a token counts, on the right only; None where nothing is padded.
        rule: which heads are asked, and which rows leave there.

    Returns:
        The logits, uncertainty and exit layer of all B sequences.
    """
    tokens = packed_tokens(input_ids, attention_mask, token_type_ids)
    if not tokens.lengths:
        return fk.ExitRecord.allocate(0, model.config.num_classes, input_ids.device)
    return run_packed(ModelStages(model, encoder), encoder.embed(tokens), tokens.lengths, tokens.cu_seqlens, rule)


class PackedHeads(Protocol):
    """The heads of a model; both as in `ExitModel`."""

    @property
    def config(self) -> EarlyExitConfig: ...

    @property
    def decide(self) -> Callable[..., fk.ExitGateOutput]: ...

    @property
    def answer(self) -> Callable[..., Tensor]: ...


class PackedLayers(Protocol):
    """The layers of a model; both as in `PackedEncoder`."""

    def run_layers(self, numbers: range, hidden_states: Tensor, layout: TokenLayout) -> Tensor: ...

    def compaction_pays(self, tokens: int, kept: int, layers: int) -> bool: ...


class StageRun(NamedTuple):
    """What a stage of packed rows gives."""

    hidden_states: Tensor
    """[R, H] after its last layer."""
    uncertainty: Tensor
    """[B]."""
    staying: list[int]
    """The rows that stay, ascending; none behind the last head."""


class PackedStages(Protocol):
    """A model whose stages run on packed rows."""

    @property
    def config(self) -> EarlyExitConfig: ...

    def run_stage(
        self,
        stage: range,
        hidden_states: Tensor | None,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        used: int,
        record: fk.ExitRecord,
        row_ids: Tensor,
        thresholds: Tensor | None = None,
    ) -> StageRun:
        """Run the layers of a stage and record the rows that leave behind them, all of them behind the last head.

        Args:
            stage: of the rule.
            hidden_states: [R, H] before its first layer; None where the model embeds its tokens itself.
            layout: of the rows.
            rule: which rows leave.
            used: how many of the R rows are tokens.
            record: filled at `row_ids` [B] int32.
            thresholds: [B] for each row, in the place of the rule's.
        """

    @property
    def compaction_pays(self) -> Callable[[int, int, int], bool]:
        """As in `PackedEncoder`."""


class ModelStages:
    """Stages of which layers and head are asked one after the other."""

    def __init__(self, heads: PackedHeads, layers: PackedLayers) -> None:
        self.config = heads.config
        self.compaction_pays = layers.compaction_pays
        self._heads, self._layers = heads, layers

    def run_stage(
        self,
        stage: range,
        hidden_states: Tensor | None,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        used: int,
        record: fk.ExitRecord,
        row_ids: Tensor,
        thresholds: Tensor | None = None,
    ) -> StageRun:
        """As in `PackedStages`; hidden states are needed."""
        assert hidden_states is not None
        layer = stage[-1]
        hidden_states = self._layers.run_layers(stage, hidden_states, layout)
        tokens = hidden_states[:used]
        if layer == rule.last_layer:
            return StageRun(hidden_states, self._heads.answer(tokens, layout, rule, record=record, row_ids=row_ids), [])
        decided = self._heads.decide(layer, tokens, layout, rule, record=record, row_ids=row_ids, thresholds=thresholds)
        return StageRun(hidden_states, decided.uncertainty, decided.kept().tolist())


def run_packed(
    model: PackedStages,
    hidden_states: Tensor | None,
    lengths: Sequence[int],
    cu_seqlens: Tensor,
    rule: ExitRule,
) -> fk.ExitRecord:
    """`run` of hidden states before the first layer, [R, H], or None as in `PackedStages`; of at least one sequence."""
    record = fk.ExitRecord.allocate(len(lengths), model.config.num_classes, cu_seqlens.device)
    lengths, layout = list(lengths), TokenLayout(cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
    row_ids = torch.arange(len(lengths), dtype=torch.int32, device=cu_seqlens.device)
    stages, last = rule.stages, rule.last_layer
    left: set[int] = set()
    checksums = []
    with torch.no_grad():
        for stage, following in zip(stages, (*stages[1:], range(0)), strict=True):
            thresholds = None
            if left:
                # rows that left keep their answers, because no row leaves at a threshold of 0
                threshold = rule.threshold(stage[-1])
                per_row = [0.0 if row in left else threshold for row in range(len(lengths))]
                thresholds = torch.tensor(per_row, device=row_ids.device)
            used = sum(lengths)
            hidden_states, uncertainty, staying = model.run_stage(
                stage, hidden_states, layout, rule, used=used, record=record, row_ids=row_ids, thresholds=thresholds
            )
            checksums.append(uncertainty.sum())
            waiting = [row for row in staying if row not in left]
            if stage[-1] == last or not waiting:
                break
            if len(waiting) == len(lengths):
                continue
            kept = [lengths[row] for row in waiting]
            # the last head answers every row that is there
            if following[-1] == last or model.compaction_pays(used, sum(kept), len(following)):
                survivors = torch.tensor(waiting, dtype=torch.int32, device=row_ids.device)
                hidden_states, cu_seqlens = compact_rows(hidden_states[:used], layout, survivors, sum(kept))
                (row_ids,) = fk.compact([row_ids], survivors)
                lengths, left = kept, set()
                layout = TokenLayout(cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
            else:
                left = set(range(len(lengths))).difference(waiting)
    warn_about_nan(checksums)
    return record


def packed_tokens(input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> PackedTokens:
    """A right-padded batch [B, T] without its padding; a GPU is waited for, to learn the lengths."""
    batch, padded = input_ids.shape
    if attention_mask is None:
        lengths = torch.full((batch,), padded, dtype=torch.int32, device=input_ids.device)
    else:
        lengths = attention_mask.sum(1, dtype=torch.int32)
    on_host = lengths.tolist()
    # encoders of transformers take other integers too
    columns = [column.long() for column in (input_ids, token_type_ids) if column is not None]
    packed, cu_seqlens = fk.pack(columns, lengths, total=sum(on_host))
    return PackedTokens(packed[0], packed[1] if len(packed) > 1 else None, on_host, cu_seqlens)
