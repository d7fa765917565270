"""MHKD: an auxiliary classifier on every matched pair of layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd.losses.kd import VanillaKDLoss
from fastkd.losses.labels import label_loss
from fastkd.losses.layer_maps import LAYER_MAPS, inner_layer_map, rows_of
from fastkd_kernels.checks import check_choice


class MHKDLoss(nn.Module):
    """KD(s_M, t_N) + sum_{l<M} [b KD(s_l, t_g(l)) + CE(t_g(l), y)] (Wang et al., 2020, arXiv:2012.02911).

    With KD(s, t) = (1 - a) CE(s, y) + a tau^2 KL(softmax(t / tau) || softmax(s / tau)). Follows the version in
    the code of DIH's authors, a 0.1, tau 4, b 0.5: the teacher's body is frozen, the heads of both networks are
    trained by this loss. `fastkd kd` has `teacher_head_ce` 0 instead: the teacher's heads are trained beforehand and
    stay, as for every other method. That code matches stages of equal number; PKD's skip map is this project's port to
    encoders. Pinned: reduction "batchmean", T^2 on.

    Args:
        kd_weight: a, of the divergence within each pair of classifiers, the paper's alpha; the labels weigh 1 - a.
        intermediate_weight: b, of the pairs below the last, the paper's beta.
        temperature: tau.
        layer_map: teacher layers of student layers 1..M-1, see `fastkd.losses.inner_layer_map`.
        detach_teacher: the code lets the distillation reach the teacher's heads too (they are not detached); False
            does as it does.
        teacher_head_ce: weight of CE(t_g(l), y); 0 for heads that were trained beforehand.
        reduction: "batchmean" or "mean", of the divergences; see `KDLoss`. Cross entropies are means over samples.
        t2_scale: multiply divergences with tau^2.
    """

    def __init__(
        self,
        kd_weight: float = 0.1,
        intermediate_weight: float = 0.5,
        temperature: float = 4.0,
        layer_map: str | Sequence[int] = "skip",
        *,
        detach_teacher: bool = True,
        teacher_head_ce: float = 1.0,
        reduction: str = "batchmean",
        t2_scale: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(layer_map, str):
            check_choice("layer_map", layer_map, LAYER_MAPS)
        check_choice("reduction", reduction, ("batchmean", "mean"))
        self.intermediate_weight = intermediate_weight
        self.layer_map = layer_map
        self.detach_teacher = detach_teacher
        self.teacher_head_ce = teacher_head_ce
        self.kd = VanillaKDLoss(kd_weight, temperature, reduction, t2_scale, detach_teacher=detach_teacher)

    def forward(self, student_layer_logits: Tensor, teacher_layer_logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits [M, B, C] and [N, B, C] of all layers, the last ones the models' own, and labels [B].

        Raises:
            ValueError: wrong shapes, or a map that does not fit.
        """
        layers = inner_layer_map(self.layer_map, student_layer_logits.shape[0], teacher_layer_logits.shape[0])
        student, teacher = student_layer_logits[:-1], teacher_layer_logits[rows_of(layers)]
        target = teacher.detach() if self.detach_teacher else teacher
        # the teacher's own classifier is frozen whatever its heads are
        last = self.kd(student_layer_logits[-1], teacher_layer_logits[-1].detach(), labels)
        loss = last + self.intermediate_weight * self.kd.layers(student, target, labels)
        return loss + self.teacher_head_ce * label_loss(teacher, labels) if self.teacher_head_ce else loss
