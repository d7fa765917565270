"""DIH: the student's classifier learns from the teacher's own and from heads mounted on its inner layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastkd.losses.kd import VanillaKDLoss
from fastkd_kernels.checks import check_choice


class DIHLoss(nn.Module):
    """sum_m [(1 - w) CE(s, y) + w tau_m^2 KL(softmax(t_m / tau_m) || softmax(s / tau_m))] (arXiv:2103.00497).

    Over the k + 1 classifiers t_m of a teacher whose k heads were trained on its frozen layers, here one on every layer
    below the last. The code of Asadian and Salehi-Abari, which this follows, sums, cross entropy included, so that the
    labels weigh (k + 1)(1 - w) in all; others describe the method as an average. With a head on every one of N layers
    that is 0.9 N; gradients clipped to a norm of 1, as by default in `fastkd kd`, are cut N times sooner than those of
    one classifier. Pinned: head_reduction "sum", reduction "batchmean", T^2 on, w 0.1, tau 5.

    Args:
        temperature: tau, one for all classifiers or one each.
        kd_weight: w, of the divergence from each classifier of the teacher, the paper's alpha; the labels weigh 1 - w.
        head_reduction: "sum" or "mean" over the teacher's classifiers.
        reduction: "batchmean" or "mean", of the divergences; see `KDLoss`.
        t2_scale: multiply divergences with tau^2.
    """

    def __init__(
        self,
        temperature: float | Sequence[float] = 5.0,
        kd_weight: float = 0.1,
        head_reduction: str = "sum",
        *,
        reduction: str = "batchmean",
        t2_scale: bool = True,
    ) -> None:
        super().__init__()
        check_choice("head_reduction", head_reduction, ("sum", "mean"))
        check_choice("reduction", reduction, ("batchmean", "mean"))
        self.head_reduction = head_reduction
        self.shared_temperature = not isinstance(temperature, Sequence)
        temperatures = temperature if isinstance(temperature, Sequence) else [temperature]
        self.kd = nn.ModuleList(VanillaKDLoss(kd_weight, tau, reduction, t2_scale) for tau in temperatures)

    def forward(self, student_logits: Tensor, teacher_layer_logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of student logits [B, C], logits [K, B, C] of all teacher classifiers, and labels [B].

        Raises:
            ValueError: wrong shapes, another number of temperatures than classifiers, a teacher that requires grad.
        """
        heads = teacher_layer_logits.shape[0]
        if self.shared_temperature:
            students = student_logits.expand_as(teacher_layer_logits)
            loss = cast(VanillaKDLoss, self.kd[0]).layers(students, teacher_layer_logits, labels)
        elif len(self.kd) == heads:
            losses = [
                kd(student_logits, teacher, labels) for kd, teacher in zip(self.kd, teacher_layer_logits, strict=True)
            ]
            loss = torch.stack(losses).sum()
        else:
            raise ValueError(f"temperature: got {len(self.kd)} values, expected {heads}, one for each classifier")
        return loss if self.head_reduction == "sum" else loss / heads
