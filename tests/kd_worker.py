"""A small distillation on generated sentences, for the tests of KD training and for the processes that they start.

As a script: `kd_worker.py TEACHER OUTPUT_DIR METHOD [--kill-at STEP] [--batch-size N] [--max-steps N] [--still]`.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import CONFIGS, tokenizer_of
from training_worker import LABEL_NAMES, KillAt, rows
from transformers import BertConfig, BertForSequenceClassification

from fastkd.data.rows import Rows
from fastkd.kd.options import KDOptions
from fastkd.kd.teacher import PseudoClassifierOptions
from fastkd.kd.trainer import KDTrainer
from fastkd.training.harness import TrainResult

OPTIONS = KDOptions(
    epochs=3,
    batch_size=8,
    learning_rate=1e-3,
    max_length=16,
    bf16=False,
    progress=False,
    logging_steps=1,
    pseudo_classifiers=PseudoClassifierOptions(epochs=3),
)


def regression_rows(count: int, seed: int = 0) -> Rows:
    """The generated sentences with scores from 0.5 to 4.5."""
    given = rows(count, seed)
    scores = [4.0 * label + 0.5 for label in given.dataset["label"]]
    dataset = given.dataset.remove_columns("label").add_column("label", scores)
    return replace(given, dataset=dataset, label_names=None, num_labels=1)


def save_teacher(folder: Path, num_labels: int = 2, dropout: float = 0.1) -> Path:
    """A BERT of four layers that gives different answers after every layer."""
    torch.manual_seed(2)
    labels = {"id2label": dict(enumerate(LABEL_NAMES))} if num_labels == 2 else {"num_labels": num_labels}
    changes = {"initializer_range": 0.1, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(**{**CONFIGS["bert"].to_dict(), **changes, **labels})
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(10)
    model.save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return folder


def train(
    teacher: Any,
    method: str,
    output_dir: Path,
    kill_at: int = 0,
    student: Any = "layers:2",
    cache: Any = True,
    on_teacher: Any = None,
    **changes: Any,
) -> TrainResult:
    callbacks = [KillAt(kill_at)] if kill_at else []
    trainer = KDTrainer(teacher, student, method, replace(OPTIONS, **changes), cache=cache)
    return trainer.train(rows(80), rows(40, seed=1), output_dir, callbacks, on_teacher)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("method")
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-steps", type=int)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--asked", type=Path, help="folder for a file of each process that asks the teacher")
    arguments = parser.parse_args()

    def note(done: int, total: int) -> None:
        if arguments.asked is not None:
            arguments.asked.mkdir(exist_ok=True)
            (arguments.asked / os.environ["RANK"]).touch()

    torch.set_num_threads(1)
    train(
        arguments.teacher,
        arguments.method,
        arguments.output_dir,
        arguments.kill_at,
        on_teacher=note,
        batch_size=arguments.batch_size,
        eval_steps=arguments.eval_steps,
        learning_rate=arguments.learning_rate,
    )
