"""fastkd.kd.trainer: killed and continued, cached and live, one process and two, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import kd_worker
import torch
from every_encoder import tiny_config
from kd_worker import OPTIONS, save_teacher, train
from tiny_models import (
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    save_plain_checkpoint,
    tokenizer_of,
)
from torch import Tensor
from training_worker import LABEL_NAMES, environment, rows, torchrun
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

from fastkd.data.errors import DataError
from fastkd.data.rows import Rows
from fastkd.kd.cache import StaleCacheError
from fastkd.kd.options import KDOptions
from fastkd.kd.stage_run import stage_length
from fastkd.kd.students import student_from_teacher
from fastkd.kd.teacher import Teacher
from fastkd.kd.trainer import KDTrainer, evaluate
from fastkd.training.harness import recomputes_activations
from fastkd.training.log import LOG_FILE

WORKER = Path(kd_worker.__file__)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def weights(folder: Path) -> dict[str, Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def losses_of(result: Any) -> list[float]:
    return [entry["loss"] for entry in result.log_history if "loss" in entry]


def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment())


# What comes out


def test_the_student_is_a_plain_folder_with_the_best_weights(teacher: Path, tmp_path: Path) -> None:
    result = train(teacher, "universal-il", tmp_path / "student")
    assert {"config.json", "model.safetensors", "tokenizer_config.json", LOG_FILE} <= set(
        os.listdir(tmp_path / "student")
    )
    history = [entry["eval_score"] for entry in result.log_history if "eval_score" in entry]
    assert len(history) == 3
    assert result.metrics["score"] == result.metrics["accuracy"] == max(history)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    found = evaluate(student, tokenizer, rows(40, seed=1), max_length=16)
    assert found["accuracy"] == pytest.approx(result.metrics["accuracy"])
    log = json.loads((tmp_path / "student" / LOG_FILE).read_text())
    assert (log["options"]["method"], log["options"]["student"]) == ("universal-il", "layers:2")
    assert result.steps == 30


def test_the_student_starts_from_the_teachers_layers(teacher: Path, tmp_path: Path) -> None:
    train(teacher, "kd", tmp_path / "student", max_steps=1, learning_rate=1e-12)
    own, given = weights(tmp_path / "student"), weights(teacher)
    for layer, source in ((0, 1), (1, 3)):
        name = "bert.encoder.layer.{}.output.dense.weight"
        torch.testing.assert_close(own[name.format(layer)], given[name.format(source)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cache", [True, False])
def test_a_method_of_logits_asks_no_classifier_for_layers(tmp_path: Path, cache: bool) -> None:
    """XLM keeps its layers in several lists, where nobody finds them."""
    config = tiny_config("xlm")
    config.num_labels = 2
    teacher = Teacher(AutoModelForSequenceClassification.from_config(config), tokenizer_of("bert"))
    student = AutoModelForSequenceClassification.from_config(config)
    KDTrainer(teacher, student, "kd", replace(OPTIONS, max_steps=2), cache=cache).train(
        rows(40), None, tmp_path / "student"
    )
    with pytest.raises(ValueError, match="XLMModel has several lists of 3 modules"):
        KDTrainer(teacher, student, "pkd-last", replace(OPTIONS, max_steps=2), cache=cache).train(
            rows(40), None, tmp_path / "other"
        )


def test_the_layers_of_a_student_are_found_where_its_teachers_are_or_named(tmp_path: Path) -> None:
    config, tokenizer = tiny_config("bart"), tokenizer_of("bert")
    config.num_labels, config.eos_token_id = 2, tokenizer.sep_token_id
    model = AutoModelForSequenceClassification.from_config(config)
    model.config.eos_token_id = config.eos_token_id
    options = replace(OPTIONS, max_steps=2, pool="mean")
    teacher = Teacher(model, tokenizer, "mean", layers="encoder.layers")
    trainer = KDTrainer(teacher, "layers:2", "universal-il", options)
    trainer.train(rows(40), None, tmp_path / "student")
    assert len(trainer.model.base_model.encoder.layers) == 2

    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="BartModel has several lists of 3 modules"):
        KDTrainer(teacher, AutoModelForSequenceClassification.from_config(config), "pkd-last", options).train(
            rows(40), None, tmp_path / "other"
        )
    named = replace(options, student_layers="decoder.layers")
    KDTrainer(teacher, student, "universal-il", named).train(rows(40), None, tmp_path / "named")


@pytest.mark.parametrize("family", ["albert", "bart", "modernbert"])
def test_any_classifier_teaches_by_its_layers(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    config.num_labels = 2
    model = AutoModelForSequenceClassification.from_config(config)
    tokenizer = tokenizer_of("bert")
    layers = "encoder.layers" if family == "bart" else None
    if layers is not None:
        config.eos_token_id = model.config.eos_token_id = tokenizer.sep_token_id
    teacher = Teacher(model, tokenizer, "mean", layers=layers)
    assert teacher.num_layers == 3
    train(teacher, "universal-il", tmp_path / "student", student="bilstm", max_steps=2, pool="mean")


def test_a_teacher_can_be_fine_tuned_by_it_too(tmp_path: Path) -> None:
    plain = save_plain_checkpoint(tmp_path / "plain", "distilbert")
    tuned = KDTrainer(None, plain, "none", replace(OPTIONS, max_steps=2)).train(rows(80), None, tmp_path / "tuned")
    assert tuned.metrics == {}
    assert Teacher.load(tmp_path / "tuned").num_labels == 2


def test_any_encoder_learns_from_any_teacher_by_way_of_the_cache(teacher: Path, tmp_path: Path) -> None:
    student = save_plain_checkpoint(tmp_path / "plain", "roberta")  # it splits text into bytes
    with pytest.raises(ValueError, match=r"tokenizer: teacher and student split text differently.*pass cache=True"):
        KDTrainer(teacher, student, "universal-il", OPTIONS, cache=False)
    result = train(teacher, "universal-il", tmp_path / "student", student=student, max_length=32)
    assert sum(losses_of(result)[-5:]) < sum(losses_of(result)[:5])
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").config
    assert (config.model_type, config.id2label) == ("roberta", {0: "negative", 1: "positive"})


def test_new_parts_learn_faster_and_frozen_embeddings_not_at_all(teacher: Path, tmp_path: Path) -> None:
    class Groups(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.rates = {group["initial_lr"] for group in kwargs["optimizer"].param_groups}
            self.fast = {
                tuple(parameter.shape)
                for group in kwargs["optimizer"].param_groups
                if group["initial_lr"] == 5e-3
                for parameter in group["params"]
            }

    observer = Groups()
    options = replace(OPTIONS, max_steps=2, head_learning_rate_factor=5.0, freeze_embeddings=True)
    loaded = Teacher.load(teacher)
    student = student_from_teacher(loaded.model, "layers:2")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    KDTrainer(loaded, student, "universal-il", options).train(rows(40), None, tmp_path / "student", [observer])
    assert observer.rates == {1e-3, 5e-3}
    assert observer.fast == {(2, 32), (2,), (1, 2, 32), (1, 1, 2)}
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert "bert.embeddings.word_embeddings.weight" not in changed
    assert "bert.embeddings.position_embeddings.weight" in changed
    assert student.get_input_embeddings().weight.requires_grad
    assert not student.training


def test_rows_are_shuffled_once_if_asked(teacher: Path, tmp_path: Path) -> None:
    still = {"max_steps": 20, "learning_rate": 1e-12, "freeze_embeddings": True}
    anew = train(teacher, "kd", tmp_path / "anew", **still)
    once = train(teacher, "kd", tmp_path / "once", shuffle_once=True, **still)
    assert losses_of(anew) != losses_of(once)


def test_takd_learns_from_the_assistant_and_not_from_the_teacher(teacher: Path, tmp_path: Path) -> None:
    class Seen(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = tmp_path / "student.checkpoints" / "assistant-1"
            assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_hidden_layers == 3

    trainer = KDTrainer(teacher, "layers:2", "takd", replace(OPTIONS, assistants=("layers:3",)))
    trainer.train(rows(80), None, tmp_path / "student", [Seen()])
    train_alone = KDTrainer(teacher, "layers:2", "kd", OPTIONS)
    train_alone.train(rows(80), None, tmp_path / "alone")
    own, other = weights(tmp_path / "student"), weights(tmp_path / "alone")
    assert any(not torch.equal(own[name], other[name]) for name in own)
    assert sorted(os.listdir(tmp_path)) == ["alone", "student"]


# Cached and live


def test_cached_and_live_teachers_give_the_same_student(tmp_path: Path) -> None:
    still = save_teacher(tmp_path / "still", dropout=0.0)
    for method in ("universal-il", "alp-kd"):
        changes = {"epochs": 1, "learning_rate": 1e-4}
        cached = train(still, method, tmp_path / f"{method}-cached", **changes)
        live = train(still, method, tmp_path / f"{method}-live", cache=False, **changes)
        assert losses_of(cached) == pytest.approx(losses_of(live), rel=1e-4)
        own, other = weights(tmp_path / f"{method}-cached"), weights(tmp_path / f"{method}-live")
        for name in own:
            torch.testing.assert_close(own[name], other[name], rtol=1e-3, atol=3e-4)


def test_a_kept_cache_serves_further_runs(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(teacher, "universal-il", tmp_path / "first", cache=tmp_path / "cache", max_steps=3)

    def asked(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the teacher was asked again")

    loaded = Teacher.load(teacher)
    monkeypatch.setattr(loaded, "signals", asked)
    second = train(loaded, "universal-il", tmp_path / "second", cache=tmp_path / "cache", max_steps=3)
    assert losses_of(first) == losses_of(second)
    assert_equal(weights(tmp_path / "first"), weights(tmp_path / "second"))


def test_a_stale_cache_stops_a_run_before_it_trains(teacher: Path, tmp_path: Path) -> None:
    train(teacher, "kd", tmp_path / "first", cache=tmp_path / "cache", max_steps=1)
    other = save_teacher(tmp_path / "other")
    model = AutoModelForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(other)
    with pytest.raises(StaleCacheError, match="another teacher; name another folder, or delete this one"):
        train(other, "kd", tmp_path / "second", cache=tmp_path / "cache", max_steps=1)
    assert not (tmp_path / "second").exists()


# Killed and continued


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_weights(teacher: Path, tmp_path: Path) -> None:
    method = "universal-il"
    killed = launched(teacher, tmp_path / "killed", method, "--kill-at", 18, "--eval-steps", 4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "killed").exists()
    with pytest.raises(FileExistsError, match="unfinished run; continue it with resume=True"):
        train(teacher, method, tmp_path / "killed", eval_steps=4)
    with pytest.raises(ValueError, match=r"resume: .* started differently \(method was"):
        train(teacher, "kd", tmp_path / "killed", eval_steps=4, resume=True)
    torch.rand(17)
    resumed = train(teacher, method, tmp_path / "killed", eval_steps=4, resume=True)
    whole = train(teacher, method, tmp_path / "whole", eval_steps=4)
    assert_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert resumed.metrics == whole.metrics
    assert losses_of(resumed) == losses_of(whole)
    assert resumed.steps == whole.steps == 30
    assert sorted(os.listdir(tmp_path)) == ["killed", "whole"]


class _Stop(TrainerCallback):
    """Ends the process's second stage with an error."""

    def __init__(self) -> None:
        self.stages = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stages += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stages == 2 and state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_finished_stage_is_not_trained_again(teacher: Path, tmp_path: Path) -> None:
    trainer = KDTrainer(teacher, "layers:2", "annealing", OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(rows(80), None, tmp_path / "student", [_Stop()])
    again = KDTrainer(teacher, "layers:2", "annealing", replace(OPTIONS, resume=True))
    counter = _Stop()
    counter.on_step_end = lambda *args, **kwargs: None  # type: ignore[method-assign]
    resumed = again.train(rows(80), None, tmp_path / "student", [counter])
    assert counter.stages == 1
    whole = KDTrainer(teacher, "layers:2", "annealing", OPTIONS).train(rows(80), None, tmp_path / "whole")
    assert_equal(weights(tmp_path / "student"), weights(tmp_path / "whole"))
    assert losses_of(resumed) == losses_of(whole)


# Two processes


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    still = save_teacher(tmp_path / "still", dropout=0.0)
    finished = torchrun(
        WORKER, still, tmp_path / "two", "universal-il", "--batch-size", 4, "--learning-rate", 1e-4,
        "--asked", tmp_path / "asked",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    train(still, "universal-il", tmp_path / "one", learning_rate=1e-4)
    logs = [json.loads((tmp_path / name / LOG_FILE).read_text()) for name in ("one", "two")]
    assert [log["processes"] for log in logs] == [1, 2]
    one, two = ([entry["loss"] for entry in log["log_history"] if "loss" in entry] for log in logs)
    assert one == pytest.approx(two, rel=1e-3)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0.02, atol=1e-3)
    # the first process alone has asked the teacher
    assert os.listdir(tmp_path / "asked") == ["0"]
    assert sorted(os.listdir(tmp_path)) == ["asked", "one", "still", "two"]


@pytest.mark.slow
def test_two_processes_train_a_student_with_early_heads(tmp_path: Path) -> None:
    """No method asks them, so that no loss has a gradient for them."""
    teacher = early_exit_model(num_labels=2)
    teacher.config.id2label = dict(enumerate(LABEL_NAMES))
    teacher.config.label2id = {name: number for number, name in enumerate(LABEL_NAMES)}
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer_of("bert").save_pretrained(tmp_path / "teacher")
    finished = torchrun(WORKER, tmp_path / "teacher", tmp_path / "two", "kd", "--batch-size", 4)
    assert finished.returncode == 0, finished.stderr


# Refused before any work


def test_a_teacher_is_not_a_model(teacher: Path) -> None:
    model: Any = Teacher.load(teacher).model
    with pytest.raises(TypeError, match=r"teacher: got \w+, expected a fastkd.Teacher, a folder or None"):
        KDTrainer(model, "layers:2", "kd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "universal"}, r"method: got 'universal', expected one of none, kd,"),
        ({"teacher": None}, r"teacher: got None, but the method 'kd' learns from one; only 'none' does not"),
        (
            {"teacher": None, "method": "none"},
            r"teacher: got None, but a student 'layers:2' is made of a teacher's parts; name a folder",
        ),
        ({"method": "distilbert", "cache": "kept"}, r"cache: distilbert compares every token .* pass cache=False"),
        ({"options": KDOptions(arguments={"delta": 1})}, r"arguments: got delta, but Vanilla KD takes"),
    ],
)
def test_impossible_combinations_are_refused(teacher: Path, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"teacher": teacher, "student": "layers:2", "method": "kd", **arguments}
    with pytest.raises(ValueError, match=message):
        KDTrainer(**given)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"metric": ("pearson",)}, rows(8), r"metric: got pearson, expected some of accuracy, f1, matthews"),
        ({}, rows(8, labelled=False), r"train: .* has no labels"),
        ({"max_length": 67}, rows(8), r"max_length: got 67, but this bert has 66 positions; pass at most that"),
        ({"early_stopping_patience": 1}, rows(8), r"early_stopping_patience: it needs an evaluation; pass dev rows"),
    ],
)
def test_bad_rows_and_options_are_refused(
    teacher: Path, tmp_path: Path, changes: dict[str, Any], given: Rows, message: str
) -> None:
    trainer = KDTrainer(teacher, "layers:2", "kd", replace(OPTIONS, **changes))
    with pytest.raises(ValueError, match=message):
        trainer.train(given, None, tmp_path / "student")
    assert os.listdir(tmp_path) == []


