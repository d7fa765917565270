"""fastkd.training.head_temperatures: every head is as certain as its agreement with the last one allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from tiny_models import early_exit_model, one_thread, random_batch, tokenizer_of  # noqa: F401  # a fixture
from training_worker import load, options_of, rows, save_plain, train

from fastkd import DistillOptions
from fastkd.training.head_temperatures import (
    HEAD_TEMPERATURES,
    agreement_temperatures,
    divide_logits,
    probability_temperatures,
)
from fastkd.training.self_distillation import distill


@pytest.mark.parametrize("classes", [2, 5])
def test_a_head_gets_the_temperature_that_its_answers_were_drawn_with(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    certain = 3 * torch.randn(20_000, classes, generator=generator)
    drawn = certain.softmax(-1).multinomial(1, generator=generator)[:, 0]
    last = 9 * torch.nn.functional.one_hot(drawn, classes).float()
    # heads that are over-confident by 4, right, and half as certain as they may be
    early = torch.stack([4 * certain, certain, certain / 2], dim=1)
    assert agreement_temperatures(early, last) == pytest.approx([4, 1, 0.5], rel=0.05)


def test_the_temperature_is_the_lowest_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    early, last = torch.randn(50, 1, 3, generator=generator), torch.randn(50, 3, generator=generator)
    (found,) = agreement_temperatures(early, last)
    target = torch.nn.functional.one_hot(last.argmax(-1), 3).double() * 50 / 53 + 1 / 53

    def loss(temperature: float) -> float:
        return -(target * (early[:, 0].double() / temperature).log_softmax(-1)).sum(-1).mean().item()

    assert loss(found) <= min(loss(found * 1.02), loss(found / 1.02))


def test_a_head_is_made_as_certain_as_the_last_one() -> None:
    last = torch.randn(500, 4, generator=torch.Generator().manual_seed(2))
    early = torch.stack([3 * last, last, last / 2 + 5], dim=1)
    assert probability_temperatures(early, last) == pytest.approx([3, 1, 0.5], rel=1e-3)


def test_a_head_that_is_always_right_is_not_infinitely_certain() -> None:
    last = torch.tensor([[2.0, -2.0], [-2.0, 2.0]]).repeat(10, 1)
    few, many = (agreement_temperatures(last[:n, None], last[:n])[0] for n in (4, 20))
    assert 0.05 < many < few


@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_temperatures_are_in_the_weights(head: str) -> None:
    model = early_exit_model("bert", head=head).eval()
    batch = random_batch()
    with torch.no_grad():
        before = model.all_exit_logits(**batch)
        divide_logits(model.early_heads, [2.0, 0.5, 4.0])
        after = model.all_exit_logits(**batch)
    torch.testing.assert_close(after * torch.tensor([2, 0.5, 4, 1])[:, None], before)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    return train("finetune", load(save_plain(folder / "plain"), num_labels=2), folder / "finetuned").output_dir


def _distilled(folder: Path, output: Path, dev: Any, **changes: Any) -> tuple[Any, dict[str, float]]:
    model = load(folder)
    done = distill(model, rows(80), dev, output, options_of("distill", **changes), tokenizer_of("bert"))
    return model, done.metrics


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["answers", "probabilities"])
def test_distill_gives_temperatures_that_every_engine_and_the_saved_model_have(
    finetuned: Path, tmp_path: Path, kind: str
) -> None:
    dev = rows(40, seed=1)
    changes = {} if kind == DistillOptions().head_temperatures else {"head_temperatures": kind}
    model, metrics = _distilled(finetuned, tmp_path / "with", dev, **changes)
    plain, plain_metrics = _distilled(finetuned, tmp_path / "without", dev, head_temperatures="none")
    found = [metrics[f"temperature_layer_{layer}"] for layer in (1, 2, 3)]
    with torch.no_grad():
        before = plain.trace(dev, tokenizer=tokenizer_of("bert"), max_length=16).logits
        after = load(tmp_path / "with").trace(dev, tokenizer=tokenizer_of("bert"), max_length=16).logits
        torch.testing.assert_close(after * torch.tensor([*found, 1])[:, None], before, rtol=1e-4, atol=1e-5)
        # nothing is left to gain on these rows
        fitted = HEAD_TEMPERATURES[kind]
        assert fitted is not None
        assert fitted(after[:, :-1], after[:, -1]) == pytest.approx([1, 1, 1], rel=1e-2)
        packed, padded = (model(**random_batch(), speed=0.3, engine=engine) for engine in ("packed", "batch"))
    assert torch.equal(packed.exit_layer, padded.exit_layer)
    # no head answers otherwise; what its uncertainty lets leave does change
    for layer in (1, 2, 3, 4):
        assert metrics[f"accuracy_layer_{layer}"] == plain_metrics[f"accuracy_layer_{layer}"]
    assert metrics["loss"] == plain_metrics["loss"]
    early = model.trace(dev, tokenizer=tokenizer_of("bert"), max_length=16).sweep([0.5], seq_len=16)[0]
    assert metrics["accuracy_speed_0.5"] == pytest.approx(early.accuracy)


@pytest.mark.parametrize(
    ("dev", "changes"), [(None, {}), (rows(20, seed=1), {"learned_exit": True})], ids=["no dev", "learned exit"]
)
def test_where_there_are_none(finetuned: Path, tmp_path: Path, dev: Any, changes: dict[str, Any]) -> None:
    _, metrics = _distilled(finetuned, tmp_path / "out", dev, max_steps=2, **changes)
    assert not [name for name in metrics if name.startswith("temperature")]
