"""The packed layout: the tokens of B sequences one behind the other, [N, ...], with bounds cu_seqlens [B + 1].

    pack             out[cu[b] + t] = padded[b, t]  for t < lengths[b],  cu[b + 1] = cu[b] + lengths[b]
    unpack           out[b, t] = packed[cu[b] + t]  for t < cu[b + 1] - cu[b], else 0
    pack_tokens      pack of what a model is given, with the places of its tokens
    compact_packed   the sequences survivors[:count] of a packed batch, one behind the other, and their bounds

Padding costs nothing in this layout, and an early exit removes a range of rows. Bounds are computed on the device in
the launch that copies; nothing waits for the host. How many rows are in use is known to the device alone, so outputs
keep room for all of them unless the caller knows better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd_kernels import _eager, _extension, _triton
from fastkd_kernels._arguments import (
    check_rising,
    check_written,
    dense,
    mark_written,
    refuse_gradient,
    select_rows,
    values_are_free,
)
from fastkd_kernels._backend import register_backends, resolve
from fastkd_kernels._derivatives import wants_gradient
from fastkd_kernels._launch import Launcher, next_power_of_2
from fastkd_kernels._library import library
from fastkd_kernels._triton import jit, tl
from fastkd_kernels.checks import check_same_device


def pack_reference(tensors: Sequence[Tensor], lengths: Tensor, total: int) -> tuple[list[Tensor], Tensor]:
    """`pack` in plain PyTorch: the oracle of the tests and the fallback on any device."""
    cu_seqlens = _bounds(lengths)
    sequence, token = _positions(cu_seqlens, total)
    padded = tensors[0].shape[1]
    rows = sequence * padded + token
    return [select_rows(tensor.flatten(0, 1), rows) for tensor in tensors], cu_seqlens


class PackedInput(NamedTuple):
    """What the embeddings of a model are asked for, of N tokens that count."""

    input_ids: Tensor
    """[N] int64"""
    positions: Tensor
    """[N] int64"""
    token_type_ids: Tensor
    """[N] int64; 0 where none were given"""
    cu_seqlens: Tensor
    """[B + 1] int32"""
    lengths: list[int]
    """Of the B sequences, on the host."""


def pack_tokens_reference(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, first_position: int
) -> PackedInput | None:
    """`pack_tokens` in plain PyTorch: the oracle of the tests and the fallback on any device."""
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if mask.numel() == 0 or not bool(mask[:, 0].all() & (mask[:, 1:] <= mask[:, :-1]).all()):
        return None
    lengths = mask.sum(1, dtype=torch.int32)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids) + first_position
    segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    return PackedInput(input_ids[mask], positions[mask], segments[mask], _bounds(lengths), lengths.tolist())


def unpack_reference(tensors: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
    """`unpack` in plain PyTorch: the oracle of the tests and the fallback on any device."""
    token = torch.arange(max_seqlen, device=cu_seqlens.device)
    used = token < cu_seqlens.diff()[:, None]
    rows = torch.where(used, cu_seqlens[:-1, None] + token, 0)
    return [
        torch.where(used.view(*used.shape, *[1] * (tensor.dim() - 1)), _gather(tensor, rows), tensor.new_zeros(()))
        for tensor in tensors
    ]


def compact_packed_reference(
    tensors: Sequence[Tensor], cu_seqlens: Tensor, survivors: Tensor, count: Tensor | None, total: int
) -> tuple[list[Tensor], Tensor]:
    """`compact_packed` in plain PyTorch: the oracle of the tests and the fallback on any device."""
    sequences = cu_seqlens.shape[0] - 1
    kept = survivors.long()
    live = torch.ones_like(kept, dtype=torch.bool)
    if count is not None:
        live = torch.arange(kept.shape[0], device=kept.device) < count
        kept = torch.where(live, kept, 0)
    if sequences == 0:
        kept, live = kept[:0], live[:0]
    lengths = torch.where(live, cu_seqlens.diff()[kept], 0)
    new_cu_seqlens = _bounds(torch.cat([lengths, lengths.new_zeros(survivors.shape[0] - kept.shape[0])]))
    place, token = _positions(new_cu_seqlens, total)
    if kept.shape[0] == 0:
        return [tensor.new_zeros((total, *tensor.shape[1:])) for tensor in tensors], new_cu_seqlens
    rows = cu_seqlens[kept[place]] + token
    # rows behind the last sequence may point anywhere
    return [_gather(tensor, rows) for tensor in tensors], new_cu_seqlens


def _bounds(lengths: Tensor) -> Tensor:
    total = lengths.cumsum(0, dtype=torch.int32)
    return torch.cat([total.new_zeros(1), total])


def _positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Sequence and token of each packed row; rows behind the last sequence count as tokens of row 0."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True)
    beyond = row >= cu_seqlens[-1]
    sequence = torch.where(beyond, 0, sequence)
    return sequence, torch.where(beyond, 0, row - cu_seqlens[sequence])


def _gather(tensor: Tensor, rows: Tensor) -> Tensor:
    if tensor.shape[0] == 0:
        return tensor.new_zeros((*rows.shape, *tensor.shape[1:]))
    flat = rows.flatten().clamp(0, tensor.shape[0] - 1)
    return select_rows(tensor, flat).view(*rows.shape, *tensor.shape[1:])


@jit
def _copy_words(
    source_ptr,  # of the first word
    target_ptr,
    words,  # int64, how many of them; zeros are written from `used` on
    used,
    BLOCK: tl.constexpr,
):
    for first in range(0, words, BLOCK):
        word = first + tl.arange(0, BLOCK)
        values = tl.load(source_ptr + word, mask=word < used, other=0)
        tl.store(target_ptr + word, values, mask=word < words)


@jit
def _pack_kernel(
    source_ptr,  # [B, T, row_words]
    target_ptr,  # [capacity, row_words]
    lengths_ptr,  # [B]
    cu_seqlens_ptr,  # [B + 1], written
    padded,
    capacity,
    row_words,
    LENGTHS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.full((), 0, tl.int64)
    for first in range(0, sequence, LENGTHS_BLOCK):
        other = first + tl.arange(0, LENGTHS_BLOCK)
        start += tl.sum(tl.load(lengths_ptr + other, mask=other < sequence, other=0).to(tl.int64), 0)
    length = tl.load(lengths_ptr + sequence).to(tl.int64)
    if sequence == 0:
        tl.store(cu_seqlens_ptr, 0)
    tl.store(cu_seqlens_ptr + sequence + 1, (start + length).to(tl.int32))
    rows = tl.minimum(tl.minimum(length, padded), tl.maximum(capacity - start, 0))
    source = source_ptr + sequence.to(tl.int64) * padded * row_words
    _copy_words(source, target_ptr + start * row_words, rows * row_words, rows * row_words, BLOCK)


@jit
def _unpack_kernel(
    source_ptr,  # [rows, row_words]
    target_ptr,  # [B, T, row_words]
    cu_seqlens_ptr,  # [B + 1]
    padded,
    rows,
    row_words,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64) - start
    used = tl.minimum(tl.minimum(length, padded), tl.maximum(rows - start, 0))
    target = target_ptr + sequence.to(tl.int64) * padded * row_words
    _copy_words(source_ptr + start * row_words, target, padded.to(tl.int64) * row_words, used * row_words, BLOCK)


@jit
def _compact_packed_kernel(
    source_ptr,  # [rows, row_words]
    target_ptr,  # [capacity, row_words]
    cu_seqlens_ptr,  # [B + 1]
    survivors_ptr,  # [K]
    count_ptr,  # [1], where HAS_COUNT
    new_cu_seqlens_ptr,  # [K + 1], written
    sequences,
    survivor_count,  # K
    rows,
    capacity,
    row_words,
    HAS_COUNT: tl.constexpr,
    SURVIVORS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    live = survivor_count
    if HAS_COUNT:
        live = tl.minimum(tl.maximum(tl.load(count_ptr), 0), survivor_count)
    start = tl.full((), 0, tl.int64)
    for first in range(0, tl.minimum(place, live), SURVIVORS_BLOCK):
        other = first + tl.arange(0, SURVIVORS_BLOCK)
        before = (other < place) & (other < live)
        kept = tl.load(survivors_ptr + other, mask=before, other=0).to(tl.int64)
        before = before & (kept >= 0) & (kept < sequences)
        end = tl.load(cu_seqlens_ptr + kept + 1, mask=before, other=0)
        start += tl.sum((end - tl.load(cu_seqlens_ptr + kept, mask=before, other=0)).to(tl.int64), 0)
    sequence = tl.load(survivors_ptr + place, mask=place < live, other=0).to(tl.int64)
    valid = (place < live) & (sequence >= 0) & (sequence < sequences)
    source_row = tl.load(cu_seqlens_ptr + sequence, mask=valid, other=0).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + sequence + 1, mask=valid, other=0).to(tl.int64) - source_row
    if place == 0:
        tl.store(new_cu_seqlens_ptr, 0)
    tl.store(new_cu_seqlens_ptr + place + 1, (start + length).to(tl.int32))
    words = tl.minimum(tl.minimum(length, rows - source_row), tl.maximum(capacity - start, 0)) * row_words
    _copy_words(source_ptr + source_row * row_words, target_ptr + start * row_words, words, words, BLOCK)


_launch_pack = Launcher(_pack_kernel)
_launch_unpack = Launcher(_unpack_kernel)
_launch_compact_packed = Launcher(_compact_packed_kernel)


_LENGTHS_BLOCK = 1024  # lengths that one program adds at a time to find where its sequence starts
_MAX_BLOCK = 2048  # words that a program of four warps moves at a time

_PURE = (torch.Tag.pt2_compliant_tag,)
library.define("pack_(Tensor[] tensors, Tensor lengths, Tensor(a!)[] out, Tensor(b!) cu_seqlens) -> ()", tags=_PURE)
library.define("unpack_(Tensor[] tensors, Tensor cu_seqlens, Tensor(a!)[] out) -> ()", tags=_PURE)
library.define(
    "compact_packed_(Tensor[] tensors, Tensor cu_seqlens, Tensor survivors, Tensor? count, Tensor(a!)[] out, "
    "Tensor(b!) new_cu_seqlens) -> ()",
    tags=_PURE,
)


@torch.library.register_fake("fastkd_kernels::pack_", lib=library)
def _pack_fake(tensors: Sequence[Tensor], lengths: Tensor, out: Sequence[Tensor], cu_seqlens: Tensor) -> None:
    return None


@torch.library.register_fake("fastkd_kernels::unpack_", lib=library)
def _unpack_fake(tensors: Sequence[Tensor], cu_seqlens: Tensor, out: Sequence[Tensor]) -> None:
    return None


@torch.library.register_fake("fastkd_kernels::compact_packed_", lib=library)
def _compact_packed_fake(
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    survivors: Tensor,
    count: Tensor | None,
    out: Sequence[Tensor],
    new_cu_seqlens: Tensor,
) -> None:
    return None


def _pack_triton(tensors: Sequence[Tensor], lengths: Tensor, out: Sequence[Tensor], cu_seqlens: Tensor) -> None:
    if lengths.shape[0] == 0:
        cu_seqlens.zero_()
        return
    for tensor, target in zip(tensors, out, strict=True):
        source, words = _as_words(tensor, 2), _as_words(target, 1)
        _launch_pack(
            (lengths.shape[0],),
            source,
            words,
            lengths,
            cu_seqlens,
            tensor.shape[1],
            target.shape[0],
            source.shape[-1],
            LENGTHS_BLOCK=_LENGTHS_BLOCK,
            BLOCK=_block(source.shape[-1] * tensor.shape[1]),
        )


def _unpack_triton(tensors: Sequence[Tensor], cu_seqlens: Tensor, out: Sequence[Tensor]) -> None:
    if cu_seqlens.shape[0] == 1:
        return
    for tensor, target in zip(tensors, out, strict=True):
        source, words = _as_words(tensor, 1), _as_words(target, 2)
        _launch_unpack(
            (target.shape[0],),
            source,
            words,
            cu_seqlens,
            target.shape[1],
            tensor.shape[0],
            source.shape[-1],
            BLOCK=_block(source.shape[-1] * target.shape[1]),
        )


def _compact_packed_triton(
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    survivors: Tensor,
    count: Tensor | None,
    out: Sequence[Tensor],
    new_cu_seqlens: Tensor,
) -> None:
    if survivors.shape[0] == 0:
        new_cu_seqlens.zero_()
        return
    for tensor, target in zip(tensors, out, strict=True):
        source, words = _as_words(tensor, 1), _as_words(target, 1)
        _launch_compact_packed(
            (survivors.shape[0],),
            source,
            words,
            cu_seqlens,
            survivors,
            survivors if count is None else count,
            new_cu_seqlens,
            cu_seqlens.shape[0] - 1,
            survivors.shape[0],
            tensor.shape[0],
            target.shape[0],
            source.shape[-1],
            HAS_COUNT=count is not None,
            SURVIVORS_BLOCK=_LENGTHS_BLOCK,
            BLOCK=_block(source.shape[-1] * 64),
        )


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _as_words(tensor: Tensor, row_dims: int) -> Tensor:
    """The memory of a contiguous tensor as [rows, words] integers, so that one kernel serves every dtype."""
    rows = tensor.flatten(row_dims) if tensor.dim() > row_dims else tensor.unsqueeze(-1)
    return rows.view(_WORDS[tensor.element_size()])


def _block(words: int) -> int:
    return min(next_power_of_2(max(words, 1)), _MAX_BLOCK)


if _triton.available:
    library.impl("pack_", _pack_triton, "CUDA")
    library.impl("unpack_", _unpack_triton, "CUDA")
    library.impl("compact_packed_", _compact_packed_triton, "CUDA")

register_backends(
    "packed",
    cuda=_triton.missing_reason,
    cpu=_extension.missing_kernel_reason("pack_", "CPU"),
    interpretable=True,
)

_KERNELS = {
    "pack": torch.ops.fastkd_kernels.pack_.default,
    "unpack": torch.ops.fastkd_kernels.unpack_.default,
    "compact_packed": torch.ops.fastkd_kernels.compact_packed_.default,
}


def _run(name: str, backend: str, *arguments: Any) -> None:
    """The kernel of the device, or in Triton's interpreter where `backend` "cuda" was asked for on CPU."""
    tensors = arguments[0]
    if backend == "cuda" and not tensors[0].is_cuda:
        interpreted: dict[str, Any] = {
            "pack": _pack_triton,
            "unpack": _unpack_triton,
            "compact_packed": _compact_packed_triton,
        }
        interpreted[name](*arguments)
        return
    try:
        _KERNELS[name](*arguments)
    except RuntimeError as error:
        raise _extension.as_typed_error(error) from None