def test_labels_that_are_not_the_teachers_are_refused(teacher: Path, tmp_path: Path) -> None:
    other = replace(rows(8), label_names=("no", "yes"))
    with pytest.raises(DataError, match=r"has the labels no, yes, the model has negative, positive"):
        KDTrainer(teacher, "layers:2", "kd", OPTIONS).train(other, None, tmp_path / "student")


def test_a_student_of_other_classes_is_refused_as_it_is(teacher: Path, tmp_path: Path) -> None:
    student = student_from_teacher(Teacher.load(save_teacher(tmp_path / "three", num_labels=3)).model, "layers:2")
    with pytest.raises(DataError, match=r"train: .* has 2 labels, the model has 3 labels"):
        KDTrainer(teacher, student, "kd", OPTIONS).train(rows(8), None, tmp_path / "student")
    assert student.config.num_labels == 3


def test_an_early_exit_model_can_teach(tmp_path: Path) -> None:
    early_exit_model("bert", num_labels=2).save_pretrained(tmp_path / "teacher")
    tokenizer_of("bert").save_pretrained(tmp_path / "teacher")
    trainer = KDTrainer(tmp_path / "teacher", "bilstm", "universal-ca", OPTIONS)
    losses = losses_of(trainer.train(rows(40), None, tmp_path / "student"))
    assert sum(losses[-4:]) < sum(losses[:4])


