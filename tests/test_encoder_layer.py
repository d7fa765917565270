"""Whole encoder layers against float64 and PyTorch's own, on every instruction set of this CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastkd_kernels as fk
from fastkd_kernels.ops.encoder_layer import encoder_layer_reference


def weights(
    hidden: int, intermediate: int, width: int, dtype: torch.dtype, gated: bool = False, biased: bool = True
) -> fk.EncoderLayerWeights:
    def product(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        weight = torch.randn(rows, columns, dtype=torch.float64) / columns**0.5
        bias = torch.randn(rows, dtype=torch.float64) / 4 if biased else None
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def norm() -> tuple[Tensor, Tensor | None]:
        weight, bias = product(hidden, 1)
        return weight[:, 0] / 4 + 1, bias

    return fk.EncoderLayerWeights(
        project=tuple(product(width, hidden) for _ in range(3)),
        output=product(hidden, width),
        attention_norm=norm(),
        expand=product(intermediate * (2 if gated else 1), hidden),
        contract=product(hidden, intermediate),
        feed_forward_norm=norm(),
    )


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_reference_is_pytorchs_layer(norm_first: bool) -> None:
    theirs = nn.TransformerEncoderLayer(24, 3, 40, 0.0, "gelu", 1e-12, True, norm_first, dtype=torch.float64).eval()
    attention = theirs.self_attn

    def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
        return module.weight.detach(), module.bias.detach()

    assert attention.in_proj_weight is not None
    given = fk.EncoderLayerWeights(
        project=((attention.in_proj_weight.detach(), attention.in_proj_bias.detach()),),
        output=affine(attention.out_proj),
        attention_norm=affine(theirs.norm1),
        expand=affine(theirs.linear1),
        contract=affine(theirs.linear2),
        feed_forward_norm=affine(theirs.norm2),
    )
    layer = fk.pack_encoder_layer(given, fk.EncoderLayerForm(3, norm_first=norm_first))
    rows = torch.randn(9, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.cat([theirs(part[None])[0] for part in rows.split([4, 5])])
    torch.testing.assert_close(encoder_layer_reference(rows, bounds([4, 5]), layer), expected)
    torch.testing.assert_close(fk.encoder_layer(rows, bounds([4, 5]), layer), expected)
