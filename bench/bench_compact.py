"""compact against index_select, boolean masks and torch.compile: the hidden states of a batch of which half survives.

`fastkd out=` writes into a workspace that is used again, as the layers of a model do it in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import common
import pytest
import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels.ops.compact import CompactConfig

HIDDEN = (128, 768)  # tokens and hidden size of BERT-base

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(batch: int, dtype: torch.dtype) -> Inputs:
    """Hidden states, the rows that stay, the same as a mask, and a workspace."""
    hidden = torch.randn(batch, *HIDDEN, device=common.DEVICE).to(dtype)
    survivors = torch.randperm(batch, device=common.DEVICE)[: batch // 2].sort().values.int()
    mask = torch.zeros(batch, dtype=torch.bool, device=common.DEVICE)
    mask[survivors.long()] = True
    workspace = torch.zeros(batch // 2, *HIDDEN, dtype=dtype, device=common.DEVICE)
    return hidden, survivors, mask, workspace


def check(result: Tensor, hidden: Tensor, survivors: Tensor, mask: Tensor, workspace: Tensor) -> None:
    torch.testing.assert_close(result, hidden[survivors.long()], rtol=0, atol=0)


def gather_into(hidden: Tensor, survivors: Tensor, mask: Tensor, workspace: Tensor) -> Tensor:
    return fk.compact([hidden], survivors, out=[workspace])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [8, 32, 64, 128, 256])
def test_hidden_states(compare: Callable[..., object], batch: int, dtype: torch.dtype) -> None:
    output_bytes = batch // 2 * HIDDEN[0] * HIDDEN[1] * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    with torch.no_grad():
        compare(
            "compact",
            f"[{batch}, {HIDDEN[0]}, {HIDDEN[1]}] {name}, {output_bytes / 2**20:g} MiB",
            {
                "fastkd": lambda hidden, survivors, *_: fk.compact([hidden], survivors)[0],
                "fastkd out=": gather_into,
                "index_select": lambda hidden, survivors, *_: hidden.index_select(0, survivors),
                "index_select out=": lambda hidden, survivors, mask, workspace: torch.index_select(
                    hidden, 0, survivors, out=workspace
                ),
                "h[mask]": lambda hidden, survivors, mask, _: hidden[mask],
                "compiled": torch.compile(lambda hidden, survivors, *_: hidden.index_select(0, survivors)),
                **_launches(),
            },
            lambda: make_inputs(batch, dtype),
            check,
            bytes_moved=2 * output_bytes,
            uncapturable=["h[mask]"],
        )


def _launches() -> dict[str, common.Provider]:
    """The launch that is not the default, where there is a GPU to try it on."""
    if common.DEVICE.type != "cuda":
        return {}
    bulk = CompactConfig(threads=64, bulk=True)
    return {"fastkd bulk": lambda hidden, survivors, *_: fk.compact([hidden], survivors, config=bulk)[0]}


@pytest.mark.parametrize("batch", [32, 128])
def test_what_a_layer_passes_on(compare: Callable[..., object], batch: int) -> None:
    """Hidden states, attention mask and row ids in one call, against one call each."""

    def inputs() -> tuple[list[Tensor], Tensor, Tensor]:
        hidden, survivors, keep, _ = make_inputs(batch, torch.float32)
        mask = torch.ones(batch, HIDDEN[0], dtype=torch.int64, device=common.DEVICE)
        return [hidden, mask, torch.arange(batch, device=common.DEVICE)], survivors, keep

    def check_all(results: Sequence[Tensor], tensors: list[Tensor], survivors: Tensor, keep: Tensor) -> None:
        for result, tensor in zip(results, tensors, strict=True):
            torch.testing.assert_close(result, tensor[survivors.long()], rtol=0, atol=0)

    def select_each(tensors: list[Tensor], survivors: Tensor, keep: Tensor) -> list[Tensor]:
        return [tensor.index_select(0, survivors) for tensor in tensors]

    with torch.no_grad():
        compare(
            "compact",
            f"[{batch}, {HIDDEN[0]}, {HIDDEN[1]}] float32 + mask + ids",
            {
                "fastkd": lambda tensors, survivors, keep: fk.compact(tensors, survivors),
                "index_select": select_each,
                "h[mask]": lambda tensors, survivors, keep: [tensor[keep] for tensor in tensors],
                "compiled": torch.compile(select_each),
            },
            inputs,
            check_all,
            uncapturable=["h[mask]"],
        )