def test_takd_without_room_for_an_assistant_is_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"assistants: no size lies between 3 layers and the teacher's 4; use"):
        KDTrainer(teacher, "layers:3", "takd", OPTIONS)
    for assistants, culprit in ((("layers:2", "layers:3"), "layers:3"), (("layers:4",), "layers:4")):
        with pytest.raises(ValueError, match=f"assistants: '{culprit}' has . layers and .* before it"):
            KDTrainer(Teacher.load(teacher), "layers:1", "takd", replace(OPTIONS, assistants=assistants))
    with pytest.raises(ValueError, match=r"assistants: there is no obvious one for a student 'bilstm'; name them"):
        KDTrainer(teacher, "bilstm", "takd", OPTIONS)


def test_a_teacher_that_pools_otherwise_is_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher: it pools by cls, expected mean; load it with pool='mean'"):
        KDTrainer(Teacher.load(teacher, "cls"), "layers:2", "rail-kd", OPTIONS)


def test_a_teacher_whose_pool_nobody_chose_pools_as_the_method_wants(teacher: Path) -> None:
    loaded = Teacher.load(teacher)
    trainer = KDTrainer(loaded, "layers:2", "rail-kd", OPTIONS)
    assert trainer.teacher is not None
    assert (trainer.teacher.pool, loaded.pool) == ("mean", "cls")
    assert trainer.teacher.model is loaded.model
    batch = random_batch()
    first, second = (t.signals(batch, ["hidden_states"]).hidden_states for t in (loaded, trainer.teacher))
    assert first is not None
    assert second is not None
    assert not torch.allclose(first, second)


