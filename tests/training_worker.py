"""A small training run on generated sentences, for tests/test_training.py and for the processes that it starts.

As a script: `training_worker.py STAGE MODEL_FOLDER OUTPUT_DIR [--kill-at STEP] [--batch-size N] [--eval-steps N]
[--learning-rate LR] [--then-distill OUTPUT_DIR] [--then-resume OUTPUT_DIR] [--then-stop OUTPUT_DIR]`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch
from tiny_models import CONFIGS, tokenizer_of
from transformers import BertConfig, BertModel, TrainerCallback

import fastkd
from fastkd.data.rows import Rows
from fastkd.training.finetune import FinetuneOptions, finetune
from fastkd.training.harness import TrainResult
from fastkd.training.self_distillation import DistillOptions, distill

WORKER = Path(__file__)
LABEL_NAMES = ("negative", "positive")
_FILLER = ("the", "a", "film", "plot", "actor", "was", "is", "and", "who", "what", "cold", "warm")
_TELLING = (("bad", "dull", "boring"), ("good", "great", "fun"))


def environment() -> dict[str, str]:
    """Of a process that finds what this one found."""
    paths = [str(WORKER.parent), *(path for path in sys.path if path)]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **settings}


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A script or module in two processes on the CPU."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment())


def rows(count: int, seed: int = 0, *, labelled: bool = True) -> Rows:
    """Sentences of 4 to 12 words, half of which give the label away."""
    source = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = source.randrange(2)
        words = source.choices(_FILLER + 4 * _TELLING[label], k=source.randint(4, 12))
        texts.append(" ".join(words))
        labels.append(label)
    columns: dict[str, Any] = {"text_a": texts} | ({"label": labels} if labelled else {})
    names, num_labels = (LABEL_NAMES, 2) if labelled else (None, None)
    return Rows(datasets.Dataset.from_dict(columns), names, num_labels, f"generated sentences {seed}")


def save_plain(folder: Path) -> Path:
    """A plain BERT checkpoint whose random weights are small enough to learn from in a few steps."""
    torch.manual_seed(2)
    BertModel(BertConfig(**{**CONFIGS["bert"].to_dict(), "initializer_range": 0.05})).save_pretrained(folder)
    return folder


def load(folder: Path, **kwargs: Any) -> fastkd.EarlyExitForSequenceClassification:
    torch.manual_seed(3)
    return fastkd.EarlyExitForSequenceClassification.from_pretrained(folder, **kwargs)


class KillAt(TrainerCallback):
    """Kills this very process after a step, as a scheduler or the kernel would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Stopped(Exception):
    """What `StopAt` raises."""


class StopAt(TrainerCallback):
    """Ends a run after a step by an error; its checkpoints stay."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stopped


def options_of(stage: str, **changes: Any) -> Any:
    shared = {"epochs": 3, "batch_size": 8, "bf16": False, "progress": False, "logging_steps": 1, "max_length": 16}
    if stage == "finetune":
        return FinetuneOptions(**{**shared, "learning_rate": 1e-3, **changes})
    return DistillOptions(**{**shared, "learning_rate": 2e-3, **changes})


def train(
    stage: str,
    model: fastkd.EarlyExitForSequenceClassification,
    output_dir: Path,
    kill_at: int = 0,
    stop_at: int = 0,
    **changes: Any,
) -> TrainResult:
    run = finetune if stage == "finetune" else distill
    callbacks: list[TrainerCallback] = [KillAt(kill_at)] if kill_at else [StopAt(stop_at)] if stop_at else []
    return run(
        model, rows(80), rows(40, seed=1), output_dir, options_of(stage, **changes), tokenizer_of("bert"), callbacks
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("model", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eval-steps", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--then-distill", type=Path)
    parser.add_argument("--then-resume", type=Path)
    parser.add_argument("--then-stop", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    changes = {"batch_size": arguments.batch_size, "eval_steps": arguments.eval_steps, "fsdp": arguments.fsdp}
    if arguments.learning_rate:
        changes["learning_rate"] = arguments.learning_rate
    train(arguments.stage, load(arguments.model), arguments.output_dir, arguments.kill_at, **changes)
    if arguments.then_distill:
        train("distill", load(arguments.output_dir), arguments.then_distill, **changes)
    if arguments.then_resume:
        train(arguments.stage, load(arguments.model), arguments.then_resume, resume=True, **changes)
    if arguments.then_stop:
        with suppress(Stopped):
            train(arguments.stage, load(arguments.model), arguments.then_stop, stop_at=18, **changes)
