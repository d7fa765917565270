"""What a configuration says about weights is held against the weights, wherever they were changed."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from tiny_models import (
    CONFIGS,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    tokenizer_of,
)
from training_worker import rows
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

import fastkd
from fastkd.commands import app
from fastkd.exits.certificate import CalibrationWarning, warn_if_uncertified
from fastkd.exits.fingerprints import WeightsSketch, file_fingerprint
from fastkd.kd.options import KDOptions
from fastkd.kd.trainer import KDTrainer
from fastkd.model.claims import ChangedWeightsWarning


def load(folder: Path, **options: Any) -> fastkd.EarlyExitForSequenceClassification:
    return fastkd.EarlyExitForSequenceClassification.from_pretrained(folder, **options).eval()


def certified(folder: Path) -> fastkd.EarlyExitForSequenceClassification:
    """A saved and certified model, which runs at its certified speed by default."""
    model = early_exit_model(num_labels=2)
    trace = model.trace([random_batch(rows=400, longest=6, seed=4)])
    fastkd.calibrate(trace, 0.6).apply(model, set_default=True)
    model.save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return load(folder)


def assert_warned(model: fastkd.EarlyExitForSequenceClassification) -> None:
    with pytest.warns(CalibrationWarning, match=r"it is for other weights: .*; calibrate again; nothing is promised"):
        assert warn_if_uncertified(model)
    with pytest.warns(ChangedWeightsWarning, match=r"were distilled for other weights .*; distil them again"):
        model(**random_batch())
    assert warn_if_uncertified(model, speed=0.0) == []


def assert_silent(model: fastkd.EarlyExitForSequenceClassification) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**random_batch())
    assert model.changed_weights() is None


def by_trainer(model: fastkd.EarlyExitForSequenceClassification) -> None:
    dataset = [{**{k: v[0] for k, v in random_batch(rows=1, seed=n).items()}, "labels": n % 2} for n in range(8)]
    arguments = TrainingArguments(
        "unused", report_to="none", use_cpu=True, max_steps=2, learning_rate=1e-3, save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=dataset).train()
    model.eval()


def by_state_dict(model: fastkd.EarlyExitForSequenceClassification) -> None:
    model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})


def by_merging(model: fastkd.EarlyExitForSequenceClassification) -> None:
    # as peft adds an adapter to the weights it was beside, which raises no version
    for layer in model.layers:
        query = layer.attention.self.query
        query.weight.data += 0.1 * torch.randn(32, 2) @ torch.randn(2, 32)
    model.last_head.classifier.weight.data += 0.1


def by_resizing(model: fastkd.EarlyExitForSequenceClassification) -> None:
    model.resize_token_embeddings(330)


@pytest.mark.parametrize("change", [by_trainer, by_state_dict, by_merging, by_resizing])
def test_changed_weights_void_what_was_said_of_them(
    tmp_path: Path, change: Callable[[fastkd.EarlyExitForSequenceClassification], None]
) -> None:
    model = certified(tmp_path / "model")
    assert warn_if_uncertified(model) == []
    change(model)
    assert_warned(model)
    model.save_pretrained(tmp_path / "changed")
    tokenizer_of("bert").save_pretrained(tmp_path / "changed")
    assert_warned(load(tmp_path / "changed"))
    told = CliRunner().invoke(app.app, ["info", str(tmp_path / "changed")])
    assert "void: the weights were changed since" in " ".join(told.output.split())
    # whoever answers for the new weights says so
    model.confirm_weights()
    assert warn_if_uncertified(model) == []
    model.save_pretrained(tmp_path / "confirmed")
    assert load(tmp_path / "confirmed").changed_weights() is None


@pytest.mark.parametrize("family", CONFIGS)
def test_other_dtypes_devices_files_and_wrappers_are_no_change(tmp_path: Path, family: str) -> None:
    early_exit_model(family).save_pretrained(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load(tmp_path / "model", dtype=dtype)
        assert model.changed_weights() is None
        model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        assert load(tmp_path / "shards").changed_weights() is None
        assert model.float().changed_weights() is None
    model = load(tmp_path / "model").half().float()
    assert model.changed_weights() is None
    assert copy.deepcopy(model).changed_weights() is None
    model.compile(backend="eager")
    assert model.changed_weights() is None


def test_wrappers_copies_and_older_models(tmp_path: Path) -> None:
    model = certified(tmp_path)
    assert_silent(model)
    assert warn_if_uncertified(torch.compile(model, backend="eager")) == []  # type: ignore[arg-type]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert_silent(again)
    # a model of a version that wrote no fingerprint: what changes it from now on is noticed
    old = (tmp_path / "config.json").read_text().replace('"weights_fingerprint"', '"unknown_to_us"')
    (tmp_path / "config.json").write_text(old)
    model = load(tmp_path)
    assert_silent(model)
    by_state_dict(model)
    model.save_pretrained(tmp_path / "changed")
    assert_warned(load(tmp_path / "changed"))


def test_pickled_weights_are_held_against_nothing(tmp_path: Path) -> None:
    model = certified(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert file_fingerprint(tmp_path) is None
    assert_silent(load(tmp_path))


def test_a_sketch_in_memory_is_that_of_the_file(tmp_path: Path) -> None:
    model = early_exit_model()
    model.save_pretrained(tmp_path)
    sketch = WeightsSketch.of(model.state_dict())
    assert sketch.fingerprint == file_fingerprint(tmp_path) == model.config.weights_fingerprint
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert file_fingerprint(tmp_path) != sketch.fingerprint
    assert load(tmp_path).changed_weights() == "the weights in the file are not those that its config.json describes"
    for damaged in (b"", b"\xff" * 30, bytes(weights[:200])):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        assert file_fingerprint(tmp_path) is None


@pytest.mark.parametrize("num_labels", [2])
def test_an_early_exit_student_of_kd_says_only_what_it_learned(tmp_path: Path, num_labels: int) -> None:
    student = certified(tmp_path / "before")
    options = KDOptions(max_steps=2, batch_size=8, bf16=False, progress=False, max_length=16)
    trained = rows(16)
    KDTrainer(None, student, "none", options, tokenizer=tokenizer_of("bert")).train(trained, rows(8, 1), tmp_path / "K")
    saved = load(tmp_path / "K")
    for model in (student, saved):
        config = model.config
        assert (config.certificate, config.exits_trained, config.speed) == (None, False, 0.0)
        assert config.training_data == {"kd train": trained.digest(), "kd dev": rows(8, 1).digest()}
        assert model.changed_weights() is None
        with pytest.raises(ValueError, match="never trained"):
            model(**random_batch(), speed=0.5)
