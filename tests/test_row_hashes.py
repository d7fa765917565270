"""Rows that training has seen are recognised one by one, in a subset and in another order, and told of or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import datasets
import numpy as np
from tiny_models import early_exit_model, one_thread, tokenizer_of  # noqa: F401  # a fixture
from training_worker import options_of, rows
from typer.testing import CliRunner

import fastkd
from fastkd.commands.app import app
from fastkd.data.row_hashes import DuplicateRowsWarning, count_shared, row_hashes, warn_about_duplicates
from fastkd.data.rows import Rows
from fastkd.exits.calibration import CalibrationError
from fastkd.exits.certificate import CalibrationWarning
from fastkd.exits.trace import ExitTrace
from fastkd.inference.trace_rows import trace_rows
from fastkd.model.seen_rows import SEEN_ROWS, load_seen_rows
from fastkd.training.finetune import finetune
from fastkd.training.self_distillation import distill


def rows_of(*texts: str, seconds: tuple[str, ...] | None = None) -> Rows:
    columns = {"text_a": list(texts)} | ({} if seconds is None else {"text_b": list(seconds)})
    return Rows(datasets.Dataset.from_dict(columns), None, None, "made up")


def part_of(source: Rows, numbers: range, other: Rows) -> Rows:
    """Some rows of `source`, and all of the other."""
    dataset = datasets.concatenate_datasets([source.dataset.select(numbers), other.dataset])
    return replace(source, dataset=dataset)


def test_rows_are_a_set_of_texts() -> None:
    assert count_shared(row_hashes(rows_of("a", "b", "c")), row_hashes(rows_of("c", "x", "a"))) == 2
    first, second = rows_of("a b", seconds=("c",)), rows_of("a", seconds=("b c",))
    assert count_shared(row_hashes(first), row_hashes(second)) == 0
    labelled = rows(20)
    unlabelled = replace(labelled, dataset=labelled.dataset.remove_columns("label"), label_names=None, num_labels=None)
    assert np.array_equal(row_hashes(labelled), row_hashes(unlabelled))
    assert row_hashes(rows_of()).shape == (0,)


def test_duplicates_between_splits_are_told() -> None:
    with pytest.warns(DuplicateRowsWarning, match=r"test: 1 of its 2 rows are in train too") as told:
        warn_about_duplicates({"train": rows_of("a", "b"), "dev": rows_of("c"), "test": rows_of("b", "d")})
    assert len(told) == 1


def test_a_calibration_knows_the_rows_of_the_training(tmp_path: Path) -> None:
    model, tokenizer = early_exit_model(num_labels=2), tokenizer_of("bert")
    train, dev = rows(60), replace(rows(40, 7), source="dev")
    options, same = options_of("finetune", max_steps=1), replace(train, dataset=train.dataset.select(range(40)))
    with pytest.warns(DuplicateRowsWarning, match="dev: 40 of its 40 rows are in train too"):
        finetune(model, train, same, tmp_path / "F", options, tokenizer)
    distill(model, train, dev, tmp_path / "D", options_of("distill", max_steps=1), tokenizer)
    loaded = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path / "D").eval()
    assert sorted(loaded.seen_rows) == ["distill dev", "distill train", "finetune dev", "finetune train"]

    def traced(calibration: Rows) -> ExitTrace:
        return trace_rows(loaded, tokenizer, calibration)

    new = rows(400, 99)
    fresh = traced(new)
    assert fresh.source.seen_anywhere == count_shared(row_hashes(new), row_hashes(part_of(train, range(60), dev)))
    mixed = traced(part_of(train, range(10, 30), new).sample(10**6))
    assert mixed.source.seen_anywhere - fresh.source.seen_anywhere == 20
    assert mixed.source.seen["distill dev"] == fresh.source.seen["distill dev"]
    mixed.save(tmp_path / "mixed.safetensors")
    assert ExitTrace.load(tmp_path / "mixed.safetensors").source == mixed.source
    with pytest.raises(CalibrationError, match=r"2\d of these 420 rows were in the training .* distill train rows"):
        fastkd.calibrate(mixed, 0.9)
    with pytest.warns(CalibrationWarning, match="the guarantee does not hold"):
        assert fastkd.calibrate(mixed, 0.9, allow_seen=True).seen_as in ("finetune train", "distill train")
    few = replace(fresh, source=replace(fresh.source, seen={"finetune train": 4}, seen_anywhere=4))
    with pytest.warns(CalibrationWarning, match=r"4 of these 400 rows .*; so few are allowed"):
        assert fastkd.calibrate(few, 0.9).seen_as is None


def test_damaged_hashes_are_one_sentence(tmp_path: Path) -> None:
    assert load_seen_rows(tmp_path) == {}
    (tmp_path / SEEN_ROWS).write_bytes(b"broken")
    with pytest.raises(ValueError, match=rf"{SEEN_ROWS} is damaged .*; copy the model again"):
        load_seen_rows(tmp_path)


def test_finetune_tells_of_duplicates_in_the_test_split(tmp_path: Path) -> None:
    lines = [f"{number % 2}\tthe film number {number} was good" for number in range(8)]
    for name, chosen in (("train", lines), ("test", [*lines[:2], "1\tnew"])):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["label\ttext_a", *chosen]) + "\n", encoding="utf-8")
    early_exit_model(num_labels=2).backbone.save_pretrained(tmp_path / "plain")
    tokenizer_of("bert").save_pretrained(tmp_path / "plain")
    command = ["finetune", tmp_path / "plain", "--data", tmp_path, "-o", tmp_path / "out", "--max-steps", "1"]
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert result.exit_code == 0, result.output
    assert "test: 2 of its 3 rows are in train too" in " ".join(result.output.split())
