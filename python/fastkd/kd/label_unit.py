"""A regression's student learns labels of mean 0 and standard deviation 1, and answers in the labels' own unit.

As `fastkd.encoders.label_scale` says of early-exit models: the scaling is in the weights of the last linear layer, and
taken out of them while they are trained. What the teacher says is brought to the same unit, so that no loss, and no
attention of one, depends on the unit of the labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.data.rows import Rows
from fastkd.encoders.label_scale import LabelScale
from fastkd.kd.teacher import Signals
from fastkd.model.modeling import EarlyExitForSequenceClassification


@dataclass(frozen=True)
class LabelUnit:
    """How answers become standardised ones.

    Attributes:
        labels: the scale of the labels, and so of the teacher's answers.
        answers: that of what the student answers while it learns: `LabelScale()`, or where it ends in no linear layer
            that could be scaled, `labels`.
    """

    labels: LabelScale
    answers: LabelScale

    def of_teacher(self, signals: Signals) -> Signals:
        """The same with standardised logits."""
        layers = signals.layer_logits
        return replace(
            signals,
            logits=self.labels.standardised(signals.logits),
            layer_logits=None if layers is None else self.labels.standardised(layers),
        )


@contextmanager
def standard_unit(
    student: PreTrainedModel, train: Rows, tokenizer: PreTrainedTokenizerBase, *, has_new_head: bool
) -> Iterator[LabelUnit | None]:
    """Inside, a student of a regression answers standardised labels as far as it can; None for classes.

    Afterwards its last linear layer holds the scale, and `config.label_scale` says which. A head that is not new is
    taken to answer in the labels' unit already.
    """
    if student.config.num_labels != 1:
        yield None
        return
    scale = LabelScale.of(train)
    linear = last_linear(student, tokenizer)
    if has_new_head:
        for head in _heads(student, linear):
            scale.put_into(head)
    student.config.label_scale = [scale.mean, scale.std]
    scaled = [] if linear is None else [linear]
    with scale.taken_out_of(scaled):
        yield LabelUnit(scale, LabelScale() if scaled else scale)


def _heads(student: PreTrainedModel, linear: nn.Linear | None) -> list[nn.Module]:
    """What a new scale goes into; the early heads of an early-exit model are in the unit of its last."""
    if isinstance(student, EarlyExitForSequenceClassification):
        return list(student.heads.values())
    return [] if linear is None else [linear]


@torch.no_grad()
def last_linear(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Linear | None:
    """The trained linear layer whose output is the student's answer, or None.

    None for heads without a bias or with something behind it, and for layers inside an adapter.
    """
    if isinstance(student, EarlyExitForSequenceClassification):
        return student.last_head.out_proj
    found: list[tuple[nn.Linear, Tensor]] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        found.append((module, output))

    hooks = [module.register_forward_hook(note) for module in student.modules() if _could_be_last(module)]
    was_training = student.training
    try:
        batch = tokenizer("0", return_tensors="pt").to(student.device)
        logits = student.eval()(**batch).logits
    finally:
        student.train(was_training)
        for hook in hooks:
            hook.remove()
    return next((linear for linear, output in found if torch.equal(output, logits)), None)


def _could_be_last(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.out_features == 1 and module.bias is not None and _learns(module)


def _learns(module: nn.Module) -> bool:
    return all(parameter.requires_grad for parameter in module.parameters())
