"""The packed layout: pack, unpack and compact_packed only copy, so every backend must agree to the bit."""

from __future__ import annotations

import pytest
import torch
from cubins import KernelSpec, compile_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels import _extension, _triton
from fastkd_kernels.ops.packed import pack_reference, pack_tokens_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["reference", *(["cuda"] if _triton.available else []), *([] if DEVICE.type == "cuda" else ["cpu"])]
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.uint32,
)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def batch(lengths: list[int], padded: int, dtype: torch.dtype = torch.float32, width: int = 5) -> Tensor:
    values = torch.arange(1, len(lengths) * padded * width + 1, device=DEVICE).remainder(251)
    return values.view(len(lengths), padded, width).to(dtype)


def expected_rows(padded: Tensor, lengths: list[int], chosen: list[int] | None = None) -> Tensor:
    rows = [padded[b, : lengths[b]] for b in (range(len(lengths)) if chosen is None else chosen)]
    return torch.cat(rows) if rows else padded.flatten(0, 1)[:0]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_and_unpack_are_inverse(name: str, dtype: torch.dtype) -> None:
    lengths = [3, 0, 7, 1, 7]
    padded = batch(lengths, 7, dtype)
    with fk.backend(name):
        (packed, ids), bounds = fk.pack([padded, padded[..., 0]], ints(lengths), total=18)
        unpacked, unpacked_ids = fk.unpack([packed, ids], bounds, 8)
    assert bounds.tolist() == [0, 3, 3, 10, 11, 18]
    assert {packed.dtype, ids.dtype, unpacked.dtype, unpacked_ids.dtype} == {dtype}
    assert packed.equal(expected_rows(padded, lengths))
    assert ids.equal(expected_rows(padded, lengths)[:, 0])
    for b, length in enumerate(lengths):
        assert unpacked[b, :length].equal(padded[b, :length])
        assert not unpacked[b, length:].to(torch.complex64).any()
        assert unpacked_ids[b, :length].equal(padded[b, :length, 0])


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=9),
    survivors=st.lists(st.integers(0, 8), max_size=9, unique=True),
    spare=st.integers(0, 3),
)
def test_compact_packed_keeps_whole_sequences(name: str, lengths: list[int], survivors: list[int], spare: int) -> None:
    kept = [b for b in survivors if b < len(lengths)]
    padded = batch(lengths, 6) if lengths else torch.zeros(0, 6, 5, device=DEVICE)
    with fk.backend(name):
        (packed,), bounds = fk.pack([padded], ints(lengths), total=sum(lengths))
        # behind count, survivors are undefined
        out, new_bounds = fk.compact_packed([packed], bounds, ints(kept + [2**30] * spare), ints([len(kept)]))
        rows = sum(lengths[b] for b in kept)
        room = packed.new_full((rows + 2, 5), -1)
        (into,), _ = fk.compact_packed([packed], bounds, ints(kept).long(), out=[room])
    ends = torch.tensor([0] + [lengths[b] for b in kept]).cumsum(0).tolist()
    assert new_bounds.tolist() == ends + [rows] * spare
    assert out[0].shape == packed.shape
    assert out[0][:rows].equal(expected_rows(padded, lengths, kept))
    assert into[:rows].equal(expected_rows(padded, lengths, kept))


@pytest.mark.parametrize("name", BACKENDS)
def test_long_rows_and_many_sequences(name: str) -> None:
    """More sequences than a program adds at a time, and rows wider than a program moves at a time."""
    lengths = [1 + b % 2 for b in range(1100)] if name == "cpu" else [1 + b % 2 for b in range(40)]
    padded = batch(lengths, 2, torch.int64, 3)
    with fk.backend(name):
        (packed,), bounds = fk.pack([padded], ints(lengths))
        (kept,), _ = fk.compact_packed([packed], bounds, ints([len(lengths) - 1, 0]))
    assert packed[: sum(lengths)].equal(expected_rows(padded, lengths))
    assert kept[: lengths[-1] + 1].equal(expected_rows(padded, lengths, [len(lengths) - 1, 0]))


