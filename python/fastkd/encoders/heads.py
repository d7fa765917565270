"""The classifiers after each layer: FastBERT's mini-classifier, or one linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd_kernels as fk
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.layout import NO_PADDING, TokenLayout
from fastkd.encoders.untouched import is_plain_linear, is_untouched
from fastkd.exits import criteria
from fastkd.exits.rule import ExitRule


class FastBertHead(nn.Module):
    """FastBERT's head (ACL 2020, section 3.2): narrow, two-head self-attention read at [CLS], dense, `out_proj`.

    No module here ends in `classifier` or `score`: peft wraps those once more inside heads that it keeps already.

    Inference runs the op `fastkd_kernels.student_head` folded, training unfolded, with dropout on the attention. Where
    a linear layer is not torch's own, or something is hooked to it (adapters, offloading, quantisation), all of them
    are called; so are they in an export, which then holds no op of fastkd_kernels.
    """

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        width = config.head_width
        self.num_attention_heads = config.head_attention_heads
        self.dropout = config.head_dropout
        self.narrow = nn.Linear(config.hidden_size, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, config.num_classes)

    def weights(self) -> fk.StudentHeadWeights:
        """The parameters in the form of `fastkd_kernels.student_head`."""
        return fk.StudentHeadWeights(
            narrow=(self.narrow.weight, self.narrow.bias),
            query=(self.query.weight, self.query.bias),
            key=(self.key.weight, self.key.bias),
            value=(self.value.weight, self.value.bias),
            output=(self.output.weight, self.output.bias),
            dense=(self.dense.weight, self.dense.bias),
            classifier=(self.out_proj.weight, self.out_proj.bias),
            num_attention_heads=self.num_attention_heads,
        )

    def prepared(self) -> fk.PreparedStudentHead | None:
        """The head for packed rows on a CPU, with its weights as they are now; None where it has to be called."""
        return fk.PreparedStudentHead(self.weights()) if is_untouched(self) and self._is_plain() else None

    def forward(self, hidden_states: Tensor, layout: TokenLayout = NO_PADDING) -> Tensor:
        """Logits [B, C] in float32 of hidden states [B, T, H], or packed [N, H]."""
        if torch.compiler.is_exporting() or not self._is_plain():
            return self._called(hidden_states, layout)
        return fk.student_head(
            hidden_states,
            self.weights(),
            attention_mask=layout.attention_mask,
            cu_seqlens=layout.cu_seqlens,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def _is_plain(self) -> bool:
        """Whether running the parameters is all that calling the linear layers does."""
        return all(map(is_plain_linear, self._modules.values()))  # type: ignore[arg-type]

    def _called(self, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        """What `fastkd_kernels.ops.student_head.student_head_reference` computes, by calling the linear layers."""
        hidden_states, mask = layout.padded(hidden_states)
        if mask is not None:
            # 0 * NaN is NaN, so what stands in padding must not reach a product
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        narrow = self.narrow(hidden_states).tanh()

        def split(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            split(self.query(narrow[:, :1])),
            split(self.key(narrow)),
            split(self.value(narrow)),
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        pooled = self.output(attended.transpose(1, 2).flatten(1))
        return _at_least_float32(self.out_proj(self.dense(pooled).tanh()))

    def decide(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        layer: int,
        record: fk.ExitRecord,
        row_ids: Tensor | None = None,
        thresholds: Tensor | None = None,
    ) -> fk.ExitGateOutput:
        """Logits and exit decision after `layer` in one op, `fastkd_kernels.student_head_exit`.

        Args:
            hidden_states: [B, T, H], or packed [N, H].
            rule: with a criterion in `fastkd_kernels.CRITERIA`.
            layout, layer, record, row_ids, thresholds: as in `fastkd.exits.criteria.decide`.
        """
        if not (is_untouched(self) and self._is_plain()):
            logits = self(hidden_states, layout)
            return criteria.decide(logits, rule, layer=layer, record=record, row_ids=row_ids, thresholds=thresholds)
        return fk.student_head_exit(
            hidden_states,
            self.weights(),
            rule.threshold(layer) if thresholds is None else thresholds,
            rule.criterion,
            row_ids,
            rule.top_n,
            attention_mask=layout.attention_mask,
            cu_seqlens=layout.cu_seqlens,
            record=record,
            layer=layer,
        )


class LinearHead(nn.Module):
    """One linear layer on the hidden state of [CLS]."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_classes)

    def prepared(self) -> None:
        """There is nothing to prepare."""

    def forward(self, hidden_states: Tensor, layout: TokenLayout = NO_PADDING) -> Tensor:
        """Logits [B, C] in float32 of hidden states [B, T, H], or packed [N, H]; padding cannot touch [CLS]."""
        return _at_least_float32(self.out_proj(self.dropout(layout.first_tokens(hidden_states))))

    def decide(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        layer: int,
        record: fk.ExitRecord,
        row_ids: Tensor | None = None,
        thresholds: Tensor | None = None,
    ) -> fk.ExitGateOutput:
        """Logits and exit decision after `layer`; arguments as in `FastBertHead.decide`."""
        logits = self(hidden_states, layout)
        return criteria.decide(logits, rule, layer=layer, record=record, row_ids=row_ids, thresholds=thresholds)