def test_a_length_beyond_the_model_is_refused(teacher: Path) -> None:
    trainer = KDTrainer(teacher, "layers:2", "kd", OPTIONS)
    trainer.tokenizer.model_max_length = 64
    with pytest.raises(ValueError, match=r"max_length: got 65, but this tokenizer's model takes at most 64 tokens"):
        trainer.set_length(65)
    trainer.set_length(24)
    assert (trainer.options.max_length, trainer.tokenizer.model_max_length) == (24, 24)


@pytest.mark.parametrize("student", ["layers:2", "layers:0,2,3", "bilstm"])
def test_an_early_exit_teacher_with_a_default_speed_runs_whole(tmp_path: Path, student: str) -> None:
    model = early_exit_model("bert", num_labels=2, speed=0.9, exit_layers=[1, 3])
    model.save_pretrained(tmp_path / "teacher")
    tokenizer_of("bert").save_pretrained(tmp_path / "teacher")
    trainer = KDTrainer(tmp_path / "teacher", student, "universal-ca", replace(OPTIONS, epochs=1))
    trainer.train(rows(16), rows(8, 1), tmp_path / "student")
    assert trainer.model is not None
    if student == "bilstm":
        return
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").config
    assert (config.speed, config.exits_trained, config.certificate) == (0.0, False, None)
    assert (config.num_hidden_layers, config.exit_layers) == {
        "layers:2": (2, [2]),
        "layers:0,2,3": (3, [1, 2, 3]),
    }[student]


