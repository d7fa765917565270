"""Tuning: what it tries and keeps, the budget, and what an interrupt leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from kd_worker import regression_rows
from tiny_models import early_exit_model, one_thread, tokenizer_of  # noqa: F401  # a fixture
from training_worker import load, options_of, rows, save_plain, train

import fastkd
from fastkd.exits.flops import FlopsShape
from fastkd.training import tuning
from fastkd.training.log import LOG_FILE
from fastkd.training.tuning import TUNING_FILE, Choice, Trial, TuneOptions, choose, tune

TRAIN, DEV = rows(80), rows(60, seed=1)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    return train("finetune", load(save_plain(folder / "plain"), num_labels=2), folder / "finetuned").output_dir


def options(**changes: Any) -> TuneOptions:
    given = {"minutes": 60, "first_steps": 10, "most_epochs": 8, "max_drop": 0.05, "training": options_of("distill")}
    return TuneOptions(**{**given, **changes})


def tuned(folder: Path, output: Path, changed: TuneOptions | None = None, **more: Any) -> tuning.TuneResult:
    return tune(load(folder), TRAIN, DEV, output, changed or options(), tokenizer_of("bert"), **more)


class Clock:
    """Time that passes by the call."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


# The choice of a speed


def sure_trace(rows_: int = 200) -> fastkd.ExitTrace:
    """Heads whose rows leave in the order of their numbers; the first head errs on the last ten of them."""
    full = torch.tensor([6.0, 0.0]).expand(rows_, 2)
    sureness = torch.linspace(6, 0.1, rows_)
    first = torch.stack([sureness, torch.zeros(rows_)], dim=1)
    first[-10:] = first[-10:].flip(1)
    shape = FlopsShape.of(early_exit_model(num_labels=2).config)
    lengths = torch.full((rows_,), 9, dtype=torch.int32)
    return fastkd.ExitTrace(torch.stack([first, full, full, full], dim=1), None, lengths, [1, 2, 3, 4], 12, shape)


def test_the_fastest_speed_that_changes_few_answers_wins() -> None:
    trace = sure_trace()
    strict, loose = (choose(trace, "entropy", None, options(max_drop=drop)) for drop in (0.02, 0.06))
    assert strict.changed <= 0.02 < loose.changed <= 0.06
    assert 1 < strict.speedup < loose.speedup
    assert strict == max(
        (choose(trace, "entropy", None, options(max_drop=drop / 1000)) for drop in range(21)),
        key=lambda choice: choice.speedup,
    )
    none = choose(replace(trace, logits=trace.logits.flip(1)), "entropy", None, options(max_drop=0.0))
    assert none.changed == 0


def test_or_the_best_answers_at_a_wanted_speed_up() -> None:
    trace = sure_trace()
    wanted = choose(trace, "entropy", None, options(speedup=2.0))
    assert wanted.speedup >= 2
    slower = choose(trace, "entropy", None, options(speedup=1.2))
    assert slower.changed <= wanted.changed
    unreachable = choose(trace, "entropy", None, options(speedup=1e3))
    assert unreachable.speedup == max(
        row.speedup["fastbert"] for row in trace.sweep([step / 200 for step in range(201)])
    )


