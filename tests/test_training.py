"""fastkd.training: what learns, what stays frozen, what a kill leaves, and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import datasets
import torch
import training_worker
from accelerate import PartialState
from tiny_models import early_exit_model, one_thread, random_batch, tokenizer_of  # noqa: F401  # a fixture
from torch.nn import functional as F
from training_worker import LABEL_NAMES, Stopped, environment, load, options_of, rows, save_plain, torchrun, train
from transformers import TrainerCallback, TrainingArguments

import fastkd
from fastkd.data.batches import LengthGroupedSampler, LengthSortedBatches, tokenize
from fastkd.data.errors import DataError
from fastkd.data.rows import Rows
from fastkd.encoders.label_scale import LabelScale
from fastkd.training.finetune import FinetuneOptions, finetune
from fastkd.training.harness import bf16_is_fast, last_checkpoint, recomputes_activations
from fastkd.training.log import LOG_FILE
from fastkd.training.self_distillation import (
    DistillOptions,
    _SelfDistillation,
    distill,
    learned_exit_loss,
    self_distillation_loss,
)

WORKER = Path(training_worker.__file__)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def finetuned(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned model folder, for the tests that distil."""
    return train("finetune", load(plain, num_labels=2), tmp_path_factory.mktemp("stage") / "finetuned").output_dir


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def _accuracies(model: fastkd.EarlyExitForSequenceClassification, dev: Rows) -> list[float]:
    """Of each head, by hand."""
    tokens = tokenize(dev, tokenizer_of("bert"), 16)
    right = []
    for batch in LengthSortedBatches(tokens, tokenizer_of("bert"), 16):
        labels = batch.pop("labels")
        with torch.no_grad():
            right.append(model.all_exit_logits(**batch).argmax(-1) == labels[:, None])
    return torch.cat(right).double().mean(0).tolist()


def _early_exit(model: fastkd.EarlyExitForSequenceClassification, dev: Rows) -> fastkd.SweepRow:
    """At the speed that the log records."""
    tokens = tokenize(dev, tokenizer_of("bert"), 16)
    return model.trace(LengthSortedBatches(tokens, tokenizer_of("bert"), 16)).sweep([0.5], seq_len=16)[0]


def _leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Fine-tuning


def test_finetune_learns_the_labels_with_backbone_and_teacher_alone(plain: Path, tmp_path: Path) -> None:
    model = load(plain, num_labels=2)
    before = _state(model)
    result = train("finetune", model, tmp_path / "out")

    assert result.metrics["accuracy"] > 0.9
    # the kept weights are those of the best evaluation
    history = [entry["eval_accuracy"] for entry in result.log_history if "eval_accuracy" in entry]
    assert (len(history), max(history)) == (3, result.metrics["accuracy"])
    assert _accuracies(model, rows(40, seed=1))[-1] == pytest.approx(result.metrics["accuracy"])
    assert result.steps == 30

    changed = _changed(model, before)
    assert not {name for name in changed if name.startswith("heads.") and not name.startswith("heads.3.")}
    assert {name.split(".")[0] for name in changed} == {"bert", "heads"}
    assert "bert.embeddings.word_embeddings.weight" in changed
    # the caller gets the model back as it was: not wrapped, not frozen, in evaluation mode
    assert "forward" not in vars(model)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_finetune_writes_a_whole_folder_and_nothing_else(plain: Path, tmp_path: Path) -> None:
    model = load(plain, num_labels=2)
    result = train("finetune", model, tmp_path / "out")
    assert _leftovers(tmp_path) == ["out"]
    assert {"config.json", "model.safetensors", "tokenizer_config.json", LOG_FILE} <= set(_leftovers(tmp_path / "out"))
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask

    log = json.loads((tmp_path / "out" / LOG_FILE).read_text())
    assert log["stage"] == "finetune"
    assert log["metrics"] == result.metrics
    assert log["options"]["learning_rate"] == 1e-3
    assert sum("loss" in entry for entry in log["log_history"]) == result.steps

    saved = load(tmp_path / "out")
    assert _changed(saved, _state(model)) == set()
    assert saved.config.id2label == dict(enumerate(LABEL_NAMES))
    assert saved.config.label2id == {"negative": 0, "positive": 1}
    assert saved.config.problem_type == "single_label_classification"
    assert not saved.config.exits_trained