def test_a_student_of_all_layers_of_an_early_exit_teacher_answers_as_it(tmp_path: Path) -> None:
    teacher = early_exit_model("bert", num_labels=2, exit_layers=[1, 3])
    student = student_from_teacher(teacher, "layers:4")
    batch = random_batch()
    with torch.no_grad():
        assert torch.equal(student.all_exit_logits(**batch), teacher.all_exit_logits(**batch))  # type: ignore[operator]


# Whose class is whose


def named(model: Any, *names: str) -> Any:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    return model


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("method", ["kd", "alp-kd"])
def test_a_student_with_the_labels_in_another_order_learns_the_same_names(
    teacher: Path, tmp_path: Path, method: str, cache: bool
) -> None:
    """Every class number is exchanged, and so every logit: up to that, the training is the same."""
    logits, accuracy = [], []
    for order in (("negative", "positive"), ("positive", "negative")):
        loaded = Teacher.load(teacher)
        student = named(student_from_teacher(loaded.model, "layers:2"), *order)
        if order[0] == "positive":
            with torch.no_grad():
                for parameter in student.classifier.parameters():
                    parameter.copy_(parameter.flip(0))
        before = student.classifier.weight.detach().clone()
        options = replace(OPTIONS, max_steps=6, learning_rate=1e-4)
        trainer = KDTrainer(loaded, student, method, options, cache=cache)
        done = trainer.train(rows(40), rows(12, seed=1), tmp_path / order[0])
        again = evaluate(student, loaded.tokenizer, rows(40), max_length=16)
        accuracy.append([done.metrics["accuracy"], again["accuracy"]])
        with torch.no_grad():
            logits.append(student(**loaded.tokenizer(["a good film"], return_tensors="pt")).logits[0])
        assert not torch.equal(student.classifier.weight, before)
        assert list(student.config.id2label.values()) == list(order)
    torch.testing.assert_close(logits[0], logits[1].flip(0), rtol=1e-3, atol=1e-3)
    assert accuracy[0] == accuracy[1]


