"""One stage of a KD training: student, method's loss and teacher's answers, put before the Trainer as one objective.

Neither model is edited: forward hooks give the hidden states of their layers, and what a method adds to the student
(pseudo-classifiers, projections) lives in the module that the Trainer wraps, and is left behind when the student is
saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy
import torch
import transformers
from torch import Tensor
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastkd.data.batches import padding_collator, tokenize
from fastkd.data.files import read_json, write_result
from fastkd.data.rows import Rows
from fastkd.data.tensors import damaged, load_tensors, save_tensors
from fastkd.kd.cache import CACHED_KINDS, TeacherCache, example_ids
from fastkd.kd.label_unit import LabelUnit
from fastkd.kd.methods import Method, Shapes, Stage, StageLoss
from fastkd.kd.options import KDOptions
from fastkd.kd.probe import LayerProbe, PseudoClassifiers, layer_count, whole_model
from fastkd.kd.teacher import Signals, Teacher, reads_layers
from fastkd.losses import label_loss
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.training import metrics
from fastkd.training.harness import Objective, TrainingStage, TrainResult, train_stage
from fastkd.training.processes import by_first

BEST_METRIC = "score"


class StudentObjective(Objective):
    """The student as the Trainer sees it, together with what the method adds to it in training."""

    def __init__(
        self,
        stage: Stage,
        student: PreTrainedModel,
        loss: StageLoss,
        teacher: Teacher | None,
        pool: str | None,
        layers: str | None = None,
        unit: LabelUnit | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.stage = stage
        self.unit = unit
        self._whole = whole_model(student)
        # no part of the module tree: the teacher is neither trained nor saved
        self._teacher = (teacher,)
        # a method that reads logits only takes students whose layers are not found
        self._probe = (
            LayerProbe(student, pool, keep_sequence="sequence_output" in stage.student, layers=layers)
            if stage.student
            else None
        )
        depth = 0 if self._probe is None else self._probe.num_layers
        has_heads = "layer_logits" in stage.student and depth > 1
        # the last layer has the student's own classifier
        self.heads = PseudoClassifiers(depth - 1, _width(student), num_labels_of(student)) if has_heads else None

    def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        given = {name: batch.pop(f"teacher_{name}") for name in CACHED_KINDS if f"teacher_{name}" in batch}
        if self.unit is not None:
            labels = self.unit.labels.standardised(labels)
        if not self.training:
            logits = self._answers(self.student(**batch, **self._whole).logits)
            return {"loss": label_loss(logits, labels), "logits": self._restored(logits)}
        student, teacher = self._student_signals(batch), self._teacher_signals(batch, given)
        if self.unit is not None and teacher is not None:
            teacher = self.unit.of_teacher(teacher)
        loss = self.loss(student, teacher, labels, batch.get("attention_mask"))
        return {"loss": loss, "logits": self._restored(student.logits)}

    def _answers(self, logits: Tensor) -> Tensor:
        """The student's in float32; of a regression standardised ones."""
        return logits.float() if self.unit is None else self.unit.answers.standardised(logits.float())

    def _restored(self, logits: Tensor) -> Tensor:
        """In the labels' unit."""
        return logits if self.unit is None else self.unit.labels.restored(logits)

    def _student_signals(self, batch: dict[str, Tensor]) -> Signals:
        if self._probe is None:
            return Signals(self._answers(self.student(**batch, **self._whole).logits))
        output = self._probe(**batch)
        logits, hidden_states = self._answers(output.logits), output.hidden_states.float()
        layer_logits = None
        if self.heads is not None:
            with torch.autocast(logits.device.type, enabled=False):
                layer_logits = self.heads(hidden_states, logits)
        return Signals(logits, layer_logits, hidden_states, output.sequence_output)

    def _teacher_signals(self, batch: dict[str, Tensor], given: dict[str, Tensor]) -> Signals | None:
        kinds = self.stage.teacher
        if not kinds:
            return None
        if not given:
            (teacher,) = self._teacher
            assert teacher is not None
            return teacher.signals(batch, kinds)
        # batches are stacked by example, losses take layers first
        layers = {name: value.transpose(0, 1) for name, value in given.items() if name != "logits"}
        logits = given["logits"] if "logits" in given else layers["layer_logits"][-1]
        return Signals(logits, layers.get("layer_logits"), layers.get("hidden_states"))

    @property
    def core(self) -> PreTrainedModel:
        return self.student

    def remove_hooks(self) -> None:
        if self._probe is not None:
            self._probe.remove()


class AnswerCollator:
    """Pads a batch and puts what the teacher says about its rows beside them, as `teacher_<kind>`."""

    def __init__(
        self, pad: Callable[[list[dict[str, Any]]], Any], cache: TeacherCache | None, ids: Sequence[bytes], stage: Stage
    ) -> None:
        self.pad = pad
        self.cache = cache
        self.ids = ids
        self.kinds = stage.teacher

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        numbers = [row.pop("example", None) for row in rows]
        batch = dict(self.pad(rows))
        if self.cache is not None and self.kinds and None not in numbers:
            answers = self.cache.answers([self.ids[cast(int, number)] for number in numbers], self.kinds)
            batch |= {f"teacher_{kind}": values for kind, values in answers.items()}
        return batch


class _Progress(TrainerCallback):
    """Tells the loss how far its stage is."""

    def __init__(self, loss: StageLoss) -> None:
        self.loss = loss

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loss.set_progress(state.global_step / state.max_steps, int(state.epoch or 0))


