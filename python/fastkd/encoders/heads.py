"""The classifiers after each layer: FastBERT's mini-classifier, or one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastkd_kernels as fk
from fastkd.encoders.configuration import EarlyExitConfig


class StudentHead(nn.Module):
    """FastBERT's head (ACL 2020, section 3.2): narrow, two-head self-attention read at [CLS], dense, classifier.

    Inference runs the op `fastkd_kernels.student_head` folded, training unfolded, with dropout on the attention.
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
        self.classifier = nn.Linear(width, config.num_classes)

    def weights(self) -> fk.StudentHeadWeights:
        """The parameters in the form of `fastkd_kernels.student_head`."""
        return fk.StudentHeadWeights(
            narrow=(self.narrow.weight, self.narrow.bias),
            query=(self.query.weight, self.query.bias),
            key=(self.key.weight, self.key.bias),
            value=(self.value.weight, self.value.bias),
            output=(self.output.weight, self.output.bias),
            dense=(self.dense.weight, self.dense.bias),
            classifier=(self.classifier.weight, self.classifier.bias),
            num_attention_heads=self.num_attention_heads,
        )

    def packed(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits [B, C] in float32 of packed hidden states [N, H], without a gradient."""
        return fk.student_head(hidden_states, self.weights(), cu_seqlens=cu_seqlens)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, C] in float32 of hidden states [B, T, H]; `attention_mask` [B, T] or None (no padding)."""
        return fk.student_head(
            hidden_states,
            self.weights(),
            attention_mask=attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def decide(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        speed: float | Tensor,
        criterion: str,
        top_n: int | None,
        *,
        row_ids: Tensor | None,
        record: fk.ExitRecord,
        layer: int,
        cu_seqlens: Tensor | None = None,
    ) -> fk.ExitGateOutput:
        """Logits and exit decision after `layer`, see `fastkd_kernels.student_head_exit`."""
        return fk.student_head_exit(
            hidden_states,
            self.weights(),
            speed,
            criterion,
            row_ids,
            top_n,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            record=record,
            layer=layer,
        )


class LinearHead(nn.Module):
    """One linear layer on the hidden state of [CLS]."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_classes)

    def packed(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits [B, C] in float32 of packed hidden states [N, H]."""
        return self(hidden_states.index_select(0, cu_seqlens[:-1])[:, None])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, C] in float32 of hidden states [B, T, H]; padding cannot touch [CLS], so the mask is unused."""
        return _at_least_float32(self.classifier(self.dropout(hidden_states[:, 0])))

    def decide(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        speed: float | Tensor,
        criterion: str,
        top_n: int | None,
        *,
        row_ids: Tensor | None,
        record: fk.ExitRecord,
        layer: int,
        cu_seqlens: Tensor | None = None,
    ) -> fk.ExitGateOutput:
        """Logits and exit decision after `layer`, see `fastkd_kernels.exit_gate`."""
        logits = self(hidden_states) if cu_seqlens is None else self.packed(hidden_states, cu_seqlens)
        decided = fk.exit_gate(logits, speed, criterion, row_ids, top_n, record=record, layer=layer)
        return decided._replace(logits=logits)


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


def build_head(config: EarlyExitConfig) -> StudentHead | LinearHead:
    """One randomly initialised head of the kind that `config.head` names."""
    return StudentHead(config) if config.head == "fastbert" else LinearHead(config)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
