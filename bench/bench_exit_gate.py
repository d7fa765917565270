"""Benchmarks of the exit gate against the eager operations it replaces, torch.compile and FastBERT's own chain.

Every provider turns logits into uncertainties, the numbers of the rows that stay, and how many these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import common
import pytest
import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels.ops.exit_gate import exit_gate_reference, uncertainty_reference

SPEED = 0.5
SAMPLING = common.Sampling(case_seconds=1.0)
Decision = tuple[Tensor, Tensor, int | Tensor]


def eager(logits: Tensor) -> Decision:
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    uncertainty = entropy / math.log(logits.shape[1])
    survivors = (uncertainty > SPEED).nonzero().squeeze(1)
    return uncertainty, survivors, survivors.shape[0]


def fastbert(logits: Tensor) -> Decision:
    """As FastBERT's authors wrote it: a distribution object, nonzero, and a Python loop over the survivors."""
    probabilities = torch.softmax(logits.float(), dim=-1)
    entropy = torch.distributions.Categorical(probabilities).entropy()
    uncertainty = entropy / math.log(logits.shape[1])
    rows = list(range(logits.shape[0]))
    picked = (uncertainty > SPEED).nonzero().view(-1)
    survivors = torch.tensor([rows[index] for index in picked], dtype=torch.int64, device=logits.device)
    return uncertainty, survivors, len(survivors)


def without_waiting(logits: Tensor) -> Decision:
    """The reference: eager operations, but a sort for nonzero, so that a CUDA graph can hold them."""
    return exit_gate_reference(logits, SPEED)[:3]


compiled = torch.compile(eager, dynamic=True)

WAITING = ("eager", "torch.compile", "FastBERT")


def check(result: Any, logits: Tensor) -> None:
    uncertainty, survivors, count = result[:3]
    truth = uncertainty_reference(logits.double())
    torch.testing.assert_close(uncertainty.double(), truth, rtol=0, atol=1e-5)  # 131,072 classes cost eager this much
    assert survivors[: int(count)].tolist() == (~(uncertainty <= SPEED)).nonzero().flatten().tolist()


def make_inputs(rows: int, columns: int, dtype: torch.dtype) -> Callable[[], tuple[Tensor]]:
    sharpness = torch.linspace(0.1, 6.0, rows, device=common.DEVICE)[:, None]

    def make() -> tuple[Tensor]:
        return ((torch.randn(rows, columns, device=common.DEVICE) * sharpness).to(dtype),)

    return make


@pytest.mark.parametrize("columns", [2, 4, 10, 16, 40])
@pytest.mark.parametrize("rows", [32, 256, 1024, 4096])
def test_exit_gate(compare: Callable[..., Any], rows: int, columns: int) -> None:
    providers = {
        "fastkd": lambda logits: fk.exit_gate(logits, SPEED),
        "eager": eager,
        "torch.compile": compiled,
        "FastBERT": fastbert,
        "eager, no wait": without_waiting,
    }
    compare(
        "exit_gate",
        f"[{rows}, {columns}] fp32",
        providers,
        make_inputs(rows, columns, torch.float32),
        check,
        bytes_moved=rows * (4 * columns + 8),
        uncapturable=WAITING,
        sampling=SAMPLING,
    )


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [(256, 4, "bfloat16"), (256, 4, "float16"), (32, 2**17, "float32")]
)
def test_exit_gate_other_shapes(compare: Callable[..., Any], rows: int, columns: int, dtype: str) -> None:
    compare(
        "exit_gate",
        f"[{rows}, {columns}] {dtype}",
        {"fastkd": lambda logits: fk.exit_gate(logits, SPEED), "eager": eager, "eager, no wait": without_waiting},
        make_inputs(rows, columns, getattr(torch, dtype)),
        check,
        bytes_moved=rows * (getattr(torch, dtype).itemsize * columns + 8),
        uncapturable=WAITING,
        sampling=SAMPLING,
    )


@pytest.mark.parametrize("rows", [32, 256])
def test_exit_gate_with_a_record(compare: Callable[..., Any], rows: int) -> None:
    """As a model calls it: the answers of the rows that leave go to where the rows came from."""
    record = fk.ExitRecord.allocate(rows, 4, common.DEVICE)
    row_ids = torch.randperm(rows, device=common.DEVICE)

    def eager_with_record(logits: Tensor) -> Decision:
        uncertainty, survivors, count = eager(logits)
        left = (uncertainty <= SPEED).nonzero().squeeze(1)
        record.write(row_ids[left], logits[left], uncertainty[left], 3)
        return uncertainty, survivors, count

    compare(
        "exit_gate",
        f"[{rows}, 4] fp32, record",
        {
            "fastkd": lambda logits: fk.exit_gate(logits, SPEED, row_ids=row_ids, record=record, layer=3),
            "eager": eager_with_record,
        },
        make_inputs(rows, 4, torch.float32),
        check,
        uncapturable=WAITING,
        sampling=SAMPLING,
    )
