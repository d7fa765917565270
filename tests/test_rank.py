"""The engine that ranks: documents that cannot reach the top k are not computed, the others as the full model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_replay import model_of
from tiny_models import early_exit_model, one_thread, random_batch, row_of

from fastkd.encoders.layout import TokenLayout
from fastkd.engines import rank
from fastkd.engines.rank_requests import RankRequest, RankRequests
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


@pytest.mark.parametrize("tokens_per_run", [1, 60, 4096])
@pytest.mark.parametrize("speed", [0.0, 0.4])
def test_a_server_s_rankings_are_the_same_in_short_steps(speed: float, tokens_per_run: int) -> None:
    model, batch = early_exit_model(num_labels=1), random_batch("bert", rows=12)
    rule = RankRule.at_speed(speed, 3, model.exit_layers)
    expected = rank.run(model, rows_of(batch), rule, first)
    requests = RankRequests(model, tokens_per_run=tokens_per_run)
    asked = [RankRequest(rows_of(batch), rule, first) for _ in range(3)]
    for request in asked:
        requests.add(request)
    asked[1].is_cancelled = True
    answers, steps = [], 0
    while not requests.is_idle:
        step, answer = requests.step()
        assert step.runs * step.tokens <= tokens_per_run or step.runs == 1
        answers += [answer] if answer is not None else []
        steps += step.layer is not None
    assert [answer.request for answer in answers] == asked
    assert answers[1].found is None
    assert asked[1].started is None
    for answer in (answers[0], answers[2]):
        assert answer.found is not None
        assert answer.found.exit_layers.tolist() == expected.exit_layers.tolist()
        torch.testing.assert_close(answer.found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert steps >= 2 * (model.num_layers if tokens_per_run == 1 else 1)


def test_a_ranking_that_fails_leaves_the_next_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = early_exit_model(num_labels=1), random_batch("bert", rows=5)
    rule = RankRule.at_speed(0.0, 3, model.exit_layers)

    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    requests = RankRequests(model)
    for score in (broken, first):
        requests.add(RankRequest(rows_of(batch), rule, score))
    (_, failed), (_, answered) = requests.step(), requests.step()
    assert failed is not None
    assert isinstance(failed.error, RuntimeError)
    assert answered is not None
    assert answered.found is not None
    assert answered.error is None