class _Observer(TrainerCallback):
    """Notes the optimiser's groups, and the learning rate of each at every step."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self.rates: list[list[float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.groups = [dict(group) for group in kwargs["optimizer"].param_groups]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])


def test_learning_rates_and_weight_decay_of_finetune(plain: Path, tmp_path: Path) -> None:
    model, observer = load(plain, num_labels=2), _Observer()
    options = replace(options_of("finetune", epochs=1), head_learning_rate_factor=5.0, weight_decay=0.03, warmup=0.5)
    finetune(model, rows(80), None, tmp_path / "out", options, tokenizer_of("bert"), [observer])
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("heads.") or "heads.3." in name}
    placed = {id(p): group for group in observer.groups for p in group["params"]}
    assert {id(p) for p in trained.values()} == set(placed)
    for name, parameter in trained.items():
        group = placed[id(parameter)]
        assert group["initial_lr"] == pytest.approx(5e-3 if name.startswith("heads.") else 1e-3), name
        assert group["weight_decay"] == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.03), name
    backbone_rates = [rates[0] for rates in observer.rates]
    assert backbone_rates == pytest.approx([0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4])


def test_every_epoch_has_its_own_order(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []

    def recorded(sampler: LengthGroupedSampler) -> Iterator[int]:
        orders.append(list(iterate(sampler)))
        return iter(orders[-1])

    iterate = LengthGroupedSampler.__iter__
    monkeypatch.setattr(LengthGroupedSampler, "__iter__", recorded)
    train("finetune", load(plain, num_labels=2), tmp_path / "out", batch_size=40)
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(80)) for order in orders)


def test_early_stopping(plain: Path, tmp_path: Path) -> None:
    changes = {"epochs": 9, "learning_rate": 1e-12, "early_stopping_patience": 2}
    result = train("finetune", load(plain, num_labels=2), tmp_path / "out", **changes)
    assert result.steps == 30  # the first evaluation is the best, two more bring nothing


def test_bf16_autocast_on_this_device_and_switched_off_after_it(plain: Path, tmp_path: Path) -> None:
    model = load(plain, num_labels=2)
    seen: list[torch.dtype] = []
    hook = model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    result = train("finetune", model, tmp_path / "out", bf16=True, max_steps=4)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    seen.clear()
    train("distill", model, tmp_path / "distilled", bf16=False, max_steps=2)
    assert set(seen) == {torch.float32}
    hook.remove()
    assert result.train_loss > 0


def test_bf16_is_chosen_where_the_hardware_has_it(plain: Path, tmp_path: Path) -> None:
    model = load(plain, num_labels=2)
    seen: list[torch.dtype] = []
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    train("finetune", model, tmp_path / "out", bf16=None, max_steps=1)
    assert set(seen) == {torch.bfloat16 if bf16_is_fast() else torch.float32}


def _scores(count: int, scale: float, shift: float, seed: int = 0) -> Rows:
    """Sentences whose score, 0 or `scale` beside `shift`, half of the words give away."""
    source = rows(count, seed).dataset
    scores = [scale * label + shift for label in source["label"]]
    features = datasets.Features({"text_a": datasets.Value("string"), "label": datasets.Value("float32")})
    scored = datasets.Dataset.from_dict({"text_a": source["text_a"][:], "label": scores}, features)
    return Rows(scored, None, 1, f"scores {scale} {shift} {seed}")


def _trained_regression(
    plain: Path, folder: Path, train_rows: Rows, callbacks: Any = (), **changes: Any
) -> tuple[fastkd.EarlyExitForSequenceClassification, list[dict[str, float]]]:
    """Fine-tuned and distilled, with the dev metrics of both steps."""
    model, tokenizer = load(plain, num_labels=1), tokenizer_of("bert")
    dev = replace(train_rows, dataset=train_rows.dataset.select(range(40)))
    tuned = finetune(model, train_rows, dev, folder / "tuned", options_of("finetune", **changes), tokenizer, callbacks)
    distilled = distill(model, train_rows, dev, folder / "distilled", options_of("distill", **changes), tokenizer)
    return model, [tuned.metrics, distilled.metrics]


def test_regression(plain: Path, tmp_path: Path) -> None:
    train_rows = _scores(80, 2.5, 0.25)
    model, (tuned, distilled) = _trained_regression(plain, tmp_path, train_rows)
    assert tuned["pearson"] > 0.9
    scale = LabelScale.of(train_rows)
    labels = torch.tensor(train_rows.dataset["label"][:])
    assert (scale.mean, scale.std) == pytest.approx((labels.mean().item(), labels.std(correction=0).item()))
    assert tuned["mse"] == pytest.approx(tuned["loss"] * scale.std**2, rel=1e-5)
    assert model.config.problem_type == "regression"
    assert {f"{name}_layer_{layer}" for name in ("pearson", "mse") for layer in (1, 2, 3, 4)} <= set(distilled)
    assert min(distilled[f"pearson_layer_{layer}"] for layer in (1, 2, 3, 4)) > 0.9
    saved = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path / "distilled")
    assert saved.config.label_scale == [scale.mean, scale.std]
    batch = random_batch()
    with torch.no_grad():
        assert torch.equal(saved.all_exit_logits(**batch), model.all_exit_logits(**batch))


def test_every_unit_of_the_labels_gives_the_same_regression(plain: Path, tmp_path: Path) -> None:
    small, _ = _trained_regression(plain, tmp_path / "small", _scores(80, 2.0, 0.0), epochs=1)
    # powers of two, so that both runs round alike
    large, (tuned, distilled) = _trained_regression(plain, tmp_path / "large", _scores(80, 2048.0, 4096.0), epochs=1)
    batch = random_batch()
    with torch.no_grad():
        expected = 1024 * small.all_exit_logits(**batch) + 4096
        torch.testing.assert_close(large.all_exit_logits(**batch), expected, rtol=0, atol=2.0)
    assert tuned["pearson"] > 0.5
    assert distilled["pearson_layer_1"] > 0.5


def test_label_scale() -> None:
    scale = LabelScale.of(_scores(40, 3.0, 7.0))
    answers = torch.tensor([7.0, 10.0])
    torch.testing.assert_close(scale.restored(scale.standardised(answers)), answers)
    assert LabelScale.of(_scores(10, 0.0, 2.5)) == LabelScale(2.5, 1.0), "labels that are all the same"
    for wrong in ([1.0], [0.0, 0.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="label_scale: got"):
            fastkd.EarlyExitConfig(num_labels=1, label_scale=wrong)


def test_distillation_of_a_regression_keeps_its_teacher_to_the_bit(plain: Path, tmp_path: Path) -> None:
    train_rows, tokenizer = _scores(40, 3.0, 7.0), tokenizer_of("bert")
    model = load(plain, num_labels=1)
    finetune(model, train_rows, None, tmp_path / "tuned", options_of("finetune", epochs=1), tokenizer)
    before = _state(model)
    distill(model, train_rows, None, tmp_path / "out", options_of("distill", epochs=1), tokenizer)
    assert {name.split(".")[1] for name in _changed(model, before)} == {"0", "1", "2"}
    again = _state(model)
    finetune(model, train_rows, None, tmp_path / "again", options_of("finetune", max_steps=1), tokenizer)
    weight, moved = again["heads.3.out_proj.weight"], model.state_dict()["heads.3.out_proj.weight"]
    # one warm-up step moves it by a learning rate of the standardised unit; scaling it once more would by far more
    torch.testing.assert_close(moved, weight, rtol=0, atol=0.05)


class _Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 12:
            raise KeyboardInterrupt


def test_an_interrupted_regression_answers_in_its_unit_and_continues_to_the_same_weights(
    plain: Path, tmp_path: Path
) -> None:
    train_rows, tokenizer, options = _scores(80, 3.0, 500.0), tokenizer_of("bert"), options_of("finetune", epochs=2)
    whole = load(plain, num_labels=1)
    finetune(whole, train_rows, None, tmp_path / "whole", options, tokenizer)
    stopped = load(plain, num_labels=1)
    with pytest.raises(KeyboardInterrupt):
        finetune(stopped, train_rows, None, tmp_path / "out", options, tokenizer, [_Interrupt()])
    with torch.no_grad():
        assert stopped(**random_batch()).logits.mean().item() == pytest.approx(500, abs=10)
    resumed = load(plain, num_labels=1)
    finetune(resumed, train_rows, None, tmp_path / "out", replace(options, resume=True), tokenizer)
    assert not _changed(resumed, _state(whole))


# Distillation


def test_distill_trains_the_students_alone_and_needs_no_labels(finetuned: Path, tmp_path: Path) -> None:
    model = load(finetuned)
    model.config.certificate = {"for": "the weights of before"}
    before = _state(model)
    unlabelled = rows(80, labelled=False)
    result = distill(model, unlabelled, rows(40, seed=1), tmp_path / "out", options_of("distill"), tokenizer_of("bert"))
    changed = _changed(model, before)
    students = {name for name in before if name.startswith("heads.") and not name.startswith("heads.3.")}
    # the key bias cancels in the softmax: its gradient is rounding noise, and it may or may not move
    assert students - {f"heads.{i}.key.bias" for i in range(3)} <= changed <= students
    assert result.metrics["accuracy_layer_4"] == load_accuracy(finetuned)
    accuracies = [result.metrics[f"accuracy_layer_{layer}"] for layer in (1, 2, 3, 4)]
    assert accuracies == pytest.approx(_accuracies(model, rows(40, seed=1)))
    early = _early_exit(model, rows(40, seed=1))
    assert result.metrics["accuracy_speed_0.5"] == pytest.approx(early.accuracy)
    assert result.metrics["flops_share_speed_0.5"] == pytest.approx(1 / early.speedup["fastbert"], rel=0.02)
    losses = [entry["loss"] for entry in result.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    config = load(tmp_path / "out").config
    assert config.exits_trained
    assert config.certificate is None
    assert config.training_data.keys() == {"finetune train", "finetune dev", "distill train", "distill dev"}
    assert config.training_data["distill dev"] == rows(40, seed=1).digest()
    assert load(tmp_path / "out")(**random_batch(), speed=0.9).exit_layer is not None

    without_labels = distill(
        load(finetuned), unlabelled, rows(40, seed=1, labelled=False), tmp_path / "blind",
        options_of("distill", max_steps=2), tokenizer_of("bert"),
    )  # fmt: skip
    assert set(without_labels.metrics) == {"loss", *(f"temperature_layer_{layer}" for layer in (1, 2, 3))}


def _logits(model: fastkd.EarlyExitForSequenceClassification, dev: Rows) -> torch.Tensor:
    """[n, K, C] of all heads."""
    return model.trace(dev, tokenizer=tokenizer_of("bert"), max_length=16).logits


def test_with_the_backbone_all_heads_learn_what_the_model_said_before(finetuned: Path, tmp_path: Path) -> None:
    model, dev = load(finetuned), rows(40, seed=1)
    before, said = _state(model), _logits(model, dev)[:, -1]
    observer = _Observer()
    options = options_of("distill", train_backbone=True, backbone_learning_rate=3e-4, head_temperatures="none")
    result = distill(
        model, rows(80, labelled=False), dev, tmp_path / "out", options, tokenizer_of("bert"), [observer]
    )  # fmt: skip
    changed = _changed(model, before)
    assert {"bert.encoder.layer.0.output.dense.weight", "heads.3.out_proj.weight"} <= changed
    now = _logits(model, dev)
    assert result.metrics["loss"] == pytest.approx(self_distillation_loss(now, said).item(), rel=1e-4)
    assert result.metrics["answers_kept"] == (now[:, -1].argmax(-1) == said.argmax(-1)).double().mean().item()
    assert result.metrics["answers_kept"] > 0.9
    rates = {id(parameter): group["initial_lr"] for group in observer.groups for parameter in group["params"]}
    assert set(rates) == {id(parameter) for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        is_early = name.startswith("heads.") and not name.startswith("heads.3.")
        assert rates[id(parameter)] == pytest.approx(2e-3 if is_early else 3e-4), name


def test_a_stopped_training_of_the_backbone_continues_with_the_same_teacher(finetuned: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train_backbone": True, "eval_steps": 4}
    with pytest.raises(Stopped):
        train("distill", load(finetuned), tmp_path / "out", stop_at=13, **changes)
    resumed, whole = load(finetuned), load(finetuned)
    again = train("distill", resumed, tmp_path / "out", resume=True, **changes)
    assert again.metrics == train("distill", whole, tmp_path / "whole", **changes).metrics
    assert _changed(resumed, _state(whole)) == set()


def test_a_regression_trains_its_backbone_in_its_own_unit(plain: Path, tmp_path: Path) -> None:
    train_rows, tokenizer = _scores(80, 3.0, 500.0), tokenizer_of("bert")
    model = load(plain, num_labels=1)
    finetune(model, train_rows, None, tmp_path / "tuned", options_of("finetune", epochs=1), tokenizer)
    said = _logits(model, train_rows)[:, -1]
    result = distill(
        model, train_rows, train_rows, tmp_path / "out", options_of("distill", train_backbone=True), tokenizer
    )  # fmt: skip
    assert "answers_kept" not in result.metrics
    _, deviation = model.config.label_scale
    now = _logits(load(tmp_path / "out"), train_rows)
    assert result.metrics["loss"] == pytest.approx(
        (((now - said[:, None]) / deviation) ** 2).mean(0).sum().item(), 1e-3
    )
    assert (now[:, -1] - said).abs().mean() < 0.3 * deviation


def test_what_does_not_go_with_a_trained_backbone() -> None:
    with pytest.raises(ValueError, match=r"frozen_dropout: with train_backbone no layer is frozen"):
        DistillOptions(train_backbone=True, frozen_dropout=True)
    with pytest.raises(ValueError, match=r"backbone_learning_rate: got 0, expected a number above 0"):
        DistillOptions(backbone_learning_rate=0)


@pytest.mark.parametrize(
    ("changes", "steps", "evaluations"),
    [
        ({"min_steps": 36}, 36, 12),
        ({"min_steps": 36, "eval_steps": 20}, 36, 2),
        ({"min_steps": 30}, 30, 3),
        ({"min_steps": 36, "epochs": 1}, 10, 1),
        ({"min_steps": 36, "max_steps": 5}, 5, 1),
        ({"min_steps": 36, "trainer_arguments": {"num_train_epochs": 1}}, 10, 1),
    ],
    ids=["more steps", "own evaluations", "three epochs", "own epochs", "max_steps", "the Trainer's epochs"],
)
def test_distill_takes_its_least_number_of_steps(
    finetuned: Path, tmp_path: Path, changes: dict[str, Any], steps: int, evaluations: int
) -> None:
    done = train("distill", load(finetuned), tmp_path / "out", **{"epochs": None, **changes})
    found = sum("eval_loss" in entry for entry in done.log_history)
    assert (done.steps, found) == (steps, evaluations)


def test_distill_trains_a_learned_exit(finetuned: Path, tmp_path: Path) -> None:
    model = load(finetuned)
    result = distill(
        model, rows(80), rows(40, seed=1), tmp_path / "out", options_of("distill", learned_exit=True),
        tokenizer_of("bert"),
    )  # fmt: skip
    assert model.config.learned_exit
    saved = load(tmp_path / "out")
    assert torch.equal(saved.learned_exit.linear.weight, model.learned_exit.linear.weight)
    assert saved.learned_exit.linear.weight[:, :-1].abs().max() > 0, "it starts at 0"
    batch = next(iter(LengthSortedBatches(tokenize(rows(40, seed=1), tokenizer_of("bert")), tokenizer_of("bert"), 40)))
    del batch["labels"]
    with torch.no_grad():
        logits, log_odds = saved.eval().all_exits(**batch)
        expected = learned_exit_loss(log_odds[:, :-1], logits[:, :-1], logits[:, -1])
        distillation = self_distillation_loss(logits[:, :-1], logits[:, -1])
        assert expected < learned_exit_loss(torch.zeros_like(log_odds[:, :-1]), logits[:, :-1], logits[:, -1])
        assert saved(**batch, speed=0.5, criterion="learned").exit_layer.min() >= 1
    assert result.metrics["loss"] == pytest.approx(float(distillation + expected), rel=1e-3)


def test_learned_exit_loss_is_its_formula() -> None:
    log_odds, student, teacher = torch.randn(5, 3), torch.randn(5, 3, 4), torch.randn(5, 4)
    expected = 0.0
    for row in range(5):
        for head in range(3):
            stands = float(student[row, head].argmax() == teacher[row].argmax())
            certainty = torch.sigmoid(log_odds[row, head].double())
            expected -= float(stands * certainty.log() + (1 - stands) * (1 - certainty).log()) / 5
    assert float(learned_exit_loss(log_odds, student, teacher)) == pytest.approx(expected, rel=1e-5)
    # regression: 1 where the answers are equal, falling with the difference
    zeros, ones = torch.zeros(1, 1), torch.ones(1, 1)
    stands = 1 - math.tanh(1.0)
    assert float(learned_exit_loss(ones, zeros[None], ones)) == pytest.approx(
        -stands * math.log(1 / (1 + math.exp(-1))) - (1 - stands) * math.log(1 - 1 / (1 + math.exp(-1))), rel=1e-5
    )
    students = torch.randn(2, 1, 3, requires_grad=True)
    learned_exit_loss(torch.randn(2, 1, requires_grad=True), students, torch.randn(2, 3)).backward()
    assert students.grad is None


def load_accuracy(folder: Path) -> float:
    return float(json.loads((folder / LOG_FILE).read_text())["metrics"]["accuracy"])


def test_the_frozen_teacher_has_no_dropout_and_the_students_do() -> None:
    model = early_exit_model("bert", head_dropout=0.3)
    batch = random_batch()
    expected = model.all_exit_logits(**batch)
    objective = _SelfDistillation(model, DistillOptions(), LabelScale()).train()
    first, second = objective(**batch)["logits"], objective(**batch)["logits"]
    torch.testing.assert_close(first[:, -1], expected[:, -1], rtol=0, atol=0)
    assert not torch.equal(first[:, :-1], second[:, :-1])
    torch.testing.assert_close(objective.eval()(**batch)["logits"], expected, rtol=0, atol=0)


def test_the_distillation_schedule_is_its_own_length(finetuned: Path, tmp_path: Path) -> None:
    observer = _Observer()
    options = options_of("distill", epochs=2, warmup=0.0, weight_decay=0.05)
    model = load(finetuned)
    distill(model, rows(80), None, tmp_path / "out", options, tokenizer_of("bert"), [observer])
    assert [rates[0] for rates in observer.rates] == pytest.approx([2e-3 * (20 - step) / 20 for step in range(20)])
    students = {id(p) for head in model.early_heads for p in head.parameters()}
    assert {id(p) for group in observer.groups for p in group["params"]} == students


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("t2_scale", [True, False])
def test_self_distillation_loss_is_its_formula(direction: Any, temperature: float, t2_scale: bool) -> None:
    student, teacher = torch.randn(7, 3, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    p = (teacher / temperature).softmax(-1)[:, None].expand(7, 3, 5)
    q = (student / temperature).softmax(-1)
    a, b = (p, q) if direction == "forward" else (q, p)
    expected = sum((a[:, i] * (a[:, i] / b[:, i]).log()).sum() / 7 for i in range(3))
    expected = expected * temperature**2 if t2_scale else expected
    loss = self_distillation_loss(student, teacher, temperature, direction, t2_scale)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.gradcheck(
        lambda logits: self_distillation_loss(logits, teacher, temperature, direction, t2_scale),
        student.requires_grad_(),
    )


def test_self_distillation_loss_of_regression_is_the_squared_difference() -> None:
    student, teacher = torch.randn(6, 2, 1), torch.randn(6, 1)
    expected = sum(F.mse_loss(student[:, i], teacher) for i in range(2))
    torch.testing.assert_close(self_distillation_loss(student, teacher), expected)


# Killed and continued


def _kill(stage: str, folder: Path, output_dir: Path, step: int) -> None:
    command = [sys.executable, str(WORKER), stage, str(folder), str(output_dir)]
    command += ["--kill-at", str(step), "--eval-steps", "4"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert finished.returncode == -signal.SIGKILL, finished.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "killed_at", "checkpoint"), [("finetune", 18, 16), ("distill", 23, 20)])
def test_a_killed_run_continues_to_the_same_weights(
    finetuned: Path, tmp_path: Path, stage: str, killed_at: int, checkpoint: int
) -> None:
    # 10 steps an epoch, a checkpoint every 4: killed in the middle of the second epoch, or at the start of the third
    # after a checkpoint that ends the second, so both ways of continuing the data order are taken
    output_dir = tmp_path / "killed"
    _kill(stage, finetuned, output_dir, killed_at)
    assert not output_dir.exists()
    checkpoints = tmp_path / "killed.checkpoints"
    found = last_checkpoint(checkpoints)
    assert found is not None
    assert found.name == f"checkpoint-{checkpoint}"

    with pytest.raises(FileExistsError, match=r"unfinished run; continue it with resume=True"):
        train(stage, load(finetuned), output_dir, eval_steps=4)
    with pytest.raises(ValueError, match=r"resume: .* started differently \(seed was 42, is 43\)"):
        train(stage, load(finetuned), output_dir, eval_steps=4, resume=True, seed=43)
    torch.rand(17)  # another state of the global generator than the killed process had
    resumed_model = load(finetuned)
    resumed = train(stage, resumed_model, output_dir, eval_steps=4, resume=True)
    whole_model = load(finetuned)
    whole = train(stage, whole_model, tmp_path / "whole", eval_steps=4)

    assert _changed(resumed_model, _state(whole_model)) == set()
    assert _changed(load(output_dir), _state(load(tmp_path / "whole"))) == set()
    assert resumed.metrics == whole.metrics
    assert resumed.steps == whole.steps == 30
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "eval_runtime")
    timed += ("eval_samples_per_second", "eval_steps_per_second", "total_flos")

    def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{name: value for name, value in entry.items() if name not in timed} for entry in history]

    assert untimed(resumed.log_history) == untimed(whole.log_history)
    assert _leftovers(tmp_path) == ["killed", "whole"]


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (4, 8, 12, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"epoch": 1.')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


@pytest.mark.parametrize("ends", ["by its steps", "by early stopping"])
def test_nothing_half_written_is_left_when_saving_fails(
    finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    tokenizer = tokenizer_of("bert")

    def out_of_space(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    options, dev = options_of("distill", max_steps=2), None
    if ends == "by early stopping":
        # a learning rate that makes every evaluation worse than the first
        options, dev = (
            replace(options, max_steps=9, eval_steps=1, learning_rate=10.0, early_stopping_patience=1),
            rows(20),
        )
    whole = distill(load(finetuned), rows(80), dev, tmp_path / "whole", options, tokenizer)
    with monkeypatch.context() as broken:
        broken.setattr(tokenizer, "save_pretrained", out_of_space)
        with pytest.raises(OSError, match="no space left"):
            distill(load(finetuned), rows(80), dev, tmp_path / "out", options, tokenizer)
    assert _leftovers(tmp_path) == ["out.checkpoints", "whole"]
    options = replace(options, resume=True)
    result = distill(load(finetuned), rows(80), dev, tmp_path / "out", options, tokenizer)
    assert result.steps == whole.steps < 9
    assert _leftovers(tmp_path) == ["out", "whole"]
    found, expected = (load(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_finished_folder_is_replaced_only_when_told(finetuned: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is free
    train("distill", load(finetuned), tmp_path / "out", max_steps=1)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out already exists; choose another, or pass overwrite=True"):
        train("distill", load(finetuned), tmp_path / "out", max_steps=1)
    assert (tmp_path / "out" / "notes.txt").exists()
    with pytest.raises(FileExistsError, match=r"out holds notes\.txt, which is yours and would be lost"):
        train("distill", load(finetuned), tmp_path / "out", max_steps=1, overwrite=True)
    before = (tmp_path / "out" / LOG_FILE).read_text()
    (tmp_path / "out" / "notes.txt").unlink()
    train("distill", load(finetuned), tmp_path / "out", max_steps=1, overwrite=True)
    assert (tmp_path / "out" / LOG_FILE).read_text() != before
    assert _leftovers(tmp_path) == ["out"]


def test_a_file_of_the_user_among_the_checkpoints_stays(finetuned: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "out.checkpoints"

    class Notes(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (Path(args.output_dir) / "notes.txt").write_text("mine")

    options = DistillOptions(max_steps=1, max_length=16, progress=False)
    texts = [row["text_a"] for row in rows(20).dataset]
    distill(load(finetuned), texts, None, tmp_path / "out", options, tokenizer_of("bert"), callbacks=[Notes()])
    assert [path.name for path in checkpoints.iterdir()] == ["notes.txt"]
    (checkpoints / "run.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"needed for the checkpoints, but holds notes\.txt"):
        train("distill", load(finetuned), tmp_path / "out", max_steps=1, overwrite=True)
    assert (checkpoints / "notes.txt").read_text() == "mine"


# Two processes


def _losses(folder: Path) -> list[float]:
    log = json.loads((folder / LOG_FILE).read_text())
    return [entry["loss"] for entry in log["log_history"] if "loss" in entry]


def _without_dropout(plain: Path, folder: Path) -> Path:
    """So that any number of processes sees the same network."""
    model = load(plain, num_labels=2)
    model.config.backbone.hidden_dropout_prob = model.config.backbone.attention_probs_dropout_prob = 0.0
    model.config.head_dropout = 0.0
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_torchrun_trains_like_one_process(plain: Path, tmp_path: Path) -> None:
    """Fine-tuned and distilled by two processes, and begun by one and continued by two, and the other way round."""
    still = _without_dropout(plain, tmp_path / "still")
    options = {"learning_rate": 1e-4, "eval_steps": 4}
    with pytest.raises(Stopped):
        train("finetune", load(still), tmp_path / "one_then_two", stop_at=18, **options)
    finished = torchrun(
        WORKER, "finetune", still, tmp_path / "two", "--batch-size", "4", "--learning-rate", "1e-4",
        "--eval-steps", "4", "--then-distill", tmp_path / "two_distilled", "--then-resume", tmp_path / "one_then_two",
        "--then-stop", tmp_path / "two_then_one",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr

    with pytest.raises(ValueError, match=r"started differently \(batch_size times processes was 8, is 4\)"):
        train("finetune", load(still), tmp_path / "two_then_one", resume=True, batch_size=4, **options)
    train("finetune", load(still), tmp_path / "two_then_one", resume=True, **options)
    train("finetune", load(still), tmp_path / "one", **options)
    train("distill", load(tmp_path / "one"), tmp_path / "one_distilled", **options)
    logs = [json.loads((tmp_path / name / LOG_FILE).read_text()) for name in ("one", "two", "one_then_two")]
    assert [log["processes"] for log in logs] == [1, 2, 2]
    expected = _losses(tmp_path / "one")
    assert len(expected) == 30
    for name in ("two", "one_then_two", "two_then_one"):
        assert _losses(tmp_path / name) == pytest.approx(expected, rel=1e-3), name
        # the kept weights are those of the best evaluation
        log = json.loads((tmp_path / name / LOG_FILE).read_text())
        found = _accuracies(load(tmp_path / name), rows(40, seed=1))[-1]
        best = max(entry["eval_accuracy"] for entry in log["log_history"] if "eval_accuracy" in entry)
        assert found == pytest.approx(log["metrics"]["accuracy"]) == best
    batch = random_batch()
    batch["input_ids"] %= len(tokenizer_of("bert"))
    with torch.no_grad():
        torch.testing.assert_close(
            load(tmp_path / "two_distilled").all_exit_logits(**batch),
            load(tmp_path / "one_distilled").all_exit_logits(**batch),
            rtol=0.02, atol=0.02,
        )  # fmt: skip
    # the first process alone has written, and nothing of a run is left
    assert _leftovers(tmp_path) == [
        "one", "one_distilled", "one_then_two", "still", "two", "two_distilled", "two_then_one",
    ]  # fmt: skip


@pytest.mark.slow
def test_weights_spread_over_processes_learn_the_same(plain: Path, tmp_path: Path) -> None:
    """FSDP2, of a run that one process began and of one that one process continues."""
    still = _without_dropout(plain, tmp_path / "still")
    options = {"learning_rate": 1e-4, "eval_steps": 4}
    with pytest.raises(Stopped):
        train("finetune", load(still), tmp_path / "one_then_two", stop_at=18, **options)
    finished = torchrun(
        WORKER, "finetune", still, tmp_path / "two", "--batch-size", "4", "--learning-rate", "1e-4",
        "--eval-steps", "4", "--fsdp", "--then-distill", tmp_path / "two_distilled",
        "--then-resume", tmp_path / "one_then_two", "--then-stop", tmp_path / "two_then_one",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    train("finetune", load(still), tmp_path / "two_then_one", resume=True, **options)
    train("finetune", load(still), tmp_path / "one", **options)
    train("distill", load(tmp_path / "one"), tmp_path / "one_distilled", **options)
    expected = _losses(tmp_path / "one")
    for name in ("two", "one_then_two", "two_then_one"):
        assert _losses(tmp_path / name) == pytest.approx(expected, rel=1e-3), name
        log = json.loads((tmp_path / name / LOG_FILE).read_text())
        found = _accuracies(load(tmp_path / name), rows(40, seed=1))[-1]
        assert found == pytest.approx(log["metrics"]["accuracy"])
    assert _losses(tmp_path / "two_distilled") == pytest.approx(_losses(tmp_path / "one_distilled"), rel=1e-3)


def test_several_gpus_of_one_process_are_never_data_parallel(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretended(self: TrainingArguments) -> torch.device:
        self._n_gpu = 4
        self.distributed_state = PartialState(cpu=True)
        return torch.device("cpu")

    class Unseen(torch.nn.Module):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("DataParallel")

    found = cached_property(pretended)
    found.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", found)
    monkeypatch.setattr(torch.nn, "DataParallel", Unseen)
    with pytest.warns(UserWarning, match=r"sees 4 GPUs and trains on the first; torchrun --nproc-per-node=4 trains on"):
        result = train("finetune", load(plain, num_labels=2), tmp_path / "out", max_steps=2)
    assert result.steps == 2
    assert json.loads((tmp_path / "out" / LOG_FILE).read_text())["rows_a_step"] == 8


def test_sharding_is_refused_before_anything_is_written(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"fsdp: heads and engines read whole weights, .* and pass fsdp=True"):
        train("finetune", load(plain, num_labels=2), tmp_path / "out", max_steps=1)
    assert _leftovers(tmp_path) == []


# Refused before any work


def _with(dataset: Rows, **changes: Any) -> Rows:
    return replace(dataset, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"train": rows(8, labelled=False)}, "train: generated sentences 0 has no labels; fine-tuning needs"),
        (lambda: {"dev": rows(8, labelled=False)}, "dev: .* has no labels"),
        (
            lambda: {"train": _with(rows(8), num_labels=3, label_names=None)},
            "3 labels, the model has 2 labels; load",
        ),
        (lambda: {"train": _with(rows(8), num_labels=1)}, r"has a number as its label \(regression\), the model has 2"),
        (
            lambda: {"dev": _with(rows(8), label_names=("positive", "negative"))},
            r"dev: .* the labels positive, negative, the model has negative, positive; .*label_names=\['negative', ",
        ),
        (lambda: {"options": options_of("finetune", max_length=67)}, "max_length: got 67, the model has 66 positions"),
        (
            lambda: {"options": options_of("finetune", early_stopping_patience=1), "dev": None},
            "early_stopping_patience: it needs an evaluation; pass dev rows",
        ),
    ],
)
def test_finetune_refuses(finetuned: Path, tmp_path: Path, make: Callable[[], dict[str, Any]], message: str) -> None:
    arguments = {"train": rows(8), "dev": rows(8), "options": options_of("finetune"), **make()}
    with pytest.raises(ValueError, match=message):
        finetune(load(finetuned), output_dir=tmp_path / "out", tokenizer=tokenizer_of("bert"), **arguments)
    assert _leftovers(tmp_path) == []


def test_data_errors_are_data_errors(finetuned: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no labels"):
        finetune(
            load(finetuned), rows(8, labelled=False), None, tmp_path / "out", FinetuneOptions(), tokenizer_of("bert")
        )


def test_weights_that_cannot_be_trained(finetuned: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights to be trained are torch\.bfloat16, expected torch\.float32"):
        train("finetune", load(finetuned, dtype=torch.bfloat16), tmp_path / "out")
    assert _leftovers(tmp_path) == []


def test_a_tokenizer_of_another_model(finetuned: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bert")
    tokenizer.add_tokens([f"new{i}" for i in range(400)])
    with pytest.raises(ValueError, match=r"tokenizer: it has 426 tokens, the model embeds 320"):
        finetune(load(finetuned), rows(8), None, tmp_path / "out", FinetuneOptions(), tokenizer)


def test_a_model_without_students(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"heads after the layers \[4\] only"):
        train("distill", load(plain, num_labels=2, exit_layers=[4]), tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", 0), ("learning_rate", -1e-3), ("learning_rate", float("nan")), ("warmup", 1.0), ("max_steps", 0)],
)
def test_option_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option}: got {value!r}, expected"):
        FinetuneOptions(**{option: value})


@pytest.mark.parametrize(("option", "value"), [("min_steps", -1), ("states_gib", -0.5)])
def test_distill_number_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option}: got {value}, expected 0 or more"):
        DistillOptions(**{option: value})


def test_distill_option_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"temperature: got 0, expected a number above 0"):
        DistillOptions(temperature=0)
    with pytest.raises(ValueError, match=r"direction: got 'both', expected 'forward' or 'reverse'"):
        DistillOptions(direction="both")


def test_unnamed_labels_may_lack_the_last_classes(plain: Path, tmp_path: Path) -> None:
    model = load(plain, num_labels=3)
    few = Rows(datasets.Dataset.from_dict({"text_a": ["a film", "the plot"], "label": [0, 1]}), None, 2, "few rows")
    options = options_of("finetune", epochs=1)
    finetune(model, few, None, tmp_path / "out", options, tokenizer_of("bert"))
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_the_package_offers_training_without_importing_it() -> None:
    code = "import sys, fastkd; assert 'fastkd.training.harness' not in sys.modules; fastkd.distill, fastkd.load_folder"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=240)
    with pytest.raises(AttributeError, match="has no attribute 'finetun'"):
        _ = fastkd.finetun


# What transformers.Trainer is asked for, and starts that fail


@pytest.mark.parametrize("stage", ["finetune", "distill"])
@pytest.mark.parametrize("arguments", [{"gradient_checkpointing": True}, {"neftune_noise_alpha": 5.0}])
def test_options_of_the_trainer_reach_the_model(
    finetuned: Path, tmp_path: Path, stage: str, arguments: dict[str, Any]
) -> None:
    model = load(finetuned)
    seen = set()
    model.get_input_embeddings().register_forward_hook(
        lambda module, *_: seen.add((recomputes_activations(model), hasattr(module, "neftune_noise_alpha")))
    )
    train(stage, model, tmp_path / "out", max_steps=2, trainer_arguments=arguments)
    if stage == "distill":
        seen.discard((False, False))  # the table of speeds, which is measured afterwards
    assert seen == {("gradient_checkpointing" in arguments, "neftune_noise_alpha" in arguments)}
    # the model is given back as it was
    assert not recomputes_activations(model)
    assert not hasattr(model.get_input_embeddings(), "neftune_noise_alpha")


def test_recomputed_activations_change_no_weight(finetuned: Path, tmp_path: Path) -> None:
    states = []
    for name, arguments in (("plain", {}), ("recomputed", {"gradient_checkpointing": True})):
        model = load(finetuned)
        train("finetune", model, tmp_path / name, max_steps=3, trainer_arguments=arguments)
        states.append(_state(model))
    assert all(torch.equal(first, second) for first, second in zip(*map(dict.values, states), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "trainer_arguments: got label_smoothing_factor=0.1, but the loss is the obj"),
        (
            {"remove_unused_columns": True},
            "trainer_arguments: got remove_unused_columns=True, but rows have no unused columns",
        ),
        ({"output_dir": "elsewhere"}, "trainer_arguments: got output_dir='elsewhere', but checkpoints lie beside"),
        ({"label_names": ["other"]}, "trainer_arguments: got label_names="),
    ],
)
def test_options_of_the_trainer_that_an_objective_cannot_have(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options_of("finetune", trainer_arguments=arguments)


@pytest.mark.parametrize("stage", ["finetune", "distill"])
def test_a_refused_or_failed_start_is_in_nobodys_way(finetuned: Path, tmp_path: Path, stage: str) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory")

    run = finetune if stage == "finetune" else distill
    model, left = load(finetuned), tokenizer_of("bert")
    before = model.config.to_dict()
    left.padding_side = "left"
    with pytest.raises(ValueError, match=r"tokenizer: it pads on the left, where \[CLS\] is read; set"):
        run(model, rows(16), None, tmp_path / "out", options_of(stage), left)
    assert model.config.to_dict() == before
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, rows(16), None, tmp_path / "out", options_of(stage), tokenizer_of("bert"), [Fails()])
    with pytest.raises(TypeError, match="no_such_argument"):
        train(stage, model, tmp_path / "out", trainer_arguments={"no_such_argument": 1})
    assert _leftovers(tmp_path) == []
    train(stage, model, tmp_path / "out", max_steps=1)
    assert _leftovers(tmp_path) == ["out"]


def test_an_error_after_a_checkpoint_keeps_it(finetuned: Path, tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("out of memory")

    options = options_of("finetune", eval_steps=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune(load(finetuned), rows(80), rows(16), tmp_path / "out", options, tokenizer_of("bert"), [Fails()])
    assert last_checkpoint(tmp_path / "out.checkpoints") is not None


def _in_peft(name: str, base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A class as peft defines it."""
    return type(name, (base,), {"__module__": "peft.tuners.lora.layer"})


@pytest.mark.parametrize("stage", [finetune, distill])
def test_models_of_peft_are_refused(finetuned: Path, tmp_path: Path, stage: Any) -> None:
    wrapped: Any = _in_peft("PeftModel", torch.nn.Module)()
    with pytest.raises(TypeError, match=r"model: got a PeftModel of peft, .*; merge the adapter first"):
        stage(wrapped, rows(8), None, tmp_path / "out", options_of("finetune"), tokenizer_of("bert"))
    model = load(finetuned)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.layers[0].attention.self.query = _in_peft("Linear", torch.nn.Linear)(32, 32)
    with pytest.raises(ValueError, match=r"model: bert\.encoder\.layer\.0\.attention\.self\.query is a peft adapter"):
        stage(model, rows(8), None, tmp_path / "out", options_of("finetune"), tokenizer_of("bert"))
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert _leftovers(tmp_path) == []
