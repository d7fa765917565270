"""Knowledge distillation into another model, on `transformers.Trainer`: teacher, student and method are free.

    Distiller("teacher", "layers:3", "universal-il").train(train, dev, "student")

The teacher is frozen and in evaluation mode; what it says is computed once (`fastkd.kd.cache`) or in every step.
Neither model is edited: forward hooks give the hidden states of their layers, and what a method adds to the student
(pseudo-classifiers, projections) lives in the module that the Trainer wraps, and is left behind when the student is
saved. A finished student is a plain checkpoint with its tokenizer.

Started by `torchrun` or `accelerate launch`, training is data-parallel; a killed run started again with `resume=True`
ends in the same weights as one that was never killed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import datasets
import numpy
import safetensors.torch
import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastkd.data.batches import LengthGroupedSampler, LengthSortedBatches, padding_collator, tokenize
from fastkd.data.files import atomic_path, write_json
from fastkd.data.rows import Rows
from fastkd.encoders.families import FAMILIES, longest_input
from fastkd.kd.cache import CACHED_KINDS, TeacherCache, example_ids
from fastkd.kd.methods import Method, Shapes, Stage, StageLoss, method_of
from fastkd.kd.probe import LayerProbe, PseudoClassifiers, encoder_layers
from fastkd.kd.students import student_from_teacher
from fastkd.kd.teacher import PseudoClassifierOptions, Signals, Teacher, tokenizer_fingerprint
from fastkd.losses import label_loss
from fastkd.training import metrics
from fastkd.training.recipes import (
    ObjectiveTrainer,
    TrainOptions,
    TrainResult,
    check_dtypes,
    check_labels,
    check_outputs,
    check_tokenizer,
    kept_metrics,
    last_checkpoint,
    require,
    save_run,
    sorted_by_length,
    training_arguments,
)


def is_made_of_teacher(spec: str) -> bool:
    """Whether a student spec needs a teacher, rather than naming a checkpoint of its own."""
    return spec in ("bilstm", "gated-cnn") or spec.startswith("layers:")


@dataclass(frozen=True)
class KDOptions(TrainOptions):
    """What a `Distiller` can be told.

    Attributes:
        learning_rate: its peak, for the student's body.
        head_learning_rate_factor: classifier, pseudo-classifiers and projections learn so many times faster.
        arguments: of the method's loss, such as {"gamma": 1.0, "attn_scale": "rsqrt_c"}; see `fastkd.kd.methods`.
        metric: what the dev rows choose the best weights by: "accuracy", "f1", "matthews", or for regression "pearson",
            "spearman"; several are averaged. Default: accuracy or pearson.
        pool: how hidden states are pooled, see `LayerProbe`; default: as the method says, else as each model does.
        freeze_embeddings: the student's word embeddings stay as they are; of most small models they are most of the
            weights, and for a student made of a teacher they are the teacher's.
        assistants: student specs of TAKD's chain, largest first; default: one with half the layers between teacher and
            student.
        pseudo_classifiers: how those of the teacher are pre-trained.
    """

    learning_rate: float = 5e-5
    head_learning_rate_factor: float = 10.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    metric: tuple[str, ...] = ()
    pool: str | None = None
    freeze_embeddings: bool = False
    assistants: tuple[str, ...] = ()
    pseudo_classifiers: PseudoClassifierOptions = field(default_factory=PseudoClassifierOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.head_learning_rate_factor
        require("head_learning_rate_factor", factor, factor > 0, "a number above 0")


class Distiller:
    """Trains a student on what a teacher says.

    Args:
        teacher: folder or hub name of any sequence classifier whose layers `LayerProbe` finds, or a `Teacher`. None
            goes with the method "none" and a student that is a model or folder: plain fine-tuning.
        student: "layers:3" and other specs of `fastkd.kd.students.student_from_teacher`, a folder or hub name of any
            encoder, or a model, which is then trained in place.
        method: a name in `fastkd.kd.methods.METHODS`.
        options: see there.
        cache: keep what the teacher says in this folder, where further runs find it; True keeps it beside the
            checkpoints for as long as the run lasts; False runs the teacher in every step, which a method that compares
            every token needs.
        tokenizer: the student's; default: that of the student's folder, else the teacher's.

    Attributes:
        model: the student, in evaluation mode, once it is trained.

    Raises:
        ValueError: an unknown method, an argument that it does not take, or a combination that cannot work.
    """

    def __init__(
        self,
        teacher: Teacher | str | os.PathLike[str] | None,
        student: PreTrainedModel | str | os.PathLike[str],
        method: str = "universal-il",
        options: KDOptions | None = None,
        *,
        cache: bool | str | os.PathLike[str] = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.method_name = method
        self.method = method_of(method)
        self.options = options or KDOptions()
        self.method.check(self.options.arguments)
        self.student = student
        self.model: PreTrainedModel | None = None
        self.cache = cache
        _check_teacher(teacher is not None, student, method, self.method)
        cannot_cache = self.method.teacher_kinds - set(CACHED_KINDS)
        if cannot_cache and not isinstance(cache, bool):
            raise ValueError(
                f"cache: {method} compares every token of the last layer, which is too much to keep; pass cache=False"
            )
        self._is_cached = bool(cache) and not cannot_cache
        pool = self.options.pool or self.method.pool
        self.teacher = Teacher.load(teacher, pool) if isinstance(teacher, str | os.PathLike) else teacher
        if self.teacher is not None and pool is not None and self.teacher.pool != pool:
            raise ValueError(f"teacher: it pools by {self.teacher.pool}, expected {pool}; load it with pool={pool!r}")
        self.tokenizer = tokenizer or self._default_tokenizer()
        self._chain = self._assistants() if self.method.has_assistants else ()
        asks_live = bool(self.method.teacher_kinds) and not self._is_cached
        if self.teacher is not None and asks_live and not self._shares_tokens():
            raise ValueError(
                "tokenizer: teacher and student split text differently, so the teacher cannot read the student's "
                "batches; pass cache=True or a folder"
            )

    def _shares_tokens(self) -> bool:
        assert self.teacher is not None
        return tokenizer_fingerprint(self.tokenizer) == self.teacher.fingerprint["tokenizer"]

    def set_length(self, max_length: int | None = None, default: int = 128) -> None:
        """Take `max_length` tokens a row, or as many as the models take up to `default`; the tokenizer keeps it.

        Raises:
            ValueError: more than the tokenizer's model takes.
        """
        most = self.tokenizer.model_max_length
        if max_length is not None and max_length > most:
            raise ValueError(f"max_length: got {max_length}, but this tokenizer's model takes at most {most} tokens")
        length = max_length or min(default, most)
        self.tokenizer.model_max_length = length
        self.options = replace(self.options, max_length=length)

    def train(
        self,
        train: Rows,
        dev: Rows | None,
        output_dir: str | os.PathLike[str],
        callbacks: Sequence[TrainerCallback] = (),
        on_teacher: Callable[[int, int], None] | None = None,
    ) -> TrainResult:
        """Train the student and save it; keep the weights of the best evaluation of each stage where `dev` is given.

        Args:
            train, dev: labelled rows.
            output_dir: made at the end, under a temporary name first; holds the student, its tokenizer and a log.
            callbacks: added to those of `transformers.Trainer`.
            on_teacher: called with the rows that the teacher has answered for the cache, and all of them.

        Raises:
            DataError: rows without labels, or with labels that are not the models'.
            FileExistsError: `output_dir`, or the checkpoints of an unfinished run, would be lost.
            StaleCacheError: the cache was filled by another teacher, or with other settings.
            ValueError: a resumed run was started with other rows or options; a tokenizer that does not fit.
        """
        options, output_dir = self.options, Path(output_dir)
        transformers.set_seed(options.seed)
        student = self._make_student(train)
        for argument, rows in (("train", train), ("dev", dev)):
            check_labels(student, rows, argument, required=True)
            if self.teacher is not None:
                check_labels(self.teacher.model, rows, argument, required=True)
        _take_labels(student, train)
        metrics.check_names(options.metric or _default_metric(student), _num_labels(student))
        if options.early_stopping_patience is not None and dev is None:
            raise ValueError("early_stopping_patience: it needs an evaluation; pass dev rows")
        check_tokenizer(self.tokenizer, student)
        check_dtypes([student])
        for model in [student] if self.teacher is None else [student, self.teacher.model]:
            _check_length(model, options.max_length)

        checkpoints = output_dir.with_name(f"{output_dir.name}.checkpoints")
        arguments = _arguments(checkpoints, options, evaluates=dev is not None)
        record = self._record(train, dev, arguments.world_size)
        if arguments.process_index == 0:
            check_outputs(output_dir, checkpoints, options, record)
        PartialState().wait_for_everyone()

        teacher = self._last_assistant(train, dev, checkpoints) if self._chain else self.teacher
        answers = self._answers(teacher, train, checkpoints, arguments, on_teacher)
        with _frozen(student.get_input_embeddings() if options.freeze_embeddings else None):
            results = [
                _StageRun(stage, student, teacher, answers, self).run(number, train, dev, checkpoints, callbacks)
                for number, stage in enumerate(self.method.stages, start=1)
            ]
        student.zero_grad(set_to_none=True)
        self.model = student.eval()
        result = _joined(results, output_dir)
        if arguments.process_index == 0:
            save_run(student, self.tokenizer, result, record)
            shutil.rmtree(checkpoints)
        PartialState().wait_for_everyone()
        return result

    def _default_tokenizer(self) -> PreTrainedTokenizerBase:
        is_folder = isinstance(self.student, str | os.PathLike) and not is_made_of_teacher(str(self.student))
        if is_folder:
            return AutoTokenizer.from_pretrained(cast(Any, self.student))
        if self.teacher is None:
            raise ValueError("tokenizer: pass one, because neither teacher nor student comes from a folder")
        return self.teacher.tokenizer

    def _make_student(self, train: Rows) -> PreTrainedModel:
        """The student with its labels, its new weights drawn from the global generator."""
        if isinstance(self.student, PreTrainedModel):
            student = self.student
        elif is_made_of_teacher(str(self.student)):
            assert self.teacher is not None
            student = student_from_teacher(self.teacher.model, str(self.student))
        else:
            path = cast(Any, self.student)
            labels: dict[str, Any] = {"num_labels": train.num_labels}
            # a folder that already has the right head keeps it
            if getattr(AutoConfig.from_pretrained(path), "num_labels", None) == train.num_labels:
                labels = {}
            student = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **labels)
        return student

    def _record(self, train: Rows, dev: Rows | None, processes: int) -> dict[str, Any]:
        student = "a model" if isinstance(self.student, PreTrainedModel) else str(self.student)
        given = {
            "method": self.method_name,
            "student": student,
            **({} if self.teacher is None else self.teacher.fingerprint),
        }
        options = json.loads(json.dumps(asdict(self.options), default=str))
        return {
            "stage": "kd",
            "options": {**options, **given},
            "train": {"source": train.source, "rows": len(train), "digest": train.digest()},
            "dev": None if dev is None else {"source": dev.source, "rows": len(dev), "digest": dev.digest()},
            "processes": processes,
        }

    # The teacher's side

    def _last_assistant(self, train: Rows, dev: Rows | None, checkpoints: Path) -> Teacher:
        """The end of TAKD's chain: each assistant learns from the one before, made of the first teacher's layers."""
        assert self.teacher is not None
        teacher = self.teacher
        for number, spec in enumerate(self._chain, start=1):
            folder = checkpoints / f"assistant-{number}"
            if not folder.exists():
                options = replace(self.options, assistants=(), resume=True, overwrite=False)
                transformers.set_seed(options.seed)
                assistant = student_from_teacher(self.teacher.model, spec)
                Distiller(teacher, assistant, "kd", options, cache=self._assistant_cache(number - 1)).train(
                    train, dev, folder
                )
            teacher = Teacher.load(folder, teacher.pool)
        return teacher

    def _assistant_cache(self, number: int) -> bool | str | os.PathLike[str]:
        """The first hop asks the teacher itself; later ones ask models of this run alone."""
        return self.cache if number == 0 else self._is_cached

    def _assistants(self) -> Sequence[str]:
        if self.options.assistants:
            return self.options.assistants
        assert self.teacher is not None
        layers = self.teacher.num_layers
        name, _, kept = str(self.student).partition(":")
        if name != "layers" or not kept.isdigit():
            raise ValueError(
                f"assistants: a student {str(self.student)!r} has no obvious one; name them, as in "
                "assistants=('layers:4',)"
            )
        between = (layers + int(kept)) // 2
        if not int(kept) < between < layers:
            raise ValueError(
                f"assistants: no size lies between {kept} layers and the teacher's {layers}; use method 'kd'"
            )
        return (f"layers:{between}",)

    def _answers(
        self,
        teacher: Teacher | None,
        train: Rows,
        checkpoints: Path,
        arguments: TrainingArguments,
        on_teacher: Callable[[int, int], None] | None,
    ) -> TeacherCache | None:
        """The filled cache; without one the teacher has its pseudo-classifiers afterwards. None: ask it live."""
        kinds = self.method.teacher_kinds
        if teacher is None or not kinds:
            return None
        teacher.to(arguments.device)
        is_own = isinstance(self.cache, bool) or teacher is not self.teacher
        folder = checkpoints / "teacher" if is_own else Path(cast(Any, self.cache))
        if not self._is_cached and "layer_logits" not in kinds:
            return None
        # the first process fills it, the others find it full
        with PartialState().main_process_first():
            cache = TeacherCache(
                folder,
                teacher,
                self.options.max_length,
                bf16=arguments.bf16,
                pseudo_classifiers=self.options.pseudo_classifiers,
                batch_size=self.options.eval_batch_size,
            )
            if self._is_cached:
                cache.ensure(train, kinds, on_teacher)
                return cache
            cache.ensure_pseudo_classifiers(train, on_teacher)
        return None


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_length: int = 128,
    batch_size: int = 64,
    bf16: bool = False,
) -> dict[str, float]:
    """Every fitting metric of `fastkd.training.metrics` of a classifier on labelled rows."""
    batches = LengthSortedBatches(tokenize(rows, tokenizer, max_length), tokenizer, batch_size)
    device = model.device
    was_training = model.training
    model.eval()
    logits, labels = [], []
    for batch in batches:
        labels.append(batch.pop("labels"))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits.append(model(**{name: value.to(device) for name, value in batch.items()}).logits.float().cpu())
    model.train(was_training)
    return metrics.scores(torch.cat(logits).numpy(), torch.cat(labels).numpy())


# One stage


class _Objective(nn.Module):
    """The student as the Trainer sees it, together with what the method adds to it in training."""

    accepts_loss_kwargs = False

    def __init__(
        self, stage: Stage, student: PreTrainedModel, loss: StageLoss, teacher: Teacher | None, pool: str | None
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.stage = stage
        # no part of the module tree: the teacher is neither trained nor saved
        self._teacher = (teacher,)
        self._probe = LayerProbe(student, pool, keep_sequence="sequence_output" in stage.student)
        layers = self._probe.num_layers
        has_heads = "layer_logits" in stage.student and layers > 1
        # the last layer has the student's own classifier
        self.heads = PseudoClassifiers(layers - 1, _width(student), _num_labels(student)) if has_heads else None

    def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        given = {name: batch.pop(f"teacher_{name}") for name in CACHED_KINDS if f"teacher_{name}" in batch}
        if not self.training:
            logits = self.student(**batch).logits.float()
            return {"loss": label_loss(logits, labels), "logits": logits}
        student = self._student_signals(batch)
        loss = self.loss(student, self._teacher_signals(batch, given), labels, batch.get("attention_mask"))
        return {"loss": loss, "logits": student.logits}

    def _student_signals(self, batch: dict[str, Tensor]) -> Signals:
        if not self.stage.student:
            return Signals(self.student(**batch).logits.float())
        output = self._probe(**batch)
        logits, hidden_states = output.logits.float(), output.hidden_states.float()
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

    def remove_hooks(self) -> None:
        self._probe.remove()


class _AnswerCollator:
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
class _StageRun:
    """One stage of one `Distiller.train`."""

    stage: Stage
    student: PreTrainedModel
    teacher: Teacher | None
    cache: TeacherCache | None
    distiller: Distiller

    def run(
        self, number: int, train: Rows, dev: Rows | None, checkpoints: Path, callbacks: Sequence[TrainerCallback]
    ) -> TrainResult:
        """Train the student, or take over what an earlier process finished."""
        stem = checkpoints / f"{number}-{self.stage.name}"
        finished, weights = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.safetensors")
        if finished.exists():
            self.student.load_state_dict(safetensors.torch.load_file(weights))
            return TrainResult(**{**json.loads(finished.read_text(encoding="utf-8")), "output_dir": stem})
        result = self._train(stem, train, dev, callbacks)
        if number < len(self.distiller.method.stages):
            if PartialState().is_main_process:
                with atomic_path(weights) as temporary:
                    state = {name: value.cpu().contiguous() for name, value in self.student.state_dict().items()}
                    safetensors.torch.save_file(state, temporary)
                write_json(finished, json.loads(json.dumps(asdict(result), default=str)))
            PartialState().wait_for_everyone()
        return result

    def _train(self, folder: Path, train: Rows, dev: Rows | None, callbacks: Sequence[TrainerCallback]) -> TrainResult:
        distiller, options = self.distiller, self.options
        arguments = _arguments(folder, options, evaluates=dev is not None)
        transformers.set_seed(options.seed)
        pool = options.pool or distiller.method.pool
        objective = _Objective(self.stage, self.student, self._loss(), self.teacher, pool)
        train_tokens = tokenize(train, distiller.tokenizer, options.max_length)
        sampler = LengthGroupedSampler(
            train_tokens["length"][:], arguments.per_device_train_batch_size * arguments.world_size, arguments.seed
        )
        added = [*callbacks, _Progress(objective.loss)]
        if options.early_stopping_patience is not None:
            added.append(EarlyStoppingCallback(options.early_stopping_patience))
        score = _Score(options.metric or _default_metric(self.student))
        trainer = ObjectiveTrainer(
            model=objective,
            args=arguments,
            train_dataset=_numbered(train_tokens.remove_columns("length")),
            eval_dataset=None
            if dev is None
            else sorted_by_length(tokenize(dev, distiller.tokenizer, options.max_length)),
            data_collator=_AnswerCollator(
                padding_collator(distiller.tokenizer), self.cache, example_ids(train), self.stage
            ),
            compute_metrics=score,
            callbacks=added,
            head_learning_rate=options.learning_rate * options.head_learning_rate_factor,
            head_names=_head_names(objective),
            sampler=sampler,
            options=options,
        )
        # it prints to standard output, which belongs to the caller
        trainer.remove_callback(PrinterCallback)
        trainer.accelerator.wait_for_everyone()
        checkpoint = last_checkpoint(folder, arguments.world_size)
        try:
            output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            objective.remove_hooks()
        trainer.accelerator.free_memory()
        return TrainResult(
            output_dir=folder,
            steps=output.global_step,
            train_loss=output.training_loss,
            metrics=kept_metrics(trainer.state, options.keep_last),
            seconds=output.metrics["train_runtime"],
            log_history=trainer.state.log_history,
        )

    @property
    def options(self) -> KDOptions:
        """Those of the run, with this stage's part of its length."""
        options, stages = self.distiller.options, self.distiller.method.stages
        if len(stages) == 1:
            return options
        if options.max_steps is not None:
            return replace(options, max_steps=max(1, round(options.max_steps * self.stage.share)))
        epochs = options.epochs * self.stage.share
        return replace(options, epochs=max(1.0, round(epochs)) if options.epochs >= len(stages) else epochs)

    def _loss(self) -> StageLoss:
        teacher = self.teacher
        shapes = Shapes(
            student_layers=len(encoder_layers(self.student)),
            teacher_layers=0 if teacher is None else teacher.num_layers,
            student_width=_width(self.student),
            teacher_width=0 if teacher is None else _width(teacher.model),
        )
        return self.stage.loss(shapes, self.distiller.options.arguments)


