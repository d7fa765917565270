"""Benchmarks of whole encoder layers, and of their products by themselves, against oneDNN's packed products.

The contestant is the same layer as engines ran it before: four products of oneDNN from weights that it packed, the
packed attention, and the fused sums. `ONEDNN_MAX_CPU_ISA` limits both. A check in float64 precedes every timing.
"""

from __future__ import annotations

from collections.abc import Callable

import common
import pytest
import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels.ops.encoder_layer import encoder_layer_reference

SIZES = {"MiniLM": (384, 1536, 12), "BERT-base": (768, 3072, 12)}
LENGTHS = {"1 x 16": [16], "1 x 50": [50], "1 x 128": [128], "1 x 512": [512], "32 x 50": [50] * 32}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}


def layer_weights(hidden: int, intermediate: int, dtype: torch.dtype) -> fk.EncoderLayerWeights:
    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), (torch.randn(outputs) / 4).to(dtype)

    norm = torch.ones(hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    return fk.EncoderLayerWeights(
        project=(linear(3 * hidden, hidden),),
        output=linear(hidden, hidden),
        attention_norm=norm,
        expand=linear(intermediate, hidden),
        contract=linear(hidden, intermediate),
        feed_forward_norm=norm,
    )


class OneDnnLayer:
    """The layer from products of oneDNN, one op after another."""

    def __init__(self, weights: fk.EncoderLayerWeights, heads: int) -> None:
        self.heads, self.weights = heads, weights
        products = (*weights.project, weights.output, weights.expand, weights.contract)
        self.products = [(torch.ops.mkldnn._reorder_linear_weight(weight, None), bias) for weight, bias in products]

    def multiply(self, rows: Tensor, number: int, activation: tuple[str, str] = ("none", "")) -> Tensor:
        weight, bias = self.products[number]
        return torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, activation[0], [], activation[1])

    def __call__(self, rows: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        query, key, value = self.multiply(rows, 0).view(rows.shape[0], 3, self.heads, -1).unbind(1)
        attended = fk.varlen_attention(query, key, value, cu_seqlens, longest).flatten(1)
        summed = self.multiply(attended, 1)
        middle = fk.add_layer_norm(summed, rows, *self.weights.attention_norm, 1e-12, out=summed)  # type: ignore[misc]
        expanded = self.multiply(middle, 2, ("gelu", "none"))
        summed = self.multiply(expanded, 3)
        return fk.add_layer_norm(summed, middle, *self.weights.feed_forward_norm, 1e-12, out=summed)  # type: ignore[misc]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(common.DEVICE.type == "cuda", reason="the kernel is the CPU's")
@torch.no_grad()
def test_encoder_layer(compare: Callable[..., object], dtype: str, lengths: str, size: str) -> None:
    hidden, intermediate, heads = SIZES[size]
    weights = layer_weights(hidden, intermediate, DTYPES[dtype])
    layer = fk.pack_encoder_layer(weights, fk.EncoderLayerForm(heads), int8=dtype == "int8")
    onednn = OneDnnLayer(weights, heads)
    cu_seqlens, longest = torch.tensor([0, *LENGTHS[lengths]]).cumsum(0).int(), max(LENGTHS[lengths])
    rows = int(cu_seqlens[-1])
    exact = fk.PackedEncoderLayer(_wide(weights), layer.form, torch.float64)
    tolerance = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.3}[dtype]

    def check(result: Tensor, hidden_states: Tensor) -> None:
        truth = encoder_layer_reference(hidden_states.double(), cu_seqlens, exact)
        torch.testing.assert_close(result.double(), truth, rtol=0, atol=tolerance)

    compare(
        "encoder_layer",
        f"{size}, {lengths}, {dtype}, {fk.encoder_layer_instructions()}",
        {
            "fastkd": lambda hidden_states: fk.encoder_layer(hidden_states, cu_seqlens, layer),
            "oneDNN, op by op": lambda hidden_states: onednn(hidden_states, cu_seqlens, longest),
        },
        lambda: [torch.randn(rows, hidden).to(DTYPES[dtype])],
        check,
        bytes_moved=0 if layer.packed is None else layer.packed.nbytes,
    )


def _wide(weights: fk.EncoderLayerWeights) -> fk.EncoderLayerWeights:
    def affine(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        return pair[0].double(), None if pair[1] is None else pair[1].double()

    assert weights.attention_norm is not None
    return fk.EncoderLayerWeights(
        project=tuple(map(affine, weights.project)),
        output=affine(weights.output),
        attention_norm=affine(weights.attention_norm),
        expand=affine(weights.expand),
        contract=affine(weights.contract),
        feed_forward_norm=affine(weights.feed_forward_norm),
    )