def test_packed_rows_have_gradients() -> None:
    padded = torch.randn(3, 4, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    lengths = ints([2, 4, 1])

    def survivors_only(padded: Tensor) -> Tensor:
        (packed,), bounds = fk.pack([padded], lengths, total=7)
        (kept,), kept_bounds = fk.compact_packed([packed], bounds, ints([2, 0]))
        return fk.unpack([kept[:3] * kept[:3]], kept_bounds, 4)[0]

    assert torch.autograd.gradcheck(survivors_only, padded)


def test_bad_input_raises_before_any_work() -> None:
    padded, bounds = torch.zeros(2, 3, 4), ints([0, 2, 5]).cpu()
    packed = torch.zeros(5, 4)
    with pytest.raises(TypeError, match=r"lengths: got dtype torch.int64"):
        fk.pack([padded], torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="lengths: got 1 values, expected B = 2"):
        fk.pack([padded], bounds[:1])
    with pytest.raises(ValueError, match=r"tensors\[1\]: got shape \(2, 2\)"):
        fk.pack([padded, padded[:, :2, 0]], bounds[:2])
    with pytest.raises(ValueError, match="tensors: got none"):
        fk.unpack([], bounds, 3)
    with pytest.raises(TypeError, match=r"survivors: got torch.float32"):
        fk.compact_packed([packed], bounds, torch.zeros(1))
    with pytest.raises(ValueError, match="cu_seqlens: got no values"):
        fk.unpack([packed], bounds[:0], 3)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU does not look at values")
def test_values_out_of_range_raise_on_cpu() -> None:
    padded, bounds, packed = torch.zeros(2, 3, 4), ints([0, 2, 5]), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"lengths\[1\]: got 4, expected 0 to T = 3"):
        fk.pack([padded], ints([1, 4]))
    with pytest.raises(ValueError, match="it has 4 rows, too few for the sequences"):
        fk.pack([padded], ints([3, 3]), total=4)
    with pytest.raises(ValueError, match="sequence 1 has 3 tokens, more than 2"):
        fk.unpack([packed], bounds, 2)
    with pytest.raises(IndexError, match=r"survivors\[1\]: got row 2, expected 0 to 1"):
        fk.compact_packed([packed], bounds, ints([0, 2]))
    with pytest.raises(ValueError, match="cu_seqlens: the last value is 5, but there are 4 rows"):
        fk.compact_packed([packed[:4]], bounds, ints([0]))


@pytest.mark.parametrize("lengths", [[3], [2, 5, 1], [5, 5]])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("with_segments", [False, True])
def test_pack_tokens(lengths: list[int], mask_dtype: torch.dtype | None, with_segments: bool) -> None:
    ids = torch.arange(100, 100 + 2 * len(lengths) * 5, device=DEVICE).view(len(lengths), 10)[:, ::2]
    if mask_dtype is None:
        lengths = [5] * len(lengths)
    mask = torch.arange(5, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    given = None if mask_dtype is None else mask.to(mask_dtype)
    segments = ids % 7 if with_segments else None
    packed = fk.pack_tokens(ids, given, segments, 2)
    assert packed is not None
    assert packed.lengths == lengths
    assert packed.cu_seqlens.equal(ints([sum(lengths[:b]) for b in range(len(lengths) + 1)]))
    assert packed.input_ids.equal(ids[mask])
    assert packed.positions.tolist() == [2 + token for length in lengths for token in range(length)]
    assert packed.token_type_ids.equal((ids % 7 if with_segments else ids * 0)[mask])
    expected = pack_tokens_reference(ids, given, segments, 2)
    assert expected is not None
    for one, other in zip(packed, expected, strict=True):
        assert one == other if isinstance(one, list) else one.equal(other) and one.dtype == other.dtype


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[1, 1, 1], [0, 0, 0]]])
def test_pack_tokens_leaves_padding_elsewhere_to_others(mask: list[list[int]]) -> None:
    attention_mask = torch.tensor(mask, device=DEVICE)
    assert fk.pack_tokens(torch.ones_like(attention_mask), attention_mask) is None