def test_wrong_options_are_refused(finetuned: Path, tmp_path: Path) -> None:
    for wrong in ({"minutes": 0}, {"max_drop": 1.0}, {"speedup": 1.0}, {"first_steps": 0}, {"most_epochs": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
            options(**wrong)
    regression = early_exit_model(num_labels=1)
    unlabelled = rows(20, labelled=False)
    with pytest.raises(ValueError, match="dev: a regression is tuned by its correlation"):
        tune(regression, unlabelled, unlabelled, tmp_path / "out", options(), tokenizer_of("bert"))
    scores = regression_rows(20)
    alike = replace(scores, dataset=scores.dataset.remove_columns("label").add_column("label", [2.5] * 20))
    with pytest.raises(ValueError, match="these are all the same; take rows whose labels differ"):
        tune(regression, scores, alike, tmp_path / "out", options(), tokenizer_of("bert"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="output_dir"):
        tuned(finetuned, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# The search


@pytest.mark.slow
def test_the_best_by_dev_is_left_with_speed_and_temperatures(finetuned: Path, tmp_path: Path) -> None:
    told: list[Trial] = []
    done = tuned(finetuned, tmp_path / "out", on_trial=told.append)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [trial.steps for trial in done.trials] == [10, 30, 80], "three times as long each, up to 8 epochs"
    assert done.reason == "a longer training would pass 8 epochs"
    assert told == done.trials
    trial, best = done.best
    assert best.changed <= 0.05
    assert best.speedup == max(choice.speedup for trial in done.trials for choice in trial.choices)

    model = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.speed == best.speed > 0
    assert model.config.certificate is None
    assert model.config.exits_trained
    assert model.config.speed_table is not None
    assert model.changed_weights() is None
    trace = model.trace(DEV, tokenizer=tokenizer_of("bert"), max_length=16, batch_size=64)
    row = trace.sweep([best.speed])[0]
    # folded temperatures round otherwise than divided logits, so a row on the edge may go on
    assert row.speedup["fastbert"] == pytest.approx(best.speedup, rel=0.02)
    assert row.accuracy == pytest.approx(best.quality, abs=0.02)
    with pytest.raises(ValueError, match="were in the training"):
        fastkd.calibrate(trace, 0.2, 0.8)

    kept = json.loads((tmp_path / "out" / TUNING_FILE).read_text())
    assert kept["trials"] == json.loads(json.dumps(done.to_dict()["trials"]))
    assert kept["reason"] == done.reason
    assert json.loads((tmp_path / "out" / LOG_FILE).read_text())["steps"] == trial.steps


@pytest.mark.slow
@pytest.mark.parametrize("train_backbone", [False, True])
def test_every_training_starts_from_the_same_weights(finetuned: Path, tmp_path: Path, train_backbone: bool) -> None:
    training = options_of("distill", train_backbone=train_backbone, backbone_learning_rate=1e-3)
    done = tuned(finetuned, tmp_path / "out", options(most_epochs=3, training=training))
    alone = tuned(finetuned, tmp_path / "alone", options(first_steps=30, most_epochs=3, training=training))
    assert [trial.steps for trial in done.trials] == [10, 30]
    assert done.trials[1].choices == alone.trials[0].choices


def test_the_budget_ends_a_training_that_would_pass_it(finetuned: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tuning, "monotonic", Clock(1.0))
    done = tuned(finetuned, tmp_path / "out", options(first_steps=50, minutes=0.25))
    (trial,) = done.trials
    assert trial.is_cut
    assert trial.steps < 20
    assert done.reason == "the budget is used up"
    assert fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path / "out").config.exits_trained


def planned(trials: list[Trial], **changes: Any) -> tuple[int | None, str | None]:
    search = tuning._Search(
        early_exit_model(), TRAIN, DEV, Path("out"), options(most_epochs=1e6, **changes), tokenizer_of("bert"),
        tuning.Silent(), lambda trial: None,
    )  # fmt: skip
    search.trials = trials
    return search._next_steps()


def trial(steps: int, seconds: float, kept: int | None = 0) -> Trial:
    return Trial(steps, 1.0, False, seconds, 0.9, [Choice(None, 0.5, 2.0, 0.0, 0.9, 2.0)], kept)


def test_a_training_that_would_pass_the_budget_is_not_begun() -> None:
    assert planned([]) == (10, None)
    assert planned([trial(100, 60)], minutes=60) == (300, None)
    # 9 minutes are left, and nine tenths of them are 810 steps at the rate of before
    assert planned([trial(100, 60), trial(300, 180)], minutes=13) == (810, None)
    assert planned([trial(100, 60), trial(300, 180)], minutes=8)[1] == "a longer training would pass the budget"
    assert planned([trial(100, 60)], minutes=1)[1] == "the budget is used up"
    # 40 seconds whatever the length, and one second for five steps
    assert planned([trial(100, 60), trial(300, 100)], minutes=8) == (900, None)


def test_the_search_ends_where_longer_trainings_gain_nothing() -> None:
    assert planned([trial(10, 1), trial(30, 3, None)]) == (90, None)
    assert planned([trial(10, 1), trial(30, 3, None), trial(90, 9, None)])[1] == "longer trainings gained nothing"
    assert planned([trial(10, 1), trial(30, 3, None), trial(90, 9)]) == (270, None)


# Interrupts


class Interrupting:
    """Silent until a training of some number begins."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.inner = tuning.Silent()
        self.progress = self.inner.progress

    def say(self, text: str) -> None:
        if text.startswith(f"training {self.number}:"):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupt_loses_nothing_that_was_tried(
    finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned(finetuned, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tuned(finetuned, tmp_path / "out", shown=Interrupting(3))
    kept = [tried.choices[tried.kept] for tried in whole.trials[:2] if tried.kept is not None][-1]
    best = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path / "out")
    assert best.config.speed == kept.speed
    assert best.config.speed_table is not None
    with pytest.raises(FileExistsError, match="output_dir"):
        tuned(finetuned, tmp_path / "out")
    with pytest.raises(ValueError, match="started with another max_drop"):
        tuned(finetuned, tmp_path / "out", options(resume=True, max_drop=0.5))

    trained: list[int] = []
    distill: Callable[..., Any] = tuning.distill

    def counted(*arguments: Any) -> Any:
        trained.append(arguments[4].max_steps)
        return distill(*arguments)

    monkeypatch.setattr(tuning, "distill", counted)
    resumed = tuned(finetuned, tmp_path / "out", options(resume=True, minutes=70))
    assert trained == [80], "what was tried is not tried again"
    assert [one.choices for one in resumed.trials] == [one.choices for one in whole.trials]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert first.read_bytes() == second.read_bytes()


def test_an_unfinished_tuning_can_be_discarded(finetuned: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(finetuned, tmp_path / "out", shown=Interrupting(2))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(FileExistsError, match="unfinished tuning"):
        tuned(finetuned, tmp_path / "out", options(most_epochs=1))
    done = tuned(finetuned, tmp_path / "out", options(most_epochs=1, overwrite=True))
    assert [one.steps for one in done.trials] == [10]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