@dataclass(frozen=True)
class _Score:
    """Every fitting metric, and as `score` the mean of the chosen ones."""

    chosen: Sequence[str]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        found = metrics.scores(numpy.asarray(prediction.predictions), numpy.asarray(prediction.label_ids))
        return {**found, "score": float(numpy.mean([found[name] for name in self.chosen]))}


def _width(model: PreTrainedModel) -> int:
    """Of the hidden states of its layers; an early-exit model has them from its backbone."""
    return getattr(model.config, "backbone", model.config).hidden_size


def _num_labels(model: PreTrainedModel) -> int:
    return cast(int, model.config.num_labels)


def _default_metric(model: PreTrainedModel) -> tuple[str, ...]:
    return ("pearson",) if model.config.num_labels == 1 else ("accuracy",)


def _arguments(folder: Path, options: KDOptions, *, evaluates: bool) -> TrainingArguments:
    return training_arguments(folder, options, best_metric="score", evaluates=evaluates)


def _numbered(tokens: datasets.Dataset) -> datasets.Dataset:
    return tokens.add_column("example", list(range(len(tokens))))


def _head_names(objective: _Objective) -> tuple[str, ...]:
    """Prefixes of all parameters that are not of the student's body."""
    student = objective.student
    children = [name for name, _ in student.named_children()]
    if student.base_model_prefix not in children:
        return ("heads.", "loss.")
    return ("heads.", "loss.", *(f"student.{name}." for name in children if name != student.base_model_prefix))


