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
from typing import NamedTuple

import torch
from torch import Tensor

CRITERIA = ("entropy", "max_prob", "margin", "top_n", "patience")


class ExitGateOutput(NamedTuple):
    """What one exit gate decided."""

    uncertainty: Tensor
    """[B] float32; NaN where the logits hold a NaN."""
    survivors: Tensor
    """[B] int32: row numbers that stay, ascending; only the first `count` are defined."""
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which nobody calls here
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
            used by the patience criterion only.
    """

    logits: Tensor
    uncertainty: Tensor
    exit_layer: Tensor
    history: Tensor

    @classmethod
    def allocate(cls, rows: int, num_labels: int, device: torch.device | str = "cpu") -> ExitRecord:
        """An empty record for `rows` sequences and `num_labels` classes."""
        history = torch.zeros(rows, 2, dtype=torch.int32, device=device)
        history[:, 0] = -1
        return cls(
            logits=torch.zeros(rows, num_labels, dtype=torch.float32, device=device),
            uncertainty=torch.zeros(rows, dtype=torch.float32, device=device),
            exit_layer=torch.zeros(rows, dtype=torch.int32, device=device),
            history=history,
        )

    def write(self, row_ids: Tensor, logits: Tensor, uncertainty: Tensor, layer: int) -> None:
        """Answer `row_ids` [K] with `logits` [K, C] and `uncertainty` [K] of `layer`, whatever the uncertainty."""
        index = row_ids.long()
        self.logits.index_copy_(0, index, logits.float())
        self.uncertainty.index_copy_(0, index, uncertainty.float())
        self.exit_layer.index_fill_(0, index, layer)


def uncertainty_reference(logits: Tensor, criterion: str = "entropy", top_n: int | None = None) -> Tensor:
    """Uncertainty [B] of logits [B, C] for every criterion but patience; differentiable.

    Computed in float64 for float64 logits, else in float32. Rows without a finite maximum are NaN.
    """
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
    first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return (1 - (first - second)).clamp(0, 1)


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
    rows = torch.arange(logits.shape[0], device=logits.device)
    ids = rows if row_ids is None else row_ids.long()
    if criterion == "patience":
        assert record is not None
        uncertainty = _patience(logits, record.history, ids)
    else:
        uncertainty = uncertainty_reference(logits, criterion, top_n)
    threshold = torch.as_tensor(speed, device=logits.device, dtype=uncertainty.dtype)
    stays = ~(uncertainty <= threshold) | (threshold == 0)
    # a stable sort puts the staying rows first without asking the device how many there are
    survivors = torch.sort((~stays).to(torch.uint8), stable=True).indices
    if record is not None:
        assert layer is not None
        _record_leaving(record, ids, ~stays, logits, uncertainty, layer)
    return ExitGateOutput(uncertainty.detach().float(), survivors.int(), stays.sum(dtype=torch.int32).reshape(1))


def _patience(logits: Tensor, history: Tensor, ids: Tensor) -> Tensor:
    label = logits.float().argmax(dim=-1).int()
    last, repeated = history[ids].unbind(-1)
    repeated = torch.where(label == last, repeated + 1, torch.zeros_like(repeated))
    invalid = logits.isnan().any(dim=-1) | ~logits.float().amax(dim=-1).isfinite()
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
        logits: [B, C] float32, bfloat16, float16 or float64, any strides; B >= 0, C >= 2.
        speed: FastBERT's speed in [0, 1], a number or one value a row [B]; 0 switches exits off.
        criterion: "entropy", "max_prob", "margin", "top_n" or "patience" (module docstring).
        row_ids: [B] int32 or int64, where in `record` each row belongs; default 0..B-1.
        top_n: how many of the largest probabilities "top_n" looks at, 2 to C.
        record: filled at `row_ids` with logits, uncertainty and `layer` of the rows that leave. Required by
            "patience", whose memory it holds.
        layer: the number of this layer, 1 after the first; required with `record`.

    Returns:
        ExitGateOutput; nothing in it was copied to the host.

    Raises:
        ValueError: a wrong shape, an unknown criterion, a speed outside [0, 1] or NaN, a missing companion argument.
        TypeError: a wrong dtype.
    """
    _check(logits, speed, criterion, row_ids, top_n, record, layer)
    return exit_gate_reference(logits, speed, criterion, row_ids, top_n, record=record, layer=layer)


def _check(
    logits: Tensor,
    speed: float | Tensor,
    criterion: str,
    row_ids: Tensor | None,
    top_n: int | None,
    record: ExitRecord | None,
    layer: int | None,
) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits: got dtype {logits.dtype}, expected a floating-point dtype")
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected [B, C]")
    if logits.shape[1] < 2:
        raise ValueError(f"logits: got C={logits.shape[1]} classes, an exit needs at least 2")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: got {criterion!r}, expected one of {', '.join(CRITERIA)}")
    if isinstance(speed, Tensor):
        _check_speeds(speed, logits)
    elif not 0 <= speed <= 1:
        raise ValueError(f"speed: got {speed}, expected a number from 0 (never leave) to 1 (leave at once)")
    if criterion == "top_n" and (top_n is None or not 2 <= top_n <= logits.shape[1]):
        raise ValueError(f"top_n: got {top_n}, criterion 'top_n' needs 2 to C={logits.shape[1]}")
    if criterion == "patience" and record is None:
        raise ValueError("record: got None, criterion 'patience' keeps its memory there; pass ExitRecord.allocate(...)")
    if record is not None and layer is None:
        raise ValueError("layer: got None, a record needs the number of this layer (1 after the first)")
    if row_ids is not None and row_ids.shape != logits.shape[:1]:
        raise ValueError(f"row_ids: got shape {tuple(row_ids.shape)}, expected [{logits.shape[0]}]")


def _check_speeds(speed: Tensor, logits: Tensor) -> None:
    if speed.shape != logits.shape[:1]:
        raise ValueError(f"speed: got shape {tuple(speed.shape)}, expected a number or [{logits.shape[0]}]")
    if speed.device != logits.device:
        raise ValueError(f"speed: got device {speed.device}, expected that of the logits, {logits.device}")
    # on a GPU this check would wait for the device
    if speed.device.type == "cpu" and not bool(((speed >= 0) & (speed <= 1)).all()):
        raise ValueError("speed: got a value that is NaN or outside [0, 1]")
