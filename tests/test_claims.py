"""What a configuration says about weights is held against the weights, wherever they were changed."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONFIGS,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    tokenizer_of,
)
from training_worker import rows
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
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
    model.last_head.out_proj.weight.data += 0.1


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
    assert "void: the weights have changed since" in " ".join(told.output.split())
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


def weights_of_others(folder: Path) -> None:
    """Put other weights under the configuration of a saved model, as a stray copy does."""
    path = folder / "model.safetensors"
    state = {name: value + 0.01 for name, value in load_file(path).items()}
    save_file(state, path, {"format": "pt"})


def as_on_the_hub(cache: Path, folder: Path) -> dict[str, Any]:
    """The arguments that load a folder by a hub name, from a cache as the hub's client leaves it."""
    place = cache / "models--someone--news"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    (place / "snapshots" / ("0" * 40)).symlink_to(folder.resolve(), target_is_directory=True)
    return {"cache_dir": cache, "local_files_only": True}


def test_models_by_hub_name_are_held_against_their_file(tmp_path: Path) -> None:
    model = certified(tmp_path / "model")
    model.seen_rows = {"finetune train": np.array([1, 2], np.int64)}
    model.save_pretrained(tmp_path / "model")
    hub = as_on_the_hub(tmp_path / "cache", tmp_path / "model")
    loaded = load(Path("someone/news"), **hub)
    assert_silent(loaded)
    assert loaded.seen_rows["finetune train"].tolist() == [1, 2]
    weights_of_others(tmp_path / "model")
    assert_warned(load(Path("someone/news"), **hub))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("zipped", [True, False])
def test_legacy_files_are_held_against_their_configuration(tmp_path: Path, shards: int, zipped: bool) -> None:
    certified(tmp_path)
    for change in (False, True):
        if change:
            weights_of_others(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        names = sorted(state)
        parts = [names[:9], names[9:]] if shards == 2 else [names]
        files = ["pytorch_model.bin"] if shards == 1 else ["pytorch_model-1.bin", "pytorch_model-2.bin"]
        for file, part in zip(files, parts, strict=True):
            chosen = {name: state[name] for name in part}
            torch.save(chosen, tmp_path / file, _use_new_zipfile_serialization=zipped)
        if shards == 2:
            index = {"metadata": {}, "weight_map": {n: f for f, part in zip(files, parts, strict=True) for n in part}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (tmp_path / "model.safetensors").rename(tmp_path / "kept")
        model = load(tmp_path)
        told = CliRunner().invoke(app.app, ["info", str(tmp_path)])
        (tmp_path / "kept").rename(tmp_path / "model.safetensors")
        # the format before torch 1.6 cannot be mapped, and reading it a second time would take as long as the first
        if change and zipped:
            assert_warned(model)
        else:
            assert_silent(model)
        assert ("void:" in told.output) == (change and zipped)


def test_a_model_built_from_a_saved_configuration_is_held_against_it(tmp_path: Path) -> None:
    model = certified(tmp_path)
    config, state = model.config, model.state_dict()
    built = AutoModelForSequenceClassification.from_config(config).eval()
    assert_warned(built)
    built.load_state_dict(state)
    assert_silent(built)
    built.load_state_dict({name: value + 0.01 for name, value in state.items()})
    assert_warned(built)
    built.save_pretrained(tmp_path / "again")
    assert_warned(load(tmp_path / "again"))
    model.save_pretrained(tmp_path / "handed", state_dict={name: value * 1.5 for name, value in state.items()})
    assert_warned(load(tmp_path / "handed"))
    # rounded weights have another fingerprint, which says nothing
    rounded = AutoModelForSequenceClassification.from_config(config)
    rounded.load_state_dict(state)
    assert_silent(rounded.bfloat16().eval())
    fresh = early_exit_model()
    assert fresh.config.weights_fingerprint is None
    assert_silent(fresh)
