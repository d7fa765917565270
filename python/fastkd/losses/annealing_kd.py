"""Annealing-KD: the student first follows teacher logits that grow to their full size, then learns from labels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.losses import _hidden
from fastkd_kernels.checks import check_choice


class AnnealingKDLoss(nn.Module):
    """Stage 1, |z^S - phi(T) z^T|^2 with phi(T) = 1 - (T - 1) / tau_max (Jafari et al., EACL 2021, arXiv:2104.07163).

    T falls from tau_max to 1 (`temperature_at`), so that phi grows from 1 / tau_max to 1; the student's logits are not
    tempered, and neither a softmax nor labels take part. Stage 2 takes the best checkpoint of stage 1 and trains on
    labels alone (`fastkd.losses.label_loss`) with a fresh optimizer. Scores (C = 1) need nothing special. Pinned:
    reduction "mean", over B * C, as `F.mse_loss` in the authors' script; the equation is "sum". There is no T^2.
    `fastkd kd` spreads the temperatures evenly over the steps of stage 1 instead of over epochs, so that ten fit into
    its default two; where the epochs are a multiple of tau_max, both are the same.

    Args:
        max_temperature: tau_max; the authors' NLP runs take 10.
        reduction: "mean", "batchmean", "sum", or "none" for [B].
    """

    def __init__(self, max_temperature: int = 10, reduction: str = "mean") -> None:
        super().__init__()
        if max_temperature < 1:
            raise ValueError(f"max_temperature: got {max_temperature}, expected a whole number of at least 1")
        check_choice("reduction", reduction, _hidden.REDUCTIONS)
        self.max_temperature = max_temperature
        self.reduction = reduction

    def temperature_at(self, epoch: int, epochs: int) -> int:
        """T in `epoch` (from 0) of the `epochs` of stage 1: from tau_max one less every epochs // tau_max epochs, to 1.

        Raises:
            ValueError: fewer epochs than temperatures.
        """
        if epochs < self.max_temperature:
            raise ValueError(
                f"epochs: got {epochs}, stage 1 needs at least {self.max_temperature}, one for each temperature; or "
                "lower max_temperature"
            )
        return max(self.max_temperature - epoch // (epochs // self.max_temperature), 1)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, temperature: int) -> Tensor:
        """The loss of stage 1 of logits [B, C] at T = `temperature`.

        Raises:
            ValueError: shapes that differ, T outside 1..tau_max, or a teacher that requires grad.
        """
        if not 1 <= temperature <= self.max_temperature:
            raise ValueError(f"temperature: got {temperature}, expected 1 to {self.max_temperature}")
        if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
            raise ValueError(
                f"teacher_logits: got shape {tuple(teacher_logits.shape)}, expected [B, C] as student_logits, "
                f"{tuple(student_logits.shape)}"
            )
        _hidden.check_no_gradient("teacher_logits", teacher_logits)
        student, teacher = _hidden.widen(student_logits, teacher_logits)
        phi = 1 - (temperature - 1) / self.max_temperature
        if self.reduction == "mean":
            return F.mse_loss(student, phi * teacher)
        loss = _hidden.squared_distance(student.unsqueeze(0), phi * teacher.unsqueeze(0), self.reduction)
        return loss[0] if self.reduction == "none" else loss
