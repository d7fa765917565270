"""Exit gate: softmax, uncertainty, decision and batch compaction of one early-exit layer in one pass.

For logits z [B, C] with p = softmax(z), every criterion gives an uncertainty u in [0, 1]:

    entropy    u = -sum_c p_c ln p_c / ln C                    FastBERT (ACL 2020), equation 5
    top_n      the same over the n largest p, renormalised, divided by ln n
    max_prob   u = (1 - max_c p_c) / (1 - 1/C)
    margin     u = 1 - (p_(1) - p_(2))                          the two largest probabilities
    patience   u = 1 / (1 + s), s = how many layers in a row repeated the label of the layer before (PABEE, 2020);
               a speed of 1/(1+k) leaves after k repetitions

A row stays iff u > speed, or speed is 0 (exits are off), or u is NaN (never answered early). The rows that stay are
returned in ascending order with their count on the device of the logits; the rows that leave are written, at their
`row_ids`, to an `ExitRecord`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd_kernels import _backend, _eager, _extension, _triton
from fastkd_kernels._arguments import check_written, dense, mark_written, plain, values_are_free
from fastkd_kernels._derivatives import transforming
from fastkd_kernels._launch import LaunchConfig, Launcher, next_power_of_2
from fastkd_kernels._library import library
from fastkd_kernels._triton import jit, tl
from fastkd_kernels.checks import check_choice, check_same_device

CRITERIA = ("entropy", "max_prob", "margin", "top_n", "patience")
"""Every criterion by its name; its place is the code that the C++ kernels understand."""


class ExitGateOutput(NamedTuple):
    """What one exit gate decided."""

    uncertainty: Tensor
    """[B] float32; NaN where the logits hold a NaN."""
    survivors: Tensor
    """[B] int32: row numbers that stay, ascending; only the first `count` are defined."""
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which is not called here
    """[1] int32 on the device of the logits."""
    logits: Tensor | None = None
    """[B, C], set by `student_head_exit`, which computes them itself."""

    def kept(self) -> Tensor:
        """`survivors[:count]`, [K] int32; the one call that waits for the device."""
        return self.survivors[: int(self.count)]


@dataclass(frozen=True)
class ExitRecord:
    """The answers of a whole batch, filled in as its rows leave.

    Attributes:
        logits: [N, C] float32, the logits of the layer that answered.
        uncertainty: [N] float32 at that layer.
        exit_layer: [N] int32, 1 after the first layer; 0 while a row has not left.
        history: [N, 2] int32, the last label (-1 before the first layer) and how often in a row it was repeated;
            the memory of the patience criterion, or of a caller's own.
    """

    logits: Tensor
    uncertainty: Tensor
    exit_layer: Tensor
    history: Tensor

    def __post_init__(self) -> None:
        rows, device = self.exit_layer.shape[0], self.exit_layer.device
        expected = {
            "logits": (torch.float32, (rows, self.logits.shape[-1])),
            "uncertainty": (torch.float32, (rows,)),
            "exit_layer": (torch.int32, (rows,)),
            "history": (torch.int32, (rows, 2)),
        }
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype:
                raise TypeError(f"ExitRecord.{name}: got dtype {tensor.dtype}, expected {dtype}")
            if tensor.shape != shape or tensor.device != device or not tensor.is_contiguous():
                raise ValueError(
                    f"ExitRecord.{name}: got shape {tuple(tensor.shape)} and strides {tensor.stride()} on "
                    f"{tensor.device}, expected contiguous {list(shape)} on {device}; ExitRecord.allocate makes that"
                )

    @classmethod
    def allocate(cls, rows: int, num_labels: int, device: torch.device | str = "cpu") -> ExitRecord:
        """An empty record for `rows` sequences and `num_labels` classes."""
        record = cls(
            logits=torch.zeros(rows, num_labels, dtype=torch.float32, device=device),
            uncertainty=torch.zeros(rows, dtype=torch.float32, device=device),
            exit_layer=torch.zeros(rows, dtype=torch.int32, device=device),
            history=torch.zeros(rows, 2, dtype=torch.int32, device=device),
        )
        record.forget()
        return record

    def forget(self, rows: slice | list[int] = slice(None)) -> None:
        """Put `history` of `rows` back to what it is before the first layer."""
        self.history[rows, 0] = -1
        self.history[rows, 1] = 0

    def write(self, row_ids: Tensor, logits: Tensor, uncertainty: Tensor, layer: int) -> None:
        """Answer `row_ids` [K] with `logits` [K, C] and `uncertainty` [K] of `layer`, whatever the uncertainty."""
        index = row_ids.long()
        self.logits.index_copy_(0, index, logits.float())
        self.uncertainty.index_copy_(0, index, uncertainty.float())
        self.exit_layer.index_fill_(0, index, layer)


class GateCall(NamedTuple):
    """What one gate is asked about its logits: the arguments of `exit_gate`."""

    speed: float | Tensor
    criterion: str = "entropy"
    row_ids: Tensor | None = None
    top_n: int | None = None
    record: ExitRecord | None = None
    layer: int | None = None

    def split_speed(self) -> tuple[float, Tensor | None]:
        """The speed of all rows and None; or 0 and the speed of each row, [B] float32, contiguous."""
        if isinstance(self.speed, Tensor):
            return 0.0, dense(self.speed.to(torch.float32))
        return float(self.speed), None

    def contiguous_row_ids(self) -> Tensor | None:
        return None if self.row_ids is None else dense(self.row_ids)

    def record_tensors(self) -> tuple[Any, ...]:
        """Logits, uncertainty, exit_layer and history of the record; four times None without one."""
        record = self.record
        if record is None:
            return (None,) * 4
        return record.logits, record.uncertainty, record.exit_layer, record.history


def uncertainty_reference(logits: Tensor, criterion: str = "entropy", top_n: int | None = None) -> Tensor:
    """Uncertainty [B] of logits [B, C] for every criterion but patience; differentiable.

    Computed in float64 for float64 logits, else in float32. Rows without a finite maximum are NaN.

    Raises:
        ValueError: `criterion` is none of these.
    """
    check_choice("criterion", criterion, _OF_ONE_LAYER)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    num_labels = logits.shape[-1]
    if criterion == "top_n":
        logits = logits.topk(top_n or num_labels, dim=-1).values
        num_labels = logits.shape[-1]
    if criterion in ("entropy", "top_n"):
        return _normalised_entropy(logits) / math.log(num_labels)
    probabilities = logits.softmax(dim=-1)
    if criterion == "max_prob":
        return ((1 - probabilities.amax(dim=-1)) / (1 - 1 / num_labels)).clamp(0, 1)
    if criterion == "margin":
        first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        return (1 - (first - second)).clamp(0, 1)
    raise NotImplementedError(f"criterion: {criterion!r} is in CRITERIA; give it a formula in uncertainty_reference")


_OF_ONE_LAYER = tuple(name for name in CRITERIA if name != "patience")
"""Criteria that need no memory of the layers before."""


def _normalised_entropy(logits: Tensor) -> Tensor:
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    # a probability of 0 contributes 0, also where its logit is -inf
    weighted = (weights * shifted.masked_fill(weights == 0, 0)).sum(dim=-1)
    return (total.log() - weighted / total).clamp_min(0).clamp_max(math.log(logits.shape[-1]))


def exit_gate_reference(
    logits: Tensor,
    speed: float | Tensor,
    criterion: str = "entropy",
    row_ids: Tensor | None = None,
    top_n: int | None = None,
    *,
    record: ExitRecord | None = None,
    layer: int | None = None,
) -> ExitGateOutput:
    """`exit_gate` in plain PyTorch: the oracle of the tests and the fallback on any device."""
    check_choice("criterion", criterion, CRITERIA)
    rows = torch.arange(logits.shape[0], device=logits.device)
    ids = rows if row_ids is None else row_ids.long()
    if criterion == "patience":
        assert record is not None
        uncertainty = _patience(logits, record.history, ids)
    else:
        uncertainty = uncertainty_reference(logits, criterion, top_n)
    # a number is filled in on the device: copying it there would wait, and cannot be captured in a CUDA graph
    threshold = speed.to(uncertainty.dtype) if isinstance(speed, Tensor) else uncertainty.new_full((), float(speed))
    stays = ~(uncertainty <= threshold) | (threshold == 0)
    # a stable sort puts the staying rows first without asking the device how many there are
    survivors = torch.sort((~stays).to(torch.uint8), stable=True).indices
    if record is not None:
        assert layer is not None
        _record_leaving(record, ids, ~stays, logits, uncertainty, layer)
    # a transform of torch.func is told of the derivative; autograd finds none, and says so
    uncertainty = uncertainty if transforming() else uncertainty.detach()
    return ExitGateOutput(uncertainty.float(), survivors.int(), stays.sum(dtype=torch.int32).reshape(1))


def _patience(logits: Tensor, history: Tensor, ids: Tensor) -> Tensor:
    label = logits.float().argmax(dim=-1).int()
    last, repeated = history[ids].unbind(-1)
    invalid = ~logits.float().amax(dim=-1).isfinite()  # amax of a row with a NaN is NaN
    repeated = torch.where((label == last) & ~invalid, repeated + 1, torch.zeros_like(repeated))
    history.index_copy_(0, ids, torch.stack([torch.where(invalid, -1, label), repeated], dim=-1).int())
    return torch.where(invalid, torch.nan, 1 / (1 + repeated.float()))


def _record_leaving(
    record: ExitRecord, ids: Tensor, leaves: Tensor, logits: Tensor, uncertainty: Tensor, layer: int
) -> None:
    # rewriting a staying row with what is already there keeps this free of data-dependent shapes
    record.logits.index_copy_(0, ids, torch.where(leaves[:, None], logits.float(), record.logits[ids]))
    record.uncertainty.index_copy_(0, ids, torch.where(leaves, uncertainty.float(), record.uncertainty[ids]))
    record.exit_layer.index_copy_(
        0, ids, torch.where(leaves, torch.full_like(ids, layer).int(), record.exit_layer[ids])
    )


@jit
def _ordered_bits(x):
    """int32 that sort as the float32 `x` do, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@jit
