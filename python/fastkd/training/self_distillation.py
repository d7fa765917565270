"""Self-distillation: every exit head below the last learns the last head's probabilities; all else is frozen.

Departures from the code of FastBERT (Liu et al., ACL 2020): the frozen part has no dropout, weight decay acts (on
trained weight matrices only), and the learning rate schedule is as long as the distillation. `FinetuneOptions.preset`
and `DistillOptions.preset(parity="fastbert")` take them all back; every quirk of that code is one option, and can be
had alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback

from fastkd.data.rows import RowSource
from fastkd.encoders.label_scale import LabelScale
from fastkd.exits.flops import FlopsShape
from fastkd.exits.trace import ExitTrace
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.training.checks import opened, parameters_to_train, require, rows_for
from fastkd.training.harness import Objective, TrainOptions, TrainResult
from fastkd.training.log import RECORDED_SPEED
from fastkd.training.metrics import head_scores
from fastkd.training.model_parts import PartTraining, check_part, train_part

_KEEP_HEADS = "keep the heads by modules_to_save=['heads'] in its configuration"
_MERGE = "merge the adapter first (model.merge_and_unload())"


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """Options of `distill`; the loss is that of `self_distillation_loss`.

    Attributes:
        learning_rate: its peak; higher than FastBERT's 2e-4, because small new heads learn faster with it.
        temperature: of both distributions.
        direction: "forward" is KL(last head || exit head), "reverse" KL(exit head || last head).
        t2_scale: multiply the loss by the square of the temperature, so that gradients keep their size.
        frozen_dropout: dropout also acts in the frozen backbone and last head while the other heads learn, so that they
            learn from noisy answers to noisy hidden states, as in FastBERT's code.
        learned_exit: also train a learned exit (criterion "learned"); a model that has one always trains it on.
    """

    learning_rate: float = 1e-3
    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    t2_scale: bool = True
    frozen_dropout: bool = False
    learned_exit: bool = False

    _fastbert: ClassVar[Mapping[str, Any]] = {
        "epochs": 5,
        "learning_rate": 2e-4,
        "frozen_dropout": True,
        "keep_last": True,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require("temperature", self.temperature, self.temperature > 0, "a number above 0")
        require("direction", self.direction, self.direction in ("forward", "reverse"), "'forward' or 'reverse'")


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

    The model is trained in place and may leave early from then on (`config.exits_trained`). Neither `train` nor `dev`
    needs labels; with labels in `dev` the accuracy after each layer is reported. Arguments and errors as in `finetune`.

    Raises:
        ValueError: also for a model whose only head is the last one.
    """
    model, adapter = opened(model)
    if not model.early_heads:
        raise ValueError(
            f"model: it has heads after the layers {model.exit_layers} only, so there is none to distil into; "
            "load it with exit_layers=None for a head after every layer"
        )
    train, dev = rows_for(model, train, dev, require_labels=False)
    check_part(model, dev, options, tokenizer)
    parameters_to_train(model.early_heads, adapter, _KEEP_HEADS)
    if adapter is not None and (options.learned_exit or model.learned_exit is not None):
        raise ValueError(f"learned_exit: an adapter does not keep it; {_MERGE}")
    if options.learned_exit:
        model.add_learned_exit()
    learned = [] if model.learned_exit is None else [model.learned_exit]
    scale = LabelScale(*model.config.label_scale or ())
    training = PartTraining(
        name="distill",
        model=model,
        objective=_SelfDistillation(model, options, scale),
        adapter=adapter,
        trained=parameters_to_train([*model.early_heads, *learned], adapter, _KEEP_HEADS),
        scale=scale,
        scaled=model.early_heads,
        head_learning_rate=options.learning_rate,
        metrics=_ExitMetrics(model.exit_layers, FlopsShape.of(model.config), options.max_length),
        best_metric="loss",
        reads_labels=False,
        trains_exits=True,
    )
    return train_part(training, train, dev, Path(output_dir), options, tokenizer, callbacks)


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

    In training mode dropout acts in the early heads, and nowhere else unless `frozen_dropout`. Early heads of a
    regression answer in standardised units; the logits given here are in those of the labels.
    """

    def __init__(self, model: EarlyExitForSequenceClassification, options: DistillOptions, scale: LabelScale) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.scale = scale

    @property
    def core(self) -> EarlyExitForSequenceClassification:
        return self.model

    def train(self, mode: bool = True) -> _SelfDistillation:
        super().train(mode and self.options.frozen_dropout)
        self.training = mode
        for head in self.model.early_heads:
            head.train(mode)
        return self

    def forward(self, labels: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        # the frozen parameters ask for no gradient, so nothing below the early heads is recorded
        logits, log_odds = self.model.all_exits(**batch)
        early, last = logits[:, :-1], logits[:, -1]
        if logits.shape[-1] == 1:
            logits = torch.cat([self.scale.restored(early), last.unsqueeze(1)], dim=1)
            last = self.scale.standardised(last)
        options = self.options
        loss = self_distillation_loss(early, last, options.temperature, options.direction, options.t2_scale)
        if log_odds is not None:
            loss = loss + learned_exit_loss(log_odds[:, :-1], early, last)
        return {"loss": loss, "logits": logits}


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