@dataclass(frozen=True)
class StageRun:
    """One stage of one `KDTrainer.train`."""

    stage: Stage
    student: PreTrainedModel
    teacher: Teacher | None
    cache: TeacherCache | None
    method: Method
    options: KDOptions
    tokenizer: PreTrainedTokenizerBase
    unit: LabelUnit | None

    def run(
        self, number: int, train: Rows, dev: Rows | None, checkpoints: Path, callbacks: Sequence[TrainerCallback]
    ) -> TrainResult:
        """Train the student, or take over what an earlier process finished."""
        stem = checkpoints / f"{number}-{self.stage.name}"
        finished, weights = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.safetensors")
        if finished.exists():
            return self._taken_over(finished, weights, stem)
        result = self._train(stem, train, dev, callbacks)
        if number < len(self.method.stages):

            def save() -> None:
                save_tensors(weights, {name: value.cpu() for name, value in self.student.state_dict().items()})
                write_result(finished, json.loads(json.dumps(asdict(result), default=str)))

            by_first(save)
        return result

    def _taken_over(self, finished: Path, weights: Path, stem: Path) -> TrainResult:
        remedy = f"delete {finished.name} to train this stage again"
        found = read_json(finished, "resume", remedy)
        state, _, _ = load_tensors(weights, "resume", remedy)
        try:
            result = TrainResult(**{**found, "output_dir": stem})
            self.student.load_state_dict(state)
        except (TypeError, RuntimeError) as error:
            raise damaged(finished, "resume", remedy, str(error)) from error
        return result

    def _train(self, folder: Path, train: Rows, dev: Rows | None, callbacks: Sequence[TrainerCallback]) -> TrainResult:
        options = self._stage_options()
        transformers.set_seed(options.seed)
        objective = StudentObjective(
            self.stage, self.student, self._loss(), self.teacher, options.pool or self.method.pool,
            options.student_layers, self.unit,
        )  # fmt: skip
        train_tokens = tokenize(train, self.tokenizer, options.max_length)
        stage = TrainingStage(
            objective=objective,
            train=train_tokens.add_column("example", list(range(len(train)))),
            dev=None if dev is None else tokenize(dev, self.tokenizer, options.max_length),
            collator=AnswerCollator(padding_collator(self.tokenizer), self.cache, example_ids(train), self.stage),
            metrics=_Score(options.metric or default_metric(self.student)),
            best_metric=BEST_METRIC,
            learning_rates=dict.fromkeys(
                _head_names(objective), options.learning_rate * options.head_learning_rate_factor
            ),
            # a student made of an early-exit model has its early heads, which no method asks
            leaves_unused=isinstance(self.student, EarlyExitForSequenceClassification),
        )
        try:
            return train_stage(stage, folder, options, [*callbacks, _Progress(objective.loss)])
        finally:
            objective.remove_hooks()

    def _stage_options(self) -> KDOptions:
        """Those of the run, with this stage's part of its length."""
        options, stages = self.options, self.method.stages
        if len(stages) == 1:
            return options
        before = sum(stage.share for stage in stages[: stages.index(self.stage)])
        is_last = self.stage is stages[-1]
        if options.max_steps is not None:
            steps = stage_length(options.max_steps, before, self.stage.share, is_last)
            return replace(options, max_steps=max(1, round(steps)))
        if options.epochs < len(stages):
            return replace(options, epochs=options.epochs * self.stage.share)
        return replace(options, epochs=stage_length(options.epochs, before, self.stage.share, is_last))

    def _loss(self) -> StageLoss:
        teacher = self.teacher
        shapes = Shapes(
            student_layers=layer_count(self.student, self.options.student_layers) if self.stage.student else 0,
            teacher_layers=0 if teacher is None or not reads_layers(self.stage.teacher) else teacher.num_layers,
            student_width=_width(self.student),
            teacher_width=0 if teacher is None else _width(teacher.model),
        )
        return self.stage.loss(shapes, self.options.arguments)


@dataclass(frozen=True)
class _Score:
    """Every fitting metric, `mse` of a regression in the labels' unit, and as `score` the mean of the chosen ones."""

    chosen: Sequence[str]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = numpy.asarray(prediction.predictions), numpy.asarray(prediction.label_ids)
        found = metrics.scores(logits, labels)
        shown = {**metrics.head_scores(logits, labels), **found}
        return {**shown, "score": float(numpy.mean([found[name] for name in self.chosen]))}


def _width(model: PreTrainedModel) -> int:
    """The width of the hidden states of its layers, which an early-exit model has from its backbone."""
    return getattr(model.config, "backbone", model.config).hidden_size


def num_labels_of(model: PreTrainedModel) -> int:
    return cast(int, model.config.num_labels)


def default_metric(model: PreTrainedModel) -> tuple[str, ...]:
    return ("pearson",) if model.config.num_labels == 1 else ("accuracy",)


def stage_length(whole: float, before: float, share: float, is_last: bool) -> float:
    """What a stage gets of the whole: stages begin at whole numbers, and together they are the whole."""
    begin = round(whole * before)
    return (whole if is_last else round(whole * (before + share))) - begin


def _head_names(objective: StudentObjective) -> tuple[str, ...]:
    """Prefixes of all parameters that are not of the student's body."""
    student = objective.student
    children = [name for name, _ in student.named_children()]
    if student.base_model_prefix not in children:
        return ("heads.", "loss.")
    return ("heads.", "loss.", *(f"student.{name}." for name in children if name != student.base_model_prefix))
