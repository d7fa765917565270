"""Every method a student can be trained with: what it asks of teacher and student, and the loss of each of its stages.

    none                            labels alone
    kd, takd                        the teacher's logits; takd by way of assistants between teacher and student
    pkd-skip, pkd-last, alp-kd, alp-kd-no, alp-kd-po, rail-kd, distilbert
                                    logits and hidden states
    mhkd, dih, universal-il, universal-cg, universal-ca
                                    logits and those of pseudo-classifiers on inner layers
    annealing, universal-cg-two-stage
                                    first the teacher, then labels alone

Losses are those of `fastkd.losses`, weighted alpha (labels), beta (last layer's logits), gamma (the method's own term)
where the method leaves the weights open. Named arguments of the builders below are what `KDOptions.arguments` may set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from fastkd import losses
from fastkd.kd.teacher import Signals

TEMPERATURE = 4.0


@dataclass(frozen=True)
class Shapes:
    """The sizes that a loss with weights of its own has to know."""

    student_layers: int
    teacher_layers: int
    student_width: int
    teacher_width: int


class StageLoss(nn.Module):
    """The loss of one stage; a method without a teacher is given None for it."""

    def set_progress(self, share: float, epoch: int) -> None:
        """Called before every step with the share of the stage's steps that are done, and the epoch from 0."""

    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Stage:
    """A part of a training with a loss, an optimiser and a learning rate schedule of its own.

    Attributes:
        name: of the stage, for files and logs.
        build: (shapes, arguments by name) -> loss.
        teacher: kinds of `fastkd.kd.teacher.KINDS` that the loss takes of the teacher; empty: the teacher does not run.
        student: those that it takes of the student beside the logits; "layer_logits" adds pseudo-classifiers.
        share: of the epochs or steps of the whole training.
    """

    name: str
    build: Callable[..., StageLoss]
    teacher: frozenset[str] = frozenset()
    student: frozenset[str] = frozenset()
    share: float = 1.0

    @property
    def argument_names(self) -> frozenset[str]:
        """The keyword arguments of the builder; its `**options` are those of `UniversalKDLoss`."""
        parameters = inspect.signature(self.build).parameters.values()
        names = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            names |= set(inspect.signature(losses.UniversalKDLoss).parameters)
        return frozenset(names)

    def loss(self, shapes: Shapes, arguments: Mapping[str, Any]) -> StageLoss:
        """The loss, built with those of the arguments that it takes."""
        names = self.argument_names
        return self.build(shapes, **{name: value for name, value in arguments.items() if name in names})


@dataclass(frozen=True)
class Method:
    """How a student is trained.

    Attributes:
        title: the name in tables.
        stages: in order; each begins with the best weights of the one before.
        pool: how hidden states are pooled where the method says so; else as model and options say.
        has_assistants: the student's teacher is the last of a chain of assistants, each trained with "kd".
    """

    title: str
    stages: tuple[Stage, ...]
    pool: str | None = None
    has_assistants: bool = False

    @property
    def teacher_kinds(self) -> frozenset[str]:
        return frozenset().union(*(stage.teacher for stage in self.stages))

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError for an argument that no stage takes."""
        known = set().union(*(stage.argument_names for stage in self.stages))
        unknown = set(arguments) - known
        if unknown:
            raise ValueError(
                f"arguments: {self.title} takes no {', '.join(sorted(unknown))}, only "
                f"{', '.join(sorted(known)) or 'none at all'}"
            )


def method_of(name: str) -> Method:
    """The method called `name`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


# Losses


class _Labels(StageLoss):
    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        return losses.label_loss(student.logits, labels)


