"""RAIL-KD: inner student layers imitate teacher layers that are drawn anew again and again."""

from __future__ import annotations

import random

from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.losses import _hidden
from fastkd_kernels.checks import check_choice

VARIANTS = ("layerwise", "concatenated")


class RAILKDLoss(nn.Module):
    """sum_j | W_S h_j^S / |W_S h_j^S| - W_T h_r(j)^T / |W_T h_r(j)^T| |^2 (Haidar et al., 2022, arXiv:2109.10164).

    r(1) < ... < r(M - 1) are drawn from the teacher's layers 1..N-1; student layers are 1..M-1; hidden states are means
    over tokens (`LayerProbe(pool="mean")`). The paper draws once an epoch. No public code was found: one projection a
    network, shared by its layers, and the normalisation are this project's reading. Pinned: reduction "batchmean" with
    a sum over layers.

    W_T is drawn once and stays, which departs from the paper. A W_T that is trained may throw away what the networks
    differ in: the distance of a student that never moves then falls to 0, even against the hidden states of other
    sentences, and the term teaches nothing. A projection with orthonormal rows keeps the angles between sentences
    (nearly, where it is narrower than the teacher), so that the distance closes from the student's side alone, by its
    layers and by W_S.

    Which layers are drawn is a function of `seed` and the number given to `resample` alone, so that resumed runs and
    all processes of a distributed one draw the same.

    Args:
        student_layers: M.
        student_hidden_size, teacher_hidden_size: their widths.
        projection_size: width that both networks are projected to; None: not projected, which needs equal widths.
        variant: "layerwise" as above, or "concatenated": all layers of a sample side by side, then one projection and
            one distance.
        train_teacher_projection: train W_T along with W_S, as the paper has it.
        reduction: "batchmean", "mean" (over features and layers too), "sum", or "none".
        seed: of the draws.
    """

    def __init__(
        self,
        student_layers: int,
        student_hidden_size: int,
        teacher_hidden_size: int,
        projection_size: int | None = 128,
        variant: str = "layerwise",
        *,
        train_teacher_projection: bool = False,
        reduction: str = "batchmean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        check_choice("reduction", reduction, _hidden.REDUCTIONS)
        if student_layers < 2:
            raise ValueError(f"student_layers: got {student_layers}, a loss on inner layers needs at least 2")
        self.inner_layers = student_layers - 1
        self.variant = variant
        self.reduction = reduction
        self.seed = seed
        self.draw = 0
        joined = self.inner_layers if variant == "concatenated" else 1
        self.student_projection = self._projection(joined * student_hidden_size, projection_size)
        self.teacher_projection = self._projection(joined * teacher_hidden_size, projection_size)
        if not train_teacher_projection:
            self._anchor()

    @staticmethod
    def _projection(width: int, projection_size: int | None) -> nn.Module:
        return nn.Identity() if projection_size is None else nn.Linear(width, projection_size, bias=False)

    def _anchor(self) -> None:
        for weight in self.teacher_projection.parameters():
            nn.init.orthogonal_(weight)
            weight.requires_grad_(False)

    def resample(self, draw: int) -> None:
        """Draw the teacher's layers for epoch (or step) number `draw`."""
        self.draw = draw

    def layers(self, teacher_layers: int) -> tuple[int, ...]:
        """The numbers, from 1 and ascending, of the teacher layers drawn.

        Raises:
            ValueError: too few teacher layers.
        """
        if teacher_layers <= self.inner_layers:
            raise ValueError(
                f"teacher_hidden: got {teacher_layers} layers, expected more than the student's {self.inner_layers} "
                "inner ones"
            )
        # text is hashed whole; torch's generator would look at 32 bits of a number made of both
        generator = random.Random(f"{self.seed} {self.draw}")
        return tuple(sorted(generator.sample(range(1, teacher_layers), self.inner_layers)))

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """The loss of mean-pooled hidden states [M, B, H^S] and [N, B, H^T] of all layers.

        Raises:
            ValueError: wrong shapes or widths, too few layers, a teacher that requires grad.
        """
        if student_hidden.shape[0] != self.inner_layers + 1:
            raise ValueError(
                f"student_hidden: got {student_hidden.shape[0]} layers, expected {self.inner_layers + 1} as given"
            )
        _hidden.check_no_gradient("teacher_hidden", teacher_hidden)
        rows = [layer - 1 for layer in self.layers(teacher_hidden.shape[0])]
        student, teacher = student_hidden[:-1], teacher_hidden[rows]
        if self.variant == "concatenated":
            student, teacher = _side_by_side(student), _side_by_side(teacher)
        student, teacher = self.student_projection(student), self.teacher_projection(teacher)
        _hidden.check_same_width(student, teacher)
        student, teacher = _hidden.widen(student, teacher)
        return _hidden.squared_distance(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1), self.reduction)


def _side_by_side(hidden: Tensor) -> Tensor:
    """[L, B, H] -> [1, B, L * H]."""
    return hidden.transpose(0, 1).flatten(1).unsqueeze(0)
