"""Knowledge distillation into another model, on `transformers.Trainer`: teacher, student and method are free.

    KDTrainer("teacher", "layers:3", "universal-il").train(train, dev, "student")

The teacher is frozen and in evaluation mode; what it says is computed once (`fastkd.kd.cache`) or in every step.
Neither model is edited (`fastkd.kd.stage_run`); a finished student is a plain checkpoint with its tokenizer.

Started by `torchrun` or `accelerate launch`, training is data-parallel; a killed run started again with `resume=True`
ends in the same weights as one that was never killed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.files import check_fields, read_json
from fastkd.data.labels import names_of_classes
from fastkd.data.row_hashes import warn_about_duplicates
from fastkd.data.rows import Rows, RowSource, load_rows, load_splits
from fastkd.encoders.families import FAMILIES, longest_input
from fastkd.kd.cache import CACHED_KINDS, TeacherCache
from fastkd.kd.label_order import common_order
from fastkd.kd.label_unit import standard_unit
from fastkd.kd.methods import Method, method_of
from fastkd.kd.options import KDOptions
from fastkd.kd.stage_run import BEST_METRIC, StageRun, default_metric, num_labels_of
from fastkd.kd.students import chosen_layers, is_made_of_teacher, student_from_teacher
from fastkd.kd.teacher import Teacher, tokenizer_fingerprint
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.pretrained import saved_config
from fastkd.model.tokenizers import load_tokenizer
from fastkd.training import metrics
from fastkd.training.checks import (
    check_evaluation,
    check_tokenizer,
    check_trainable,
    opened_student,
    parameters_to_train,
)
from fastkd.training.harness import Run, TrainResult, asking_for_gradients, take_labels
from fastkd.training.log import LOG_FILE
from fastkd.training.model_parts import seen_by
from fastkd.training.processes import by_first


class KDTrainer:
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
        model: the student, in evaluation mode, once it is trained; of a `PeftModel` that one.

    Raises:
        TypeError: a teacher of another type, such as a model without its tokenizer.
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
        if not isinstance(teacher, Teacher | str | os.PathLike | None):
            raise TypeError(
                f"teacher: got {type(teacher).__name__}, expected a fastkd.Teacher, a folder or None; pass "
                "fastkd.Teacher(model, tokenizer) first and the student second"
            )
        self.method_name = method
        self.method = method_of(method)
        self.options = options or KDOptions()
        self.method.check(self.options.arguments)
        self.student, self._adapter = opened_student(student)
        student = self.student
        self.model: Any = None
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
        if self.teacher is not None:
            self.teacher = self.teacher.pooled_by(pool)
        if self.teacher is not None and self.options.student_layers is None and str(student).startswith("layers:"):
            self.options = replace(self.options, student_layers=self.teacher.layers)
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
        train: RowSource,
        dev: RowSource | None,
        output_dir: str | os.PathLike[str],
        callbacks: Sequence[TrainerCallback] = (),
        on_teacher: Callable[[int, int], None] | None = None,
    ) -> TrainResult:
        """Train the student and save it; keep the weights of the best evaluation of each stage where `dev` is given.

        Args:
            train, dev: labelled rows; what `fastkd.load_rows` takes, which also chooses among columns.
            output_dir: made at the end, under a temporary name first; holds the student, its tokenizer and a log.
            callbacks: added to those of `transformers.Trainer`.
            on_teacher: called with the rows that the teacher has answered for the cache, and all of them.

        Returns:
            Metrics and losses of the student. Steps and seconds count every training on the way: both stages, and the
            assistants of "takd". A regression's losses are those of labels with mean 0 and standard deviation 1; the
            student answers in the labels' unit, and so are its metrics.

        Raises:
            DataError: rows without labels, or with labels that are not the models'.
            FileExistsError: `output_dir`, or the checkpoints of an unfinished run, would be lost.
            StaleCacheError: the cache was filled by another teacher, or with other settings.
            ValueError: a resumed run was started with other rows or options; a tokenizer that does not fit.
        """
        options, output_dir = self.options, Path(output_dir)
        train, dev = self._read(train, dev)
        transformers.set_seed(options.seed)
        student, has_new_head = self._make_student(train)
        first_teacher, train, dev = common_order(student, self.teacher, train, dev)
        take_labels(student, train)
        metrics.check_names(options.metric or default_metric(student), num_labels_of(student))
        check_evaluation(options.early_stopping_patience, dev)
        check_tokenizer(self.tokenizer, student)
        parameters_to_train([student], self._adapter, "let it target layers of the student")
        for model in [student] if self.teacher is None else [student, self.teacher.model]:
            _check_length(model, options.max_length)

        warn_about_duplicates({"train": train, "dev": dev})
        run = Run.begin(
            "kd", train, dev, output_dir, options, best_metric=BEST_METRIC, given=self._given(first_teacher)
        )
        with run.cleared_if_failed():
            teacher, hops = self._last_assistant(train, dev, run.checkpoints) if self._chain else (first_teacher, [])
            if teacher is not None and teacher is not first_teacher:
                teacher, _, _ = common_order(student, teacher, train, dev)
            answers = self._answers(teacher, train, run, on_teacher)
            frozen = student.get_input_embeddings().parameters() if options.freeze_embeddings else ()
            with (
                asking_for_gradients(dict.fromkeys(frozen, False)),
                standard_unit(student, train, self.tokenizer, has_new_head=has_new_head) as unit,
            ):
                results = [
                    StageRun(stage, student, teacher, answers, self.method, options, self.tokenizer, unit).run(
                        number, train, dev, run.checkpoints, callbacks
                    )
                    for number, stage in enumerate(self.method.stages, start=1)
                ]
        student.zero_grad(set_to_none=True)
        student.eval()
        self.model = student if self._adapter is None else self._adapter.eval()
        if isinstance(student, EarlyExitForSequenceClassification):
            _describe(student, train, dev, run)
        return run.finish(student, self.tokenizer, _with_hops(_joined(results), hops), self._adapter)

    def _read(self, train: RowSource, dev: RowSource | None) -> tuple[Rows, Rows | None]:
        """The rows; names bring their classes into one order afterwards, and numbers stay numbers until then."""
        model = self.student if isinstance(self.student, PreTrainedModel) else None
        if model is None and self.teacher is not None:
            model = self.teacher.model
        rows = load_splits({"train": train, "dev": dev}, num_labels=None if model is None else num_labels_of(model))
        return rows["train"], rows.get("dev")

    def _default_tokenizer(self) -> PreTrainedTokenizerBase:
        is_folder = isinstance(self.student, str | os.PathLike) and not is_made_of_teacher(str(self.student))
        if is_folder:
            return load_tokenizer(cast(Any, self.student))
        if self.teacher is None:
            raise ValueError("tokenizer: pass one, because neither teacher nor student comes from a folder")
        return self.teacher.tokenizer

    def _make_student(self, train: Rows) -> tuple[PreTrainedModel, bool]:
        """The student with its labels, its new weights drawn from the global generator, and whether its head is new."""
        if isinstance(self.student, PreTrainedModel) or is_made_of_teacher(str(self.student)):
            student = self._given_student()
            return student, getattr(student.config, "label_scale", None) is None
        path = self.student
        labels: dict[str, Any] = {"num_labels": train.num_labels}
        # a folder that already has the right head keeps it
        if getattr(saved_config(path, {}), "num_labels", None) == train.num_labels:
            labels = {}
        student, found = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **labels
        )
        # such a folder holds an adapter, which transformers puts into its base
        check_trainable(student, "student")
        return student, bool(found["missing_keys"] or found["mismatched_keys"])

    def _given_student(self) -> PreTrainedModel:
        """The one that was passed, or is made of the teacher."""
        if isinstance(self.student, PreTrainedModel):
            return self.student
        assert self.teacher is not None
        return student_from_teacher(self.teacher.model, str(self.student), layers=self.teacher.layers)

    def _given(self, teacher: Teacher | None) -> dict[str, Any]:
        """What a continuation must agree with beside rows and options."""
        student = "a model" if isinstance(self.student, PreTrainedModel) else str(self.student)
        fingerprint = {} if teacher is None else teacher.fingerprint
        return {"method": self.method_name, "student": student, **fingerprint}

    # The teacher's side

    def _last_assistant(self, train: Rows, dev: Rows | None, checkpoints: Path) -> tuple[Teacher, list[dict[str, Any]]]:
        """The end of TAKD's chain, and the log of every training on the way.

        Each assistant learns from the one before, made of the first teacher's layers.
        """
        assert self.teacher is not None
        teacher, logs = self.teacher, []
        for number, spec in enumerate(self._chain, start=1):
            folder = checkpoints / f"assistant-{number}"
            if not folder.exists():
                options = replace(self.options, assistants=(), resume=True, overwrite=False)
                transformers.set_seed(options.seed)
                assistant = student_from_teacher(self.teacher.model, spec, layers=self.teacher.layers)
                KDTrainer(teacher, assistant, "kd", options, cache=self._assistant_cache(number - 1)).train(
                    train, dev, folder
                )
            teacher = Teacher.load(folder, teacher.pool, self.teacher.layers)
            logs.append(_log_of(folder))
        return teacher, logs

    def _assistant_cache(self, number: int) -> bool | str | os.PathLike[str]:
        """The first hop asks the teacher itself; later ones ask models of this run alone."""
        return self.cache if number == 0 else self._is_cached

    def _assistants(self) -> Sequence[str]:
        assert self.teacher is not None
        layers = self.teacher.num_layers
        if self.options.assistants:
            _check_that_they_shrink(self.options.assistants, str(self.student), layers)
            return self.options.assistants
        name, _, kept = str(self.student).partition(":")
        if name != "layers" or not kept.isdigit():
            raise ValueError(
                f"assistants: there is no obvious one for a student {str(self.student)!r}; name them, as in "
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
        run: Run,
        on_teacher: Callable[[int, int], None] | None,
    ) -> TeacherCache | None:
        """The filled cache; without one the teacher has its pseudo-classifiers afterwards. None: ask it live."""
        kinds = self.method.teacher_kinds
        if teacher is None or not kinds:
            return None
        teacher.to(run.arguments.device)
        is_own = isinstance(self.cache, bool) or bool(self._chain)
        folder = run.checkpoints / "teacher" if is_own else Path(cast(Any, self.cache))
        if not self._is_cached and "layer_logits" not in kinds:
            return None
        fill = partial(self._filled_cache, folder, teacher, train, run)
        # the first process fills it, the others find it full
        cache = by_first(lambda: fill(on_teacher)) or fill(None)
        return cache if self._is_cached else None

    def _filled_cache(
        self, folder: Path, teacher: Teacher, train: Rows, run: Run, on_teacher: Callable[[int, int], None] | None
    ) -> TeacherCache:
        cache = TeacherCache(
            folder,
            teacher,
            self.options.max_length,
            bf16=run.arguments.bf16,
            pseudo_classifiers=self.options.pseudo_classifiers,
            batch_size=self.options.eval_batch_size,
        )
        if self._is_cached:
            cache.ensure(train, self.method.teacher_kinds, on_teacher)
        else:
            cache.ensure_pseudo_classifiers(train, on_teacher)
        return cache


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowSource,
    *,
    max_length: int = 128,
    batch_size: int = 64,
    bf16: bool = False,
) -> dict[str, float]:
    """Every fitting metric of `fastkd.training.metrics` of a classifier on labelled rows, which `load_rows` takes.

    Raises:
        DataError: the names of the rows' classes are not the model's.
    """
    rows = load_rows(rows, name="rows", num_labels=num_labels_of(model))
    names = names_of_classes(model.config.id2label)
    if names is not None and rows.label_names is not None:
        rows = rows.in_order_of(names)
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


def _joined(results: Sequence[TrainResult]) -> TrainResult:
    """The metrics of the last stage, the work of all."""
    steps = sum(result.steps for result in results)
    return TrainResult(
        output_dir=results[-1].output_dir,
        steps=steps,
        train_loss=math.fsum(result.train_loss * result.steps for result in results) / steps,
        metrics=results[-1].metrics,
        seconds=math.fsum(result.seconds for result in results),
        log_history=[
            {"stage": number, **entry} for number, result in enumerate(results, start=1) for entry in result.log_history
        ],
    )


def _log_of(assistant: Path) -> dict[str, Any]:
    file, remedy = assistant / LOG_FILE, f"delete {assistant} to train this assistant again"
    log = read_json(file, "resume", remedy)
    check_fields(log, {"steps": int, "seconds": (int, float)}, file, "resume", remedy)
    return log


def _with_hops(result: TrainResult, logs: Sequence[Mapping[str, Any]]) -> TrainResult:
    """The work of a chain is that of all its trainings; metrics and losses are the student's."""
    return replace(
        result,
        steps=result.steps + sum(log["steps"] for log in logs),
        seconds=result.seconds + math.fsum(log["seconds"] for log in logs),
    )


def _describe(student: EarlyExitForSequenceClassification, train: Rows, dev: Rows | None, run: Run) -> None:
    """Make the configuration of an early-exit student say what its last head, and only that, has just learned."""
    config = student.config
    config.last_head_was_trained()
    config.training_data |= run.digests
    student.seen_rows |= seen_by("kd", train, dev)
    student.confirm_weights()


# Checks before the work


def _check_that_they_shrink(assistants: Sequence[str], student: str, teacher_layers: int) -> None:
    """Of specs "layers:..." each must have fewer layers than the one before; of others the size is not asked."""
    larger, name = teacher_layers, "the teacher"
    for spec in [*assistants, student]:
        if not spec.startswith("layers:"):
            continue
        layers = len(chosen_layers(spec, teacher_layers))
        if layers >= larger:
            raise ValueError(
                f"assistants: {spec!r} has {layers} layers and {name} before it {larger}; models get smaller on "
                "the way from the teacher to the student, so name the largest assistant first"
            )
        larger, name = layers, repr(spec)


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
