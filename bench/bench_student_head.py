"""Benchmarks of the student head, alone and with its exit gate.

Baselines: FastBERT's own formulation, which attends from every token though only token 0 is used ("all queries"); the
same head attending from token 0 only ("token 0"), which is what a careful user would write; and `torch.compile` of
both. Every provider is checked against the unfolded head in float64 before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import common
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd_kernels as fk
from fastkd_kernels.ops.student_head import student_head_reference

WIDTH, LABELS = 128, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(32, 128, 768), (8, 128, 768), (1, 128, 768), (32, 64, 384), (8, 512, 768)]
if common.DEVICE.type == "cuda":
    SHAPES += [(128, 128, 768), (512, 128, 768)]

Inputs = tuple[Tensor, fk.StudentHeadWeights]


def all_queries(hidden_states: Tensor, head: fk.StudentHeadWeights) -> Tensor:
    """The head as FastBERT's code computes it: self-attention of all tokens, of which token 0 is then taken."""
    batch, tokens, _ = hidden_states.shape
    narrow = torch.tanh(F.linear(hidden_states, *head.narrow))

    def split(projected: Tensor) -> Tensor:
        return projected.view(batch, tokens, head.num_attention_heads, -1).transpose(1, 2)

    query, key, value = (split(F.linear(narrow, *pair)) for pair in (head.query, head.key, head.value))
    probabilities = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1)
    attended = F.linear((probabilities @ value).transpose(1, 2).reshape(batch, tokens, -1), *head.output)
    return F.linear(torch.tanh(F.linear(attended[:, 0], *head.dense)), *head.classifier)


def fastbert_exit(hidden_states: Tensor, head: fk.StudentHeadWeights) -> tuple[Tensor, list[int]]:
    """`all_queries`, then FastBERT's chain to the rows that stay at a speed of 0.5."""
    logits = all_queries(hidden_states, head)
    probabilities = logits.float().softmax(dim=-1)
    uncertainty = torch.distributions.Categorical(probs=probabilities).entropy() / math.log(LABELS)
    stays = (uncertainty > 0.5).nonzero().flatten()
    return logits, [int(row) for row in stays]


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Callable[[], Inputs]:
    batch, tokens, hidden = shape

    def make() -> Inputs:
        sizes = [(WIDTH, hidden), *[(WIDTH, WIDTH)] * 5, (LABELS, WIDTH)]
        random = lambda *size: torch.randn(size, device=common.DEVICE)  # noqa: E731
        pairs = [((random(*size) / size[1] ** 0.5).to(dtype), random(size[0]).to(dtype)) for size in sizes]
        return random(batch, tokens, hidden).to(dtype), fk.StudentHeadWeights(*pairs)

    return make


def check_logits(logits: Tensor, hidden_states: Tensor, head: fk.StudentHeadWeights) -> None:
    exact = fk.StudentHeadWeights(*[(weight.double(), bias.double()) for weight, bias in head[:7]])
    truth = student_head_reference(hidden_states.double(), exact)
    tolerance = 1e-5 if hidden_states.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(logits.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_student_head(compare: Callable[..., object], dtype: str, shape: tuple[int, int, int]) -> None:
    torch.compiler.reset()
    itemsize = DTYPES[dtype].itemsize
    compare(
        "student_head",
        f"{list(shape)} {dtype}",
        {
            "fastkd": fk.student_head,
            "eager, all queries": all_queries,
            "eager, token 0": student_head_reference,
            "compile, all queries": torch.compile(all_queries, fullgraph=True),
            "compile, token 0": torch.compile(student_head_reference, fullgraph=True),
        },
        make_inputs(shape, DTYPES[dtype]),
        check_logits,
        bytes_moved=(math.prod(shape) + WIDTH * shape[-1]) * itemsize,
    )


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_student_head_exit(compare: Callable[..., object], dtype: str, shape: tuple[int, int, int]) -> None:
    def fastkd(hidden_states: Tensor, head: fk.StudentHeadWeights) -> fk.ExitGateOutput:
        return fk.student_head_exit(hidden_states, head, 0.5)

    def token_0(hidden_states: Tensor, head: fk.StudentHeadWeights) -> tuple[Tensor, Tensor]:
        with fk.backend("reference"):
            logits = student_head_reference(hidden_states, head)
            return logits, fk.exit_gate(logits, 0.5).survivors

    def check(result: object, hidden_states: Tensor, head: fk.StudentHeadWeights) -> None:
        logits = result.logits if isinstance(result, fk.ExitGateOutput) else result[0]  # type: ignore[index]
        check_logits(logits, hidden_states, head)

    compare(
        "student_head_exit",
        f"{list(shape)} {dtype}",
        {"fastkd": fastkd, "eager, FastBERT's chain": fastbert_exit, "eager, token 0, no sync": token_0},
        make_inputs(shape, DTYPES[dtype]),
        check,
        uncapturable=["eager, FastBERT's chain"],
    )
