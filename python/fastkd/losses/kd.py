"""Distillation from the logits of the last layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import fastkd_kernels as fk
from fastkd.losses.labels import task_of

KD_PRESETS: dict[str, dict[str, Any]] = {
    "hinton": {"temperature": 1.0, "reduction": "batchmean", "t2_scale": True},
    "pkd": {"temperature": 10.0, "reduction": "mean", "t2_scale": True},
    "takd": {"temperature": 1.0, "reduction": "mean", "t2_scale": True},
    "mhkd": {"temperature": 4.0, "reduction": "batchmean", "t2_scale": True},
    "dih": {"temperature": 5.0, "reduction": "batchmean", "t2_scale": True},
    "distilbert": {"temperature": 2.0, "reduction": "batchmean", "t2_scale": True},
    "continuation-kd": {"temperature": 1.0, "reduction": "batchmean", "t2_scale": False},
}
"""Temperature, reduction and T^2 of published codes, which differ by factors of C and T^2 for one and the same formula.

hinton: the paper's formula as most codes write it. pkd, takd: the released codes of PKD (arXiv:1908.09355) and TAKD
(arXiv:1902.03393; it searches the temperature) call `KLDivLoss()`, which divides by B * C. mhkd, dih: the code of DIH
(arXiv:2103.00497), which holds a version of MHKD too. distilbert: the training code of DistilBERT. continuation-kd:
equation 1 of arXiv:2212.05998, which has no T^2.
"""


class KDLoss(nn.Module):
    """tau^2 KL(softmax(t / tau) || softmax(s / tau)) (Hinton et al., 2015), by `fastkd_kernels.kd_loss`.

    Pinned: reduction "batchmean", T^2 on. For one class (C = 1, a regression) it is the squared error (s - t)^2,
    divided by tau^2 where T^2 is off.

    Args:
        temperature: tau.
        reduction: "batchmean" divides the sum by B, "mean" by B * C, "sum" does not, "none" gives [B].
        t2_scale: multiply with tau^2.
        direction: "forward" KL(teacher || student), "reverse" KL(student || teacher), or "jsd".
        detach_teacher: False lets a gradient reach the teacher; otherwise a teacher that requires grad is an error.
        beta: the interpolation of direction="jsd", default 0.5.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        t2_scale: bool = True,
        direction: str = "forward",
        *,
        detach_teacher: bool = True,
        beta: float | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.t2_scale = t2_scale
        self.direction = direction
        self.detach_teacher = detach_teacher
        self.beta = beta

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> KDLoss:
        """What a published code does, see `KD_PRESETS`; `options` overrides it.

        Raises:
            ValueError: an unknown preset.
        """
        if name not in KD_PRESETS:
            raise ValueError(f"preset: got {name!r}, expected one of {', '.join(KD_PRESETS)}")
        return cls(**{**KD_PRESETS[name], **options})

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """A scalar, or [B] for reduction="none", of logits [B, C]."""
        return fk.kd_loss(
            student_logits,
            teacher_logits,
            self.temperature,
            self.reduction,
            self.t2_scale,
            self.direction,
            task=task_of(student_logits),
            detach_teacher=self.detach_teacher,
            beta=self.beta,
        )


class VanillaKDLoss(nn.Module):
    """(1 - w) CE(y, s) + w tau^2 KL(softmax(t / tau) || softmax(s / tau)), in one launch on a GPU.

    The whole loss of a vanilla distillation step (Hinton et al., 2015), of each hop of TAKD (arXiv:1902.03393),
    and of every head of DIH and MHKD. Pinned: reduction "batchmean", T^2 on. C = 1 takes squared errors.

    Args:
        kd_weight: w, of the divergence from the teacher; the labels weigh 1 - w. The papers' alpha, TAKD's lambda.
        temperature, reduction, t2_scale, direction, detach_teacher: as in `KDLoss`; the cross entropy of "mean" divides
            by B only.
    """

    def __init__(
        self,
        kd_weight: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        t2_scale: bool = True,
        direction: str = "forward",
        *,
        detach_teacher: bool = True,
    ) -> None:
        super().__init__()
        self.kd_weight = kd_weight
        self.temperature = temperature
        self.reduction = reduction
        self.t2_scale = t2_scale
        self.direction = direction
        self.detach_teacher = detach_teacher

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """A scalar, or [B] for reduction="none", of logits [B, C] and labels [B]."""
        return fk.distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            student_logits.new_empty(0, *student_logits.shape),
            teacher_logits.unsqueeze(0),
            1 - self.kd_weight,
            self.kd_weight,
            0.0,
            temperature=self.temperature,
            reduction=self.reduction,
            t2_scale=self.t2_scale,
            direction=self.direction,
            task=task_of(student_logits),
            detach_teacher=self.detach_teacher,
        )

    def layers(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over L layers of the losses of logits [L, B, C] each, in one call of the op.

        Raises:
            ValueError: a reduction other than "batchmean" and "mean".
        """
        if self.reduction not in ("batchmean", "mean"):
            raise ValueError(f'reduction: got "{self.reduction}", a sum over layers expects "batchmean" or "mean"')
        layers = student_logits.shape[0]
        labels = labels.repeat(layers, *[1] * (labels.dim() - 1))
        return layers * self(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels)