def test_the_answers_of_a_teacher_follow_the_names(teacher: Path) -> None:
    loaded = Teacher.load(teacher)
    turned = loaded.in_order_of(["positive", "negative"])
    batch = loaded.tokenizer(["a good film", "bad"], padding=True, return_tensors="pt")
    plain = loaded.signals(batch, ["logits"]).logits
    torch.testing.assert_close(turned.signals(batch, ["logits"]).logits, plain.flip(1), rtol=0, atol=0)
    assert loaded.in_order_of(["negative", "positive"]) is loaded
    assert turned.fingerprint != loaded.fingerprint
    with pytest.raises(ValueError, match="label_names: got no, yes, expected the teacher's, negative, positive"):
        loaded.in_order_of(["no", "yes"])


def test_an_early_exit_teacher_is_turned_too(tmp_path: Path) -> None:
    named(early_exit_model("bert", num_labels=2), "positive", "negative").save_pretrained(tmp_path / "teacher")
    tokenizer_of("bert").save_pretrained(tmp_path / "teacher")
    loaded = Teacher.load(tmp_path / "teacher")
    batch = loaded.tokenizer(["a good film"], return_tensors="pt")
    plain = loaded.signals(batch, ["logits"]).logits
    turned = loaded.in_order_of(["negative", "positive"]).signals(batch, ["logits"]).logits
    torch.testing.assert_close(turned, plain.flip(1), rtol=0, atol=0)


def test_a_cache_of_the_other_order_is_stale(teacher: Path, tmp_path: Path) -> None:
    student = named(student_from_teacher(Teacher.load(teacher).model, "layers:2"), "positive", "negative")
    train(teacher, "kd", tmp_path / "first", cache=tmp_path / "cache", max_steps=1)
    trainer = KDTrainer(teacher, student, "kd", replace(OPTIONS, max_steps=1), cache=tmp_path / "cache")
    with pytest.raises(StaleCacheError, match="label order None, now positive, negative"):
        trainer.train(rows(8), None, tmp_path / "second")


