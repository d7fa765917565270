"""DistilBERT's triple loss, with a task's labels in the place of masked words."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.losses import _hidden
from fastkd.losses.kd import KDLoss
from fastkd.losses.labels import label_loss
from fastkd_kernels.checks import check_choice


class DistilBertLoss(nn.Module):
    """a tau^2 KL(teacher || student) + b CE(y, s) + c (1 - cos(h^S, h^T)) (Sanh et al., 2019, arXiv:1910.01108).

    DistilBERT's training code does this with masked-language modelling in the middle, weights 5, 2, 1, tau 2, and the
    cosine over the last hidden states of all tokens that are not padding; here the middle is the task. Pinned: those
    weights, reduction "batchmean", T^2 on, the mean over tokens.

    Args:
        kd_weight, label_weight, cosine_weight: a, b, c; that code's alpha_ce, alpha_mlm and alpha_cos.
        temperature, reduction, t2_scale: of the first term; see `KDLoss`.
        projection: applied to the student's hidden states where widths differ (not in the paper).
    """

    def __init__(
        self,
        kd_weight: float = 5.0,
        label_weight: float = 2.0,
        cosine_weight: float = 1.0,
        temperature: float = 2.0,
        *,
        reduction: str = "batchmean",
        t2_scale: bool = True,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("batchmean", "mean", "sum"))
        self.kd_weight = kd_weight
        self.label_weight = label_weight
        self.cosine_weight = cosine_weight
        self.kd = KDLoss(temperature, reduction, t2_scale)
        self.projection = projection

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student_logits, teacher_logits: [B, C].
            labels: [B].
            student_hidden, teacher_hidden: of the last layers, [B, T, H] of all tokens or [B, H] pooled.
            attention_mask: [B, T], non-zero where a token counts; None: all of them.

        Raises:
            ValueError: wrong shapes or widths, or a teacher that requires grad.
        """
        cosine = self.cosine(student_hidden, teacher_hidden, attention_mask)
        loss = self.kd_weight * self.kd(student_logits, teacher_logits)
        return loss + self.label_weight * label_loss(student_logits, labels) + self.cosine_weight * cosine

    def cosine(self, student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The mean of 1 - cos over the tokens that count."""
        _hidden.check_no_gradient("teacher_hidden", teacher_hidden)
        if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
            raise ValueError(
                f"teacher_hidden: got shape {tuple(teacher_hidden.shape)}, expected "
                f"{[*student_hidden.shape[:-1]]} + [H] as student_hidden"
            )
        if self.projection is not None:
            student_hidden = self.projection(student_hidden)
        _hidden.check_same_width(student_hidden, teacher_hidden)
        student, teacher = _hidden.widen(student_hidden, teacher_hidden)
        distance = 1 - F.cosine_similarity(student, teacher, dim=-1)
        if attention_mask is None:
            return distance.mean()
        if attention_mask.shape != distance.shape:
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {tuple(distance.shape)} as the "
                "hidden states"
            )
        kept = attention_mask.bool()
        return distance.masked_fill(~kept, 0).sum() / kept.sum().clamp(min=1)
