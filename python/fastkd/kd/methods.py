"""What each method of `fastkd.kd.catalogue` asks of teacher and student, and the loss of each of its stages.

Losses are those of `fastkd.losses`. A weight has the same name in every method: `label_weight` for labels, `kd_weight`
for the divergence from the teacher's answer, `intermediate_weight` for what inner layers add; DistilBERT's third term
has a `cosine_weight`. Where a method has no `label_weight`, its labels weigh 1 - `kd_weight`. The keyword arguments of
the builders below are what `KDOptions.arguments` may set.

Their defaults are not each paper's. Vanilla KD, TAKD, PKD, ALP-KD, RAIL-KD and Universal-KD share one temperature of 4,
where each paper searches its own (PKD, arXiv:1908.09355: 5, 10 and 20), so that rows of a table differ by the method.
ALP-KD's inner layers weigh 1, where its one public reproduction has 1000. MHKD's teacher heads are frozen, so that its
loss has no cross entropy of theirs. Its classifiers and those of Universal-KD (IL, CA) read the mean of all tokens.
Students of "layers:K" begin with evenly spaced layers; PKD begins with the first. Annealing-KD spreads ten temperatures
over the steps of its stage. The second of two stages begins with the best weights of the first, or its last ones where
no dev rows choose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastkd import losses
from fastkd.kd.catalogue import CATALOGUE
from fastkd.kd.teacher import Signals
from fastkd.training.checks import require

# of the last logits, for every method whose paper searches it
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Shapes:
    """The sizes that a loss with weights of its own has to know."""

    student_layers: int
    teacher_layers: int
    student_width: int
    teacher_width: int


_ANY_SHAPES = Shapes(student_layers=3, teacher_layers=6, student_width=8, teacher_width=8)
"""Of losses that are built only to see whether they take their arguments."""


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
        name: in `fastkd.kd.catalogue.CATALOGUE`.
        stages: in order; each begins with the best weights of the one before, by the dev rows, else its last.
        pool: how hidden states are pooled where the method says so; else as model and options say.
        has_assistants: the student's teacher is the last of a chain of assistants, each trained with "kd".
    """

    name: str
    stages: tuple[Stage, ...]
    pool: str | None = None
    has_assistants: bool = False

    @property
    def title(self) -> str:
        """The name in tables."""
        return CATALOGUE[self.name].title

    @property
    def teacher_kinds(self) -> frozenset[str]:
        return frozenset().union(*(stage.teacher for stage in self.stages))

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError for an argument that no stage takes, or a value that its loss refuses."""
        known = set().union(*(stage.argument_names for stage in self.stages))
        unknown = set(arguments) - known
        if unknown:
            takes = f"takes {', '.join(sorted(known))}" if known else "takes no arguments"
            raise ValueError(f"arguments: got {', '.join(sorted(unknown))}, but {self.title} {takes}")
        for name, value in arguments.items():
            _check_numbers(name, value)
        # projections draw weights, which must not move the draws of the training
        with torch.random.fork_rng(devices=[]):
            for stage in self.stages:
                stage.loss(_ANY_SHAPES, arguments)


def _check_numbers(name: str, value: Any) -> None:
    """Raise ValueError for a temperature or weight that the loss would refuse, or pass on, in the first step only."""
    is_temperature = name.endswith("temperature")
    if not (is_temperature or name.endswith("weight")):
        return
    for number in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        is_right = isinstance(number, int | float) and (number > 0 or not is_temperature)
        require(name, number, is_right, "a finite number above 0" if is_temperature else "a finite number")


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
    """Labels, last logits and `inner`, a loss of both models' hidden states or None, each with its weight."""

    def __init__(
        self,
        label_weight: float,
        kd_weight: float,
        temperature: float,
        intermediate_weight: float = 0.0,
        inner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.label_weight = label_weight
        self.kd_weight = kd_weight
        self.intermediate_weight = intermediate_weight
        self.kd = losses.KDLoss(temperature)
        self.inner = inner

    def set_progress(self, share: float, epoch: int) -> None:
        if isinstance(self.inner, losses.RAILKDLoss):
            self.inner.resample(epoch)

    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        assert teacher is not None
        loss = self.label_weight * losses.label_loss(student.logits, labels)
        loss = loss + self.kd_weight * self.kd(student.logits, teacher.logits)
        if self.inner is None:
            return loss
        return loss + self.intermediate_weight * self.inner(student.hidden_states, teacher.hidden_states)


class _Whole(StageLoss):
    """A loss of `fastkd.losses` that is all of its method, called with what `takes` picks of a batch."""

    def __init__(
        self, loss: nn.Module, takes: Callable[[Signals, Signals, Tensor, Tensor | None], tuple[Any, ...]]
    ) -> None:
        super().__init__()
        self.loss = loss
        self.takes = takes

    def forward(
        self, student: Signals, teacher: Signals | None, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        assert teacher is not None
        return self.loss(*self.takes(student, teacher, labels, attention_mask))


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


# Builders: their keyword arguments are the method's


def _none(shapes: Shapes) -> StageLoss:
    return _Labels()


def _kd(
    shapes: Shapes, *, label_weight: float = 0.5, kd_weight: float = 0.5, temperature: float = TEMPERATURE
) -> StageLoss:
    return _Mixture(label_weight, kd_weight, temperature)


def _pkd(layer_map: str) -> Callable[..., StageLoss]:
    def build(
        shapes: Shapes,
        *,
        label_weight: float = 0.5,
        kd_weight: float = 0.5,
        intermediate_weight: float = 100.0,
        temperature: float = TEMPERATURE,
        layer_map: Any = layer_map,
        normalize: bool = True,
    ) -> StageLoss:
        inner = losses.PKDLoss(layer_map, normalize, projection=_projection(shapes))
        return _Mixture(label_weight, kd_weight, temperature, intermediate_weight, inner)

    return build


def _alp(variant: str) -> Callable[..., StageLoss]:
    def build(
        shapes: Shapes,
        *,
        label_weight: float = 0.5,
        kd_weight: float = 0.5,
        intermediate_weight: float = 1.0,
        temperature: float = TEMPERATURE,
        scale: Any = "rsqrt_h",
    ) -> StageLoss:
        inner = losses.ALPKDLoss(variant, scale, _projection(shapes))
        return _Mixture(label_weight, kd_weight, temperature, intermediate_weight, inner)

    return build


def _rail(
    shapes: Shapes,
    *,
    label_weight: float = 1 / 3,
    kd_weight: float = 1 / 3,
    intermediate_weight: float = 1 / 3,
    temperature: float = TEMPERATURE,
    projection_size: int | None = 128,
    variant: str = "layerwise",
    train_teacher_projection: bool = False,
    seed: int = 0,
) -> StageLoss:
    inner = losses.RAILKDLoss(
        shapes.student_layers,
        shapes.student_width,
        shapes.teacher_width,
        projection_size,
        variant,
        train_teacher_projection=train_teacher_projection,
        seed=seed,
    )
    return _Mixture(label_weight, kd_weight, temperature, intermediate_weight, inner)


def _mhkd(
    shapes: Shapes,
    *,
    kd_weight: float = 0.1,
    intermediate_weight: float = 0.5,
    temperature: float = 4.0,
    layer_map: Any = "skip",
) -> StageLoss:
    # every method gets the same teacher heads, trained beforehand; the authors' code trains them along
    loss = losses.MHKDLoss(kd_weight, intermediate_weight, temperature, layer_map, teacher_head_ce=0.0)
    return _Whole(loss, lambda student, teacher, labels, _: (student.layer_logits, teacher.layer_logits, labels))


def _dih(shapes: Shapes, *, kd_weight: float = 0.1, temperature: Any = 5.0, head_reduction: str = "sum") -> StageLoss:
    loss = losses.DIHLoss(temperature, kd_weight, head_reduction)
    return _Whole(loss, lambda student, teacher, labels, _: (student.logits, teacher.layer_logits, labels))


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
    loss = losses.DistilBertLoss(kd_weight, label_weight, cosine_weight, temperature, projection=_projection(shapes))

    def takes(student: Signals, teacher: Signals, labels: Tensor, attention_mask: Tensor | None) -> tuple[Any, ...]:
        hidden = student.sequence_output, teacher.sequence_output
        return student.logits, teacher.logits, labels, *hidden, attention_mask

    return _Whole(loss, takes)


def _universal(student_layers: str, default_label_weight: float = 0.2) -> Callable[..., StageLoss]:
    def build(
        shapes: Shapes,
        *,
        label_weight: float = default_label_weight,
        kd_weight: float = 0.4,
        intermediate_weight: float = 0.4,
        kd_temperature: float = TEMPERATURE,
        **options: Any,
    ) -> StageLoss:
        universal = losses.UniversalKDLoss(**{"student_layers": student_layers, **options})
        return _Whole(
            losses.UniversalKDMixtureLoss(universal, label_weight, kd_weight, intermediate_weight, kd_temperature),
            lambda student, teacher, labels, _: (_layer_logits(student), teacher.layer_logits, labels),
        )

    return build


def _layer_logits(student: Signals) -> Tensor:
    """[L, B, C]; a student without pseudo-classifiers has those of its last layer."""
    return student.logits.unsqueeze(0) if student.layer_logits is None else student.layer_logits


def _projection(shapes: Shapes) -> nn.Module | None:
    """A projection to the teacher's width, None where the student has the same."""
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
# the student's classifiers are new: of [CLS] of lower layers, nearly the same for every text, they learn nothing
_FOR_NEW_CLASSIFIERS = "mean"
# one loss for students with layers like the teacher's and of another architecture
_UNIVERSAL_INNER = _one(_universal("inner"), _LAYERS, _LAYERS)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("none", _one(_none)),
        Method("kd", _one(_kd, _LOGITS)),
        Method("takd", _one(_kd, _LOGITS), has_assistants=True),
        Method("pkd-skip", _one(_pkd("skip"), *_INNER)),
        Method("pkd-last", _one(_pkd("last"), *_INNER)),
        Method("alp-kd", _one(_alp("ALP"), *_INNER)),
        Method("alp-kd-no", _one(_alp("NO"), *_INNER)),
        Method("alp-kd-po", _one(_alp("PO"), *_INNER)),
        Method("rail-kd", _one(_rail, *_INNER), pool="mean"),
        Method("mhkd", _one(_mhkd, _LAYERS, _LAYERS), pool=_FOR_NEW_CLASSIFIERS),
        Method("dih", _one(_dih, _LAYERS)),
        Method("annealing", (Stage("annealing", _annealing, frozenset(_LOGITS), share=2 / 3), _ON_LABELS)),
        Method("distilbert", _one(_distilbert, ("logits", "sequence_output"), ("sequence_output",))),
        Method("universal-il", _UNIVERSAL_INNER, pool=_FOR_NEW_CLASSIFIERS),
        Method("universal-ca", _UNIVERSAL_INNER, pool=_FOR_NEW_CLASSIFIERS),
        Method("universal-cg", _one(_universal("last"), _LAYERS)),
        Method(
            "universal-cg-two-stage",
            (Stage("teacher", _universal("last", 0.0), frozenset(_LAYERS), share=2 / 3), _ON_LABELS),
        ),
    )
}
"""One for each name in `fastkd.kd.catalogue.CATALOGUE`."""