def _from_ordered_bits(bits):
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@jit
def _load_logits(
    row_starts,  # [ROWS] pointers to the first logit of each row
    in_batch,  # [ROWS]
    column,  # [COLUMNS]
    columns,  # C
    column_stride,
):
    """float32 [ROWS, COLUMNS], -inf outside the tensor"""
    inside = in_batch[:, None] & (column < columns)[None, :]
    pointers = row_starts[:, None] + column.to(tl.int64)[None, :] * column_stride
    return tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)


@jit
def _weigh(x, maximum):
    """Sums over the columns of e^y and y e^y, where y = x - maximum; NaN where the maximum is not finite."""
    y = x - maximum[:, None]
    weight = tl.exp(y)
    # a weight of 0 contributes 0, also where y is -inf
    return tl.sum(weight, 1), tl.sum(tl.where(weight == 0, 0.0, weight * y), 1)


@jit
def _two_largest(x):
    """The largest of each row, the largest of the others, and the first column of the largest."""
    column = tl.arange(0, x.shape[1])[None, :]
    first = tl.max(x, 1)
    # not tl.max's own indices: of a row of NaN the interpreter has none
    label = tl.min(tl.where(x == first[:, None], column, x.shape[1]), 1)
    others = tl.where(column == label[:, None], float("-inf"), x)
    return first, tl.max(others, 1), label


