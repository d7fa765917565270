"""Benchmarks of the survivor gather."""

from __future__ import annotations

import common
import pytest
import torch

import fastkd_kernels as fk


@pytest.mark.parametrize("batch", [8, 32])
def test_compact(compare, batch):
    def make_inputs():
        hidden = torch.randn(batch, 128, 768, device=common.DEVICE)
        survivors = torch.arange(0, batch, 2, dtype=torch.int32, device=common.DEVICE)
        return hidden, survivors

    def check(result, hidden, survivors):
        torch.testing.assert_close(result, hidden[survivors.long()])

    compare(
        "compact",
        f"[{batch}, 128, 768] fp32",
        {
            "fastkd": lambda hidden, survivors: fk.compact([hidden], survivors)[0],
            "index_select": lambda hidden, survivors: hidden.index_select(0, survivors),
        },
        make_inputs,
        check,
        bytes_moved=batch * 128 * 768 * 4,
    )
