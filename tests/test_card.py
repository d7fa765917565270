"""The model card of a saved folder: true, runnable, kept where somebody else wrote it, and pushed to the hub."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from tiny_models import early_exit_model, one_thread, random_batch, tokenizer_of

import fastkd
from fastkd.data.own_files import CARD_MARK
from fastkd.model import card

__all__ = ["one_thread"]

TRAIN = [("the film was good", 1), ("a bad plot", 0), ("the actor was not dull", 1), ("cold and boring", 0)]
DEV = [("a great film", 1), ("a dull actor", 0)]
OPTIONS: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "max_length": 12, "progress": False, "bf16": False}


def read(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def run_blocks(text: str, folder: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block.replace(card.PLACE, str(folder)), names)
    return names


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "gte"])
def test_its_code_runs(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = early_exit_model(family, num_labels=2, id2label={0: "bad", 1: "good"})
    model.save_pretrained(tmp_path)
    tokenizer_of("distilbert" if family == "distilbert" else "bert").save_pretrained(tmp_path)
    text = read(tmp_path)
    encoder = run_blocks(text, tmp_path)["encoder"].eval()
    answers = capsys.readouterr().out
    assert "exit_layer" in answers
    assert "bad" in answers or "good" in answers
    batch = random_batch(family)
    with torch.no_grad():
        own = model.backbone(**batch).last_hidden_state
        assert torch.equal(encoder(**batch).last_hidden_state, own)
    meta = yaml.safe_load(text.split("---")[1])
    assert meta["library_name"] == "fastkd-kernels"
    assert meta["pipeline_tag"] == "text-classification"
    assert {*card.TAGS, family} == set(meta["tags"])
    assert "pip install fastkd-kernels" in text
    assert "2 classes (bad, good)" in text
    assert "after layers 1, 2, 3, 4" in text
    assert str(tmp_path) not in text


def test_an_encoder_in_int8_is_not_said_to_run_elsewhere(tmp_path: Path) -> None:
    model = early_exit_model().quantize()
    model.config.rank_certificate = {
        "top_k": 3, "recall": 1.0, "method": "fixed-sequence", "max_drop": 0.05, "confidence": 0.95,
        "half_widths": [0.5, 0.25, 0.125], "factor": 1.0, "label": 1, "exit_layers": [1, 2, 3, 4], "dtype": "int8",
        "n": 1200, "failures": 20, "bound": 0.03, "mean_recall": 0.99, "documents": 12.0, "speedup": 1.5,
        "average_layers": 2.5, "seq_len": 24, "data": "", "model": "", "seen_as": None,
        "date": "2026-01-02T00:00:00", "version": "0",
    }  # fmt: skip
    model.save_pretrained(tmp_path)
    text = read(tmp_path)
    assert "without fastkd" not in text
    assert "Its layers compute in int8" in text
    assert (
        "Ranking by `model.rank`, top 3, int8 weights: with 95% confidence at most 5% of queries get a different"
        in text
    )
    assert "1.50x fewer operations. Calibrated 2026-01-02 on 1,200 queries." in text


def test_it_says_what_the_trainings_and_the_calibration_found(tmp_path: Path) -> None:
    model, tokenizer = early_exit_model(num_labels=2), tokenizer_of("bert")
    fastkd.finetune(model, TRAIN, DEV, tmp_path / "tuned", fastkd.FinetuneOptions(**OPTIONS), tokenizer)
    tuned = read(tmp_path / "tuned")
    assert re.search(r"\| finetune train \| 4 \| \w{12} \|", tuned)
    assert "Not measured." in tuned
    assert "Only the last head is trained" in tuned
    assert "speed=0.5" not in tuned
    distilling = fastkd.DistillOptions(**OPTIONS, head_temperatures="none")
    fastkd.distill(model, TRAIN, DEV, tmp_path / "model", distilling, tokenizer)
    text = read(tmp_path / "model")
    assert re.search(r"\| distill dev \| 2 \|", text)
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) of 4 \| ([\d.]+)x \|$", text, re.MULTILINE)
    sweep = model.trace(DEV, tokenizer=tokenizer).sweep([0.0, 0.1, 0.3, 0.5, 0.8])
    assert rows == [
        (f"{row.speed:g}", f"{row.accuracy:.4f}", f"{row.average_layers:.2f}", f"{row.speedup['fastbert']:.2f}")
        for row in sweep
    ]
    assert "On the 2 dev rows" in text
    assert "None. `fastkd calibrate`" in text

    certificate = fastkd.calibrate(model.trace([random_batch(rows=400, longest=6, seed=4)]), 0.95, speeds=[0.05])
    certificate.apply(model, set_default=True)
    model.save_pretrained(tmp_path / "model")
    text = read(tmp_path / "model")
    assert str(certificate) in text
    assert "runs at 0.05" in text
    again = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path / "model")
    again.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again") == text
    with torch.no_grad():
        next(again.backbone.parameters()).add_(1)
    again.save_pretrained(tmp_path / "again")
    assert "found with other weights" in read(tmp_path / "again")
    fastkd.finetune(model, TRAIN, None, tmp_path / "anew", fastkd.FinetuneOptions(**OPTIONS), tokenizer)
    assert "Not measured." in read(tmp_path / "anew")
    assert str(certificate) not in read(tmp_path / "anew")


def test_a_regression_has_its_own_words(tmp_path: Path) -> None:
    model, tokenizer = early_exit_model(num_labels=1), tokenizer_of("bert")
    dev = [(text, 0.5 + index) for index, (text, _) in enumerate(TRAIN)]
    fastkd.finetune(model, dev, None, tmp_path / "tuned", fastkd.FinetuneOptions(**OPTIONS), tokenizer)
    fastkd.distill(model, TRAIN, dev, tmp_path / "model", fastkd.DistillOptions(**OPTIONS), tokenizer)
    text = read(tmp_path / "model")
    assert "answers a number" in text
    assert "| speed | pearson |" in text


def test_a_card_that_somebody_wrote_is_kept(tmp_path: Path) -> None:
    model = early_exit_model()
    model.save_pretrained(tmp_path)
    own = read(tmp_path).replace(CARD_MARK, "").replace("leaves early", "is mine")
    (tmp_path / "README.md").write_text(own, encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert read(tmp_path) == own


def test_an_adapter_has_a_card_too(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    base, tokenizer = early_exit_model(num_labels=2), tokenizer_of("bert")
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["value"], modules_to_save=["heads"])
    model = peft.get_peft_model(base, config)
    fastkd.distill(model, TRAIN, DEV, tmp_path / "model", fastkd.DistillOptions(**OPTIONS), tokenizer)
    text = read(tmp_path / "model")
    assert "holds a PEFT adapter" in text
    assert "without fastkd" not in text
    assert run_blocks(text, tmp_path / "model")["classify"]("a film")[0]["exit_layer"] >= 1


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the hub."""
    place = tmp_path / "hub"

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> Any:
        (place / repo_id).mkdir(parents=True, exist_ok=True)
        return type("Url", (), {"repo_id": repo_id})()

    def create_commit(self: HfApi, repo_id: str, operations: Any, **options: Any) -> str:
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, place / repo_id / operation.path_in_repo)
        return repo_id

    def load(repo_id: str, **options: Any) -> ModelCard:
        file = place / repo_id / "README.md"
        if not file.is_file():
            raise EntryNotFoundError("no card")
        return ModelCard(file.read_text(encoding="utf-8"))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", load)
    return place


def test_a_push_takes_the_card_along(hub: Path) -> None:
    model = early_exit_model()
    model.push_to_hub("me/classifier")
    tokenizer_of("bert").push_to_hub("me/classifier")
    pushed = hub / "me" / "classifier"
    text = read(pushed)
    assert 'model="me/classifier"' in text
    assert card.PLACE not in text
    again = fastkd.EarlyExitForSequenceClassification.from_pretrained(pushed).eval()
    batch = random_batch()
    with torch.no_grad():
        assert torch.equal(again(**batch, speed=0.5).logits, model(**batch, speed=0.5).logits)
    own = text.replace(CARD_MARK, "") + "\nMine.\n"
    (pushed / "README.md").write_text(own, encoding="utf-8")
    model.push_to_hub("me/classifier")
    assert read(pushed).endswith("\nMine.\n")
