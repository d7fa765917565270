"""What fine-tuning and self-distillation share: the training of a part of one early-exit model, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from fastkd.data.batches import padding_collator, tokenize
from fastkd.data.input_format import input_format_of
from fastkd.data.row_hashes import Hashes, row_hashes, warn_about_duplicates
from fastkd.data.rows import Rows
from fastkd.encoders.label_scale import LabelScale
from fastkd.exits.trace import ExitTrace
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.training.checks import check_evaluation, check_tokenizer
from fastkd.training.harness import (
    Objective,
    Run,
    TrainingStage,
    TrainOptions,
    TrainResult,
    only_trainable,
    train_stage,
)

_SPEEDS = (0.0, 0.1, 0.3, 0.5, 0.8)


@dataclass(frozen=True)
class PartTraining:
    """Which part of a model is trained, and how.

    Attributes:
        name: "finetune" or "distill", for the log.
        model: trained in place.
        objective: the model as the Trainer sees it, so that the user's model is never wrapped or patched.
        adapter: the `PeftModel` around it, or None.
        trained: the parameters that learn; all others are frozen.
        scale: of the labels of a regression.
        scaled: the heads that learn in standardised units.
        learning_rates: peaks by the prefix of parameters that learn at another rate than the options'.
        metrics: of the predictions on the dev rows.
        best_metric: decides which weights are kept, see `TrainingStage`.
        reads_labels: whether the objective takes the labels of training rows.
        trains_exits: whether the model may leave early afterwards.
        prepared: called once with the stage and the Trainer's arguments, gives the stage to train.
        finished: called with the trained stage, the arguments and the result, gives the result.
    """

    name: str
    model: EarlyExitForSequenceClassification
    objective: Objective
    adapter: Any
    trained: Sequence[nn.Parameter]
    scale: LabelScale
    scaled: Sequence[nn.Module]
    learning_rates: Mapping[str, float]
    metrics: Callable[[EvalPrediction], dict[str, float]]
    best_metric: str
    reads_labels: bool
    trains_exits: bool
    prepared: Callable[[TrainingStage, TrainingArguments], TrainingStage] = lambda stage, arguments: stage
    finished: Callable[[TrainingStage, TrainingArguments, TrainResult], TrainResult] = lambda stage, arguments, done: (
        done
    )


def check_part(
    model: EarlyExitForSequenceClassification,
    dev: Rows | None,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise for what cannot be trained, before the model or any file is changed."""
    check_evaluation(options.early_stopping_patience, dev)
    check_tokenizer(tokenizer, model)
    _check_input_format(tokenizer, model)
    _check_max_length(options.max_length, model)


def train_part(
    training: PartTraining,
    train: Rows,
    dev: Rows | None,
    output_dir: Path,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback],
) -> TrainResult:
    """Train and save what `check_part` found in order; arguments and errors are those of `fastkd.finetune`."""
    model = training.model
    train_tokens = tokenize(train, tokenizer, options.max_length)
    if not training.reads_labels and "labels" in train_tokens.column_names:
        train_tokens = train_tokens.remove_columns("labels")
    stage = TrainingStage(
        objective=training.objective,
        train=train_tokens,
        dev=None if dev is None else tokenize(dev, tokenizer, options.max_length),
        collator=padding_collator(tokenizer),
        metrics=training.metrics,
        best_metric=training.best_metric,
        learning_rates=training.learning_rates,
    )
    warn_about_duplicates({"train": train, "dev": dev})
    run = Run.begin(training.name, train, dev, output_dir, options, best_metric=training.best_metric)
    with run.cleared_if_failed(), only_trainable(model, training.trained), training.scale.taken_out_of(training.scaled):
        stage = training.prepared(stage, run.arguments)
        done = train_stage(stage, run.checkpoints, options, callbacks)
        done = training.finished(stage, run.arguments, done)
    model.zero_grad(set_to_none=True)
    model.eval()
    config = model.config
    config.certificate = config.rank_certificate = None  # they were for the weights of before
    config.training_data |= run.digests
    model.seen_rows |= seen_by(training.name, train, dev)
    if training.trains_exits:
        config.exits_trained = True
    model.confirm_weights()
    config.speed_table = _speed_table(model, dev, tokenizer, options) if training.trains_exits else None
    return run.finish(model, tokenizer, done, training.adapter)


def _speed_table(
    model: EarlyExitForSequenceClassification,
    dev: Rows | None,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
) -> list[dict[str, Any]] | None:
    """Quality and cost of a few speeds on labelled dev rows, as the configuration holds them."""
    if dev is None or not dev.is_labelled:
        return None
    trace = model.trace(dev, tokenizer=tokenizer, max_length=options.max_length, batch_size=options.eval_batch_size)
    return speed_table_of(trace)


def speed_table_of(trace: ExitTrace) -> list[dict[str, Any]] | None:
    """The same, of a trace of the dev rows; None where they have no labels."""
    if trace.labels is None:
        return None
    sweep = trace.sweep(_SPEEDS)
    measure = "pearson" if trace.is_regression else "accuracy"
    return [
        {
            "speed": row.speed,
            "measure": measure,
            "quality": row.quality,
            "average_layers": row.average_layers,
            "speedup": row.speedup["fastbert"],
            "criterion": sweep.criterion,
            "rows": len(trace),
        }
        for row in sweep
    ]


def seen_by(name: str, train: Rows, dev: Rows | None) -> dict[str, Hashes]:
    """Hashes of the rows of a training by their part in it, as `model.seen_rows` holds them."""
    parts = {"train": train, "dev": dev}
    return {f"{name} {part}": row_hashes(rows) for part, rows in parts.items() if rows is not None}


def _check_input_format(tokenizer: PreTrainedTokenizerBase, model: EarlyExitForSequenceClassification) -> None:
    wanted, own = model.config.input_format, input_format_of(tokenizer)
    if wanted != own:
        raise ValueError(
            f"tokenizer: it writes its inputs in the format {own!r}, the model's input_format is {wanted!r}; pass "
            f"fastkd.with_input_format(tokenizer, {wanted!r})"
        )


def _check_max_length(max_length: int, model: EarlyExitForSequenceClassification) -> None:
    limit = model.config.longest_input
    if max_length > limit:
        raise ValueError(f"max_length: got {max_length}, the model has {limit} positions; pass at most that")
