"""Traces of made-up rows whose heads come nearer to the last one's answer from layer to layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tiny_models import early_exit_model
from torch import Tensor

import fastkd
from fastkd.exits.flops import FlopsShape
from fastkd.exits.trace import TraceSource


def population(rows: int = 20_000, num_labels: int = 3, seed: int = 0) -> fastkd.ExitTrace:
    """Four heads that come nearer to the last one's answer from layer to layer, and sometimes better it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, num_labels, (rows,), generator=generator)
    difficulty = torch.rand(rows, 1, generator=generator)
    full = 4 * torch.nn.functional.one_hot(labels, num_labels) * (1 - 0.7 * difficulty) + 1.3 * difficulty * noise(
        rows, num_labels
    )
    heads = [full + scale * difficulty * noise(rows, num_labels) for scale in (1.6, 0.9, 0.4)]
    return fastkd.ExitTrace(
        logits=torch.stack([*heads, full], dim=1),
        labels=labels,
        lengths=torch.full((rows,), 20, dtype=torch.int32),
        exit_layers=[1, 2, 3, 4],
        max_length=20,
        shape=FlopsShape.of(early_exit_model(num_labels=num_labels).config),
        source=TraceSource(model="m" * 64, data="d" * 64),
    )


def part_of(trace: fastkd.ExitTrace, rows: Any, data: str = "part") -> fastkd.ExitTrace:
    assert trace.labels is not None
    index = torch.as_tensor(rows)
    return replace(
        trace,
        logits=trace.logits[index],
        labels=trace.labels[index],
        lengths=trace.lengths[index],
        source=replace(trace.source, data=data),
    )


def certain_trace(rows: int, failing: int = 0) -> fastkd.ExitTrace:
    """Rows that all leave at the first head at any speed tried; `failing` of them with another answer."""
    logits = torch.tensor([9.0, -9.0, -9.0]).expand(rows, 4, 3).clone()
    logits[:failing, 0] = torch.tensor([-9.0, 9.0, -9.0])
    return replace(part_of(population(rows=rows), range(rows)), logits=logits, labels=torch.zeros(rows).long())