@contextmanager
def _frozen(module: nn.Module | None) -> Iterator[None]:
    """Inside, no parameter of the module asks for a gradient; afterwards each does as before."""
    before = {} if module is None else {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _joined(results: Sequence[TrainResult], output_dir: Path) -> TrainResult:
    """The metrics of the last stage, the work of all."""
    steps = sum(result.steps for result in results)
    return TrainResult(
        output_dir=output_dir,
        steps=steps,
        train_loss=math.fsum(result.train_loss * result.steps for result in results) / steps,
        metrics=results[-1].metrics,
        seconds=math.fsum(result.seconds for result in results),
        log_history=[
            {"stage": number, **entry} for number, result in enumerate(results, start=1) for entry in result.log_history
        ],
    )


def _take_labels(student: PreTrainedModel, rows: Rows) -> None:
    config = student.config
    if rows.label_names is not None:
        config.id2label = dict(enumerate(rows.label_names))
        config.label2id = {name: index for index, name in enumerate(rows.label_names)}
    config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"


# Checks before the work


def _check_length(model: PreTrainedModel, max_length: int) -> None:
    config = model.config
    if config.model_type in FAMILIES and max_length > longest_input(config):
        raise ValueError(
            f"max_length: got {max_length}, but this {config.model_type} has {longest_input(config)} positions; pass "
            "at most that"
        )


def _check_teacher(has_teacher: bool, student: Any, name: str, method: Method) -> None:
    if has_teacher:
        return
    if method.teacher_kinds:
        raise ValueError(f"teacher: got None, but the method {name!r} learns from one; only 'none' does not")
    if not isinstance(student, PreTrainedModel) and is_made_of_teacher(str(student)):
        raise ValueError(
            f"teacher: got None, but a student {str(student)!r} is made of a teacher's parts; name a folder"
        )
