"""`model.rank`, and the rule by which documents leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, early_exit_model, one_thread, tokenizer_of

import fastkd
from fastkd.exits.ranking import RankRule

__all__ = ["one_thread"]

QUERY = "the film was good"


def documents(count: int = 25) -> list[str]:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


def full_scores(model: Any, texts: list[str]) -> torch.Tensor:
    tokenizer = tokenizer_of("bert")
    batch = tokenizer([QUERY] * len(texts), texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch, speed=0.0).logits


@pytest.fixture(scope="module")
def reranker() -> fastkd.EarlyExitForSequenceClassification:
    return early_exit_model(num_labels=1)


def test_what_is_ranked_is_the_full_model_s_order(reranker: fastkd.EarlyExitForSequenceClassification) -> None:
    texts = documents()
    scores = full_scores(reranker, texts)[:, 0]
    ranked = reranker.rank(QUERY, texts, tokenizer=tokenizer_of("bert"))
    assert [entry["corpus_id"] for entry in ranked] == scores.argsort(descending=True).tolist()
    torch.testing.assert_close(torch.tensor([entry["score"] for entry in ranked]), scores.sort(descending=True).values)
    assert ranked.exit_layers == [4] * len(texts)
    assert set(ranked[0]) == {"corpus_id", "score"}
    best = reranker.rank(QUERY, texts, 3, True, tokenizer=tokenizer_of("bert"), tokens_per_run=20)
    assert [(entry["corpus_id"], entry["text"]) for entry in best] == [
        (entry["corpus_id"], texts[entry["corpus_id"]]) for entry in ranked[:3]
    ]


def test_what_is_returned_at_a_speed_has_the_full_model_s_scores(
    reranker: fastkd.EarlyExitForSequenceClassification,
) -> None:
    texts = documents()
    scores = full_scores(reranker, texts)[:, 0]
    for speed in (0.2, 0.5, 1.0):
        ranked = reranker.rank(QUERY, texts, 5, tokenizer=tokenizer_of("bert"), speed=speed)
        assert len(ranked) == 5
        found = [entry["score"] for entry in ranked]
        assert found == sorted(found, reverse=True)
        torch.testing.assert_close(torch.tensor(found), scores[[entry["corpus_id"] for entry in ranked]])
    assert sum(ranked.exit_layers) == 5 * 4 + 20


def test_a_class_ranks_by_its_probability() -> None:
    model = early_exit_model(num_labels=2, id2label={0: "no", 1: "yes"})
    texts = documents()
    probability = full_scores(model, texts).softmax(-1)[:, 1]
    for label in ("yes", 1):
        ranked = model.rank(QUERY, texts, 4, tokenizer=tokenizer_of("bert"), label=label)
        assert [entry["corpus_id"] for entry in ranked] == probability.argsort(descending=True)[:4].tolist()
        torch.testing.assert_close(
            torch.tensor([entry["score"] for entry in ranked]), probability.sort(descending=True).values[:4]
        )
    worst = model.rank(QUERY, texts, 1, tokenizer=tokenizer_of("bert"), label="no")
    assert worst[0]["corpus_id"] == probability.argmin()


def test_tokenised_documents_need_no_tokenizer(reranker: fastkd.EarlyExitForSequenceClassification) -> None:
    texts, tokenizer = documents(), tokenizer_of("bert")
    tokenised = [dict(tokenizer(QUERY, text)) for text in texts]
    expected = reranker.rank(QUERY, texts, 5, tokenizer=tokenizer, speed=0.5)
    found = reranker.rank(None, tokenised, 5, speed=0.5)
    assert [entry["corpus_id"] for entry in found] == [entry["corpus_id"] for entry in expected]


def test_the_tokenizer_beside_the_weights_is_found(tmp_path: Path) -> None:
    early_exit_model(num_labels=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: got None"):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path).rank(QUERY, documents())
    tokenizer_of("bert").save_pretrained(tmp_path)
    model = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert model.rank(QUERY, documents(), 3) == model.rank(QUERY, documents(), 3, tokenizer=tokenizer_of("bert"))


def test_no_documents_are_no_answers(reranker: fastkd.EarlyExitForSequenceClassification) -> None:
    assert reranker.rank(QUERY, [], 3) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"documents": "one text"}, TypeError, "documents: got one str, expected a list of texts"),
        ({"documents": None}, TypeError, "documents: got one NoneType, expected a list of texts"),
        (
            {"documents": [{"input_ids": [1.5]}]},
            ValueError,
            r"documents\[0\]: input_ids \[1.5\]; expected whole numbers",
        ),
        (
            {"documents": [{"input_ids": [4, 5], "token_type_ids": [1]}]},
            ValueError,
            r"documents\[0\]: 1 token_type_ids for 2 input_ids",
        ),
        ({"documents": ["good", " "]}, ValueError, r"documents\[1\]: empty text"),
        ({"documents": ["good", None]}, ValueError, r"documents\[1\]: no value"),
        ({"documents": ["good", 3]}, ValueError, r"documents\[1\]: 3 \(int\)"),
        ({"documents": [{"input_ids": []}]}, ValueError, r"documents\[0\]: 0 tokens"),
        ({"query": ""}, ValueError, "query: empty text"),
        ({"query": None}, ValueError, "query: no value"),
        ({"top_k": 0}, ValueError, "top_k: got 0"),
        ({"top_k": 1.5}, ValueError, "top_k: got 1.5"),
        ({"speed": 2}, ValueError, "speed: got 2"),
        ({"speed": [0.1, 0.2, 0.3]}, ValueError, "documents are ranked at one speed"),
        ({"label": "yes"}, ValueError, "label: got 'yes', but this model is a regression"),
        ({"tokens_per_run": 0}, ValueError, "tokens_per_run: got 0"),
        ({"max_length": 1000}, ValueError, "max_length: got 1000"),
    ],
)
def test_bad_input_is_one_sentence(
    reranker: fastkd.EarlyExitForSequenceClassification,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    given = {"query": QUERY, "documents": documents(), "tokenizer": tokenizer_of("bert"), **arguments}
    with pytest.raises(error, match=message):
        reranker.rank(**given)


def test_a_table_is_no_list_of_documents(reranker: fastkd.EarlyExitForSequenceClassification) -> None:
    """It gives the names of its columns, which were ranked in silence."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    frame = pandas.DataFrame({"text": documents(4)})
    with pytest.raises(TypeError, match="documents: got a DataFrame with the columns 'text', expected a list of texts"):
        reranker.rank(QUERY, frame, tokenizer=tokenizer_of("bert"))
    ranked = reranker.rank(QUERY, frame["text"], frame.index[2], tokenizer=tokenizer_of("bert"))
    assert ranked == reranker.rank(QUERY, documents(4), 2, tokenizer=tokenizer_of("bert"))


