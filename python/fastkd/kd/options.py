"""What a `KDTrainer` can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastkd.kd.teacher import PseudoClassifierOptions
from fastkd.training.harness import HeadTrainOptions


@dataclass(frozen=True)
class KDOptions(HeadTrainOptions):
    """Options of `KDTrainer`.

    Attributes:
        learning_rate: its peak, for the student's body.
        head_learning_rate_factor: classifier, pseudo-classifiers and projections learn so many times faster.
        arguments: of the method's loss, such as {"intermediate_weight": 1.0, "attn_scale": "rsqrt_c"}; see
            `fastkd.kd.methods`.
        metric: what the dev rows choose the best weights by: "accuracy", "f1", "matthews", or for regression "pearson",
            "spearman"; several are averaged. Default: accuracy or pearson.
        pool: how hidden states are pooled, see `LayerProbe`; default: as the method says, else as each model does.
        freeze_embeddings: the student's word embeddings stay as they are; of most small models they are most of the
            weights, and for a student made of a teacher they are the teacher's.
        assistants: student specs of TAKD's chain, largest first; default: one with half the layers between teacher and
            student.
        student_layers: where the student's list of layers lies, as in "encoder.layers"; None: as in the teacher that it
            is made of, else found by itself.
        pseudo_classifiers: how those of the teacher are pre-trained.
    """

    learning_rate: float = 5e-5
    arguments: Mapping[str, Any] = field(default_factory=dict)
    metric: tuple[str, ...] = ()
    pool: str | None = None
    freeze_embeddings: bool = False
    assistants: tuple[str, ...] = ()
    student_layers: str | None = None
    pseudo_classifiers: PseudoClassifierOptions = field(default_factory=PseudoClassifierOptions)
