"""Attention on packed sequences against float64, and its indifference to who else is in the batch."""

from __future__ import annotations

import sys

import pytest
import torch
from error_budget import assert_within_budget
from torch import Tensor
from transformers.masking_utils import sliding_window_bidirectional_overlay
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

import fastkd_kernels as fk
from fastkd_kernels import _extension
from fastkd_kernels.ops.varlen_attention import varlen_attention_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(
    lengths: list[int], heads: int, head_size: int, dtype: torch.dtype, spare: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value as slices of one projection, and cu_seqlens; `spare` rows belong to no sequence."""
    rows = sum(lengths) + spare
    projected = torch.randn(rows, 3, heads, head_size, device=DEVICE, dtype=torch.float64) * scale
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    return *projected.to(dtype).unbind(1), bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("lengths", "heads", "head_size"),
    [
        ([1, 17, 0, 64, 5], 3, 32),
        ([33, 2, 16, 15], 2, 64),
        ([7, 9], 4, 8),
        ([20, 3], 1, 20),
        ([300], 2, 48),
        ([0, 0], 2, 16),
        ([], 2, 16),
    ],
)
def test_error_budget(lengths: list[int], heads: int, head_size: int, dtype: torch.dtype) -> None:
    query, key, value, bounds = inputs(lengths, heads, head_size, dtype, spare=3)
    longest = max(lengths, default=0)
    result = fk.varlen_attention(query, key, value, bounds, longest)
    wide = [tensor.double() for tensor in (query, key, value)]
    truth = varlen_attention_reference(*wide, bounds, longest)
    same_dtype = varlen_attention_reference(query, key, value, bounds, longest)
    assert result.dtype == dtype
    used = slice(0, sum(lengths))
    assert_within_budget(result[used], truth[used], same_dtype[used], slack=2.0, absolute=4 * torch.finfo(dtype).eps)
    is_flash = DEVICE.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0
    assert (longest and is_flash) or not result[sum(lengths) :].any(), "rows of no sequence"


def tables(positions: int, head_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines as transformers computes them."""
    frequencies = 10000.0 ** -(torch.arange(0, head_size, 2, device=DEVICE, dtype=torch.float64) / head_size)
    angles = torch.arange(positions, device=DEVICE)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def attention_as_transformers_does(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, rotary: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Of one sequence [T, heads, head_size], by transformers' rotation of halves and its mask of a sliding window."""
    tokens = query.shape[0]
    if rotary is not None:
        cosines, sines = (torch.cat([table[:tokens], table[:tokens]], -1)[None].to(query.dtype) for table in rotary)
        query, key = apply_rotary_pos_emb(query[None], key[None], cosines, sines, unsqueeze_dim=2)
        query, key = query[0], key[0]
    seen = None
    if window is not None:
        sees = sliding_window_bidirectional_overlay(window)
        pairs = [[bool(sees(0, 0, q, k)) for k in range(tokens)] for q in range(tokens)]
        seen = torch.tensor(pairs, device=query.device)
    rows = (rows.transpose(0, 1) for rows in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=seen).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("window", [None, 0, 1, 7, 16, 40, 1000])
@pytest.mark.parametrize(("lengths", "head_size"), [([1, 17, 0, 64, 5, 33], 32), ([150, 2], 64), ([20, 50], 12)])
def test_window_and_rotary(
    lengths: list[int], head_size: int, window: int | None, turned: bool, dtype: torch.dtype
) -> None:
    query, key, value, bounds = inputs(lengths, 2, head_size, dtype, spare=3)
    rotary = tables(max(lengths) + 2, head_size) if turned else None
    result = fk.varlen_attention(query, key, value, bounds, max(lengths), window=window, rotary=rotary)
    same_dtype = varlen_attention_reference(query, key, value, bounds, max(lengths), None, window, rotary)
    for b, length in enumerate(lengths):
        if length == 0:
            continue
        rows = slice(int(bounds[b]), int(bounds[b + 1]))
        wide = (tensor[rows].double() for tensor in (query, key, value))
        truth = attention_as_transformers_does(*wide, window, rotary)
        absolute = 8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6  # transformers turns in float32
        assert_within_budget(result[rows], truth, same_dtype[rows], slack=2.0, absolute=absolute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_mates_change_nothing(dtype: torch.dtype) -> None:
    lengths = [5, 40, 1, 23]
    query, key, value, bounds = inputs(lengths, 2, 32, dtype)
    together = fk.varlen_attention(query, key, value, bounds, 40)
    for b, length in enumerate(lengths):
        rows = slice(int(bounds[b]), int(bounds[b + 1]))
        alone = fk.varlen_attention(query[rows], key[rows], value[rows], bounds.new_tensor([0, length]), length)
        # on a GPU float32 is padded, and how much decides in which order it is added up
        tolerance = 1e-6 if DEVICE.type == "cuda" and dtype == torch.float32 else 0.0
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=tolerance)


def test_huge_scores_and_a_scale() -> None:
    query, key, value, bounds = inputs([9, 30], 2, 16, torch.float32, scale=40.0)
    result = fk.varlen_attention(query, key, value, bounds, 30, scale=0.7)
    truth = varlen_attention_reference(query.double(), key.double(), value.double(), bounds, 30, 0.7)
    same_dtype = varlen_attention_reference(query, key, value, bounds, 30, 0.7)
    # scores of thousands: float32 knows their differences to about 1e-3 whoever adds them up
    assert_within_budget(result, truth, same_dtype, slack=4.0, absolute=0.05)
    assert result.isfinite().all()


def test_nan_stays_in_its_sequence() -> None:
    query, key, value, bounds = inputs([4, 6], 2, 16, torch.float32)
    clean = fk.varlen_attention(query, key, value, bounds, 6)
    key[1] = torch.nan
    result = fk.varlen_attention(query, key, value, bounds, 6)
    assert result[:4].isnan().all()
    assert result[4:].equal(clean[4:])


def test_rows_with_gaps_are_copied() -> None:
    query, key, value, bounds = inputs([4, 6], 2, 16, torch.float32)
    strided = torch.stack([key, key], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert fk.varlen_attention(query, strided, value, bounds, 6).equal(
        fk.varlen_attention(query, key, value, bounds, 6)
    )


def test_gradients_come_from_the_reference() -> None:
    query, key, value, bounds = inputs([2, 3], 1, 4, torch.float64)
    query.requires_grad_(True)
    rotary = tables(3, 4, torch.float64)
    for options in ({}, {"window": 1, "rotary": rotary}):
        assert torch.autograd.gradcheck(
            lambda q, options=options: fk.varlen_attention(q, key, value, bounds, 3, **options), query
        )


def test_bad_input_raises_before_any_work() -> None:
    query, key, value, bounds = inputs([2, 3], 1, 4, torch.float32)
    with pytest.raises(ValueError, match=r"key: got shape \(4, 1, 4\)"):
        fk.varlen_attention(query, key[1:], value, bounds, 3)
    with pytest.raises(TypeError, match=r"value: got torch.float64"):
        fk.varlen_attention(query, key, value.double(), bounds, 3)
    with pytest.raises(TypeError, match=r"cu_seqlens: got dtype torch.int64"):
        fk.varlen_attention(query, key, value, bounds.long(), 3)
    with pytest.raises(ValueError, match="cu_seqlens: got shape"):
        fk.varlen_attention(query, key, value, bounds[:0], 3)
    with pytest.raises(ValueError, match="window: got -1, expected at least 0, or None"):
        fk.varlen_attention(query, key, value, bounds, 3, window=-1)
    cosines, sines = tables(3, 4)
    for wrong in ((cosines[:2], sines[:2]), (cosines[:, :1], sines[:, :1]), (torch.cat([cosines] * 2, -1), sines)):
        with pytest.raises(
            ValueError, match=r"rotary\[0\]: got shape .* expected \[max_seqlen=3 or more, head_size / 2"
        ):
            fk.varlen_attention(query, key, value, bounds, 3, rotary=wrong)
    with pytest.raises(ValueError, match=r"rotary\[1\]: got shape \(2, 2\)"):
        fk.varlen_attention(query, key, value, bounds, 2, rotary=(cosines, sines[:2]))
    with pytest.raises(TypeError, match=r"rotary\[0\]: got torch.bfloat16, expected float32"):
        fk.varlen_attention(query, key, value, bounds, 3, rotary=(cosines.bfloat16(), sines))


def test_a_gpu_gets_pytorchs_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for `varlen_attn` that takes what the oldest supported one takes, which knows no scale."""
    module = sys.modules["fastkd_kernels.ops.varlen_attention"]
    calls: list[tuple[torch.dtype, int, int]] = []

    def flash(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        calls.append((query.dtype, max_q, max_k))
        assert cu_q is cu_k
        return varlen_attention_reference(query, key, value, cu_q, max_q)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    monkeypatch.setattr(module, "resolve", lambda op, device: "cuda")
    for head_size, dtype, is_called in (
        (16, torch.bfloat16, True),
        (16, torch.float16, True),
        (16, torch.float32, False),
        (12, torch.bfloat16, False),
    ):
        calls.clear()
        empty, *_ = inputs([0, 0], 2, head_size, dtype, spare=3)
        assert not fk.varlen_attention(empty, empty, empty, torch.zeros(3).int().to(DEVICE), 0).any()
        assert calls == [], "nothing to launch"
        query, key, value, bounds = inputs([4, 9], 2, head_size, dtype)
        result = fk.varlen_attention(query, key, value, bounds, 9)
        assert result.equal(varlen_attention_reference(query, key, value, bounds, 9))
        assert calls == [(dtype, 9, 9)] * is_called
        # half and quarter of the usual scale: exact in every dtype
        for factor in (0.5, 0.25):
            scale = head_size**-0.5 * factor
            expected = varlen_attention_reference(query, key, value, bounds, 9, scale)
            torch.testing.assert_close(fk.varlen_attention(query, key, value, bounds, 9, scale), expected)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU does not look at values")
@pytest.mark.parametrize("values", [[0, 3, 2], [0, 9], [1, 5]])
def test_bounds_out_of_range_raise_on_cpu(values: list[int]) -> None:
    query, key, value, bounds = inputs([5], 1, 4, torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        fk.varlen_attention(query, key, value, bounds.new_tensor(values), 5)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the op is the CPU's; a GPU runs PyTorch's own")
def test_opcheck_and_fullgraph() -> None:
    query, key, value, bounds = inputs([2, 3], 2, 8, torch.float32)
    rotary = tables(3, 8)
    for options in ((None, None, None), (1, *rotary)):
        arguments = (query, key, value, bounds, 0.5, *options, torch.zeros(5, 2, 8))
        torch.library.opcheck(torch.ops.fastkd_kernels.varlen_attention_.default, arguments)

    def attend(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        return fk.varlen_attention(query * 2, key, value, bounds, 3, window=1, rotary=rotary) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert compiled(query, key, value, bounds).equal(attend(query, key, value, bounds))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the CPU backend is used for CPU tensors only")
def test_the_extension_is_what_runs_here() -> None:
    assert _extension.missing_kernel_reason("varlen_attention_", "CPU") is None
