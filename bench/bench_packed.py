"""Benchmarks of the packed layout: leaving padding behind, dropping sequences, and going back.

Baselines: boolean masks and `pad_sequence`, as most people write it, a precomputed `index_select`, and `torch.compile`.
Every provider is checked for equality before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import common
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fastkd_kernels as fk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# sequences, their shortest and longest, and the hidden size: SST-2 with MiniLM, and long texts with BERT-base
CASES = {"160 x 5..45, 384": (160, 5, 45, 384), "32 x 16..128, 768": (32, 16, 128, 768)}


def lengths_of(case: str) -> tuple[Tensor, int]:
    """int32 lengths [B] in an order that is not sorted, and the hidden size."""
    batch, shortest, longest, hidden = CASES[case]
    lengths = torch.linspace(shortest, longest, batch).int()
    return lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(0))].to(common.DEVICE), hidden


def bounds_of(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def mask_of(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_pack(compare: Callable[..., object], dtype: str, case: str) -> None:
    torch.compiler.reset()
    lengths, hidden = lengths_of(case)
    total, mask = int(lengths.sum()), mask_of(lengths)
    rows = mask.flatten().nonzero().flatten()

    def make() -> Sequence[Tensor]:
        return (torch.randn(*mask.shape, hidden, device=common.DEVICE).to(DTYPES[dtype]),)

    def check(result: Tensor, padded: Tensor) -> None:
        torch.testing.assert_close(result, padded[mask], rtol=0, atol=0)

    compare(
        "pack",
        f"{case} {dtype}",
        {
            "fastkd": lambda padded: fk.pack([padded], lengths, total)[0][0],
            "h[mask]": lambda padded: padded[mask],
            "index_select, rows known": lambda padded: padded.flatten(0, 1).index_select(0, rows),
            "compile, rows known": torch.compile(lambda padded: padded.flatten(0, 1).index_select(0, rows)),
        },
        make,
        check,
        bytes_moved=2 * total * hidden * DTYPES[dtype].itemsize,
        uncapturable=["h[mask]"],
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_unpack(compare: Callable[..., object], dtype: str, case: str) -> None:
    lengths, hidden = lengths_of(case)
    cu_seqlens, mask, longest = bounds_of(lengths), mask_of(lengths), int(lengths.max())
    pieces = lengths.tolist()

    def make() -> Sequence[Tensor]:
        return (torch.randn(sum(pieces), hidden, device=common.DEVICE).to(DTYPES[dtype]),)

    def into_zeros(packed: Tensor) -> Tensor:
        padded = packed.new_zeros(*mask.shape, hidden)
        padded[mask] = packed
        return padded

    def check(result: Tensor, packed: Tensor) -> None:
        torch.testing.assert_close(result, into_zeros(packed), rtol=0, atol=0)

    compare(
        "unpack",
        f"{case} {dtype}",
        {
            "fastkd": lambda packed: fk.unpack([packed], cu_seqlens, longest)[0],
            "zeros[mask] = h": into_zeros,
            "pad_sequence": lambda packed: pad_sequence(packed.split(pieces), batch_first=True),
        },
        make,
        check,
        bytes_moved=(sum(pieces) + mask.numel()) * hidden * DTYPES[dtype].itemsize,
        uncapturable=["zeros[mask] = h"],
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_compact_packed(compare: Callable[..., object], dtype: str, case: str) -> None:
    """Half of the sequences stay."""
    lengths, hidden = lengths_of(case)
    cu_seqlens = bounds_of(lengths)
    survivors = torch.arange(0, lengths.shape[0], 2, dtype=torch.int32, device=common.DEVICE)
    stays = torch.zeros(lengths.shape[0], dtype=torch.bool, device=common.DEVICE)
    stays[survivors.long()] = True
    total = int(lengths[stays].sum())
    ranges = [bound for bound, kept in zip(pairwise(cu_seqlens.tolist()), stays.tolist(), strict=True) if kept]

    def make() -> tuple[Tensor, Tensor]:
        packed = torch.randn(int(lengths.sum()), hidden, device=common.DEVICE).to(DTYPES[dtype])
        return packed, packed.new_zeros(total, hidden)

    def check(result: Tensor, packed: Tensor, room: Tensor) -> None:
        torch.testing.assert_close(result, torch.cat([packed[start:end] for start, end in ranges]), rtol=0, atol=0)

    compare(
        "compact_packed",
        f"{case} {dtype}",
        {
            "fastkd": lambda packed, room: fk.compact_packed([packed], cu_seqlens, survivors, out=[room])[0][0],
            "h[mask]": lambda packed, room: packed[stays.repeat_interleave(lengths)],
            "cat of slices": lambda packed, room: torch.cat([packed[start:end] for start, end in ranges]),
        },
        make,
        check,
        bytes_moved=2 * total * hidden * DTYPES[dtype].itemsize,
        uncapturable=["h[mask]"],
    )