def _backend(tensors: Sequence[Tensor]) -> str:
    return "reference" if wants_gradient(tensors) else resolve("packed", tensors[0].device)


def _checks_values(backend: str, tensor: Tensor) -> bool:
    """Whether values are checked here: the C++ kernels do it themselves, and on a GPU it would wait for the device."""
    return backend != "cpu" and values_are_free(tensor)


def pack(tensors: Sequence[Tensor], lengths: Tensor, total: int | None = None) -> tuple[list[Tensor], Tensor]:
    """Take the padding out of right-padded batches.

    Args:
        tensors: each [B, T, ...] of any dtype; all on one device.
        lengths: [B] int32, tokens of each sequence, 0 to T.
        total: their sum, where the host knows it; default B * T.

    Returns:
        One [total, ...] tensor a tensor, rows from cu_seqlens[B] on undefined; and cu_seqlens [B + 1] int32.

    Raises:
        ValueError: shapes that differ; on CPU, a length outside 0..T, or sequences that exceed `total`.
        TypeError: lengths that are not int32.
    """
    _check_tensors(tensors, 2)
    _check_vector("lengths", lengths, tensors[0].device)
    if lengths.shape[0] != tensors[0].shape[0]:
        raise ValueError(f"lengths: got {lengths.shape[0]} values, expected B = {tensors[0].shape[0]}")
    total = tensors[0].shape[0] * tensors[0].shape[1] if total is None else total
    if total < 0:
        raise ValueError(f"total: got {total}, expected at least 0")
    backend = _backend(tensors)
    if _checks_values(backend, lengths):
        _check_lengths(lengths, tensors[0].shape[1], total)
    if backend == "reference":
        return pack_reference(tensors, lengths, total)
    out = [tensor.new_empty((total, *tensor.shape[2:])) for tensor in tensors]
    cu_seqlens = lengths.new_empty(lengths.shape[0] + 1)
    _run("pack", backend, [dense(tensor) for tensor in tensors], dense(lengths), out, cu_seqlens)
    return out, cu_seqlens


