"""Self-distillation: every exit head below the last learns the last head's probabilities.

All else is frozen, or learns along to give the answers that it gave before.

Departures from the code of FastBERT (Liu et al., ACL 2020): the frozen part has no dropout, weight decay acts (on
trained weight matrices only), and the learning rate schedule is as long as the distillation. `FinetuneOptions.preset`
and `DistillOptions.preset(parity="fastbert")` take them all back; every quirk of that code is one option, and can be
had alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import datasets
import numpy
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from fastkd.data.augmentation import with_altered_copies
from fastkd.data.rows import RowSource
from fastkd.encoders.label_scale import LabelScale
from fastkd.encoders.untouched import is_plain_linear
from fastkd.exits.flops import FlopsShape
from fastkd.exits.trace import ExitTrace
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.training.checks import opened, parameters_to_train, require, rows_for
from fastkd.training.harness import Objective, TrainingStage, TrainOptions, TrainResult
from fastkd.training.head_temperatures import HEAD_TEMPERATURES, divide_logits
from fastkd.training.hidden_states import HiddenStates
from fastkd.training.log import RECORDED_SPEED
from fastkd.training.metrics import head_scores
from fastkd.training.model_parts import PartTraining, check_part, train_part
from fastkd_kernels.checks import check_choice

_KEEP_HEADS = "keep the heads by modules_to_save=['heads'] in its configuration"
_TRAIN, _DEV = "train_rows", "dev_rows"
_OWN = "own_answers"
"""Column: the logits [C] of the full model before the training."""
_EPOCHS = 3.0
_MOST_COPIES = 9
_MERGE = "merge the adapter first (model.merge_and_unload())"


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """Options of `distill`; the loss is that of `self_distillation_loss`.

    Attributes:
        epochs: passes over the training rows; None: three, or as many as make `min_steps` steps.
        min_steps: see there; small files need more passes.
        augmented_copies: copies of each training row in which some tokens are replaced by others of the rows; the
            model says what its heads learn of them. With them small files teach as larger ones do. An epoch passes over
            them too. None: where the length is given in steps, as many as those steps see, at most nine; 0 with
            `epochs` or `train_backbone`, which learns less of the task from such text.
        augmentation_rate: probability with which a token of a copy is replaced (`fastkd.data.augmentation`).
        learning_rate: its peak; higher than FastBERT's 2e-4, because small new heads learn faster with it.
        temperature: of both distributions.
        direction: "forward" is KL(last head || exit head), "reverse" KL(exit head || last head).
        t2_scale: multiply the loss by the square of the temperature, so that gradients keep their size.
        frozen_dropout: dropout also acts in the frozen backbone and last head while the other heads learn, so that they
            learn from noisy answers to noisy hidden states, as in FastBERT's code.
        train_backbone: the backbone and the last head learn too. All heads then learn the answers that the model gave
            before, so that its lower layers turn to the task. Early heads get better; a few answers of the full model
            change (`answers_kept` is the share of dev rows whose answer stays), and a step takes several times as long.
        backbone_learning_rate: its peak for the backbone and the last head.
        learned_exit: also train a learned exit (criterion "learned"); a model that has one always trains it on.
        head_temperatures: afterwards divide the logits of every early head by the temperature at which it predicts the
            last head best on the dev rows: its "answers", or its "probabilities"; "none" leaves the heads as they are.
            A head's probability then says how likely the full model gives the same answer, or the same probability
            (`agreement_temperatures`, `probability_temperatures` of `fastkd.training.head_temperatures`). Without dev
            rows, for a regression and beside a learned exit nothing is done. It is part of the saved weights, and
            changes no head's answer.
        states_gib: memory for the frozen hidden states that the heads read, of training and dev rows each. Where they
            fit, the backbone runs once a row and not once an epoch, with the same results but for rounding; 0: never.
            They are computed anew with `frozen_dropout` or `train_backbone`, in several processes, and for an encoder
            whose answers depend on padding.
    """

    epochs: float | None = None  # type: ignore[assignment]  # `distill` fills it in
    min_steps: int = 600
    augmented_copies: int | None = None
    augmentation_rate: float = 0.15
    learning_rate: float = 1e-3
    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    t2_scale: bool = True
    frozen_dropout: bool = False
    train_backbone: bool = False
    backbone_learning_rate: float = 5e-5
    learned_exit: bool = False
    head_temperatures: Literal["answers", "probabilities", "none"] = "answers"
    states_gib: float = 4.0

    _fastbert: ClassVar[Mapping[str, Any]] = {
        "epochs": 5,
        "augmented_copies": 0,
        "head_temperatures": "none",
        "learning_rate": 2e-4,
        "frozen_dropout": True,
        "keep_last": True,
    }

    def _check_epochs(self) -> None:
        require("epochs", self.epochs, self.epochs is None or self.epochs > 0, "a number above 0, or None")

    def __post_init__(self) -> None:
        super().__post_init__()
        require("temperature", self.temperature, self.temperature > 0, "a number above 0")
        require("min_steps", self.min_steps, self.min_steps >= 0, "0 or more")
        require("states_gib", self.states_gib, self.states_gib >= 0, "0 or more")
        copies, rate = self.augmented_copies, self.augmentation_rate
        require("augmented_copies", copies, copies is None or copies >= 0, "0 or more, or None")
        expected = "a share of the tokens in (0, 1]; augmented_copies=0 replaces none"
        require("augmentation_rate", rate, 0 < rate <= 1, expected)
        require("direction", self.direction, self.direction in ("forward", "reverse"), "'forward' or 'reverse'")
        check_choice("head_temperatures", self.head_temperatures, HEAD_TEMPERATURES)
        rate = self.backbone_learning_rate
        require("backbone_learning_rate", rate, rate > 0, "a number above 0; without train_backbone nothing reads it")
        if self.train_backbone and self.frozen_dropout:
            raise ValueError(
                "frozen_dropout: with train_backbone no layer is frozen and dropout acts in all; leave it out"
            )


def distill(
    model: EarlyExitForSequenceClassification | Any,
    train: RowSource,
    dev: RowSource | None,
    output_dir: str | os.PathLike[str],
    options: DistillOptions,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train every head below the last to give the last one's probabilities; keep the weights of the lowest dev loss.

    With `train_backbone` all heads learn what the last one said before the training, and all layers with them. The
    model is trained in place and may leave early from then on (`config.exits_trained`). Neither `train` nor `dev` needs
    labels; with labels in `dev` the accuracy after each layer is reported. Arguments and errors as in `finetune`.

    Raises:
        ValueError: also for a model whose only head is the last one, and for `bf16` or `train_backbone` with an int8
            encoder.
    """
    model, adapter = opened(model)
    if not model.early_heads:
        raise ValueError(
            f"model: it has heads after the layers {model.exit_layers} only, so there is none to distil into; "
            "load it with exit_layers=None for a head after every layer"
        )
    train, dev = rows_for(model, train, dev, require_labels=False)
    check_part(model, dev, options, tokenizer)
    options = _in_its_dtype(_long_enough(options, len(train)), model)
    along = [model.backbone, model.last_head] if options.train_backbone else []
    parameters_to_train([*model.early_heads, *along], adapter, _KEEP_HEADS)
    if adapter is not None and (options.learned_exit or model.learned_exit is not None):
        raise ValueError(f"learned_exit: an adapter does not keep it; {_MERGE}")
    if options.learned_exit:
        model.add_learned_exit()
    learned = [] if model.learned_exit is None else [model.learned_exit]
    scale = LabelScale(*model.config.label_scale or ())
    objective = _SelfDistillation(model, options, scale)
    training = PartTraining(
        name="distill",
        model=model,
        objective=objective,
        adapter=adapter,
        trained=parameters_to_train([*model.early_heads, *learned, *along], adapter, _KEEP_HEADS),
        scale=scale,
        scaled=model.early_heads,
        learning_rates={
            f"model.{name}.": options.backbone_learning_rate
            for name, module in model.named_modules()
            if any(module is part for part in along)
        },
        metrics=_ExitMetrics(model.exit_layers, FlopsShape.of(model.config), options.max_length),
        best_metric="loss",
        reads_labels=False,
        trains_exits=True,
        prepared=objective.prepared,
        finished=objective.finished,
    )
    return train_part(training, train, dev, Path(output_dir), options, tokenizer, callbacks)