class _Mixture(StageLoss):
    """alpha labels + beta logits + gamma inner, `inner` being a loss of both models' hidden states or None."""

    def __init__(
        self, alpha: float, beta: float, temperature: float, gamma: float = 0.0, inner: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.kd = losses.KDLoss(temperature)
        self.inner = inner

    def set_progress(self, share: float, epoch: int) -> None:
        if isinstance(self.inner, losses.RAILKDLoss):
            self.inner.resample(epoch)

    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        assert teacher is not None
        loss = self.alpha * losses.label_loss(student.logits, labels)
        loss = loss + self.beta * self.kd(student.logits, teacher.logits)
        if self.inner is None:
            return loss
        return loss + self.gamma * self.inner(student.hidden_states, teacher.hidden_states)


class _MHKD(StageLoss):
    def __init__(self, loss: losses.MHKDLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        assert teacher is not None
        return self.loss(student.layer_logits, teacher.layer_logits, labels)


class _DIH(StageLoss):
    def __init__(self, loss: losses.DIHLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        assert teacher is not None
        return self.loss(student.logits, teacher.layer_logits, labels)


class _Annealing(StageLoss):
    def __init__(self, loss: losses.AnnealingKDLoss) -> None:
        super().__init__()
        self.loss = loss
        self.temperature = loss.max_temperature

    def set_progress(self, share: float, epoch: int) -> None:
        # equal spans of steps, so that the length of the stage is free; whole epochs give the authors' schedule
        self.temperature = max(self.loss.max_temperature - int(share * self.loss.max_temperature), 1)

    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        assert teacher is not None
        return self.loss(student.logits, teacher.logits, self.temperature)


class _DistilBert(StageLoss):
    def __init__(self, loss: losses.DistilBertLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        assert teacher is not None
        return self.loss(
            student.logits, teacher.logits, labels, student.sequence_output, teacher.sequence_output, attention_mask
        )


class _Universal(StageLoss):
    def __init__(self, loss: losses.UniversalKDMixtureLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        assert teacher is not None
        layer_logits = student.logits.unsqueeze(0) if student.layer_logits is None else student.layer_logits
        return self.loss(layer_logits, teacher.layer_logits, labels)


# Builders: their keyword arguments are the method's


def _none(shapes: Shapes) -> StageLoss:
    return _Labels()


def _kd(shapes: Shapes, *, alpha: float = 0.5, beta: float = 0.5, temperature: float = TEMPERATURE) -> StageLoss:
    return _Mixture(alpha, beta, temperature)


def _pkd(layer_map: str) -> Callable[..., StageLoss]:
    def build(
        shapes: Shapes,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 100.0,
        temperature: float = TEMPERATURE,
        layer_map: Any = layer_map,
        normalize: bool = True,
    ) -> StageLoss:
        return _Mixture(
            alpha, beta, temperature, gamma, losses.PKDLoss(layer_map, normalize, projection=_projection(shapes))
        )

    return build


def _alp(variant: str) -> Callable[..., StageLoss]:
    def build(
        shapes: Shapes,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        temperature: float = TEMPERATURE,
        scale: Any = "rsqrt_h",
    ) -> StageLoss:
        inner = losses.ALPKDLoss(variant, scale, _projection(shapes))
        return _Mixture(alpha, beta, temperature, gamma, inner)

    return build


def _rail(
    shapes: Shapes,
    *,
    alpha: float = 1 / 3,
    beta: float = 1 / 3,
    gamma: float = 1 / 3,
    temperature: float = TEMPERATURE,
    projection_size: int | None = 128,
    variant: str = "layerwise",
    seed: int = 0,
) -> StageLoss:
    inner = losses.RAILKDLoss(
        shapes.student_layers, shapes.student_width, shapes.teacher_width, projection_size, variant, seed=seed
    )
    return _Mixture(alpha, beta, temperature, gamma, inner)


def _mhkd(
    shapes: Shapes,
    *,
    alpha: float = 0.1,
    beta: float = 0.5,
    temperature: float = 4.0,
    layer_map: Any = "skip",
) -> StageLoss:
    # every method gets the same teacher heads, trained beforehand; the authors' code trains them along
    return _MHKD(losses.MHKDLoss(alpha, beta, temperature, layer_map, teacher_head_ce=0.0))


def _dih(shapes: Shapes, *, alpha: float = 0.1, temperature: Any = 5.0, head_reduction: str = "sum") -> StageLoss:
    return _DIH(losses.DIHLoss(temperature, alpha, head_reduction))


def _annealing(shapes: Shapes, *, max_temperature: int = 10) -> StageLoss:
    return _Annealing(losses.AnnealingKDLoss(max_temperature))


def _distilbert(
    shapes: Shapes,
    *,
    kd_weight: float = 5.0,
    label_weight: float = 2.0,
    cosine_weight: float = 1.0,
    temperature: float = 2.0,
) -> StageLoss:
    return _DistilBert(
        losses.DistilBertLoss(kd_weight, label_weight, cosine_weight, temperature, projection=_projection(shapes))
    )


def _universal(student_layers: str, default_alpha: float = 0.2) -> Callable[..., StageLoss]:
    def build(
        shapes: Shapes,
        *,
        alpha: float = default_alpha,
        beta: float = 0.4,
        gamma: float = 0.4,
        kd_temperature: float = TEMPERATURE,
        **options: Any,
    ) -> StageLoss:
        universal = losses.UniversalKDLoss(**{"student_layers": student_layers, **options})
        return _Universal(losses.UniversalKDMixtureLoss(universal, alpha, beta, gamma, kd_temperature))

    return build


def _projection(shapes: Shapes) -> nn.Module | None:
    """To the teacher's width, where the student's is another."""
    if shapes.student_width == shapes.teacher_width:
        return None
    return cast(nn.Module, nn.Linear(shapes.student_width, shapes.teacher_width, bias=False))


def _one(build: Callable[..., StageLoss], teacher: tuple[str, ...] = (), student: tuple[str, ...] = ()) -> tuple[Stage]:
    return (Stage("train", build, frozenset(teacher), frozenset(student)),)


_LOGITS = ("logits",)
_HIDDEN = ("hidden_states",)
_LAYERS = ("layer_logits",)
_INNER = (("logits", "hidden_states"), _HIDDEN)
_ON_LABELS = Stage("labels", _none, share=1 / 3)

METHODS: dict[str, Method] = {
    "none": Method("w/o KD", _one(_none)),
    "kd": Method("Vanilla KD", _one(_kd, _LOGITS)),
    "takd": Method("TAKD", _one(_kd, _LOGITS), has_assistants=True),
    "pkd-skip": Method("PKD-skip", _one(_pkd("skip"), *_INNER)),
    "pkd-last": Method("PKD-last", _one(_pkd("last"), *_INNER)),
    "alp-kd": Method("ALP-KD", _one(_alp("ALP"), *_INNER)),
    "alp-kd-no": Method("ALP-NO", _one(_alp("NO"), *_INNER)),
    "alp-kd-po": Method("ALP-PO", _one(_alp("PO"), *_INNER)),
    "rail-kd": Method("RAIL-KD", _one(_rail, *_INNER), pool="mean"),
    "mhkd": Method("MHKD", _one(_mhkd, _LAYERS, _LAYERS)),
    "dih": Method("DIH", _one(_dih, _LAYERS)),
    "annealing": Method("Annealing-KD", (Stage("annealing", _annealing, frozenset(_LOGITS), share=2 / 3), _ON_LABELS)),
    "distilbert": Method("DistilBERT loss", _one(_distilbert, ("logits", "sequence_output"), ("sequence_output",))),
    "universal-il": Method("Universal-KD (IL)", _one(_universal("inner"), _LAYERS, _LAYERS)),
    "universal-ca": Method("Universal-KD (CA)", _one(_universal("inner"), _LAYERS, _LAYERS)),
    "universal-cg": Method("Universal-KD (CG)", _one(_universal("last"), _LAYERS)),
    "universal-cg-two-stage": Method(
        "Universal-KD (CG), two stages",
        (Stage("teacher", _universal("last", 0.0), frozenset(_LAYERS), share=2 / 3), _ON_LABELS),
    ),
}
