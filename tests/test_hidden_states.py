"""fastkd.training.hidden_states: what heads learn from memory is what they would learn from the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from tiny_models import early_exit_model, one_thread, tokenizer_of  # noqa: F401  # a fixture
from training_worker import load, options_of, rows, save_plain, train

from fastkd.data.batches import padding_collator, tokenize
from fastkd.training.hidden_states import HiddenStates
from fastkd.training.self_distillation import distill


def _kept(model: Any, count: int, family: str) -> tuple[HiddenStates, Any]:
    tokens = tokenize(rows(count), tokenizer_of(family), 16)
    collator = padding_collator(tokenizer_of(family))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=False)
    return HiddenStates.of(model, tokens, collator, 4, autocast), (tokens, collator)


@pytest.mark.parametrize(
    ("family", "options"),
    [("bert", {}), ("bert", {"pool": "mean"}), ("bert", {"exit_layers": [2, 3]}), ("modernbert", {}),
     ("roberta", {"head": "linear"}), ("bert", {"learned_exit": True})],
    ids=["bert", "mean", "some layers", "final norm", "linear", "learned exit"],
)  # fmt: skip
def test_exits_are_those_of_the_model(family: str, options: dict[str, Any]) -> None:
    model = early_exit_model(family, **options).eval()
    states, (tokens, collator) = _kept(model, 21, family)
    for chosen in ([3], [20, 0, 7, 7, 11], list(range(21))):
        batch = collator([tokens.remove_columns(["length", "labels"])[row] for row in chosen])
        with torch.no_grad():
            expected, expected_odds = model.all_exits(**batch)
            logits, odds = states.exits(model, torch.tensor(chosen))
        # batches of other shapes are multiplied by other kernels, which round otherwise
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert (odds is None) == (expected_odds is None)
        if odds is not None and expected_odds is not None:
            torch.testing.assert_close(odds[:, :-1], expected_odds[:, :-1], rtol=1e-4, atol=1e-5)
    assert HiddenStates.size(model, tokens) == sum(kept.numel() * 4 for kept in states.states)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    plain = save_plain(folder / "plain")
    return train("finetune", load(plain, num_labels=2), folder / "finetuned").output_dir


def _distilled(folder: Path, output: Path, **changes: Any) -> tuple[Any, dict[str, float], int]:
    """The model, its metrics, and how many rows the first layer saw while it was trained."""
    model = load(folder)
    seen: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    options = options_of("distill", **changes)
    done = distill(model, rows(80), rows(40, seed=1, labelled=False), output, options, tokenizer_of("bert"))
    return model, done.metrics, sum(seen)


@pytest.mark.slow
def test_the_backbone_runs_once_a_row_and_the_heads_learn_the_same(finetuned: Path, tmp_path: Path) -> None:
    kept, metrics, seen = _distilled(finetuned, tmp_path / "kept")
    anew, expected, seen_anew = _distilled(finetuned, tmp_path / "anew", states_gib=0)
    # the heads' temperatures ask for the dev rows once more
    assert (seen, seen_anew) == (80 + 40, 3 * (80 + 40) + 40)
    assert metrics == pytest.approx(expected, rel=1e-4)
    for (name, ours), (_, theirs) in zip(kept.heads.named_parameters(), anew.heads.named_parameters(), strict=True):
        if "key.bias" not in name:  # it cancels in the softmax: its gradient is rounding noise
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("changes", "rows_seen"),
    [
        ({"frozen_dropout": True}, 3 * (80 + 40) + 40),
        ({"epochs": 1}, 80 + 40),
        ({"max_steps": 5, "eval_steps": 5}, 40 + 40),
        # the dev rows fit, the training rows do not
        ({"states_gib": 40 * 16 * 32 * 3 * 4 / 2**30}, 3 * 80 + 40),
    ],
    ids=["dropout", "one epoch", "less than an epoch", "little memory"],
)
def test_states_are_kept_where_that_saves_work_and_fits(
    finetuned: Path, tmp_path: Path, changes: dict[str, Any], rows_seen: int
) -> None:
    assert _distilled(finetuned, tmp_path / "out", **changes)[2] == rows_seen
