"""The engine that ranks: documents that cannot reach the top k are not computed, the others as the full model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_replay import model_of
from tiny_models import early_exit_model, one_thread, random_batch, row_of

from fastkd.encoders.layout import TokenLayout
from fastkd.engines import rank
from fastkd.engines.stream_reader import EncodedRow
from fastkd.exits.ranking import RankRule

__all__ = ["one_thread"]


def rows_of(batch: dict[str, torch.Tensor]) -> list[EncodedRow]:
    rows = []
    for index in range(batch["input_ids"].shape[0]):
        row = {name: values[0].tolist() for name, values in row_of(batch, index).items()}
        rows.append(EncodedRow(index, index, len(row["input_ids"]), row["input_ids"], row.get("token_type_ids"), 0.0))
    return rows


def first(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 0].float()


def by_hand(scores: torch.Tensor, rule: RankRule, layers: list[int]) -> torch.Tensor:
    """The layer after which each document leaves, from its scores [n, K] at all heads."""
    left = torch.full((scores.shape[0],), layers[-1])
    here, before = torch.arange(scores.shape[0]), None
    for index, layer in enumerate(layers[:-1]):
        stays = rule.staying(layer, scores[here, index], None if before is None else before[here])
        left[here[~stays]] = layer
        here, before = here[stays], scores[:, index]
    return left


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2"])
@pytest.mark.parametrize("tokens_per_run", [1, 40, 4096])
def test_documents_leave_where_the_scores_of_all_heads_say(family: str, tokens_per_run: int) -> None:
    is_own = family not in ("modernbert", "deberta-v2")
    model = early_exit_model(family, num_labels=1) if is_own else model_of(family).eval()
    batch = random_batch(family if is_own else "bert", rows=40)
    if not is_own:
        batch = {name: batch[name].clamp(max=90) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        scores = torch.stack([model.all_exit_logits(**row_of(batch, row))[0, :, 0] for row in range(40)])
    layers = model.exit_layers
    for speed in (0.0, 0.4, 1.0):
        rule = RankRule.at_speed(speed, 5, layers)
        found = rank.run(model, rows_of(batch), rule, first, tokens_per_run)
        expected = by_hand(scores, rule, layers) if speed else torch.full((40,), layers[-1])
        assert found.exit_layers.tolist() == expected.tolist()
        reached = scores[torch.arange(40), [layers.index(layer) for layer in expected.tolist()]]
        torch.testing.assert_close(found.scores, reached, rtol=1e-4, atol=1e-4)
    assert sorted(set(expected.tolist())) == [layers[0], layers[-1]]


def test_layers_do_not_run_on_documents_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = early_exit_model(num_labels=1)
    seen: list[tuple[int, int]] = []
    read = type(model).logits_after

    def counted(self: Any, layer: int, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        assert layout.cu_seqlens is not None
        seen.append((layer, layout.cu_seqlens.shape[0] - 1))
        return read(self, layer, hidden_states, layout)

    monkeypatch.setattr(type(model), "logits_after", counted)
    found = rank.run(model, rows_of(random_batch(rows=30)), RankRule.at_speed(1, 4, model.exit_layers), first)
    # four of thirty are left, and no head between is worth asking
    assert seen == [(1, 30), (4, 4)]
    assert (found.exit_layers == 4).sum() == 4


def test_few_documents_run_through_all_layers() -> None:
    model = early_exit_model(num_labels=1)
    rule = RankRule.at_speed(1, 10, model.exit_layers)
    assert rank.run(model, rows_of(random_batch(rows=10)), rule, first).exit_layers.tolist() == [4] * 10
    assert rank.run(model, [], rule, first).scores.shape == (0,)
