"""Exit criteria beyond those of the fused gate, which see the class probabilities of one head only.

    learned      u = 1 - c, c the certainty in [0, 1] that the learned exit reads off the hidden state of [CLS] and
                 the margin of the logits (`fastkd.encoders.heads.LearnedExit`; BERxiT, EACL 2021)
    agreement    u = d / (1 + d), d = |y_k - y_(k-1)| how far the answer moved since the head asked before, 1 at the
                 first head asked: for regression, which has no probabilities. A speed of t / (1 + t) lets rows leave
                 that moved by at most t, in units of the label

They run in plain PyTorch after the head's own op, on any device, without the fused head and gate: some ten small ops a
head instead of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd.exits.catalogue import CRITERIA
from fastkd.exits.rule import ExitRule


def decide(
    logits: Tensor,
    rule: ExitRule,
    *,
    layer: int,
    record: fk.ExitRecord,
    row_ids: Tensor | None = None,
    thresholds: Tensor | None = None,
    certainty: Tensor | None = None,
) -> fk.ExitGateOutput:
    """`fastkd_kernels.exit_gate` for every criterion in `CRITERIA`.

    Args:
        logits: [B, C], of the head after `layer`.
        rule: its criterion measures the uncertainty, and its threshold after `layer` says which rows leave.
        layer, record, row_ids: as in `fastkd_kernels.exit_gate`; "agreement" keeps its memory in the record, as
            "patience" does.
        thresholds: [B] float32, one a row, in the place of the rule's.
        certainty: [B] of the learned exit, for "learned".

    Returns:
        What the gate decided, with the logits.

    Raises:
        ValueError: as `fastkd_kernels.exit_gate`; "learned" without a certainty; "agreement" with more than one number
            a row, others with only one.
    """
    speed = rule.threshold(layer) if thresholds is None else thresholds
    if rule.criterion in fk.CRITERIA:
        if logits.shape[1] == 1:
            raise ValueError(
                f"criterion: {rule.criterion!r} needs class probabilities, but a regression answers with one number; "
                "use 'agreement'"
            )
        decided = fk.exit_gate(logits, speed, rule.criterion, row_ids, rule.top_n, record=record, layer=layer)
        return decided._replace(logits=logits)
    uncertainty = _uncertainty(logits, rule.criterion, record, row_ids, certainty)
    # a NaN stays, as in the fused gate
    leaves = (uncertainty <= speed) & (speed > 0)
    ids = _row_numbers(logits, row_ids)
    # rewriting a staying row with what is already there keeps this free of data-dependent shapes
    record.logits.index_copy_(0, ids, torch.where(leaves[:, None], logits.float(), record.logits[ids]))
    record.uncertainty.index_copy_(0, ids, torch.where(leaves, uncertainty, record.uncertainty[ids]))
    record.exit_layer.index_copy_(0, ids, torch.where(leaves, layer, record.exit_layer[ids]).int())
    # a stable sort puts the staying rows first without asking the device how many there are
    survivors = torch.sort(leaves.to(torch.uint8), stable=True).indices.int()
    return fk.ExitGateOutput(uncertainty, survivors, leaves.logical_not().sum(dtype=torch.int32).reshape(1), logits)


def _uncertainty(
    logits: Tensor, criterion: str, record: fk.ExitRecord, row_ids: Tensor | None, certainty: Tensor | None
) -> Tensor:
    """[B] float32, by a criterion that the fused gate does not have."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: got {criterion!r}, expected one of {', '.join(CRITERIA)}")
    if criterion == "agreement":
        return _moved(logits, record, _row_numbers(logits, row_ids)).float()
    if criterion != "learned":
        raise NotImplementedError(
            f"criterion: {criterion!r} is in the catalogue; give it a formula in exits/criteria.py"
        )
    if certainty is None:
        raise ValueError("criterion: got 'learned', but there is no learned exit; distil with one (--learned-exit)")
    return (1 - certainty).float()


def _row_numbers(logits: Tensor, row_ids: Tensor | None) -> Tensor:
    return torch.arange(logits.shape[0], device=logits.device) if row_ids is None else row_ids.long()


def _moved(logits: Tensor, record: fk.ExitRecord, ids: Tensor) -> Tensor:
    """The uncertainty of "agreement"; remembers the answers, as bits beside a mark that there are some."""
    if logits.shape[1] != 1:
        raise ValueError(
            f"criterion: 'agreement' compares numbers, got C={logits.shape[1]} classes; use 'patience', which compares "
            "labels"
        )
    answer = logits[:, 0].float().contiguous()
    mark, bits = record.history[ids].unbind(-1)
    distance = (answer - bits.contiguous().view(torch.float32)).abs()
    moved = torch.where(distance.isinf(), 1.0, distance / (1 + distance))
    remembered = torch.stack([torch.zeros_like(mark), answer.view(torch.int32)], dim=-1)
    record.history.index_copy_(0, ids, remembered)
    return torch.where((mark < 0) & ~answer.isnan(), 1.0, moved)