def _in_its_dtype(options: DistillOptions, model: EarlyExitForSequenceClassification) -> DistillOptions:
    """The options without bfloat16 for an encoder in int8, which takes float32 only."""
    if model.config.quantized is None:
        return options
    if options.bf16:
        raise ValueError(
            f"bf16: got True, but the model is quantised to {model.config.quantized}, with everything else in float32; "
            "leave bf16 out, or train the unquantised model"
        )
    return replace(options, bf16=False)


def _long_enough(options: DistillOptions, rows: int) -> DistillOptions:
    """The options with their length: `min_steps` where three epochs make fewer, evaluated twelve times on the way."""
    if options.epochs is not None:
        return options
    options = replace(options, epochs=_EPOCHS)
    rows_a_step = options.batch_size * PartialState().num_processes
    is_given = options.max_steps is not None or {"max_steps", "num_train_epochs"} & options.trainer_arguments.keys()
    if is_given or _EPOCHS * math.ceil(rows / rows_a_step) >= options.min_steps:
        return options
    return replace(
        options, max_steps=options.min_steps, eval_steps=options.eval_steps or math.ceil(options.min_steps / 12)
    )


def self_distillation_loss(
    early_logits: Tensor,
    last_logits: Tensor,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
    t2_scale: bool = True,
) -> Tensor:
    """The sum over the early heads of their divergences from the last, a mean over the batch (Liu et al., ACL 2020).

    With p and q the softmax of the last head's and an early head's logits divided by the temperature: "forward" is
    KL(p || q), what FastBERT's code minimises, "reverse" KL(q || p), as the paper writes it. With one class
    (regression), where every KL is 0, it is the squared difference.

    Args:
        early_logits: [B, M, C], of the M heads below the last.
        last_logits: [B, C], of the last head.
        temperature, t2_scale: see `DistillOptions`.

    Returns:
        A scalar.
    """
    last_logits = last_logits.unsqueeze(1)
    if early_logits.shape[-1] == 1:
        return (early_logits - last_logits).square().squeeze(-1).mean(dim=0).sum()
    log_p = F.log_softmax(last_logits / temperature, dim=-1).expand_as(early_logits)
    log_q = F.log_softmax(early_logits / temperature, dim=-1)
    target, given = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    divergence = F.kl_div(given, target, reduction="none", log_target=True).sum(dim=-1)
    return divergence.mean(dim=0).sum() * (temperature**2 if t2_scale else 1.0)