def unpack(tensors: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
    """Pad packed sequences on the right with zeros.

    Args:
        tensors: each [N, ...] of any dtype; all on one device.
        cu_seqlens: [B + 1] int32, sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; the first is 0.
        max_seqlen: T, at least the longest sequence.

    Returns:
        One [B, T, ...] tensor a tensor.

    Raises:
        ValueError: shapes that differ; on CPU, a sequence longer than `max_seqlen` or bounds outside the tensors.
        TypeError: cu_seqlens that are not int32.
    """
    _check_tensors(tensors, 1)
    _check_bounds(cu_seqlens, tensors[0].device)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen: got {max_seqlen}, expected at least 0")
    backend = _backend(tensors)
    if _checks_values(backend, cu_seqlens):
        _check_rising(cu_seqlens, tensors[0].shape[0])
        longest = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
        if longest > max_seqlen:
            raise ValueError(f"max_seqlen: got {max_seqlen}, expected at least the longest sequence, {longest} tokens")
    if backend == "reference":
        return unpack_reference(tensors, cu_seqlens, max_seqlen)
    out = [t.new_empty((cu_seqlens.shape[0] - 1, max_seqlen, *t.shape[1:])) for t in tensors]
    _run("unpack", backend, [dense(tensor) for tensor in tensors], dense(cu_seqlens), out)
    return out


def compact_packed(
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    survivors: Tensor,
    count: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Gather the sequences `survivors[:count]` of a packed batch.

    Args:
        tensors: each [N, ...] of any dtype; all on one device.
        cu_seqlens: [B + 1] int32, as in `unpack`.
        survivors: [K] int32 or int64 sequence numbers, each once (more often only with room for it in `out`); with
            `count`, only the first `count` are read.
        count: [1] int32 on the device of the tensors, as `exit_gate` returns it; default: all K.
        out: one contiguous tensor a tensor, of its dtype and trailing shape, with room for the rows that survive, to
            be written instead of new memory; must not overlap the inputs.

    Returns:
        One tensor a tensor, [N, ...] or `out`, its rows from the last bound on undefined; and the new cu_seqlens
        [K + 1] int32, whose values from `count` on repeat the last one.

    Raises:
        ValueError: shapes or devices that differ, a wrong `out`, or one where a gradient is wanted; on CPU, rows that
            do not fit `out`.
        TypeError: cu_seqlens or survivors of another dtype.
        IndexError: on CPU, a sequence number outside 0..B-1.
    """
    _check_tensors(tensors, 1)
    _check_bounds(cu_seqlens, tensors[0].device)
    if survivors.dtype not in (torch.int32, torch.int64) or survivors.dim() != 1:
        raise TypeError(f"survivors: got {survivors.dtype} {tuple(survivors.shape)}, expected int32 or int64 [K]")
    check_same_device("survivors", survivors, "tensors[0]", tensors[0])
    if count is not None:
        if count.dtype != torch.int32 or count.numel() != 1:
            raise TypeError(f"count: got {count.dtype} {tuple(count.shape)}, expected int32 [1]")
        check_same_device("count", count, "tensors[0]", tensors[0])
    if out is not None:
        _check_out(out, tensors, cu_seqlens, survivors, count)
    backend = _backend(tensors)
    if _checks_values(backend, cu_seqlens):
        _check_rising(cu_seqlens, tensors[0].shape[0])
        _check_survivors(survivors, count, cu_seqlens, tensors if out is None else out)
    if backend == "reference":
        total = tensors[0].shape[0] if out is None else max(target.shape[0] for target in out)
        gathered, bounds = compact_packed_reference(tensors, cu_seqlens, survivors, count, total)
        if out is not None:
            gathered = [target.copy_(rows[: target.shape[0]]) for target, rows in zip(out, gathered, strict=True)]
        return gathered, bounds
    targets = [tensor.new_empty(tensor.shape) for tensor in tensors] if out is None else list(out)
    new_cu_seqlens = cu_seqlens.new_empty(survivors.shape[0] + 1)
    _run(
        "compact_packed",
        backend,
        [dense(tensor) for tensor in tensors],
        dense(cu_seqlens),
        dense(survivors),
        None if count is None else dense(count.reshape(1)),
        targets,
        new_cu_seqlens,
    )
    if out is not None:
        mark_written(out)
    return targets, new_cu_seqlens


def _check_out(
    out: Sequence[Tensor], tensors: Sequence[Tensor], cu_seqlens: Tensor, survivors: Tensor, count: Tensor | None
) -> None:
    if len(out) != len(tensors):
        raise ValueError(f"out: got {len(out)} tensors, expected one for each of the {len(tensors)} in tensors")
    for number, (target, tensor) in enumerate(zip(out, tensors, strict=True)):
        name = f"out[{number}]"
        if target.dim() != tensor.dim() or target.shape[1:] != tensor.shape[1:]:
            raise ValueError(f"{name}: got shape {tuple(target.shape)}, expected {('rows', *tensor.shape[1:])}")
        if target.dtype != tensor.dtype or target.device != tensor.device:
            raise ValueError(
                f"{name}: got {target.dtype} on {target.device}, expected that of tensors[{number}], {tensor.dtype} on "
                f"{tensor.device}"
            )
        if not target.is_contiguous():
            raise ValueError(f"{name}: got strides {target.stride()}, expected a contiguous tensor")
    refuse_gradient("out", [*out, *tensors])
    read = {f"tensors[{number}]": tensor for number, tensor in enumerate(tensors)}
    check_written(
        {f"out[{number}]": target for number, target in enumerate(out)},
        {**read, "cu_seqlens": cu_seqlens, "survivors": survivors, "count": count},
    )


def _check_lengths(lengths: Tensor, padded: int, total: int) -> None:
    wrong = ((lengths < 0) | (lengths > padded)).nonzero()
    if wrong.numel():
        position = int(wrong[0])
        raise ValueError(f"lengths[{position}]: got {int(lengths[position])}, expected 0 to T = {padded}")
    rows = int(lengths.sum())
    if rows > total:
        raise ValueError(f"total: got {total}, expected at least the sum of the lengths, {rows}")


def _check_rising(cu_seqlens: Tensor, rows: int) -> None:
    check_rising(cu_seqlens, rows, f"{rows}, the rows of the tensors")


def _check_survivors(survivors: Tensor, count: Tensor | None, cu_seqlens: Tensor, targets: Sequence[Tensor]) -> None:
    sequences = cu_seqlens.shape[0] - 1
    live = survivors if count is None else survivors[: max(int(count), 0)]
    wrong = ((live < 0) | (live >= sequences)).nonzero()
    if wrong.numel():
        position = int(wrong[0])
        raise IndexError(f"survivors[{position}]: got row {int(live[position])}, expected 0 to {sequences - 1}")
    rows, room = int(cu_seqlens.diff()[live.long()].sum()), min(target.shape[0] for target in targets)
    if rows > room:
        raise ValueError(f"out: the sequences have {rows} rows, but it has room for {room}")


def _check_tensors(tensors: Sequence[Tensor], row_dims: int) -> None:
    if not tensors:
        raise ValueError("tensors: got none, expected at least one")
    form = "[B, T, ...]" if row_dims == 2 else "[N, ...]"
    for number, tensor in enumerate(tensors):
        if tensor.dim() < row_dims or tensor.shape[:row_dims] != tensors[0].shape[:row_dims]:
            raise ValueError(
                f"tensors[{number}]: got shape {tuple(tensor.shape)}, expected {form} like tensors[0], whose shape is "
                f"{tuple(tensors[0].shape)}"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors[{number}]: got device {tensor.device}, expected {tensors[0].device}")


def _check_bounds(cu_seqlens: Tensor, device: torch.device) -> None:
    _check_vector("cu_seqlens", cu_seqlens, device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: got no values, expected [B + 1], the first 0")


def _check_vector(name: str, vector: Tensor, device: torch.device) -> None:
    if vector.dtype != torch.int32:
        raise TypeError(f"{name}: got dtype {vector.dtype}, expected int32")
    if vector.dim() != 1 or vector.device != device:
        raise ValueError(f"{name}: got shape {tuple(vector.shape)} on {vector.device}, expected a vector on {device}")


def pack_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    first_position: int = 0,
) -> PackedInput | None:
    """What a model does with its arguments before the first layer; a GPU is waited for.

    Args:
        input_ids, token_type_ids: [B, T] int64.
        attention_mask: [B, T] of any dtype, non-zero where a token counts; None where nothing is padded.
        first_position: of the first token of each sequence.

    Returns:
        The tokens that count, one sequence behind the other; None where there are none, where padding is not on the
        right, or where it begins a row.

    Raises:
        ValueError: other shapes or dtypes.
    """
    given = (input_ids, attention_mask, token_type_ids)
    if _eager_pack_tokens is not None and all(t is None or type(t) is Tensor for t in given) and _eager.is_unwatched():
        packed = _eager_pack_tokens(*given, first_position)
        if packed is not None:
            return PackedInput(*packed)
    for name, tensor in zip(("input_ids", "attention_mask", "token_type_ids"), given, strict=True):
        if tensor is None:
            continue
        if tensor.dim() != 2 or tensor.shape != input_ids.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [B, T], that of input_ids")
        if name != "attention_mask" and tensor.dtype != torch.int64:
            raise ValueError(f"{name}: got {tensor.dtype}, expected torch.int64")
    return pack_tokens_reference(input_ids, attention_mask, token_type_ids, first_position)


_eager_pack_tokens = _eager.find("pack_tokens")
"""The same for tensors on the CPU; also None where the arguments need care."""
