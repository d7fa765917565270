"""What `trainer_log.json` of a model folder says about the way there: figure 7 of FastBERT (ACL 2020) as numbers."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd.data.files import check_fields, read_json

LOG_FILE = "trainer_log.json"
RECORDED_SPEED = 0.5
"""At this speed `fastkd.training.self_distillation.distill` records what early exit would do after every evaluation."""

_LAYER = re.compile(r"eval_(?:accuracy|pearson)_layer_(\d+)")


@dataclass(frozen=True)
class TrainingPoint:
    """One evaluation on the dev rows."""

    stage: str
    """"finetune" or "distill"."""
    epoch: float
    """Counted through: distillation goes on where fine-tuning ended."""
    accuracy: float | None
    """Of the last head, which is the full model. Here and below, a regression has its correlation with the labels."""
    accuracy_at_speed: float | None
    """At `RECORDED_SPEED`; None in fine-tuning, where no row leaves early, and in logs that lack it."""
    flops_share: float | None
    """Of the full model's FLOPs, at `RECORDED_SPEED`; 1 in fine-tuning; None in logs that lack it."""
    accuracy_by_layer: dict[int, float] = field(default_factory=dict)
    is_regression: bool = False


def read_log(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The log in a file, or in a model folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no log of a training.
    """
    file = Path(path) / LOG_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"log: no file {file}; finetune and distill leave {LOG_FILE} in the model's folder")
    remedy = f"name the {LOG_FILE} of a model folder"
    log = read_json(file, "log", remedy)
    if log.get("stage") not in ("finetune", "distill") or "log_history" not in log:
        raise ValueError(f"log: {file} is not a log of finetune or distill; {remedy}")
    check_fields(log, {"log_history": list}, file, "log", remedy)
    for entry in log["log_history"]:
        is_right = isinstance(entry, dict) and all(isinstance(entry.get(name), _NUMBERS) for name in _numbers_of(entry))
        if not is_right:
            raise ValueError(f"log: {file} has an entry {reprlib.repr(entry)}, expected names and numbers; {remedy}")
    return log


_NUMBERS = (int, float)


def _numbers_of(entry: dict[str, Any]) -> list[str]:
    """What an entry must have as numbers: those that an evaluation writes."""
    return [name for name in entry if name.startswith("eval_")] + (["epoch"] if "eval_loss" in entry else [])


def training_curve(logs: Sequence[Mapping[str, Any]]) -> list[TrainingPoint]:
    """The evaluations of fine-tuning and then of distillation, whatever the order of `logs`.

    Raises:
        ValueError: two logs of one stage.
    """
    stages = [log["stage"] for log in logs]
    if len(set(stages)) < len(stages):
        raise ValueError(f"log: got {len(stages)} logs of {', '.join(stages)}, expected at most one of each stage")
    points: list[TrainingPoint] = []
    for log in sorted(logs, key=lambda log: log["stage"] == "distill"):
        start = points[-1].epoch if points else 0.0
        points += [
            _point(log["stage"], start, entry) for entry in log["log_history"] if "eval_loss" in entry
        ]  # fmt: skip
    return points


def _point(stage: str, start: float, entry: Mapping[str, float]) -> TrainingPoint:
    by_layer = {int(match[1]): value for name, value in entry.items() if (match := _LAYER.fullmatch(name))}
    is_finetuning = stage == "finetune"
    is_regression = any(name.startswith("eval_pearson") for name in entry)
    measure = "eval_pearson" if is_regression else "eval_accuracy"
    return TrainingPoint(
        stage=stage,
        epoch=start + entry["epoch"],
        accuracy=entry.get(measure, by_layer[max(by_layer)] if by_layer else None),
        accuracy_at_speed=entry.get(f"{measure}_speed_{RECORDED_SPEED:g}"),
        flops_share=1.0 if is_finetuning else entry.get(f"eval_flops_share_speed_{RECORDED_SPEED:g}"),
        accuracy_by_layer=by_layer,
        is_regression=is_regression,
    )