class LearnedExit(nn.Module):
    """How certain a head may be: one linear layer for all, on the hidden state of [CLS] (BERxiT, EACL 2021) and margin.

    Distillation trains it to say whether a head's answer is the full model's. The margin between the two largest logits
    is our addition: [CLS] alone says nothing in an encoder that was trained to be read as the mean of its tokens, where
    it hardly differs from text to text. A regression has no margin; 0 stands for it.
    """

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size + 1, 1)

    @torch.no_grad()
    def start(self) -> None:
        """Believe the margin: for two classes, the certainty is then the larger probability."""
        # a logistic regression has one optimum; one fixed start keeps a killed and resumed training the same
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.linear.weight)[:, -1] = 1

    def forward(self, hidden_states: Tensor, logits: Tensor) -> Tensor:
        """Log-odds [...] in float32 that the answer stands.

        Args:
            hidden_states: of [CLS], [..., H].
            logits: of the head, [..., C]; no gradient reaches them.
        """
        features = torch.cat([hidden_states, _margin(logits.detach()).to(hidden_states.dtype)], dim=-1)
        return _at_least_float32(self.linear(features).squeeze(-1))


def _margin(logits: Tensor) -> Tensor:
    """How far the largest logit [..., C] is above the second one, [..., 1]; 0 for C = 1."""
    if logits.shape[-1] == 1:
        return torch.zeros_like(logits)
    largest, second = logits.topk(2, dim=-1).values.split(1, dim=-1)
    return largest - second


ExitHead = FastBertHead | LinearHead


class ExitHeads(nn.Module):
    """The heads of a model, "0" after the first layer: an `nn.ModuleDict` that peft can keep as a whole.

    peft wraps no `ModuleDict` (`modules_to_save`), and its wrapper passes on attributes alone, so `after` is the door.
    """

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        for layer in config.exit_layers:
            self.add_module(str(layer - 1), build_head(config))

    def after(self, layer: int) -> ExitHead:
        """The head after `layer`, from 1."""
        return self[str(layer - 1)]

    def __getitem__(self, name: str) -> ExitHead:
        return cast(ExitHead, self._modules[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def values(self) -> list[ExitHead]:
        """In the order of the layers."""
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, ExitHead]]:
        """Name and head, in the order of the layers."""
        return [(name, self[name]) for name in self]


def build_head(config: EarlyExitConfig) -> ExitHead:
    """One randomly initialised head of the kind that `config.head` names."""
    return FastBertHead(config) if config.head == "fastbert" else LinearHead(config)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