def test_pack_tokens_of_nothing() -> None:
    assert fk.pack_tokens(torch.ones(0, 3, dtype=torch.int64, device=DEVICE)) is None
    assert fk.pack_tokens(torch.ones(2, 0, dtype=torch.int64, device=DEVICE)) is None


def test_bad_input_of_pack_tokens() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"^input_ids: got shape \(3,\)"):
        fk.pack_tokens(ids[0])
    with pytest.raises(ValueError, match=r"^attention_mask: got shape \(2, 2\)"):
        fk.pack_tokens(ids, ids[:, :2])
    with pytest.raises(ValueError, match=r"^token_type_ids: got torch\.int32"):
        fk.pack_tokens(ids, None, ids.int())


def test_opcheck() -> None:
    ops = torch.ops.fastkd_kernels
    padded, lengths, bounds = batch([2, 3], 3), ints([2, 3]), ints([0, 2, 5])
    packed = torch.randn(5, 5, device=DEVICE)
    torch.library.opcheck(
        ops.pack_.default, ([padded], lengths, [torch.zeros(5, 5, device=DEVICE)], torch.zeros_like(bounds))
    )
    torch.library.opcheck(ops.unpack_.default, ([packed], bounds, [torch.zeros_like(padded)]))
    torch.library.opcheck(
        ops.compact_packed_.default,
        ([packed], bounds, ints([1]), ints([1]), [torch.zeros_like(packed)], torch.zeros_like(ints([0, 0]))),
    )


def test_compiles_without_a_graph_break() -> None:
    def step(padded: Tensor, lengths: Tensor, survivors: Tensor) -> Tensor:
        (packed,), bounds = fk.pack([padded * 2], lengths)
        (kept,), kept_bounds = fk.compact_packed([packed], bounds, survivors)
        return fk.unpack([kept], kept_bounds, 3)[0] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    padded, lengths = batch([2, 3], 3), ints([2, 3])
    assert compiled(padded, lengths, ints([1])).equal(step(padded, lengths, ints([1])))


@pytest.mark.skipif(not _triton.available, reason="Triton is not installed")
def test_machine_code() -> None:
    module, pointers = "fastkd_kernels.ops.packed", {"source_ptr": "*i16:16", "target_ptr": "*i16:16"}
    sizes = {"row_words": "i32:16", "BLOCK": 2048}
    specs = [
        KernelSpec(
            f"{module}:_pack_kernel",
            {**pointers, **sizes, "lengths_ptr": "*i32:16", "cu_seqlens_ptr": "*i32:16", "padded": "i32:16",
             "capacity": "i32:16", "LENGTHS_BLOCK": 1024},
        ),
        KernelSpec(
            f"{module}:_unpack_kernel",
            {**pointers, **sizes, "cu_seqlens_ptr": "*i32:16", "padded": "i32:16", "rows": "i32:16"},
        ),
        *[
            KernelSpec(
                f"{module}:_compact_packed_kernel",
                {**pointers, **sizes, "cu_seqlens_ptr": "*i32:16", "survivors_ptr": f"*{index}:16",
                 "count_ptr": "*i32:16", "new_cu_seqlens_ptr": "*i32:16", "sequences": "i32", "survivor_count": "i32",
                 "rows": "i32:16", "capacity": "i32:16", "HAS_COUNT": has_count, "SURVIVORS_BLOCK": 1024},
            )
            for index, has_count in (("i32", True), ("i64", False))
        ],
    ]  # fmt: skip
    for cubin in compile_kernels(specs):
        cubin.assert_no_spills()
        assert cubin.opcodes()["STG.E.128"], cubin.spec


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the CPU backend is used for CPU tensors only")
def test_the_extension_is_what_runs_here() -> None:
    """The parity tests above would pass on the reference alone: make sure that they compared something."""
    assert _extension.missing_kernel_reason("pack_", "CPU") is None
    padded, lengths = batch([2, 3], 3), ints([2, 3])
    with fk.backend("cpu"):
        (packed,), _ = fk.pack([padded], lengths)
    assert packed[:5].equal(pack_reference([padded], lengths, 5)[0][0])