def learned_exit_loss(log_odds: Tensor, early_logits: Tensor, last_logits: Tensor) -> Tensor:
    """How far the learned exit is from knowing which answers stand, summed over the heads (BERxiT, EACL 2021).

    An answer stands in so far as it is the last head's: 1 or 0 for classes, 1 - tanh|difference| for a regression.
    BERxiT compares with the labels, by squared error; here no labels are needed, and cross-entropy keeps its gradient
    where the certainty is wrong and close to 0 or 1.

    Args:
        log_odds: [B, M], M heads.
        early_logits: [B, M, C]; no gradient reaches them.
        last_logits: [B, C], of the last head.

    Returns:
        A scalar.
    """
    with torch.no_grad():
        last_logits = last_logits.unsqueeze(1)
        if early_logits.shape[-1] == 1:
            stands = 1 - (early_logits - last_logits).abs().squeeze(-1).tanh()
        else:
            stands = (early_logits.argmax(-1) == last_logits.argmax(-1)).to(log_odds.dtype)
    return F.binary_cross_entropy_with_logits(log_odds, stands, reduction="none").mean(dim=0).sum()


class _SelfDistillation(Objective):
    """`self_distillation_loss` of all early heads, and `learned_exit_loss` where there is a learned exit.

    With `train_backbone` all heads learn what the last one said before the training. In training mode dropout acts in
    the early heads, and elsewhere with `train_backbone` or `frozen_dropout` only. Early heads of a regression answer in
    standardised units; the logits given here are in those of the labels.
    """

    def __init__(self, model: EarlyExitForSequenceClassification, options: DistillOptions, scale: LabelScale) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.scale = scale
        self.states: dict[str, HiddenStates] = {}

    @property
    def core(self) -> EarlyExitForSequenceClassification:
        return self.model

    def train(self, mode: bool = True) -> _SelfDistillation:
        super().train(mode and (self.options.train_backbone or self.options.frozen_dropout))
        self.training = mode
        for head in self.model.early_heads:
            head.train(mode)
        return self

    def prepared(self, stage: TrainingStage, arguments: TrainingArguments) -> TrainingStage:
        """The stage with altered copies of its rows, and with what of them need not be computed in every epoch."""
        stage = replace(stage, train=self._augmented(stage, arguments))
        return (self.with_own_answers if self.options.train_backbone else self.with_states)(stage, arguments)

    def _augmented(self, stage: TrainingStage, arguments: TrainingArguments) -> datasets.Dataset:
        copies = self.options.augmented_copies
        if copies is None and arguments.max_steps > 0 and not self.options.train_backbone:
            copies = min(math.ceil(_passes(stage.train, arguments)) - 1, _MOST_COPIES)
        if not copies:
            return stage.train
        tokenizer = cast(DataCollatorWithPadding, stage.collator).tokenizer
        return with_altered_copies(
            stage.train, tokenizer.all_special_ids, copies, self.options.augmentation_rate, self.options.seed
        )

    def with_states(self, stage: TrainingStage, arguments: TrainingArguments) -> TrainingStage:
        """The stage with row numbers in the place of tokens, for the rows whose hidden states fit into memory."""
        self.states = {}
        can_keep = not (self.options.frozen_dropout or self.model.reads_padding or arguments.world_size > 1)
        if not can_keep:
            return stage
        cast(nn.Module, self.model).to(arguments.device)
        kept = {_TRAIN: stage.train if _passes(stage.train, arguments) > 1 else None, _DEV: stage.dev}
        for name, tokens in kept.items():
            if tokens is not None:
                self._keep(name, tokens, stage, arguments)
        changes: dict[str, Any] = {
            part: _row_numbers(tokens, name)
            for part, name, tokens in (("train", _TRAIN, stage.train), ("dev", _DEV, stage.dev))
            if name in self.states and tokens is not None
        }
        return replace(stage, collator=_RowCollator(stage.collator), **changes)

    def _keep(self, name: str, tokens: datasets.Dataset, stage: TrainingStage, arguments: TrainingArguments) -> None:
        """Keep the hidden states of these rows, unless they need more memory than was allowed."""
        if HiddenStates.size(self.model, tokens) > self.options.states_gib * 2**30:
            return
        collator = cast(DataCollatorWithPadding, stage.collator)
        size = self.options.eval_batch_size
        self.states[name] = HiddenStates.of(self.model, tokens, collator, size, _autocast(arguments))

    def with_own_answers(self, stage: TrainingStage, arguments: TrainingArguments) -> TrainingStage:
        """The stage with what the model says now beside its rows: a continuation begins with the same model."""
        self.states = {}
        cast(nn.Module, self.model).to(arguments.device)

        def beside(tokens: datasets.Dataset) -> datasets.Dataset:
            answers = self._answers(stage, tokens, arguments)[0][:, -1]
            return tokens.add_column(_OWN, answers.tolist())  # type: ignore[call-arg]

        return replace(stage, train=beside(stage.train), dev=None if stage.dev is None else beside(stage.dev))

    @torch.no_grad()
    def finished(self, stage: TrainingStage, arguments: TrainingArguments, result: TrainResult) -> TrainResult:
        """Give the heads their temperatures; the result with them, and with what the model now does on dev rows."""
        fitted = HEAD_TEMPERATURES[self.options.head_temperatures] if self._takes_temperatures() else None
        is_compared = self.options.train_backbone and self.model.config.num_classes > 1
        if stage.dev is None or not (fitted or is_compared):
            return result
        heads = self.model.early_heads
        logits, labels = self._answers(stage, stage.dev, arguments)
        kept = {"answers_kept": _agreement(logits[:, -1], torch.tensor(stage.dev[_OWN][:]))} if is_compared else {}
        if fitted is None:
            return replace(result, metrics={**result.metrics, **kept})
        found = fitted(logits[:, :-1], logits[:, -1])
        divide_logits(heads, found)
        logits[:, :-1] /= logits.new_tensor(found)[:, None]
        layers = self.model.exit_layers
        metrics = {f"temperature_layer_{layer}": value for layer, value in zip(layers, found, strict=False)}
        if labels is not None:
            metrics |= stage.metrics(EvalPrediction(logits.numpy(), labels.numpy()))
        return replace(result, metrics={**result.metrics, **metrics, **kept})

    def _takes_temperatures(self) -> bool:
        is_classifier = self.model.config.num_classes > 1 and self.model.learned_exit is None
        return is_classifier and all(is_plain_linear(head.out_proj) for head in self.model.early_heads)

    @torch.no_grad()
    def _answers(
        self, stage: TrainingStage, rows: datasets.Dataset, arguments: TrainingArguments
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [n, K, C] of all heads on the CPU, and labels, if there are any."""
        self.eval()
        logits, labels = [], []
        order = torch.tensor(rows["length"][:]).argsort(descending=True, stable=True)
        rows = rows.select_columns([name for name in rows.column_names if name not in ("length", _OWN)])
        for chosen in order.split(self.options.eval_batch_size):
            batch = stage.collator([rows[row] for row in chosen.tolist()])
            if "labels" in batch:
                labels.append(batch.pop("labels"))
            with _autocast(arguments):
                found, _ = self._exits({name: value.to(arguments.device) for name, value in batch.items()})
            logits.append(found.float().cpu())
        back = order.argsort()
        return torch.cat(logits)[back], torch.cat(labels)[back] if labels else None

    def _exits(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        for name, states in self.states.items():
            if name in batch:
                return states.exits(self.model, batch[name])
        return self.model.all_exits(**batch)

    def forward(
        self, labels: Tensor | None = None, own_answers: Tensor | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        # parameters that are frozen ask for no gradient, so nothing below the early heads is recorded then
        logits, log_odds = self._exits(batch)
        early, last = logits[:, :-1], logits[:, -1]
        if logits.shape[-1] == 1:
            logits = torch.cat([self.scale.restored(early), last.unsqueeze(1)], dim=1)
            last = self.scale.standardised(last)
            own_answers = None if own_answers is None else self.scale.standardised(own_answers)
        taught, target = early, last
        if own_answers is not None:
            taught, target = torch.cat([early, last.unsqueeze(1)], dim=1), own_answers
        options = self.options
        loss = self_distillation_loss(taught, target, options.temperature, options.direction, options.t2_scale)
        if log_odds is not None:
            loss = loss + learned_exit_loss(log_odds[:, :-1], early, last)
        return {"loss": loss, "logits": logits}


def _agreement(logits: Tensor, others: Tensor) -> float:
    """Share of rows to which both [n, C] give the same answer."""
    return (logits.argmax(-1) == others.argmax(-1)).double().mean().item()


def _autocast(arguments: TrainingArguments) -> torch.autocast:
    """In which the Trainer computes."""
    dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    return torch.autocast(arguments.device.type, dtype, enabled=arguments.bf16 or arguments.fp16)


def _passes(tokens: datasets.Dataset, arguments: TrainingArguments) -> float:
    """How often a training sees each row."""
    if arguments.max_steps < 1:
        return arguments.num_train_epochs
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return arguments.max_steps * rows / len(tokens)


def _row_numbers(tokens: datasets.Dataset, name: str) -> datasets.Dataset:
    """The rows as numbers in the column `name`, with the columns that are no input of the model."""
    others = [column for column in ("length", "labels") if column in tokens.column_names]
    return tokens.select_columns(others).add_column(name, list(range(len(tokens))))  # type: ignore[call-arg]


@dataclass(frozen=True)
class _RowCollator:
    """Batches of row numbers [B] and labels; of rows with tokens those of `tokens`."""

    tokens: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        if "input_ids" in rows[0]:
            return self.tokens(rows)
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


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
            for name, value in head_scores(logits[:, index], labels).items()
        }
        return scores | self._early_exit(torch.from_numpy(logits).float(), labels)

    def _early_exit(self, logits: Tensor, labels: numpy.ndarray) -> dict[str, float]:
        lengths = torch.full((len(logits),), self.max_length, dtype=torch.int32)
        trace = ExitTrace(
            logits, torch.from_numpy(labels), lengths, list(self.exit_layers), self.max_length, self.shape
        )
        row = trace.sweep([RECORDED_SPEED])[0]
        assert row.quality is not None
        name, measure = f"speed_{RECORDED_SPEED:g}", "accuracy" if row.pearson is None else "pearson"
        return {f"{measure}_{name}": row.quality, f"flops_share_{name}": 1 / row.speedup["fastbert"]}