@pytest.mark.parametrize(
    ("names", "row_names", "message"),
    [
        (("POSITIVE", "NEGATIVE"), None, r"teacher: it has the labels negative, positive, the student has POSITIVE"),
        (("positive", "negative"), None, r"train: its labels are numbers, but class 0 is negative for the teacher and"),
        (
            ("LABEL_0", "LABEL_1"),
            ("no", "yes"),
            r"teacher: it has the labels .*, the rows have no, yes",
        ),
    ],
)
def test_labels_that_cannot_be_brought_together_are_refused(
    teacher: Path, tmp_path: Path, names: tuple[str, ...], row_names: tuple[str, ...] | None, message: str
) -> None:
    student = named(student_from_teacher(Teacher.load(teacher).model, "layers:2"), *names)
    given = replace(rows(8), label_names=row_names)
    with pytest.raises(DataError, match=message):
        KDTrainer(teacher, student, "kd", OPTIONS).train(given, None, tmp_path / "student")
    assert os.listdir(tmp_path) == []


def test_a_student_without_names_takes_the_teachers_where_the_rows_have_none(teacher: Path, tmp_path: Path) -> None:
    student = named(student_from_teacher(Teacher.load(teacher).model, "layers:2"), "LABEL_0", "LABEL_1")
    given = replace(rows(16), label_names=None)
    KDTrainer(teacher, student, "kd", replace(OPTIONS, max_steps=1)).train(given, None, tmp_path / "student")
    assert student.config.id2label == {0: "negative", 1: "positive"}


def left_padding() -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_of("bert")
    tokenizer.padding_side = "left"
    return tokenizer


def test_a_teacher_reads_texts_padded_on_the_right_only() -> None:
    model, texts = early_exit_model("bert", num_labels=2), ["the film was good", "bad"]
    left, right = Teacher(model, left_padding()), Teacher(model, tokenizer_of("bert"))
    assert left.fingerprint == right.fingerprint
    batches = [teacher.tokenizer(texts, padding=True, return_tensors="pt") for teacher in (left, right)]
    signals = [right.signals(batch, ["hidden_states"]).hidden_states for batch in batches]
    assert torch.equal(*signals)
    with pytest.raises(
        ValueError, match="attention_mask: the first token of a row is masked, but the heads read it; pad on the right"
    ):
        right.signals(left_padding()(texts, padding=True, return_tensors="pt"), ["logits"])


def test_a_failed_start_leaves_nothing_behind(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer: it pads on the left"):
        KDTrainer(teacher, "layers:2", "kd", OPTIONS, tokenizer=left_padding()).train(rows(8), None, tmp_path / "out")

    class Fails(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        KDTrainer(teacher, "layers:2", "kd", OPTIONS).train(rows(8), None, tmp_path / "out", [Fails()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"gradient_checkpointing": True}, {"neftune_noise_alpha": 5.0}])
@pytest.mark.parametrize("method", ["kd", "pkd-skip"])
def test_options_of_the_trainer_reach_the_student(
    teacher: Path, tmp_path: Path, method: str, arguments: dict[str, Any]
) -> None:
    options = replace(OPTIONS, max_steps=2, trainer_arguments=arguments)
    trainer = KDTrainer(teacher, "layers:2", method, options)
    assert all(loss > 0 for loss in losses_of(trainer.train(rows(16), None, tmp_path / "out")))
    assert trainer.model is not None
    assert not recomputes_activations(trainer.model)


def test_a_student_of_peft_is_refused(teacher: Path) -> None:
    student: Any = type("PeftModel", (torch.nn.Module,), {"__module__": "peft.peft_model"})()
    with pytest.raises(TypeError, match="student: got a PeftModel of peft"):
        KDTrainer(teacher, student, "kd", OPTIONS)


@pytest.mark.parametrize("whole", [2, 2.5, 3, 5, 10, 7.25])
def test_stages_are_as_long_as_the_whole(whole: float) -> None:
    first = stage_length(whole, 0.0, 2 / 3, is_last=False)
    second = stage_length(whole, 2 / 3, 1 / 3, is_last=True)
    assert first == round(first)
    assert first + second == whole
    assert abs(first - 2 * whole / 3) <= 0.5
