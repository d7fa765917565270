"""Patient knowledge distillation: inner student layers imitate chosen teacher layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.losses import _hidden
from fastkd.losses.layer_maps import LAYER_MAPS, inner_layer_map, rows_of
from fastkd_kernels.checks import check_choice


class PKDLoss(nn.Module):
    """sum_{j=1}^{M-1} | h_j^S / |h_j^S| - h_g(j)^T / |h_g(j)^T| |^2 (Sun et al., 2019, arXiv:1908.09355, 3.2).

    Of the [CLS] outputs of the layers (no pooler); the last student layer is left out, as in the released code. Pinned:
    reduction "mean", over samples, layers and features, which is that code's `F.mse_loss` and goes with its weights of
    10 to 1000. "batchmean" is the sum over layers and features, H (M - 1) times larger, as in TextBrewer. The code
    switches normalisation off for some tasks (its best MNLI, QNLI and QQP rows), the formula has it. PKD's students
    begin with the teacher's first layers ("layers:K:first"), those of `fastkd kd` by default with evenly spaced ones.

    Args:
        layer_map: see `fastkd.losses.inner_layer_map`: "skip", "last", "reverse",
            "random", or the numbers of the teacher layers.
        normalize: compare directions only.
        reduction: "mean", "batchmean", "sum", or "none" for [M - 1, B].
        projection: applied to the student's hidden states where widths differ (not in the paper).
        seed: of layer_map="random".
    """

    def __init__(
        self,
        layer_map: str | Sequence[int] = "skip",
        normalize: bool = True,
        reduction: str = "mean",
        projection: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(layer_map, str):
            check_choice("layer_map", layer_map, LAYER_MAPS)
        check_choice("reduction", reduction, _hidden.REDUCTIONS)
        self.layer_map = layer_map
        self.normalize = normalize
        self.reduction = reduction
        self.projection = projection
        self.seed = seed

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """The loss of pooled hidden states [M, B, H] and [N, B, H] of all layers.

        Raises:
            ValueError: wrong shapes or widths, a map that does not fit, a teacher that requires grad.
        """
        layers = inner_layer_map(self.layer_map, student_hidden.shape[0], teacher_hidden.shape[0], self.seed)
        student, teacher = _hidden.comparable(student_hidden[:-1], teacher_hidden[rows_of(layers)], self.projection)
        if self.normalize:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        return _hidden.squared_distance(student, teacher, self.reduction)