def test_models_that_cannot_rank_say_so() -> None:
    classifier = early_exit_model(num_labels=3)
    for label in (None, "maybe", 3, True):
        with pytest.raises(ValueError, match=r"label: got .* expected the class"):
            classifier.rank(QUERY, documents(), tokenizer=tokenizer_of("bert"), label=label)
    untrained = early_exit_model(num_labels=1, exits_trained=False)
    assert untrained.rank(QUERY, documents(), 3, tokenizer=tokenizer_of("bert"))
    with pytest.raises(ValueError, match="never trained"):
        untrained.rank(QUERY, documents(), 3, tokenizer=tokenizer_of("bert"), speed=0.5)
    with pytest.raises(ValueError, match="training mode"):
        early_exit_model(num_labels=1).train().rank(QUERY, documents(), tokenizer=tokenizer_of("bert"))
    broken = early_exit_model(num_labels=1)
    with torch.no_grad():
        broken.last_head.out_proj.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"documents\[\d+\]: the model's answer is not a finite number"):
        broken.rank(QUERY, documents(), 3, tokenizer=tokenizer_of("bert"), speed=0.5)


def test_who_cannot_reach_the_top_leaves() -> None:
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
    within = RankRule.within([0.5, 0.4], 2, [1, 3, 4])
    assert within.layers == (1, 3, 4)
    # the second best reaches 1.5 at least, the third 1.5 at most
    assert within.staying(1, scores, None).tolist() == [True, True, True, False]
    assert within.staying(3, scores, scores).tolist() == [True, True, False, False]
    assert within.staying(1, scores[:2], None).tolist() == [True, True]
    # scores that all move alike keep their order
    at_speed = RankRule.at_speed(0.5, 1, [1, 2])
    assert at_speed.staying(1, scores + 7, scores).tolist() == [True, False, False, False]
    assert at_speed.staying(1, scores, None).tolist() == [True, True, True, False]
    assert RankRule.at_speed(1, 1, [1, 2]).staying(1, scores, None).tolist() == [True, False, False, False]
    with_nan = torch.tensor([torch.nan, 2.0, 1.0, -9.0])
    assert at_speed.staying(1, with_nan, None)[0]
