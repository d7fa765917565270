"""Tuning: how long to self-distil, a temperature for each head and a speed, found on dev rows in stated minutes.

Every training is one of `fastkd.distill` from the same weights, each about three times as long as the one before. The
best so far is a whole model folder at every moment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastkd.data.files import atomic_folder, changed_settings, check_output_folder, read_json, write_json
from fastkd.data.own_files import remove_own
from fastkd.data.rows import Rows, RowSource
from fastkd.data.work_folders import claim_folder, forget_folders
from fastkd.exits.calibration import SPEEDS
from fastkd.exits.sweep import SweepRow
from fastkd.exits.trace import ExitTrace
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.training.checks import check_trainable, require, rows_for
from fastkd.training.harness import TrainResult
from fastkd.training.head_temperatures import HEAD_TEMPERATURES, divide_logits
from fastkd.training.log import LOG_FILE
from fastkd.training.model_parts import speed_table_of
from fastkd.training.progress import Progress, Silent, training_progress
from fastkd.training.self_distillation import DistillOptions, distill

TUNING_FILE = "tuning.json"
"""In the folder of the model: what was tried."""
_TRIALS, _SETTINGS = "trials.json", "settings.json"
_GROWTH = 3
_EVALUATIONS = 5
_WITHOUT_GAIN = 2
"""So many longer trainings in a row that gain nothing end the search."""
_LEAST_LONGER = 1.5
"""What is left of the budget goes to a last training, if it is so many times longer than those before."""


@dataclass(frozen=True)
class TuneOptions:
    """What `tune` looks for, and how long.

    Attributes:
        minutes: budget of all trainings and their evaluation; a training that would pass it is stopped and evaluated.
        max_drop: the share of dev rows that may get another answer than from the full model, which is what a
            certificate counts; the fastest speed that keeps it wins. For a regression: of the correlation.
        speedup: instead, the speed with the best accuracy (correlation; without labels the full model's answers) among
            those with so many times fewer operations.
        first_steps: length of the first training.
        most_epochs: no training is longer.
        training: everything else of each training; its length and evaluations are set here.
        resume: go on with a tuning that was interrupted.
        overwrite: replace the model of an earlier run.
    """

    minutes: float = 10.0
    max_drop: float = 0.01
    speedup: float | None = None
    first_steps: int = 100
    most_epochs: float = 100.0
    training: DistillOptions = field(default_factory=DistillOptions)
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("minutes", "first_steps", "most_epochs"):
            require(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        require("max_drop", self.max_drop, 0 <= self.max_drop < 1, "a share from 0 to below 1")
        require("speedup", self.speedup, self.speedup is None or self.speedup > 1, "a number above 1, or None")


@dataclass(frozen=True)
class Choice:
    """A speed of a trained model, and what it does on the dev rows."""

    temperatures: list[float] | None
    """Of the heads below the last; None leaves them as they were trained."""
    speed: float
    speedup: float
    """Operations of the full model divided by those at this speed (`fastkd.flops`, convention fastbert)."""
    changed: float
    """Share of dev rows with another answer than from the full model; for a regression, the loss of correlation."""
    quality: float | None
    """Accuracy, or for regression Pearson's correlation; None without labels."""
    average_layers: float


@dataclass(frozen=True)
class Trial:
    """One training, and the best speed without temperatures, and with those of each kind."""

    steps: int
    epochs: float
    is_cut: bool
    """Whether the budget ended it before its last step."""
    seconds: float
    """With its evaluation."""
    full_quality: float | None
    choices: list[Choice]
    kept: int | None = None
    """Which choice was better than all before, if any."""


@dataclass(frozen=True)
class TuneResult:
    """What a tuning found.

    Attributes:
        output_dir: the model folder; its `tuning.json` holds this.
        trials: in their order.
        reason: why no further training was begun.
    """

    output_dir: Path
    trials: list[Trial]
    reason: str

    @property
    def best(self) -> tuple[Trial, Choice]:
        """The kept training, and its speed."""
        trial = [trial for trial in self.trials if trial.kept is not None][-1]
        assert trial.kept is not None
        return trial, trial.choices[trial.kept]

    def to_dict(self) -> dict[str, Any]:
        return {"reason": self.reason, "trials": [asdict(trial) for trial in self.trials]}


def tune(
    model: EarlyExitForSequenceClassification,
    train: RowSource,
    dev: RowSource,
    output_dir: str | os.PathLike[str],
    options: TuneOptions,
    tokenizer: PreTrainedTokenizerBase,
    shown: Progress | None = None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> TuneResult:
    """Try trainings of the early heads of growing length; leave the best model by `dev`, with its speed as default.

    The model is trained in place and ends as the last training left it; load the best from `output_dir`. The dev rows
    choose weights, temperatures and speed, so they look a little better than the truth: calibrate on others. In
    `<output_dir>.tuning` lies what `resume` needs; it is removed at the end.

    Args:
        model: a fine-tuned one; its early heads may be new.
        train: needs no labels.
        dev: with labels for a regression.
        output_dir: the folder of the best model.
        options: see there.
        tokenizer: of the model.
        shown: where progress is told.
        on_trial: called after each training.

    Raises:
        FileExistsError: `output_dir` or an interrupted tuning would be lost.
        ValueError: an option outside its range, a tuning that is resumed with other rows or options, or as
            `fastkd.distill`.
        TypeError: a model in an adapter.
    """
    check_trainable(model)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("model: tuning runs in one process, which watches its own clock; start it without torchrun")
    rows, dev_rows = rows_for(model, train, dev, require_labels=False)
    assert dev_rows is not None
    if model.config.num_classes == 1:
        if not dev_rows.is_labelled:
            raise ValueError("dev: a regression is tuned by its correlation with the labels, and these rows have none")
        if len(set(dev_rows.dataset["label"][:])) < 2:
            raise ValueError(
                "dev: a regression is tuned by its correlation with the labels, and these are all the same; take rows "
                "whose labels differ"
            )
    search = _Search(model, rows, dev_rows, Path(output_dir), options, tokenizer, shown or Silent(), on_trial)
    return search.run()


def choose(trace: ExitTrace, criterion: str, top_n: int | None, options: TuneOptions) -> Choice:
    """The best speed of a trace, by what `options` look for; speed 0 where no other keeps `max_drop`."""
    sweep = trace.sweep([0.0, *SPEEDS], criterion, top_n)
    full = trace.answers(0.0, criterion, top_n).prediction
    found = []
    for row in sweep:
        answers = trace.answers(row.speed, criterion, top_n).prediction
        changed = (answers != full).double().mean().item()
        if trace.is_regression:
            changed = (sweep[0].quality or 0.0) - (row.quality or 0.0)
        found.append((row, changed))
    row, changed = _best_at(found, options.speedup) if options.speedup else _fastest(found, options.max_drop)
    return Choice(None, row.speed, row.speedup["fastbert"], changed, row.quality, row.average_layers)


def _fastest(found: list[tuple[SweepRow, float]], max_drop: float) -> tuple[SweepRow, float]:
    """Among the speeds up to the first that loses more, as a calibration tries them."""
    kept = []
    for row, changed in found:
        if changed > max_drop:
            break
        kept.append((row, changed))
    return max(kept, key=lambda pair: (pair[0].speedup["fastbert"], -pair[1]))


def _best_at(found: list[tuple[SweepRow, float]], speedup: float) -> tuple[SweepRow, float]:
    fast = [pair for pair in found if pair[0].speedup["fastbert"] >= speedup]
    if not fast:
        return max(found, key=lambda pair: pair[0].speedup["fastbert"])
    return max(fast, key=lambda pair: (_worth(pair[0].quality, pair[1]), pair[0].speedup["fastbert"]))


def _worth(quality: float | None, changed: float) -> float:
    return -changed if quality is None else quality


def _score(choice: Choice, options: TuneOptions) -> tuple[float, float]:
    """What makes one choice better than another; the second number decides between equals."""
    if options.speedup is None:
        return choice.speedup, -choice.changed
    # a model that cannot be that fast is worse than any that can
    return min(choice.speedup / options.speedup, 1.0), _worth(choice.quality, choice.changed)


@dataclass
class _Search:
    model: EarlyExitForSequenceClassification
    train: Rows
    dev: Rows
    output_dir: Path
    options: TuneOptions
    tokenizer: PreTrainedTokenizerBase
    shown: Progress
    on_trial: Callable[[Trial], None]

    def __post_init__(self) -> None:
        self.work = self.output_dir.with_name(f"{self.output_dir.name}.tuning")
        self.trials: list[Trial] = []

    def run(self) -> TuneResult:
        self._begin()
        start = self._exits()
        reason = None
        while reason is None:
            planned, reason = self._next_steps()
            if planned is not None:
                self._reset(start)
                self._try(planned)
        result = TuneResult(self.output_dir, self.trials, reason)
        write_json(self.output_dir / TUNING_FILE, self._record() | {"reason": reason})
        remove_own(self.work)
        return result

    def _exits(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the weights that a training changes."""
        parts: dict[str, nn.Module | None] = {"heads": self.model.heads, "learned_exit": self.model.learned_exit}
        if self.options.training.train_backbone:
            parts["backbone"] = self.model.backbone
        return {
            part: {name: value.clone() for name, value in module.state_dict().items()}
            for part, module in parts.items()
            if module is not None
        }

    def _reset(self, start: Mapping[str, Mapping[str, Tensor]]) -> None:
        for part in {"heads", "backbone"} & start.keys():
            getattr(self.model, part).load_state_dict(start[part])
        if self.model.learned_exit is not None and "learned_exit" in start:
            self.model.learned_exit.load_state_dict(start["learned_exit"])
        elif self.model.learned_exit is not None:
            self.model.learned_exit.start()

    @property
    def steps_of_epoch(self) -> float:
        return len(self.train) / self.options.training.batch_size

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.options.minutes - sum(trial.seconds for trial in self.trials)

    def _begin(self) -> None:
        """Take up an interrupted tuning, or make sure that there is none; before any work."""
        settings = self._settings()
        started = (self.work / _SETTINGS).is_file()
        if started and self.options.resume:
            check_output_folder(self.output_dir, overwrite=True)
            self._take_up(settings)
            return
        check_output_folder(self.output_dir, overwrite=self.options.overwrite)
        claim_folder(self.work, "tune")
        if started and not self.options.overwrite:
            raise FileExistsError(
                f"output_dir: {self.work} holds an unfinished tuning; continue it with resume=True, or discard it with "
                "overwrite=True"
            )
        forget_folders([path for path in self.work.iterdir() if path.is_dir()])
        (self.work / _TRIALS).unlink(missing_ok=True)
        write_json(self.work / _SETTINGS, settings)

    def _take_up(self, settings: dict[str, Any]) -> None:
        different = changed_settings(self.work / _SETTINGS, settings)
        if different:
            raise ValueError(
                f"resume: the tuning in {self.work} was started with another {', '.join(different)}; resume it as it "
                "was started, or start over with overwrite=True and resume=False"
            )
        if (self.work / _TRIALS).is_file():
            found = read_json(self.work / _TRIALS, "resume", "discard the tuning with overwrite=True")
            self.trials = [
                Trial(**{**trial, "choices": [Choice(**choice) for choice in trial["choices"]]})
                for trial in found["trials"]
            ]

    def _settings(self) -> dict[str, Any]:
        chosen = asdict(self.options)
        # more minutes are a reason to go on
        for free in ("minutes", "resume", "overwrite"):
            del chosen[free]
        rows = {"train": self.train.digest(), "dev": self.dev.digest()}
        return json.loads(json.dumps(chosen | rows, default=str))

    def _next_steps(self) -> tuple[int | None, str | None]:
        """The length of the next training, or why there is none."""
        options, most = self.options, max(1, int(self.options.most_epochs * self.steps_of_epoch))
        if not self.trials:
            return _evaluated_last(min(options.first_steps, most)), None
        longest = max(trial.steps for trial in self.trials)
        if any(trial.is_cut for trial in self.trials) or self.left <= 0:
            return None, "the budget is used up"
        if longest >= most:
            return None, f"a longer training would pass {options.most_epochs:g} epochs"
        gains = [trial.kept is not None for trial in self.trials]
        if len(gains) > _WITHOUT_GAIN and not any(gains[-_WITHOUT_GAIN:]):
            return None, "longer trainings gained nothing"
        affordable = self._affordable_steps()
        if affordable < _LEAST_LONGER * longest:
            return None, "a longer training would pass the budget"
        return _evaluated_last(min(_GROWTH * longest, affordable, most)), None

    def _affordable_steps(self) -> int:
        """How long a training may be that ends within the budget, by what those before took."""
        last = self.trials[-1]
        per_step, fixed = last.seconds / last.steps, 0.0
        if len(self.trials) > 1:
            before = self.trials[-2]
            slope = (last.seconds - before.seconds) / (last.steps - before.steps)
            if slope > 0:
                per_step, fixed = slope, max(0.0, last.seconds - slope * last.steps)
        return int((0.9 * self.left - fixed) / per_step)

    def _try(self, planned: int) -> None:
        began = monotonic()
        number, folder = len(self.trials) + 1, self.work / f"{planned}-steps"
        self.shown.say(f"training {number}: {planned} steps, {planned / self.steps_of_epoch:.3g} epochs")
        with training_progress(self.shown, f"training {number}") as bar:
            done = self._trained(planned, folder, [bar, _Deadline(began + self.left)])
        trial, traces = self._judged(done, planned, began)
        if trial.kept is not None:
            self._keep(trial.choices[trial.kept], traces[trial.kept], folder)
        trial = replace(trial, seconds=round(monotonic() - began, 2))
        self.trials.append(trial)
        write_json(self.work / _TRIALS, self._record())
        if trial.kept is not None:
            write_json(self.output_dir / TUNING_FILE, self._record() | {"reason": "unfinished"})
        remove_own(folder)
        self.on_trial(trial)

    def _trained(self, steps: int, folder: Path, callbacks: list[TrainerCallback]) -> TrainResult:
        options = replace(
            self.options.training,
            max_steps=steps,
            eval_steps=max(1, -(-steps // _EVALUATIONS)),
            # it judges the model without and with them
            head_temperatures="none",
            # a training that was interrupted goes on from its checkpoints, one that was not judged is made again
            resume=True,
            overwrite=True,
            progress=False,
        )
        return distill(self.model, self.train, self.dev, folder, options, self.tokenizer, callbacks)

    def _judged(self, done: TrainResult, planned: int, began: float) -> tuple[Trial, list[ExitTrace]]:
        """What the training came to on the dev rows, and the trace behind each of its choices."""
        config, training = self.model.config, self.options.training
        trace = self.model.trace(
            self.dev, tokenizer=self.tokenizer, max_length=training.max_length, batch_size=training.eval_batch_size
        )
        traces = [trace]
        choices = [choose(trace, config.criterion, config.top_n, self.options)]
        if not trace.is_regression and config.criterion not in ("patience", "learned"):
            for fitted in filter(None, HEAD_TEMPERATURES.values()):
                temperatures = [round(value, 4) for value in fitted(trace.logits[:, :-1], trace.logits[:, -1])]
                divided = replace(trace, logits=trace.logits / torch.tensor([*temperatures, 1.0])[:, None])
                traces.append(divided)
                found = choose(divided, config.criterion, config.top_n, self.options)
                choices.append(replace(found, temperatures=temperatures))
        best = max(range(len(choices)), key=lambda index: _score(choices[index], self.options))
        before = [trial.choices[trial.kept] for trial in self.trials if trial.kept is not None]
        is_better = not before or _score(choices[best], self.options) > _score(before[-1], self.options)
        trial = Trial(
            steps=done.steps,
            epochs=round(done.steps / self.steps_of_epoch, 3),
            is_cut=done.steps < planned and training.early_stopping_patience is None,
            seconds=monotonic() - began,
            full_quality=trace.sweep([0.0])[0].quality,
            choices=choices,
            kept=best if is_better else None,
        )
        return trial, traces

    def _keep(self, choice: Choice, trace: ExitTrace, folder: Path) -> None:
        """Save the model as it is now, with this speed and these temperatures, over the best so far."""
        if choice.temperatures is not None:
            divide_logits(self.model.early_heads, choice.temperatures)
            self.model.confirm_weights()
        config = self.model.config
        config.speed = choice.speed
        config.speed_table = speed_table_of(trace)
        with atomic_folder(self.output_dir) as fresh:
            self.model.save_pretrained(fresh)
            self.tokenizer.save_pretrained(fresh)
            shutil.copy(folder / LOG_FILE, fresh / LOG_FILE)
        config.speed = 0.0

    def _record(self) -> dict[str, Any]:
        return {"options": self._settings(), "trials": [asdict(trial) for trial in self.trials]}


def _evaluated_last(steps: int) -> int:
    """At most so many steps, the last of which is evaluated."""
    return steps - steps % _EVALUATIONS if steps > _EVALUATIONS else steps


class _Deadline(TrainerCallback):
    """Ends a training at a time of `time.monotonic`, with an evaluation of where it is then."""

    def __init__(self, at: float) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if monotonic() >= self.at:
            control.should_evaluate = control.should_save = control.should_training_stop = True
