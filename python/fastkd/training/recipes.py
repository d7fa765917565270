"""The two training steps of an early-exit model, on `transformers.Trainer`.

    finetune   the backbone and the last head (the teacher) learn the labels; the other heads wait, frozen
    distill    everything is frozen but the other heads (the students), which learn the teacher's probabilities

Both take a loaded model and checked rows, and leave a whole model folder or none. While they run, checkpoints lie in
`<output_dir>.checkpoints`; a killed run started again with `resume=True` ends in the same weights as one that was never
killed. Started by `torchrun` or `accelerate launch`, they train data-parallel.

Departures from the code of FastBERT (Liu et al., ACL 2020): the frozen teacher has no dropout, weight decay acts (on
trained weight matrices only), and the learning rate schedule of the distillation is as long as the distillation.
`FinetuneOptions.preset(parity="fastbert")` and `DistillOptions.preset(parity="fastbert")` take them all back; every
quirk of that code is one option, and can be had alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import datasets
import numpy
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastkd.data.batches import LengthGroupedSampler, ShuffledOnceSampler, padding_collator, tokenize
from fastkd.data.errors import DataError
from fastkd.data.files import atomic_folder, write_json
from fastkd.data.input_format import input_format_of
from fastkd.data.rows import Rows
from fastkd.encoders.label_scale import LabelScale
from fastkd.exits.flops import FlopsShape
from fastkd.exits.trace import ExitTrace
from fastkd.losses import label_loss
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.training.log import LOG_FILE, RECORDED_SPEED
from fastkd.training.metrics import correlation
from fastkd.training.optimizers import BiasedAdamW

_RUN_FILE = "run.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# what may differ between a killed run and its continuation without changing the weights
_FREE_OPTIONS = ("resume", "overwrite", "progress", "logging_steps")
# what the official code does in both steps; weight decay it asks for under a name that its optimiser does not read
_FASTBERT: Mapping[str, Any] = {
    "batch_size": 32,
    "weight_decay": 0.0,
    "warmup": 0.1,
    "max_grad_norm": 0.0,
    "max_length": 128,
    "bf16": False,
    "seed": 7,
    "schedule_epochs": 3.0,
    "bias_correction": False,
    "adam_epsilon": 1e-6,
    "shuffle_once": True,
}
_Options = TypeVar("_Options", bound="TrainOptions")


@dataclass(frozen=True)
class TrainOptions:
    """What both steps can be told.

    Attributes:
        epochs: passes over the training rows.
        max_steps: optimiser steps; where given, `epochs` is ignored.
        batch_size: rows a step and process.
        learning_rate: its peak.
        weight_decay: of trained weight matrices; biases and LayerNorms have none.
        warmup: share of the steps in which the learning rate rises; it then falls linearly to 0.
        max_grad_norm: gradients are clipped to this norm; 0 switches clipping off.
        max_length: tokens a row, special ones included; longer rows are truncated.
        eval_batch_size: rows a batch and process in evaluation.
        eval_steps: evaluate and write a checkpoint every so many steps; None does so after each epoch.
        early_stopping_patience: stop after so many evaluations without a better one; None never stops early.
        bf16: autocast to bfloat16; None uses it where the hardware computes in it.
        seed: of the order of the rows, and of dropout.
        schedule_epochs: the learning rate rises and falls to 0 within so many epochs, whatever `epochs` says, and stays
            there: FastBERT's code gives the distillation the schedule of the fine-tuning, so that its epochs after the
            third change nothing. Steps are counted as there, int(rows * schedule_epochs / batch) + 1, and `warmup` is
            an unrounded share of them. None: the whole run.
        bias_correction: of the moments that Adam keeps; FastBERT's code leaves them biased towards 0, which makes its
            first step 3.2 times as long.
        adam_epsilon: what Adam adds to the root of the second moment; 1e-6 in FastBERT's code.
        shuffle_once: the rows come in one order, `random.Random(seed).shuffle` of theirs, in every epoch, as in
            FastBERT's code, instead of a new order of batches of like length in each.
        keep_last: keep the weights of the last step, not those of the best evaluation.
        logging_steps: log the mean loss every so many steps.
        progress: show a progress bar and print the logs.
        resume: continue the killed run whose checkpoints lie beside `output_dir`, if there are any.
        overwrite: replace a finished `output_dir`, and unless `resume`, discard the checkpoints of a killed run.
        trainer_arguments: further `transformers.TrainingArguments`; they win over the ones above.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 4e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    max_length: int = 128
    eval_batch_size: int = 64
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    bf16: bool | None = None
    seed: int = 42
    schedule_epochs: float | None = None
    bias_correction: bool = True
    adam_epsilon: float = 1e-8
    shuffle_once: bool = False
    keep_last: bool = False
    logging_steps: int = 25
    progress: bool = True
    resume: bool = False
    overwrite: bool = False
    trainer_arguments: Mapping[str, Any] = field(default_factory=dict)

    _fastbert: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "max_length", "eval_batch_size", "logging_steps"):
            require(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        for name in ("max_steps", "eval_steps", "early_stopping_patience", "schedule_epochs"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "a number above 0, or None")
        for name in ("weight_decay", "max_grad_norm", "adam_epsilon"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        require("warmup", self.warmup, 0 <= self.warmup < 1, "a share of the steps in [0, 1)")

    @classmethod
    def preset(cls: type[_Options], parity: str, **changes: Any) -> _Options:
        """The options under which a run does what another code does; `changes` are options that win over them.

        Args:
            parity: "fastbert", the official code at https://github.com/autoliuweijie/FastBERT as its README runs it.
                What it does to the input is an attribute of model and tokenizer, see `fastkd.data.input_format`.

        Raises:
            ValueError: another code.
        """
        if parity != "fastbert":
            raise ValueError(f"parity: got {parity!r}, expected 'fastbert'")
        return cls(**{**_FASTBERT, **cls._fastbert, **changes})


@dataclass(frozen=True)
class FinetuneOptions(TrainOptions):
    """Options of `finetune`.

    Attributes:
        head_learning_rate_factor: the new head learns so many times faster than the pretrained backbone.
        redraw_heads: draw the weights of all heads anew, from torch's own initialisation of linear layers as FastBERT's
            code does, instead of the backbone's.
    """

    head_learning_rate_factor: float = 10.0
    redraw_heads: bool = False

    _fastbert: ClassVar[Mapping[str, Any]] = {
        "epochs": 3,
        "learning_rate": 2e-5,
        "head_learning_rate_factor": 1.0,
        "redraw_heads": True,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.head_learning_rate_factor
        require("head_learning_rate_factor", factor, factor > 0, "a number above 0")


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """Options of `distill`; the loss is that of `self_distillation_loss`.

    Attributes:
        learning_rate: its peak; higher than FastBERT's 2e-4, because small new heads learn faster with it.
        temperature: of both distributions.
        direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher).
        t2_scale: multiply the loss by the square of the temperature, so that gradients keep their size.
        teacher_dropout: dropout also acts in the frozen backbone and teacher while the students learn, so that they
            learn from noisy answers to noisy hidden states, as in FastBERT's code.
        learned_exit: also train a learned exit (criterion "learned"); a model that has one always trains it on.
    """

    learning_rate: float = 1e-3
    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    t2_scale: bool = True
    teacher_dropout: bool = False
    learned_exit: bool = False

    _fastbert: ClassVar[Mapping[str, Any]] = {
        "epochs": 5,
        "learning_rate": 2e-4,
        "teacher_dropout": True,
        "keep_last": True,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require("temperature", self.temperature, self.temperature > 0, "a number above 0")
        require("direction", self.direction, self.direction in ("forward", "reverse"), "'forward' or 'reverse'")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did.

    Attributes:
        output_dir: the model folder; its `trainer_log.json` holds this and the options.
        steps: optimiser steps, those before a kill included.
        train_loss: mean loss over the steps of this process.
        metrics: of the kept weights on the dev rows, without a prefix: `loss`, and `accuracy` (`pearson` and `mse` for
            regression) after `finetune`, `accuracy_layer_<n>` (...) after `distill`, and what early exit does at speed
            0.5: `accuracy_speed_0.5`, `flops_share_speed_0.5` (of the full model's FLOPs). Empty without dev rows.
        seconds: time in the training loop of this process, evaluation included.
        log_history: every log of `transformers.Trainer`.
    """

    output_dir: Path
    steps: int
    train_loss: float
    metrics: dict[str, float]
    seconds: float
    log_history: list[dict[str, float]]


def finetune(
    model: EarlyExitForSequenceClassification,
    train: Rows,
    dev: Rows | None,
    output_dir: str | os.PathLike[str],
    options: FinetuneOptions,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train the backbone and the last head on labels; keep the weights of the best evaluation where `dev` is given.

    The model is trained in place, and takes the rows' label names. Its other heads are left as they are, and marked as
    untrained (`config.exits_trained`).

    Args:
        model: with float32 weights; its number of labels must be that of the rows.
        train, dev: labelled rows.
        output_dir: made at the end, under a temporary name first.
        options: see there.
        tokenizer: the model's; saved with it.
        callbacks: added to those of `transformers.Trainer`.

    Raises:
        DataError: rows without labels, or with labels that are not the model's.
        FileExistsError: `output_dir`, or the checkpoints of an unfinished run, would be lost.
        ValueError: a resumed run was started with other rows or options; a tokenizer that is not the model's.
    """
    check_labels(model, train, "train", required=True)
    check_labels(model, dev, "dev", required=True)
    config = model.config
    if train.label_names is not None:
        config.id2label = dict(enumerate(train.label_names))
        config.label2id = {name: index for index, name in enumerate(train.label_names)}
    config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
    config.exits_trained = False
    if options.redraw_heads:
        _redraw(model.heads, options.seed)
    scale = LabelScale()
    if config.num_labels == 1:
        scale = LabelScale.of(train)
        if config.label_scale is None or options.redraw_heads:
            for head in model.heads.values():
                scale.put_into(head)
        config.label_scale = [scale.mean, scale.std]
    stage = _Stage(
        name="finetune",
        objective=_TeacherObjective(model, scale),
        trained=[model.backbone, model.teacher_head],
        scale=scale,
        scaled=[model.teacher_head],
        head_learning_rate=options.learning_rate * options.head_learning_rate_factor,
        metrics=_teacher_metrics,
        best_metric="pearson" if config.num_labels == 1 else "accuracy",
    )
    return _run(stage, train, dev, Path(output_dir), options, tokenizer, callbacks)


def distill(
    model: EarlyExitForSequenceClassification,
    train: Rows,
    dev: Rows | None,
    output_dir: str | os.PathLike[str],
    options: DistillOptions,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train every head below the last to give the last one's probabilities; keep the weights of the lowest dev loss.

    The model is trained in place and may leave early from then on (`config.exits_trained`). Neither `train` nor `dev`
    needs labels; with labels in `dev` the accuracy after each layer is reported. Arguments and errors as in `finetune`.

    Raises:
        ValueError: also for a model whose only head is the last one.
    """
    if not model.student_heads:
        raise ValueError(
            f"model: it has heads after the layers {model.exit_layers} only, so there is none to distil into; "
            "load it with exit_layers=None for a head after every layer"
        )
    check_labels(model, train, "train", required=False)
    check_labels(model, dev, "dev", required=False)
    if options.learned_exit:
        model.add_learned_exit()
    learned = [] if model.learned_exit is None else [model.learned_exit]
    scale = LabelScale(*model.config.label_scale or ())
    stage = _Stage(
        name="distill",
        objective=_SelfDistillation(model, options, scale),
        trained=[*model.student_heads, *learned],
        scale=scale,
        scaled=model.student_heads,
        head_learning_rate=options.learning_rate,
        metrics=_ExitMetrics(model.exit_layers, FlopsShape.of(model.config), options.max_length),
        best_metric="loss",
    )
    return _run(stage, train, dev, Path(output_dir), options, tokenizer, callbacks, exits_trained=True)


def self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
    t2_scale: bool = True,
) -> Tensor:
    """The sum over the heads of each one's divergence from the teacher, averaged over the batch (Liu et al., ACL 2020).

    With p and q the softmax of teacher and student logits divided by the temperature: "forward" is KL(p || q), what
    FastBERT's code minimises, "reverse" KL(q || p), as the paper writes it. With one class (regression), where
    every KL is 0, it is the squared difference.

    Args:
        student_logits: [B, M, C], M heads.
        teacher_logits: [B, C].
        temperature, t2_scale: see `DistillOptions`.

    Returns:
        A scalar.
    """
    teacher_logits = teacher_logits.unsqueeze(1)
    if student_logits.shape[-1] == 1:
        return (student_logits - teacher_logits).square().squeeze(-1).mean(dim=0).sum()
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1).expand_as(student_logits)
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    target, given = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    divergence = F.kl_div(given, target, reduction="none", log_target=True).sum(dim=-1)
    return divergence.mean(dim=0).sum() * (temperature**2 if t2_scale else 1.0)


def learned_exit_loss(log_odds: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How far the learned exit is from knowing which answers stand, summed over the heads (BERxiT, EACL 2021).

    An answer stands in so far as it is the teacher's: 1 or 0 for classes, 1 - tanh|difference| for a regression. BERxiT
    compares with the labels, by squared error; here no labels are needed, and cross-entropy keeps its gradient where
    the certainty is wrong and close to 0 or 1.

    Args:
        log_odds: [B, M], M heads.
        student_logits: [B, M, C]; no gradient reaches them.
        teacher_logits: [B, C].

    Returns:
        A scalar.
    """
    with torch.no_grad():
        teacher_logits = teacher_logits.unsqueeze(1)
        if student_logits.shape[-1] == 1:
            stands = 1 - (student_logits - teacher_logits).abs().squeeze(-1).tanh()
        else:
            stands = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).to(log_odds.dtype)
    return F.binary_cross_entropy_with_logits(log_odds, stands, reduction="none").mean(dim=0).sum()


def last_checkpoint(folder: str | os.PathLike[str], processes: int = 1) -> Path | None:
    """The newest whole checkpoint in `folder`; a run killed while it wrote one continues from the one before."""
    found = [(int(match[1]), path) for path in Path(folder).glob("*") if (match := _CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
        if not all((path / name).is_file() for name in random_states):
            continue
        try:
            # written last, so its closing brace vouches for the files before it
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return path
    return None


def bf16_is_fast() -> bool:
    """Whether the device that would train computes in bfloat16 rather than emulating it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# Objectives: the models as the Trainer sees them, so that the user's model is never wrapped or patched


class _TeacherObjective(nn.Module):
    """Cross-entropy (squared error of standardised labels for regression) of the last head.

    The head answers in standardised units, the logits given here are in those of the labels.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: EarlyExitForSequenceClassification, scale: LabelScale) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        logits = self.model(**batch, speed=0.0).logits
        if logits.shape[-1] > 1:
            return {"loss": label_loss(logits, labels), "logits": logits}
        return {"loss": label_loss(logits, self.scale.standardised(labels)), "logits": self.scale.restored(logits)}


class _SelfDistillation(nn.Module):
    """`self_distillation_loss` of all heads, and `learned_exit_loss` where there is a learned exit.

    In training mode dropout acts in the students, and nowhere else unless `teacher_dropout`. Students of a regression
    answer in standardised units, the logits given here are in those of the labels.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: EarlyExitForSequenceClassification, options: DistillOptions, scale: LabelScale) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.scale = scale

    def train(self, mode: bool = True) -> _SelfDistillation:
        super().train(mode and self.options.teacher_dropout)
        self.training = mode
        for head in self.model.student_heads:
            head.train(mode)
        return self

    def forward(self, labels: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        # the frozen parameters ask for no gradient, so nothing below the students is recorded
        logits, log_odds = self.model.all_exits(**batch)
        students, teacher = logits[:, :-1], logits[:, -1]
        if logits.shape[-1] == 1:
            logits = torch.cat([self.scale.restored(students), teacher.unsqueeze(1)], dim=1)
            teacher = self.scale.standardised(teacher)
        options = self.options
        loss = self_distillation_loss(students, teacher, options.temperature, options.direction, options.t2_scale)
        if log_odds is not None:
            loss = loss + learned_exit_loss(log_odds[:, :-1], students, teacher)
        return {"loss": loss, "logits": logits}


@dataclass(frozen=True)
class _Stage:
    """One training step: what is minimised, over which modules, and how it is judged."""

    name: str
    objective: _TeacherObjective | _SelfDistillation
    trained: Sequence[nn.Module]
    scale: LabelScale
    scaled: Sequence[nn.Module]
    """Heads that learn in standardised units."""
    head_learning_rate: float
    metrics: Callable[[EvalPrediction], dict[str, float]]
    best_metric: str


# Metrics


def _accuracy(logits: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
    return {"accuracy": float((logits.argmax(axis=-1) == labels).mean())}


def _regression_metrics(logits: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
    predicted = logits.squeeze(-1)
    return {"pearson": correlation(predicted, labels), "mse": float(((predicted - labels) ** 2).mean())}


def _score(logits: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
    return (_regression_metrics if logits.shape[-1] == 1 else _accuracy)(logits, labels)


def _teacher_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return _score(numpy.asarray(prediction.predictions), numpy.asarray(prediction.label_ids))


@dataclass(frozen=True)
class _ExitMetrics:
    """The score of every head, [n, K, C] logits in the order of `exit_layers`, and what early exit would do."""

    exit_layers: Sequence[int]
    shape: FlopsShape
    max_length: int

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = numpy.asarray(prediction.predictions), numpy.asarray(prediction.label_ids)
        scores = {
            f"{name}_layer_{layer}": value
            for index, layer in enumerate(self.exit_layers)
            for name, value in _score(logits[:, index], labels).items()
        }
        is_regression = logits.shape[-1] == 1
        return scores if is_regression else scores | self._early_exit(torch.from_numpy(logits).float(), labels)

    def _early_exit(self, logits: Tensor, labels: numpy.ndarray) -> dict[str, float]:
        lengths = torch.full((len(logits),), self.max_length, dtype=torch.int32)
        trace = ExitTrace(
            logits, torch.from_numpy(labels), lengths, list(self.exit_layers), self.max_length, self.shape
        )
        row = trace.sweep([RECORDED_SPEED])[0]
        assert row.accuracy is not None
        name = f"speed_{RECORDED_SPEED:g}"
        return {f"accuracy_{name}": row.accuracy, f"flops_share_{name}": 1 / row.speedup["fastbert"]}


# The run


class ObjectiveTrainer(Trainer):
    """A Trainer over an objective: two learning rates, its own order of rows, evaluation that needs no labels."""

    def __init__(
        self,
        *,
        head_learning_rate: float,
        head_names: tuple[str, ...],
        sampler: LengthGroupedSampler | ShuffledOnceSampler,
        options: TrainOptions,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.head_learning_rate = head_learning_rate
        self.head_names = head_names
        self.options = options
        self.sampler = sampler
        if isinstance(sampler, LengthGroupedSampler):
            self.add_callback(_SamplerEpoch(sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler | ShuffledOnceSampler:
        return self.sampler

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        epochs = self.options.schedule_epochs
        if epochs is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        batch = self.args.per_device_train_batch_size * self.args.world_size
        steps = int(len(self.sampler) * epochs / batch) + 1
        schedule = partial(_official_schedule, steps=steps, warmup=steps * self.options.warmup)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or cast(Any, self.optimizer), schedule)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        objective: Any = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(objective))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name.startswith(self.head_names), name in decaying), []).append(parameter)
        optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, objective)
        if not self.options.bias_correction:
            optimizer_class = BiasedAdamW
            arguments = {name: arguments[name] for name in ("lr", "betas", "eps")}
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.head_learning_rate if in_head else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (in_head, decays), parameters in groups.items()
            ],
            **arguments,
        )
        return self.optimizer

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        if prediction_loss_only:
            return output["loss"], None, None
        return output["loss"], output["logits"], inputs.get("labels")


def _official_schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at `step`: linear to 1 in `warmup` steps, then to 0 at `steps`, and 0."""
    if step < warmup:
        return step / max(1.0, warmup)
    return max(0.0, (steps - step) / max(1.0, steps - warmup))


class _SamplerEpoch(TrainerCallback):
    """Tells the sampler the epoch: accelerate's own way does not reach it behind skipped and sharded batches."""

    def __init__(self, sampler: LengthGroupedSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.epoch = int(state.epoch or 0)


def _run(
    stage: _Stage,
    train: Rows,
    dev: Rows | None,
    output_dir: Path,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback],
    *,
    exits_trained: bool = False,
) -> TrainResult:
    model = stage.objective.model
    if options.early_stopping_patience is not None and dev is None:
        raise ValueError("early_stopping_patience: it needs an evaluation; pass dev rows")
    check_tokenizer(tokenizer, model)
    _check_input_format(tokenizer, model)
    _check_max_length(options.max_length, model)
    check_dtypes(stage.trained)
    train_tokens = tokenize(train, tokenizer, options.max_length)
    dev_tokens = None if dev is None else tokenize(dev, tokenizer, options.max_length)

    checkpoints = output_dir.with_name(f"{output_dir.name}.checkpoints")
    arguments = training_arguments(checkpoints, options, best_metric=stage.best_metric, evaluates=dev is not None)
    record = {
        "stage": stage.name,
        "options": json.loads(json.dumps(asdict(options), default=str)),
        "train": {"source": train.source, "rows": len(train), "digest": train.digest()},
        "dev": None if dev is None else {"source": dev.source, "rows": len(dev), "digest": dev.digest()},
        "processes": arguments.world_size,
    }
    if arguments.process_index == 0:
        check_outputs(output_dir, checkpoints, options, record)
    with only_trainable(model, stage.trained), stage.scale.taken_out_of(stage.scaled):
        trainer = _trainer(stage, train_tokens, dev_tokens, arguments, options, tokenizer, callbacks)
        # no process may look for checkpoints before the first one has put the folder in order
        trainer.accelerator.wait_for_everyone()
        checkpoint = last_checkpoint(checkpoints, arguments.world_size)
        output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.zero_grad(set_to_none=True)
    model.eval()
    model.config.certificate = None  # it was for the weights of before
    model.config.training_data |= {
        f"{stage.name} {part}": record[part]["digest"] for part in ("train", "dev") if record[part] is not None
    }
    if exits_trained:
        model.config.exits_trained = True
    result = TrainResult(
        output_dir=output_dir,
        steps=output.global_step,
        train_loss=output.training_loss,
        metrics=kept_metrics(trainer.state, options.keep_last),
        seconds=output.metrics["train_runtime"],
        log_history=trainer.state.log_history,
    )
    if trainer.is_world_process_zero():
        save_run(model, tokenizer, result, record)
        shutil.rmtree(checkpoints)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return result


def training_arguments(
    checkpoints: Path, options: TrainOptions, *, best_metric: str, evaluates: bool
) -> TrainingArguments:
    """The arguments of a `Trainer` that writes to `checkpoints`; `best_metric` decides which weights are kept."""
    use_cpu = not torch.accelerator.is_available()
    every = {"strategy": "epoch"} if options.eval_steps is None else {"strategy": "steps", "steps": options.eval_steps}
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.eval_batch_size,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "warmup_steps": options.warmup,
        "lr_scheduler_type": "linear",
        "max_grad_norm": options.max_grad_norm,
        "adam_epsilon": options.adam_epsilon,
        "bf16": bf16_is_fast() if options.bf16 is None else options.bf16,
        "use_cpu": use_cpu,
        "dataloader_pin_memory": not use_cpu,
        "seed": options.seed,
        "logging_steps": options.logging_steps,
        "logging_nan_inf_filter": False,
        "disable_tqdm": not options.progress,
        "report_to": "none",
        "save_total_limit": 1,
        "load_best_model_at_end": evaluates and not options.keep_last,
        "metric_for_best_model": best_metric if evaluates else None,
        "greater_is_better": best_metric != "loss" if evaluates else None,
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
    }
    arguments |= {f"save_{name}": value for name, value in every.items()}
    arguments |= {f"eval_{name}": value for name, value in every.items()} if evaluates else {"eval_strategy": "no"}
    return TrainingArguments(**{**arguments, **options.trainer_arguments})


def _trainer(
    stage: _Stage,
    train: datasets.Dataset,
    dev: datasets.Dataset | None,
    arguments: TrainingArguments,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback],
) -> ObjectiveTrainer:
    group = arguments.per_device_train_batch_size * arguments.world_size
    sampler: LengthGroupedSampler | ShuffledOnceSampler
    if options.shuffle_once:
        sampler = ShuffledOnceSampler(len(train), arguments.seed)
    else:
        sampler = LengthGroupedSampler(train["length"][:], group, arguments.seed)
    added = list(callbacks)
    if options.early_stopping_patience is not None:
        added.append(EarlyStoppingCallback(options.early_stopping_patience))
    unused = ["length"] if stage.name == "finetune" else ["length", "labels"]
    trainer = ObjectiveTrainer(
        model=stage.objective,
        args=arguments,
        train_dataset=train.remove_columns([name for name in unused if name in train.column_names]),
        eval_dataset=None if dev is None else sorted_by_length(dev),
        data_collator=padding_collator(tokenizer),
        compute_metrics=stage.metrics,
        callbacks=added,
        head_learning_rate=stage.head_learning_rate,
        head_names=("model.heads.",),
        sampler=sampler,
        options=options,
    )
    # it prints to standard output, which belongs to the caller
    trainer.remove_callback(PrinterCallback)
    return trainer


def sorted_by_length(tokens: datasets.Dataset) -> datasets.Dataset:
    """Longest first, without the column `length`."""
    lengths = tokens["length"][:]
    order = sorted(range(len(tokens)), key=lengths.__getitem__, reverse=True)
    return tokens.select(order).remove_columns("length")


def kept_metrics(state: TrainerState, keep_last: bool) -> dict[str, float]:
    """The dev metrics of the weights that were kept, from the log."""
    for entry in reversed(state.log_history):
        if "eval_loss" in entry and (keep_last or entry["step"] == state.best_global_step):
            timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
            return {
                name.removeprefix("eval_"): value
                for name, value in entry.items()
                if name.startswith("eval_") and name not in timing
            }
    return {}


def _redraw(heads: nn.Module, seed: int) -> None:
    """Give all linear layers the weights that torch draws by itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in heads.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


@contextmanager
def only_trainable(model: nn.Module, trained: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, exactly the parameters of `trained` ask for gradients; afterwards each parameter does as before."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {parameter for module in trained for parameter in module.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


# Checks before the work


def require(name: str, value: Any, is_right: bool, expected: str) -> None:
    """Raise ValueError about the argument `name` unless `is_right`; an infinite or undefined float never is."""
    if not is_right or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def check_labels(model: PreTrainedModel, rows: Rows | None, argument: str, *, required: bool) -> None:
    """Raise DataError where the labels of `rows` are missing or not the model's."""
    if rows is None:
        return
    if rows.num_labels is None:
        if required:
            raise DataError(f"{argument}: {rows.source} has no labels; fine-tuning needs them (distill does not)")
        return
    model_names = tuple((model.config.id2label or {}).values())
    # unnamed integer labels may lack the last classes; everything else must agree in number
    may_lack_classes = rows.label_names is None and 1 < rows.num_labels < len(model_names)
    if rows.num_labels != len(model_names) and not may_lack_classes:
        raise DataError(
            f"{argument}: {rows.source} has {_described(rows.num_labels)}, the model has "
            f"{_described(len(model_names))}; load the model with num_labels={rows.num_labels}, or the rows with "
            f"num_labels={len(model_names)}"
        )
    generic = tuple(f"LABEL_{index}" for index in range(len(model_names)))
    if rows.label_names is not None and model_names not in (generic, rows.label_names):
        raise DataError(
            f"{argument}: {rows.source} has the labels {', '.join(rows.label_names)}, the model has "
            f"{', '.join(model_names)}; load the rows with label_names={list(model_names)}"
        )


def _described(num_labels: int) -> str:
    return "a number as its label (regression)" if num_labels == 1 else f"{num_labels} labels"


def check_dtypes(trained: Sequence[nn.Module]) -> None:
    """Raise ValueError unless all weights to be trained are float32."""
    wrong = {parameter.dtype for module in trained for parameter in module.parameters()} - {torch.float32}
    if wrong:
        raise ValueError(
            f"model: the weights to be trained are {', '.join(map(str, wrong))}, expected torch.float32; load the "
            "model with dtype=torch.float32 (bf16=True still computes in bfloat16)"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model embeds."""
    embedded = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > embedded:
        raise ValueError(
            f"tokenizer: it has {len(tokenizer)} tokens, the model embeds {embedded}; pass the tokenizer that was "
            "saved with the model"
        )


def _check_input_format(tokenizer: PreTrainedTokenizerBase, model: EarlyExitForSequenceClassification) -> None:
    wanted, own = model.config.input_format, input_format_of(tokenizer)
    if wanted != own:
        raise ValueError(
            f"tokenizer: it writes its inputs in the format {own!r}, the model's input_format is {wanted!r}; pass "
            f"fastkd.with_input_format(tokenizer, {wanted!r})"
        )


def _check_max_length(max_length: int, model: EarlyExitForSequenceClassification) -> None:
    positions: nn.Embedding = cast(Any, model.backbone).embeddings.position_embeddings
    # RoBERTa counts positions from its padding index up
    limit = positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)
    if max_length > limit:
        raise ValueError(f"max_length: got {max_length}, the model has {limit} positions; pass at most that")


def check_outputs(output_dir: Path, checkpoints: Path, options: TrainOptions, record: dict[str, Any]) -> None:
    """Refuse to lose anything; put the folder of the checkpoints in order, with the record of this run in it."""
    is_taken = output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir()))
    if is_taken and not options.overwrite:
        raise FileExistsError(f"output_dir: {output_dir} already exists; choose another, or pass overwrite=True")
    started = _started_run(checkpoints)
    if started is not None and not options.resume:
        if not options.overwrite:
            raise FileExistsError(
                f"output_dir: {checkpoints} holds the checkpoints of an unfinished run; continue it with resume=True, "
                "or discard it with overwrite=True"
            )
        started = None
    if started is None:
        shutil.rmtree(checkpoints, ignore_errors=True)
        write_json(checkpoints / _RUN_FILE, record)
        return
    differences = _differences(started, record)
    if differences:
        raise ValueError(
            f"resume: the run in {checkpoints} was started differently ({'; '.join(differences)}); resume it as it was "
            "started, or start over with overwrite=True and resume=False"
        )


def _started_run(checkpoints: Path) -> dict[str, Any] | None:
    try:
        return json.loads((checkpoints / _RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _differences(started: dict[str, Any], record: dict[str, Any]) -> list[str]:
    def flat(run: dict[str, Any]) -> dict[str, Any]:
        rows = {name: (run[name] or {}).get("digest") for name in ("train", "dev")}
        options = {name: value for name, value in run["options"].items() if name not in _FREE_OPTIONS}
        return {"stage": run["stage"], "processes": run["processes"], **options, **rows}

    before, now = flat(started), flat(record)
    return [
        f"other {name} rows" if name in ("train", "dev") else f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


# Saving


def save_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    result: TrainResult,
    record: dict[str, Any],
) -> None:
    log = {
        **record,
        "steps": result.steps,
        "train_loss": result.train_loss,
        "seconds": result.seconds,
        "metrics": result.metrics,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log_history": result.log_history,
    }
    with atomic_folder(result.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / LOG_FILE, log)
