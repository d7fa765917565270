"""Floating-point operations of an early-exit model, in the conventions that the literature uses.

    fastbert          2 * in * out for every token that enters an `nn.Linear`; what FastBERT's tables count
    macs              half of that: one multiply-accumulate counts once
    all_matmuls       fastbert, plus the products Q K' and P V of every attention
    fastbert_float32  fastbert, added up in float32 layer by layer, as the tool behind FastBERT's tables did: from
                      2^31 on the sum is rounded, so 21,785,248,256 is printed there as 21,785,247,744

Embeddings, normalisations, activations and softmax count nothing in any of them; a sliding window counts as all tokens.
A FastBERT head is counted as it is written down in the paper, with keys, values, queries and output projection of every
token; the fused op of fastkd_kernels does about half of that work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

CONVENTIONS = ("fastbert", "macs", "all_matmuls")
"""The conventions that tables and sweeps show."""


@dataclass(frozen=True)
class FlopsShape:
    """The sizes on which the operations of a model depend."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_labels: int
    embedding_size: int
    """Width of the embeddings; where it differs from `hidden_size`, one linear layer lies between (ELECTRA)."""
    head: str = "fastbert"
    head_width: int = 128
    linear_products: int | None = None
    """Sum of in * out over the linear layers in one layer; None where they are the six of BERT."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> FlopsShape:
        """The sizes in an encoder's or an early-exit model's configuration."""
        # only an early-exit model has a backbone, and then heads of its own
        encoder: PreTrainedConfig = getattr(config, "backbone", config)
        added: dict[str, Any] = {}
        if encoder is not config:
            added = {
                "head": config.head,
                "head_width": config.head_width,
                "linear_products": config.linear_products,
            }
        return cls(
            hidden_size=encoder.hidden_size,
            # DistilBERT calls it `hidden_dim`
            intermediate_size=encoder.intermediate_size
            if hasattr(encoder, "intermediate_size")
            else getattr(encoder, "hidden_dim", encoder.hidden_size),
            num_hidden_layers=encoder.num_hidden_layers,
            num_labels=config.num_labels or 2,
            embedding_size=getattr(encoder, "embedding_size", None) or encoder.hidden_size,
            **added,
        )


def flops(
    config: PreTrainedConfig | FlopsShape,
    seq_len: int = 128,
    layers: int | None = None,
    heads: int = 1,
    num_labels: int | None = None,
    convention: str = "fastbert",
    learned_exits: int = 0,
) -> int:
    """Operations that one sequence costs.

    Args:
        config: of an encoder (its heads are then FastBERT's, 128 wide) or of an early-exit model.
        seq_len: tokens of the sequence, padding included.
        layers: how many layers it runs through; default: all, 12 for BERT-base.
        heads: how many heads look at it; the full model runs one.
        num_labels: number of classes; default: that of `config`, 2 where it says nothing.
        convention: "fastbert", "macs", "all_matmuls" or "fastbert_float32" (module docstring).
        learned_exits: how often the sequence meets the learned exit, a linear layer on [CLS] and one number more.

    Raises:
        ValueError: an unknown convention, or counts out of range.
    """
    shape = config if isinstance(config, FlopsShape) else FlopsShape.of(config)
    layers = shape.num_hidden_layers if layers is None else layers
    num_labels = shape.num_labels if num_labels is None else num_labels
    for name, value, least, most in (
        ("seq_len", seq_len, 1, None),
        ("layers", layers, 0, shape.num_hidden_layers),
        ("heads", heads, 0, shape.num_hidden_layers),
        ("num_labels", num_labels, 1, None),
        ("learned_exits", learned_exits, 0, shape.num_hidden_layers),
    ):
        if value < least or (most is not None and value > most):
            limit = f"at least {least}" if most is None else f"{least} to {most} (this backbone's depth)"
            raise ValueError(f"{name}: got {value}, expected {limit}")
    linear = list(_linear_terms(shape, seq_len, layers, heads, num_labels))
    linear += [2 * (shape.hidden_size + 1)] * learned_exits
    if convention == "fastbert":
        return sum(linear)
    if convention == "macs":
        return sum(linear) // 2
    if convention == "all_matmuls":
        return sum(linear) + _attention_terms(shape, seq_len, layers, heads)
    if convention == "fastbert_float32":
        total = np.float32(0)
        for term in linear:
            total += np.float32(term)
        return int(total)
    raise ValueError(f"convention: got {convention!r}, expected one of {', '.join((*CONVENTIONS, 'fastbert_float32'))}")


def _linear_terms(shape: FlopsShape, seq_len: int, layers: int, heads: int, num_labels: int) -> Iterator[int]:
    """2 * in * out * tokens of every linear layer, the encoder first and the heads after it."""
    hidden, width = shape.hidden_size, shape.head_width
    if shape.embedding_size != hidden:
        yield 2 * seq_len * shape.embedding_size * hidden
    for _ in range(layers):
        if shape.linear_products is not None:
            yield 2 * seq_len * shape.linear_products
            continue
        yield from [2 * seq_len * hidden * hidden] * 4  # query, key, value, output
        yield from [2 * seq_len * hidden * shape.intermediate_size] * 2
    for _ in range(heads):
        if shape.head == "linear":
            yield 2 * hidden * num_labels
            continue
        yield 2 * seq_len * hidden * width  # narrow
        yield from [2 * seq_len * width * width] * 4  # query, key, value, output
        yield 2 * width * width  # dense, [CLS] only
        yield 2 * width * num_labels


def _attention_terms(shape: FlopsShape, seq_len: int, layers: int, heads: int) -> int:
    per_layer = 2 * 2 * seq_len * seq_len * shape.hidden_size
    per_head = 2 * 2 * seq_len * seq_len * shape.head_width if shape.head == "fastbert" else 0
    return layers * per_layer + heads * per_head
