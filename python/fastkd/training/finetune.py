"""Fine-tuning: backbone and last head learn the labels; the other heads wait, frozen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback

from fastkd.data.rows import RowSource
from fastkd.encoders.label_scale import LabelScale
from fastkd.losses import label_loss
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.training.checks import opened, parameters_to_train, rows_for
from fastkd.training.harness import HeadTrainOptions, Objective, TrainResult, take_labels
from fastkd.training.metrics import head_scores
from fastkd.training.model_parts import PartTraining, check_part, train_part


@dataclass(frozen=True)
class FinetuneOptions(HeadTrainOptions):
    """Options of `finetune`.

    Attributes:
        head_learning_rate_factor: the new head learns so many times faster than the pretrained backbone.
        redraw_heads: draw the weights of all heads anew, from torch's own initialisation of linear layers as FastBERT's
            code does, instead of the backbone's.
    """

    redraw_heads: bool = False

    _fastbert: ClassVar[Mapping[str, Any]] = {
        "epochs": 3,
        "learning_rate": 2e-5,
        "head_learning_rate_factor": 1.0,
        "redraw_heads": True,
    }


def finetune(
    model: EarlyExitForSequenceClassification | Any,
    train: RowSource,
    dev: RowSource | None,
    output_dir: str | os.PathLike[str],
    options: FinetuneOptions,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train the backbone and the last head on labels; keep the weights of the best evaluation where `dev` is given.

    The model is trained in place, and takes the rows' label names. Its other heads are left as they are, and marked as
    untrained (`config.exits_trained`); a default speed above 0 goes, because they cannot answer.

    Args:
        model: with float32 weights; its number of labels must be that of the rows. Or a `PeftModel` around one: what
            peft trains of the backbone and the last head is trained, and `output_dir` holds the adapter, which
            `from_pretrained` loads upon its base.
        train, dev: labelled rows; what `fastkd.load_rows` takes, which also chooses among columns.
        output_dir: made at the end, under a temporary name first.
        options: see there.
        tokenizer: the model's; saved with it.
        callbacks: added to those of `transformers.Trainer`.

    Raises:
        DataError: rows without labels, or with labels that are not the model's.
        FileExistsError: `output_dir`, or the checkpoints of an unfinished run, would be lost.
        TypeError: a model of peft around something else.
        ValueError: a resumed run was started with other rows or options; a tokenizer that is not the model's or pads on
            the left; an adapter that cannot be trained or loaded again so.
    """
    model, adapter = opened(model)
    train, dev = rows_for(model, train, dev, require_labels=True)
    check_part(model, dev, options, tokenizer)
    trained = parameters_to_train([model.backbone, model.last_head], adapter, "let it target layers of the encoder")
    config = model.config
    take_labels(model, train)
    config.last_head_was_trained()
    if options.redraw_heads:
        _redraw(model.heads, options.seed)
    scale = LabelScale()
    if config.num_labels == 1:
        scale = LabelScale.of(train)
        if config.label_scale is None or options.redraw_heads:
            for head in model.heads.values():
                scale.put_into(head)
        config.label_scale = [scale.mean, scale.std]
    training = PartTraining(
        name="finetune",
        model=model,
        objective=_LastHead(model, scale),
        adapter=adapter,
        trained=trained,
        scale=scale,
        scaled=[model.last_head],
        learning_rates={"model.heads.": options.learning_rate * options.head_learning_rate_factor},
        metrics=_last_head_scores,
        best_metric="pearson" if config.num_labels == 1 else "accuracy",
        reads_labels=True,
        trains_exits=False,
    )
    return train_part(training, train, dev, Path(output_dir), options, tokenizer, callbacks)


class _LastHead(Objective):
    """Cross-entropy (squared error of standardised labels for regression) of the last head.

    The head answers in standardised units, the logits given here are in those of the labels.
    """

    def __init__(self, model: EarlyExitForSequenceClassification, scale: LabelScale) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    @property
    def core(self) -> EarlyExitForSequenceClassification:
        return self.model

    def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        logits = self.model(**batch, speed=0.0).logits
        if logits.shape[-1] > 1:
            return {"loss": label_loss(logits, labels), "logits": logits}
        return {"loss": label_loss(logits, self.scale.standardised(labels)), "logits": self.scale.restored(logits)}


def _last_head_scores(prediction: EvalPrediction) -> dict[str, float]:
    return head_scores(numpy.asarray(prediction.predictions), numpy.asarray(prediction.label_ids))


def _redraw(heads: nn.Module, seed: int) -> None:
    """Give all linear layers the weights that torch draws by itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in heads.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
