"""ALP-KD: student layers imitate an attention-weighted mixture of the teacher's hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastkd.losses import _hidden
from fastkd_kernels.checks import check_choice

VARIANTS = ("ALP", "NO", "PO")
LAYER_REDUCTIONS = ("sum", "mean")


class ALPKDLoss(nn.Module):
    """sum_j MSE(h_j^S, C_j), C_j = sum_i softmax_i(<h_j^S, h_i^T>) h_i^T (Passban et al., AAAI 2021, arXiv:2012.14022).

    Pinned to the one public reproduction: scores divided by sqrt(H), mean over samples and features, mean over all M
    student layers (the last one included), the gradient flows through the attention; there it goes with a weight of
    1000, in `fastkd kd` by default with 1. `paper()` is the formula as written: unscaled scores, sum over layers.
    Softmax is the stable one.

    Args:
        variant: "ALP", attention over all N teacher layers; "NO", student layer j sees only the j-th of M consecutive
            buckets of teacher layers; "PO", those buckets with one more layer on either side. The paper does not say
            how N is divided where M does not divide it; here the first N mod M buckets hold one layer more.
        scale: factor of the scores, or "rsqrt_h" for 1 / sqrt(H).
        projection: applied to the student's hidden states where widths differ (not in the paper).
        layer_reduction: "mean" or "sum".
        reduction: over samples and features, as in `PKDLoss`: "mean" (B * H), "batchmean" (B), "sum"; "none" for
            [M, B], squared distances whatever `layer_reduction` is.
        detach_attention: take the attention weights as constants.
    """

    def __init__(
        self,
        variant: str = "ALP",
        scale: float | str = "rsqrt_h",
        projection: nn.Module | None = None,
        *,
        layer_reduction: str = "mean",
        reduction: str = "mean",
        detach_attention: bool = False,
    ) -> None:
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        check_choice("layer_reduction", layer_reduction, LAYER_REDUCTIONS)
        check_choice("reduction", reduction, _hidden.REDUCTIONS)
        if scale != "rsqrt_h" and (isinstance(scale, str) or not math.isfinite(scale)):
            raise ValueError(f'scale: got {scale!r}, expected a finite number or "rsqrt_h"')
        self.variant = variant
        self.scale = scale
        self.projection = projection
        self.layer_reduction = layer_reduction
        self.reduction = reduction
        self.detach_attention = detach_attention

    @classmethod
    def paper(cls, variant: str = "ALP", projection: nn.Module | None = None) -> ALPKDLoss:
        """Unscaled scores and a sum over layers, as the formula has it."""
        return cls(variant, 1.0, projection, layer_reduction="sum")

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """The loss of pooled hidden states [M, B, H] and [N, B, H] of all layers.

        Raises:
            ValueError: wrong shapes or widths, fewer teacher layers than buckets, a teacher that requires grad.
        """
        student, teacher = _hidden.comparable(student_hidden, teacher_hidden, self.projection)
        # a softmax over sums of hundreds of products does not survive bfloat16
        with torch.autocast(student.device.type, enabled=False):
            attention = self.attention(student, teacher)
            if self.detach_attention:
                attention = attention.detach()
            mixture = torch.einsum("mbn,nbh->mbh", attention, teacher)
        loss = _hidden.squared_distance(student, mixture, self.reduction)
        layers = student.shape[0]
        # "mean" has divided by the number of layers already
        if self.reduction == "mean" and self.layer_reduction == "sum":
            return loss * layers
        if self.reduction in ("batchmean", "sum") and self.layer_reduction == "mean":
            return loss / layers
        return loss

    def attention(self, student: Tensor, teacher: Tensor) -> Tensor:
        """lambda [M, B, N] of hidden states of one width."""
        scale = student.shape[-1] ** -0.5 if isinstance(self.scale, str) else self.scale
        scores = torch.einsum("mbh,nbh->mbn", student, teacher) * scale
        seen = visible_layers(self.variant, student.shape[0], teacher.shape[0])
        return scores.masked_fill(~seen.to(scores.device).unsqueeze(1), -math.inf).softmax(-1)


def visible_layers(variant: str, student_layers: int, teacher_layers: int) -> Tensor:
    """[M, N] bool: which teacher layers each student layer attends to.

    Raises:
        ValueError: fewer teacher layers than buckets.
    """
    if variant == "ALP":
        return torch.ones(student_layers, teacher_layers, dtype=torch.bool)
    if teacher_layers < student_layers:
        raise ValueError(
            f'variant: "{variant}" puts {teacher_layers} teacher layers into {student_layers} buckets, one of which '
            'stays empty; use "ALP"'
        )
    overlap = 1 if variant == "PO" else 0
    student = torch.arange(student_layers).unsqueeze(1)
    size, larger = divmod(teacher_layers, student_layers)
    first = student * size + student.clamp(max=larger)
    end = first + size + (student < larger)
    teacher = torch.arange(teacher_layers)
    return (teacher >= first - overlap) & (teacher < end + overlap)