@jit
def _count_at_least(
    bits,  # [ROWS]
    row_starts,  # [ROWS]
    in_batch,  # [ROWS]
    tile,  # [ROWS, BLOCK_COLUMNS], all logits where RESIDENT
    columns,  # C
    column_stride,
    RESIDENT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """How many logits of each row have at least these ordered bits."""
    if RESIDENT:
        return tl.sum((_ordered_bits(tile) >= bits[:, None]).to(tl.int32), 1)
    counted = tl.zeros_like(bits)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        x = _load_logits(row_starts, in_batch, column, columns, column_stride)
        counted += tl.sum((_ordered_bits(x) >= bits[:, None]).to(tl.int32), 1)
    return counted


@jit
def _nth_largest(
    row_starts,  # [ROWS]
    in_batch,  # [ROWS]
    tile,  # [ROWS, BLOCK_COLUMNS], all logits where RESIDENT
    columns,  # C
    column_stride,
    top_n,
    RESIDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Ordered bits of the n-th largest logit of each row, found bit by bit: exact for every n, without sorting."""
    bits = tl.zeros([BLOCK_ROWS], tl.int32)
    counted = _count_at_least(bits, row_starts, in_batch, tile, columns, column_stride, RESIDENT, BLOCK_COLUMNS)
    bits = tl.where(counted >= top_n, bits, -(2**31))
    for step in range(31):
        candidate = bits | (1 << (30 - step))
        counted = _count_at_least(
            candidate, row_starts, in_batch, tile, columns, column_stride, RESIDENT, BLOCK_COLUMNS
        )
        bits = tl.where(counted >= top_n, candidate, bits)
    return bits


@jit
def _keep_above(x, threshold):
    """`x` where it is above the threshold, else -inf; and how many there are."""
    above = _ordered_bits(x) > threshold[:, None]
    return tl.where(above, x, float("-inf")), tl.sum(above.to(tl.int32), 1)


@jit
def _merge_sums(maximum, total, weighted, x):
    """Running maximum and sums with another block of columns: the sums are moved to the new maximum, then added to."""
    larger = tl.maximum(maximum, tl.max(x, 1))
    # before the first finite logit there is nothing to move, and no maximum to subtract
    drop = tl.where(maximum == float("-inf"), 0.0, maximum - larger)
    scale = tl.exp(drop)
    pivot = tl.where(larger == float("-inf"), 0.0, larger)
    block_total, block_weighted = _weigh(x, pivot)
    return larger, total * scale + block_total, (weighted + total * drop) * scale + block_weighted


@jit
def _streamed_statistics(
    row_starts,  # [ROWS]
    in_batch,  # [ROWS]
    threshold,  # [ROWS] ordered bits: "top_n" looks only above
    columns,  # C
    column_stride,
    CRITERION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Largest, second largest, sums, label, and how many are above the threshold; block by block of columns."""
    first = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    second = first
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = total
    label = tl.zeros([BLOCK_ROWS], tl.int32)
    above = label
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        x = _load_logits(row_starts, in_batch, column, columns, column_stride)
        if CRITERION == "top_n":
            x, block_above = _keep_above(x, threshold)
            above += block_above
        if CRITERION == "margin" or CRITERION == "patience":
            block_first, block_second, block_label = _two_largest(x)
            label = tl.where(block_first > first, start + block_label, label)
            second = tl.maximum(tl.minimum(first, block_first), tl.maximum(second, block_second))
        first, total, weighted = _merge_sums(first, total, weighted, x)
    return first, second, total, weighted, label, above


@jit
def _resident_statistics(
    tile,  # [ROWS, COLUMNS]
    threshold,  # [ROWS] ordered bits: "top_n" looks only above
    CRITERION: tl.constexpr,
):
    """The same of a tile that holds all columns."""
    above = tl.zeros_like(threshold)
    label = above
    if CRITERION == "margin" or CRITERION == "patience":
        first, second, label = _two_largest(tile)
    else:
        first = tl.max(tile, 1)
        second = first
    if CRITERION == "top_n":
        tile, above = _keep_above(tile, threshold)
    total, weighted = _weigh(tile, first)
    return first, second, total, weighted, label, above


@jit
def _statistics(
    row_starts,  # [ROWS]
    in_batch,  # [ROWS]
    tile,  # [ROWS, BLOCK_COLUMNS], all logits where RESIDENT
    columns,  # C
    column_stride,
    top_n,
    CRITERION: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Largest, second largest, sums and label of each row; the total is NaN without a finite maximum or with a NaN."""
    threshold = tl.zeros([BLOCK_ROWS], tl.int32)
    if CRITERION == "top_n":
        threshold = _nth_largest(
            row_starts, in_batch, tile, columns, column_stride, top_n, RESIDENT, BLOCK_ROWS, BLOCK_COLUMNS
        )
    if RESIDENT:
        first, second, total, weighted, label, above = _resident_statistics(tile, threshold, CRITERION)
    else:
        first, second, total, weighted, label, above = _streamed_statistics(
            row_starts, in_batch, threshold, columns, column_stride, CRITERION, BLOCK_ROWS, BLOCK_COLUMNS
        )
    if CRITERION == "top_n":
        # what the n largest have beyond those above the threshold are copies of it
        copies = (top_n - above).to(tl.float32)
        nth = _from_ordered_bits(threshold)
        first = tl.maximum(first, nth)
        y = nth - first
        weight = tl.exp(y)
        total += copies * weight
        weighted += tl.where(weight == 0, 0.0, copies * weight * y)
    total = tl.where(first == float("-inf"), float("nan"), total)
    return first, second, total, weighted, label


@jit
def _uncertainty(first, second, total, weighted, scale, CRITERION: tl.constexpr):
    if CRITERION == "max_prob":
        u = (1 - 1 / total) / scale
    elif CRITERION == "margin":
        u = 1 - (1 - tl.exp(second - first)) / total
    else:
        tl.static_assert(CRITERION == "entropy" or CRITERION == "top_n", "unknown criterion")
        u = (tl.log(total) - weighted / total) / scale
    # written so that a NaN passes through
    return tl.where(u < 0, 0.0, tl.where(u > 1, 1.0, u))


@jit
def _patience_of(
    history,  # [N, 2]
    ids,  # [ROWS]
    known,  # [ROWS]: within the batch and the record
    label,  # [ROWS]
    valid,  # [ROWS]: the logits have a finite maximum and no NaN
):
    last = tl.load(history + 2 * ids, mask=known, other=-1)
    repeated = tl.load(history + 2 * ids + 1, mask=known, other=0)
    tl.debug_barrier()  # several threads hold a row: all have read it before one of them writes it
    repeated = tl.where(valid & (label == last), repeated + 1, 0)
    tl.store(history + 2 * ids, tl.where(valid, label, -1), mask=known)
    tl.store(history + 2 * ids + 1, repeated, mask=known)
    return tl.where(valid, 1 / (1 + repeated.to(tl.float32)), float("nan"))


@jit
def gate_rows(
    first_row,
    logits,  # [B, C]
    speeds,  # [B] or None
    row_ids,  # [B] or None
    uncertainty,  # [B], out
    exit_logits,  # [N, C] or None, out, as the other three
    exit_uncertainty,  # [N]
    exit_layer,  # [N]
    history,  # [N, 2]
    rows,  # B
    columns,  # C
    row_stride,
    column_stride,
    capacity,  # N
    layer,
    speed,
    scale,  # by what the uncertainty is divided
    top_n,
    CRITERION: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Decides on rows first_row to first_row + BLOCK_ROWS; returns 1 for those that stay, [BLOCK_ROWS]."""
    row = first_row + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    in_batch = row < rows
    row_starts = logits + row * row_stride
    tile = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    if RESIDENT:
        tile = _load_logits(row_starts, in_batch, tl.arange(0, BLOCK_COLUMNS), columns, column_stride)
    first, second, total, weighted, label = _statistics(
        row_starts, in_batch, tile, columns, column_stride, top_n, CRITERION, RESIDENT, BLOCK_ROWS, BLOCK_COLUMNS
    )
    ids = row
    if row_ids is not None:
        ids = tl.load(row_ids + row, mask=in_batch, other=0).to(tl.int64)
    known = in_batch & (ids >= 0) & (ids < capacity)
    if CRITERION == "patience":
        u = _patience_of(history, ids, known, label, total == total)
    else:
        u = _uncertainty(first, second, total, weighted, scale, CRITERION)
    tl.store(uncertainty + row, u, mask=in_batch)

    limit = tl.zeros([BLOCK_ROWS], tl.float32) + speed
    if speeds is not None:
        limit = tl.load(speeds + row, mask=in_batch, other=0.0)
    # a NaN is not below any limit and stays; a limit of 0 keeps every row
    leaves = in_batch & (u <= limit) & (limit != 0)
    if exit_logits is not None:
        written = leaves & known
        tl.store(exit_uncertainty + ids, u, mask=written)
        tl.store(exit_layer + ids, tl.zeros([BLOCK_ROWS], tl.int32) + layer, mask=written)
        answers = exit_logits + ids * columns
        for start in range(0, columns, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            values = tile
            if not RESIDENT:
                values = _load_logits(row_starts, written, column, columns, column_stride)
            tl.store(answers[:, None] + column[None, :], values, mask=written[:, None] & (column < columns)[None, :])
    return (in_batch & (leaves == 0)).to(tl.int32)


@jit
def list_survivors(survivors, first_row, stays, kept, BLOCK_ROWS: tl.constexpr):
    """Writes the rows that stay after the `kept` before them; returns how many there are now."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    tl.store(survivors + kept + tl.cumsum(stays, 0) - stays, row, mask=stays != 0)
    return kept + tl.sum(stays, 0)


@jit
def _survivors_before(
    scan,  # one word a block: 0, or 4 * survivors + 1 of the block alone, + 2 of it and all before
    block,
    total,  # survivors of this block
    WINDOW: tl.constexpr,  # words a poll looks at: one a thread, because copies of a changing word may differ
):
    """Survivors of all earlier blocks, by a decoupled look-back over what those have published so far."""
    before = tl.zeros((), tl.int32)
    if block > 0:
        # relaxed: a word carries all that is to be known of its block
        tl.atomic_xchg(scan + block, 4 * total + 1, sem="relaxed")
    end = block  # blocks from here on are counted
    while end > 0:
        distance = tl.arange(0, WINDOW)
        index = end - 1 - distance
        # loaded once, so that the reductions below are of one moment
        words = tl.load(scan + index, mask=index >= 0, other=2, volatile=True)
        complete = tl.min(tl.where(words & 3 == 2, distance, WINDOW), 0)
        missing = tl.min(tl.where(words & 3 == 0, distance, WINDOW), 0)
        if complete < missing:
            before += tl.sum(tl.where(distance <= complete, words >> 2, 0), 0)
            end = tl.zeros((), tl.int32)
        elif missing == WINDOW:
            before += tl.sum(words >> 2, 0)
            end -= WINDOW
    tl.atomic_xchg(scan + block, 4 * (before + total) + 2, sem="relaxed")
    return before


# one binary for every batch size, layer and n
@jit(do_not_specialize=["rows", "capacity", "layer", "top_n"])
def _exit_gate_kernel(
    logits,  # [B, C]
    speeds,  # [B] float32 or None
    row_ids,  # [B] int32 or int64, or None
    uncertainty,  # [B] float32, out
    survivors,  # [B] int32, out
    count,  # [1] int32, out
    scan,  # [1 + blocks] int32 zeros: the next block, then a word a block; None where one program does all
    exit_logits,  # [N, C] float32 or None, out, as the other three
    exit_uncertainty,  # [N] float32
    exit_layer,  # [N] int32
    history,  # [N, 2] int32
    rows,  # B
    columns,  # C
    row_stride,
    column_stride,
    capacity,  # N
    layer,
    speed,
    scale,  # by what the uncertainty is divided
    top_n,
    CRITERION: tl.constexpr,
    RESIDENT: tl.constexpr,  # a tile holds all columns
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILES: tl.constexpr,  # that a program of several takes in turn before it publishes how many rows stay
    WINDOW: tl.constexpr,
):
    block = 0
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    if scan is not None:
        # numbered in the order of their start, so that a block only ever waits for running ones
        block = tl.atomic_add(scan, 1, sem="relaxed")
        tiles = TILES
    block_rows: tl.constexpr = TILES * BLOCK_ROWS
    block_start = block * block_rows
    kept = tl.zeros((), tl.int32)
    flags = tl.zeros([TILES, BLOCK_ROWS], tl.int32)
    for tile in range(0, tiles):
        first_row = block_start + tile * BLOCK_ROWS
        stays = gate_rows(
            first_row,
            logits,
            speeds,
            row_ids,
            uncertainty,
            exit_logits,
            exit_uncertainty,
            exit_layer,
            history,
            rows,
            columns,
            row_stride,
            column_stride,
            capacity,
            layer,
            speed,
            scale,
            top_n,
            CRITERION,
            RESIDENT,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
        if scan is None:
            kept = list_survivors(survivors, first_row, stays, kept, BLOCK_ROWS)
        else:
            flags = tl.where(tl.arange(0, TILES)[:, None] == tile, stays[None, :], flags)
    if scan is None:
        tl.store(count, kept)
    else:
        stays = tl.reshape(flags, [block_rows])
        kept = _survivors_before(scan + 1, block, tl.sum(stays, 0), WINDOW)
        kept = list_survivors(survivors, block_start, stays, kept, block_rows)
        if block_start + block_rows >= rows:
            tl.store(count, kept)


_launch_exit_gate = Launcher(_exit_gate_kernel)


MAX_COLUMNS = 4096
"""Classes up to which a program holds whole rows: 16 logits a thread with 8 warps, the most that fits its registers."""


ENOUGH_PROGRAMS = 132 * 16
"""What fills an H200 with programs of 128 threads."""


@dataclass(frozen=True)
class ExitGateConfig(LaunchConfig):
    """Launch configuration of the CUDA kernel."""

    block_rows: int
    block_columns: int
    resident: bool  # a tile holds all columns of its rows
    tiles: int  # of each program, where there are several
    programs: int
    num_warps: int

    @classmethod
    @lru_cache(maxsize=1024)  # the host is what a small gate waits for
    def choose(cls, rows: int, columns: int) -> ExitGateConfig:
        """The analytical choice for `rows` > 0.

        Up to four tiles one program takes in turn, which costs less than zeroing the scan state of several. The sizes
        of a tile depend on the classes alone: a batch that shrinks from layer to layer compiles nothing new, but for
        batches so large that programs of several tiles fill the GPU: there the atomics of a program, and the wait for
        what it reads of others, would cost as much as the one row it looks at.
        """
        block_columns = min(next_power_of_2(columns), MAX_COLUMNS)
        block_rows = min(max(1024 // block_columns, 1), 512)
        tiles = -(-rows // block_rows)
        each = max(min(16, 1024 // block_rows), 1)
        if tiles < each * ENOUGH_PROGRAMS:
            each = 1
        return cls(
            block_rows=block_rows,
            block_columns=block_columns,
            resident=columns <= block_columns,
            tiles=each,
            programs=1 if tiles <= 4 and columns <= block_columns else -(-tiles // each),
            num_warps=min(max(block_rows * block_columns // 256, 1), 8),
        )

    def options(self) -> dict[str, int]:
        """Without a limit of its own the assembler spills to fit more programs at once."""
        return {"num_warps": self.num_warps, "maxnreg": 160}

    def constants(self) -> dict[str, int]:
        """The constexprs under the kernel's names."""
        return {
            "RESIDENT": self.resident,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLUMNS": self.block_columns,
            "TILES": self.tiles,
            "WINDOW": 32 * self.num_warps,
        }


def uncertainty_scale(criterion: str, columns: int, top_n: int | None) -> float:
    """The number that divides the uncertainty, so that it lies in [0, 1]."""
    if criterion == "max_prob":
        return 1 - 1 / columns
    return math.log(top_n if criterion == "top_n" and top_n else columns)


def _exit_gate_triton(logits: Tensor, call: GateCall) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = logits.shape
    if rows >= 2**29:
        raise ValueError(f"logits: got B={rows} rows, the CUDA kernel takes fewer than 2**29; split the batch")
    uncertainty = torch.empty(rows, dtype=torch.float32, device=logits.device)
    survivors = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows == 0:
        return uncertainty, survivors, torch.zeros(1, dtype=torch.int32, device=logits.device)
    count = torch.empty(1, dtype=torch.int32, device=logits.device)
    speed, speeds = call.split_speed()
    config = ExitGateConfig.choose(rows, columns)
    scan = None
    if config.programs > 1:
        scan = torch.zeros(1 + config.programs, dtype=torch.int32, device=logits.device)
    _launch_exit_gate(
        (config.programs,),
        logits,
        speeds,
        call.contiguous_row_ids(),
        uncertainty,
        survivors,
        count,
        scan,
        *call.record_tensors(),
        rows,
        columns,
        *logits.stride(),
        rows if call.record is None else call.record.exit_layer.shape[0],
        call.layer or 0,
        speed,
        uncertainty_scale(call.criterion, columns, call.top_n),
        call.top_n or 0,
        CRITERION=call.criterion,
        **config.launch,
    )
    return uncertainty, survivors, count


_backend.register_backends(
    "exit_gate",
    cuda=_triton.missing_reason,
    cpu=_extension.missing_kernel_reason("exit_gate", "CPU"),
    interpretable=True,
)

library.define(
    "exit_gate(Tensor logits, float speed, int criterion, int top_n, Tensor? speeds) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "exit_gate_record(Tensor logits, float speed, int criterion, int top_n, Tensor? speeds, Tensor? row_ids, "
    "Tensor(a!) exit_logits, Tensor(b!) exit_uncertainty, Tensor(c!) exit_layer, Tensor(d!) history, int layer) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(library, "exit_gate", "CUDA")
def _exit_gate_op(
    logits: Tensor, speed: float, criterion: int, top_n: int, speeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _exit_gate_triton(logits, GateCall(speed if speeds is None else speeds, CRITERIA[criterion], top_n=top_n))


@torch.library.impl(library, "exit_gate_record", "CUDA")
def _exit_gate_record_op(
    logits: Tensor,
    speed: float,
    criterion: int,
    top_n: int,
    speeds: Tensor | None,
    row_ids: Tensor | None,
    exit_logits: Tensor,
    exit_uncertainty: Tensor,
    exit_layer: Tensor,
    history: Tensor,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    record = ExitRecord(exit_logits, exit_uncertainty, exit_layer, history)
    call = GateCall(speed if speeds is None else speeds, CRITERIA[criterion], row_ids, top_n, record, layer)
    return _exit_gate_triton(logits, call)


@torch.library.register_fake("fastkd_kernels::exit_gate", lib=library)
def _exit_gate_fake(
    logits: Tensor, speed: float, criterion: int, top_n: int, speeds: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(1, dtype=torch.int32),
    )


@torch.library.register_fake("fastkd_kernels::exit_gate_record", lib=library)
def _exit_gate_record_fake(
    logits: Tensor, speed: float, criterion: int, top_n: int, speeds: Tensor | None, *record: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _exit_gate_fake(logits, speed, criterion, top_n, speeds)


_CODES = {name: code for code, name in enumerate(CRITERIA)}


_eager_cpu = _eager.find("exit_gate")
"""(logits, speed, criterion, top_n) -> the decision, or None where the arguments need care."""


def _run(name: str, logits: Tensor, call: GateCall) -> ExitGateOutput:
    """`exit_gate` on the kernel of the backend `name`."""
    if logits.requires_grad:  # otherwise detaching would cost a small gate for nothing
        logits = logits.detach()
    logits = plain(logits)
    if name == "cuda" and not torch.compiler.is_compiling():
        # the dispatcher costs more than the kernel
        return ExitGateOutput(*_exit_gate_triton(logits, call))
    speed, speeds = call.split_speed()
    arguments = (logits, speed, _CODES[call.criterion], call.top_n or 0, speeds)
    if call.record is None:
        return ExitGateOutput(*torch.ops.fastkd_kernels.exit_gate(*arguments))
    return ExitGateOutput(
        *torch.ops.fastkd_kernels.exit_gate_record(
            *arguments, call.contiguous_row_ids(), *call.record_tensors(), call.layer
        )
    )


def _choose_backend(logits: Tensor) -> str:
    name = _backend.resolve("exit_gate", logits.device)
    if name == "reference" or logits.dtype in _KERNEL_DTYPES:
        return name
    return _backend.fall_back("exit_gate", name, f"its kernel computes in float32, and the logits are {logits.dtype}")


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def exit_gate(
    logits: Tensor,
    speed: float | Tensor,
    criterion: str = "entropy",
    row_ids: Tensor | None = None,
    top_n: int | None = None,
    *,
    record: ExitRecord | None = None,
    layer: int | None = None,
) -> ExitGateOutput:
    """Decide which rows leave after this layer and list those that stay.

    Args:
        logits: [B, C] float32, bfloat16, float16 or float64, any strides; B >= 0, C >= 2. float64 always takes the
            reference: the kernels compute in float32.
        speed: FastBERT's speed in [0, 1], a number or one value a row [B]; 0 switches exits off.
        criterion: "entropy", "max_prob", "margin", "top_n" or "patience" (module docstring).
        row_ids: [B] int32 or int64, where in `record` each row belongs; default 0..B-1. No number twice.
        top_n: how many of the largest probabilities "top_n" looks at, 2 to C.
        record: filled at `row_ids` with logits, uncertainty and `layer` of the rows that leave. Required by
            "patience", whose memory it holds.
        layer: the number of this layer, 1 after the first; required with `record`.

    Returns:
        ExitGateOutput; nothing in it was copied to the host.

    Raises:
        ValueError: a wrong shape or device, an unknown criterion, a speed outside [0, 1] or NaN, a missing companion
            argument. The values of tensors are looked at on CPU only: on a GPU a NaN speed keeps its row, and a row
            number outside the record is not written.
        IndexError: on CPU, a row number outside the record.
        TypeError: a wrong dtype.
    """
    if (
        _eager_cpu is not None
        and type(logits) is Tensor
        and logits.is_cpu
        and type(speed) is float
        and row_ids is None
        and record is None
        and (top_n is None or type(top_n) is int)
        and _eager.is_unwatched()
        and not logits.is_neg()
    ):
        decided = _eager_cpu(logits, speed, _CODES.get(criterion, -1), top_n or 0)
        if decided is not None:
            return ExitGateOutput(*decided)
    call = GateCall(speed, criterion, row_ids, top_n, record, layer)
    check_gate_call(call, logits)
    name = _choose_backend(logits)
    if name == "reference":
        return exit_gate_reference(logits, speed, criterion, row_ids, top_n, record=record, layer=layer)
    result = _run(name, logits, call)
    if record is not None:
        mark_written(call.record_tensors())
    return result


def check_gate_call(call: GateCall, logits: Tensor) -> None:
    """Raise what `exit_gate` raises for arguments that do not fit each other or the logits."""
    speed, criterion, row_ids, top_n, record, layer = call
    if not logits.is_floating_point():
        raise TypeError(f"logits: got dtype {logits.dtype}, expected a floating-point dtype")
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [B, C]")
    if logits.shape[1] < 2:
        raise ValueError(f"logits: got C={logits.shape[1]} classes, an exit needs at least 2")
    check_choice("criterion", criterion, CRITERIA)
    _check_speed(speed, logits)
    if criterion == "top_n" and (top_n is None or not 2 <= top_n <= logits.shape[1]):
        raise ValueError(f"top_n: got {top_n}, criterion 'top_n' needs 2 to C={logits.shape[1]}")
    if criterion == "patience" and record is None:
        raise ValueError(
            "record: got None, but criterion 'patience' keeps its state there; pass ExitRecord.allocate(...)"
        )
    if record is not None and layer is None:
        raise ValueError("layer: got None, a record needs the number of this layer (1 after the first)")
    if record is not None:
        _check_record(record, logits, speed, row_ids)
    if row_ids is not None:
        _check_row_ids(row_ids, logits, record)
    elif record is not None and record.exit_layer.shape[0] < logits.shape[0]:
        raise ValueError(
            f"record: got room for {record.exit_layer.shape[0]} rows, expected at least B={logits.shape[0]}, "
            "or row_ids that say which rows these are"
        )


def _check_speed(speed: float | Tensor, logits: Tensor) -> None:
    if not isinstance(speed, Tensor):
        # asking the abstract class takes longer than all other checks
        if type(speed) is not float and not isinstance(speed, Real):
            raise TypeError(f"speed: got {type(speed).__name__}, expected a number or a tensor [B]")
        if not 0 <= speed <= 1:
            raise ValueError(f"speed: got {speed}, expected a number from 0 (never leave) to 1 (leave at once)")
        return
    if not speed.is_floating_point():
        raise TypeError(f"speed: got dtype {speed.dtype}, expected a floating-point dtype")
    if speed.shape != logits.shape[:1]:
        raise ValueError(f"speed: got shape {tuple(speed.shape)}, expected a number or [{logits.shape[0]}]")
    check_same_device("speed", speed, "the logits", logits)
    if values_are_free(speed) and not bool(((speed >= 0) & (speed <= 1)).all()):
        raise ValueError("speed: got a value that is NaN or outside [0, 1]")


def _check_record(record: ExitRecord, logits: Tensor, speed: float | Tensor, row_ids: Tensor | None) -> None:
    check_same_device("record", record.exit_layer, "the logits", logits)
    if record.logits.shape[1] != logits.shape[1]:
        raise ValueError(f"record: got C={record.logits.shape[1]} classes, the logits have {logits.shape[1]}")
    written = {
        "record.logits": record.logits,
        "record.uncertainty": record.uncertainty,
        "record.exit_layer": record.exit_layer,
        "record.history": record.history,
    }
    check_written(
        written, {"logits": logits, "speed": speed if isinstance(speed, Tensor) else None, "row_ids": row_ids}
    )


def _check_row_ids(row_ids: Tensor, logits: Tensor, record: ExitRecord | None) -> None:
    if row_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"row_ids: got dtype {row_ids.dtype}, expected torch.int32 or torch.int64")
    if row_ids.shape != logits.shape[:1]:
        raise ValueError(f"row_ids: got shape {tuple(row_ids.shape)}, expected [{logits.shape[0]}]")
    check_same_device("row_ids", row_ids, "the logits", logits)
    if record is None or row_ids.shape[0] == 0 or not values_are_free(row_ids):
        return
    smallest, largest = (int(value) for value in row_ids.aminmax())
    if smallest < 0 or largest >= record.exit_layer.shape[0]:
        raise IndexError(
            f"row_ids: got values from {smallest} to {largest}, expected 0 to {record.exit_layer.shape[0] - 1}, "
            "the rows of the record"
        )
