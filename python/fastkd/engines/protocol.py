"""`ExitModel`: all that an engine may ask of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import fastkd_kernels as fk
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.heads import ExitHeads
from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.recording import EncoderInputs
from fastkd.exits.rule import ExitRule


class ExitModel(Protocol):
    """An encoder with a head after some of its layers. Layers are numbered from 1."""

    training: bool

    @property
    def config(self) -> EarlyExitConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def backbone(self) -> PreTrainedModel:
        """The encoder of transformers."""
        ...

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's layers, for what runs them from their parts."""
        ...

    @property
    def base_model_prefix(self) -> str:
        """The name of the encoder among the model's modules."""
        ...

    @property
    def _modules(self) -> dict[str, nn.Module | None]: ...

    @property
    def heads(self) -> ExitHeads: ...

    @property
    def exit_layers(self) -> list[int]:
        """The layers that have a head, ascending."""
        ...

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        """`backbone` and `heads`, cheaply."""
        ...

    @property
    def is_replica(self) -> bool:
        """Whether it lives for one call, as the copies of DataParallel do."""
        ...

    @property
    def claims_version(self) -> int:
        """Another number after each change of what is known of the weights."""
        ...

    def exit_rule(
        self,
        speed: float | Sequence[float] | None = None,
        criterion: str | None = None,
        top_n: int | None = None,
        exit_layers: Sequence[int] | None = None,
    ) -> ExitRule:
        """Where rows leave with these options; ValueError for what the model refuses."""
        ...

    def prepared_head(self, layer: int) -> fk.PreparedStudentHead | None:
        """What answers packed rows after `layer`, with the weights as they are now; None: `decide` and `answer` do."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def check_input(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The mask as [B, T] bool, None where nothing is padded; ValueError for what the model cannot take."""
        ...

    def start(self, inputs: EncoderInputs) -> tuple[Tensor, TokenLayout]:
        """Hidden states [B, T, H] before the first layer, and their layout."""
        ...

    @property
    def reads_padding(self) -> bool:
        """Whether a row's answer depends on how far it is padded."""
        ...

    def narrowed(
        self, layout: TokenLayout, survivors: Tensor, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> TokenLayout:
        """The layout of the rows `survivors` [R] of a batch with this layout.

        `hidden_states` [R, W, H] and `attention_mask` [R, W] bool, or None where nothing is padded, are those of these
        rows; where W is less than the width of the batch, the rest was padding.
        """
        ...

    def run_layers(self, numbers: range, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        """Hidden states after these layers, [B, T, H]; the layers are called as they are."""
        ...

    def logits_after(self, layer: int, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        """What the head after `layer` says of each row, [B, C]; of hidden states [B, T, H], or packed [N, H]."""
        ...

    def decide(
        self,
        layer: int,
        hidden_states: Tensor,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        record: fk.ExitRecord,
        row_ids: Tensor | None = None,
        thresholds: Tensor | None = None,
    ) -> fk.ExitGateOutput:
        """What the head after `layer` says of each row, and which rows leave there.

        Args:
            layer: one of `rule.layers`, not the last one.
            hidden_states: after `layer`, [B, T, H], or packed [N, H].
            layout: of the hidden states.
            rule: which rows leave.
            record: where the answers of the rows that leave are written.
            row_ids: [B] int32, where in the record each row belongs; default 0..B-1.
            thresholds: [B] float32, one a row, in the place of the rule's; 0 keeps a row.
        """
        ...

    def answer(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        record: fk.ExitRecord,
        row_ids: Tensor,
    ) -> Tensor:
        """Write what the last head says of every row into the record; the uncertainties [B] float32.

        A regression knows no uncertainty: 0, or NaN where the answer is NaN.
        """
        ...
