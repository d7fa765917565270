"""Universal-KD: student layers learn from an attention-weighted mixture of the teacher's pseudo-classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastkd_kernels as fk
from fastkd.losses import _hidden
from fastkd.losses.labels import label_loss, task_of
from fastkd.losses.layer_maps import rows_of
from fastkd_kernels.checks import check_choice

STUDENT_LAYERS = ("inner", "last", "all")
ATTENTION_SPACES = ("logits", "centred", "log_probs", "probs")


class UniversalKDLoss(nn.Module):
    """sum_j tau^2 KL(softmax(F(j) / tau) || softmax(f_j^S / tau)) with F(j) = sum_i lambda_ij f_i^T (EMNLP 2021).

    lambda_ij = softmax_i <f_i^T, f_j^S> over the logits f of the classifiers on the teacher's layers i = 1..N and the
    student's layers j. By `fastkd_kernels.universal_kd_loss`: all layers in one launch on a GPU. No public code of the
    paper exists. What its formulas leave open is settled by the defaults here, which are this project's:

    1.  attention on logits, unscaled dot product: `attn_space`, `attn_scale`, `attn_temperature`
    2.  logits are mixed, then softmax: `mix` ("loss" is the other side of the paper's table 6)
    3.  KL(teacher || student): `direction`
    4.  temperature 1 with T^2: `temperature`, `t2_scale`
    5.  batchmean, summed over student layers: `reduction`, `layer_reduction`
    6.  teacher classifiers trained beforehand, without the student: `teacher_head_ce` > 0 trains them jointly instead
        (PseudoClassifiers(tied=True) is one for all layers)
    7.  student classifiers trained by this loss alone: `student_head_ce` > 0 adds labels
    8.  IL leaves the student's last layer out, all teacher layers take part: `student_layers`, `teacher_layers`
    9.  [CLS] before the pooler, masked mean where there is none: `LayerProbe(pool=...)`; in `fastkd kd` the mean for IL
        and CA: [CLS] of lower layers is nearly the same for every text, so that a new classifier learns nothing of it
    10. gradient through the attention: `detach_attention`
    11. C = 1 is a regression, squared error and attention on -(f_i - f_j)^2: `attn`
    12. joint with labels and logits in IL and CA: `UniversalKDMixtureLoss`; two stages in CG: a recipe
    13. classifiers with bias: `PseudoClassifiers(bias=...)`

    Pinned: reduction "batchmean", layer_reduction "sum", T^2 on, temperature 1.

    Attention on raw logits sees what no softmax sees: a constant added to all of a layer's logits changes lambda, and
    with it the loss, though not one probability. `attn_space="centred"` takes the mean over the classes from both sides
    of the product, which changes the attention and nothing else; "probs" and "log_probs" do not depend on it either. In
    a regression the attention depends on the unit of the labels: give scores of unit variance, as `fastkd kd` does.

    Args:
        temperature, reduction, layer_reduction, direction, t2_scale: see `fastkd_kernels.universal_kd_loss`.
        mix, attn, attn_scale, attn_temperature, detach_attention: see there.
        attn_space: see there; or "centred", logits less their mean over the classes (a regression's stay as they are).
        student_layers: "inner" (j < M), "last" (j = M), "all", or layer numbers from 1.
        teacher_layers: "all", or layer numbers from 1.
        student_head_ce: weight of the cross entropy of the chosen student layers.
        teacher_head_ce: weight of the cross entropy of the teacher layers that require grad jointly with the student;
            the distillation itself never reaches the teacher.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        layer_reduction: str = "sum",
        mix: str = "logits",
        attn_space: str = "logits",
        attn_scale: float | str = 1.0,
        direction: str = "forward",
        detach_attention: bool = False,
        *,
        attn: str | None = None,
        attn_temperature: float = 1.0,
        t2_scale: bool = True,
        student_layers: str | Sequence[int] = "inner",
        teacher_layers: str | Sequence[int] = "all",
        student_head_ce: float = 0.0,
        teacher_head_ce: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("attn_space", attn_space, ATTENTION_SPACES)
        if isinstance(student_layers, str) and student_layers not in STUDENT_LAYERS:
            raise ValueError(
                f"student_layers: got {student_layers!r}, expected one of {', '.join(STUDENT_LAYERS)}, or layer numbers"
            )
        if isinstance(teacher_layers, str) and teacher_layers != "all":
            raise ValueError(f'teacher_layers: got {teacher_layers!r}, expected "all" or layer numbers')
        if (student_head_ce or teacher_head_ce) and reduction == "none":
            raise ValueError(
                'reduction: got "none", expected a sum or mean where student_head_ce or teacher_head_ce is set'
            )
        self.temperature = temperature
        self.reduction = reduction
        self.layer_reduction = layer_reduction
        self.mix = mix
        self.attn_space = attn_space
        self.attn_scale = attn_scale
        self.direction = direction
        self.detach_attention = detach_attention
        self.attn = attn
        self.attn_temperature = attn_temperature
        self.t2_scale = t2_scale
        self.student_layers = student_layers
        self.teacher_layers = teacher_layers
        self.student_head_ce = student_head_ce
        self.teacher_head_ce = teacher_head_ce
        self._check_options()

    @classmethod
    def intermediate_layer(cls, **options: Any) -> UniversalKDLoss:
        """IL, the paper's equation for BERT -> a shallower BERT: student layers j = 1..M-1, all teacher layers."""
        return cls(**{"student_layers": "inner", **options})

    @classmethod
    def capacity_gap(cls, **options: Any) -> UniversalKDLoss:
        """CG, for a much deeper teacher: only the student's own classifier, j = M, with no student heads at all."""
        return cls(**{"student_layers": "last", **options})

    @classmethod
    def cross_architecture(cls, **options: Any) -> UniversalKDLoss:
        """CA, for a BiLSTM or Gated-CNN: IL's equation; what differs is the pooling of the student's layers."""
        return cls(**{"student_layers": "inner", **options})

    def forward(
        self, student_layer_logits: Tensor, teacher_layer_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The loss of logits [M, B, C] of the student's and [N, B, C] of the teacher's layers, the models' own last.

        Returns:
            A scalar, or for reduction="none" [chosen student layers, B].

        Raises:
            ValueError: what `fastkd_kernels.universal_kd_loss` raises; a layer that does not exist; no labels where
                student_head_ce or teacher_head_ce wants them.
        """
        student, teacher = self.chosen(student_layer_logits, teacher_layer_logits)
        heads = self.head_loss(student, teacher, labels)
        loss = fk.universal_kd_loss(
            student, self.as_target(teacher), self.temperature, task=task_of(student), **self.options()
        )
        return loss if heads is None else loss + heads

    @torch.no_grad()
    def attention(self, student_layer_logits: Tensor, teacher_layer_logits: Tensor) -> Tensor:
        """lambda [chosen student layers, B, chosen teacher layers] of finite logits, for a look at it; no gradient."""
        chosen = self.chosen(student_layer_logits, teacher_layer_logits)
        student, teacher = (_features(logits, self.options()["attn_space"]) for logits in chosen)
        attn = self.attn or ("neg_sqdist" if task_of(student) == "regression" else "dot")
        with torch.autocast(student.device.type, enabled=False):
            scores = torch.einsum("mbc,nbc->mbn", student, teacher)
        if attn == "neg_sqdist":
            scores = -(student.unsqueeze(2) - teacher.transpose(0, 1).unsqueeze(0)).square().sum(-1)
        scale = student.shape[-1] ** -0.5 if isinstance(self.attn_scale, str) else self.attn_scale
        return (scores * (0.0 if attn == "uniform" else scale / self.attn_temperature)).softmax(-1)

    def effective_layers(self, student_layer_logits: Tensor, teacher_layer_logits: Tensor) -> Tensor:
        """How many teacher layers the attention really uses, exp of its entropy, the mean over layers and samples.

        From 1, all weight on one layer, to N, all alike. Unscaled dot products of confident classifiers come out near
        1: then attn_scale or attn_temperature decides whether this is more than distillation from one layer.
        """
        return torch.special.entr(self.attention(student_layer_logits, teacher_layer_logits)).sum(-1).exp().mean()

    def _check_options(self) -> None:
        """Raise what `universal_kd_loss` would raise in the first step, before a teacher answered."""
        one = torch.zeros(1, 1, 2, device="cpu")
        fk.universal_kd_loss(one, one, temperature=self.temperature, **self.options())

    def options(self) -> dict[str, Any]:
        """The options that `universal_kd_loss` and `distillation_loss` have in common."""
        return {
            "reduction": self.reduction,
            "layer_reduction": self.layer_reduction,
            "mix": self.mix,
            "attn_space": "logits" if self.attn_space == "centred" else self.attn_space,
            "attn_scale": self.attn_scale,
            "direction": self.direction,
            "detach_attention": self.detach_attention,
            "attn": self.attn,
            "attn_temperature": self.attn_temperature,
            "t2_scale": self.t2_scale,
        }

    def chosen(self, student_layer_logits: Tensor, teacher_layer_logits: Tensor) -> tuple[Tensor, Tensor]:
        """The layers that take part, centred where the attention wants it: no softmax of them changes by that."""
        layers = student_layer_logits.shape[0]
        if self.student_layers == "inner" and layers < 2:
            raise ValueError(
                f'student_layers: "inner" leaves no layer in a student of depth {layers}; use '
                '"last" or "all", or a deeper student'
            )
        student = _layers(student_layer_logits, self.student_layers, "student_layers")
        teacher = _layers(teacher_layer_logits, self.teacher_layers, "teacher_layers")
        if self.attn_space != "centred" or student.shape[-1] == 1:
            return student, teacher
        return _centred(student), _centred(teacher)

    def as_target(self, teacher_logits: Tensor) -> Tensor:
        """Detached where the teacher's heads learn from labels here; elsewhere a gradient would be a mistake."""
        return teacher_logits.detach() if self.teacher_head_ce else teacher_logits

    def head_loss(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor | None:
        """What the pseudo-classifiers learn from labels, None where they do not."""
        if not (self.student_head_ce or self.teacher_head_ce):
            return None
        if labels is None:
            raise ValueError("labels: got None, expected labels for student_head_ce or teacher_head_ce")
        parts = [(self.student_head_ce, student), (self.teacher_head_ce, teacher)]
        losses = [weight * label_loss(logits, labels) for weight, logits in parts if weight]
        return losses[0] if len(losses) == 1 else losses[0] + losses[1]


class UniversalKDMixtureLoss(nn.Module):
    """a CE(y, z^S) + b KD(z^T, z^S) + c Univ, the whole loss of a Universal-KD step, fused into one launch.

    By `fastkd_kernels.distillation_loss`; z are the last layers' logits, Univ is `universal`. In CG (j = M), whose one
    student layer is z^S itself, the two gradients add up as they should.

    Pinned: the reduction and T^2 of `universal`, for all three terms.

    Args:
        universal: the third term; default `UniversalKDLoss.intermediate_layer()`.
        label_weight, kd_weight, intermediate_weight: a, b, c, the paper's alpha, beta, gamma. The paper's values are
            not known; ours add up to 1.
        temperature: of the second term.
    """

    def __init__(
        self,
        universal: UniversalKDLoss | None = None,
        label_weight: float = 0.2,
        kd_weight: float = 0.4,
        intermediate_weight: float = 0.4,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.universal = UniversalKDLoss.intermediate_layer() if universal is None else universal
        self.label_weight = label_weight
        self.kd_weight = kd_weight
        self.intermediate_weight = intermediate_weight
        self.temperature = temperature

    def forward(
        self, student_layer_logits: Tensor, teacher_layer_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The loss of logits [M, B, C] and [N, B, C] of all layers; without labels only the teacher's terms."""
        universal = self.universal
        student, teacher = universal.chosen(student_layer_logits, teacher_layer_logits)
        heads = universal.head_loss(student, teacher, labels)
        loss = fk.distillation_loss(
            student_layer_logits[-1],
            universal.as_target(teacher_layer_logits[-1]),
            labels,
            student,
            universal.as_target(teacher),
            self.label_weight,
            self.kd_weight,
            self.intermediate_weight,
            temperature=self.temperature,
            universal_temperature=universal.temperature,
            task=task_of(student),
            **universal.options(),
        )
        return loss if heads is None else loss + self.intermediate_weight * heads


def _centred(logits: Tensor) -> Tensor:
    (logits,) = _hidden.widen(logits)
    return logits - logits.mean(-1, keepdim=True)


def _features(logits: Tensor, space: str) -> Tensor:
    """What scores compare."""
    if space == "logits":
        return logits
    return logits.softmax(-1) if space == "probs" else logits.log_softmax(-1)


def _layers(logits: Tensor, layers: str | Sequence[int], name: str) -> Tensor:
    """Rows of [L, B, C]; slices, which copy nothing, where they are named."""
    if layers == "all":
        return logits
    if layers == "inner":
        return logits[:-1]
    if layers == "last":
        return logits[-1:]
    numbers = [int(layer) for layer in layers]
    wrong = [layer for layer in numbers if not 1 <= layer <= logits.shape[0]]
    if wrong or not numbers:
        raise ValueError(f"{name}: got {numbers}, expected layer numbers from 1 to {logits.shape[0]}")
    return logits[rows_of(numbers)]
