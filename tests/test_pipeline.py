"""The pipeline of transformers: options of early exits act or are refused, answers say their layer, lists stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, early_exit_model, one_thread, tokenizer_of
from transformers import AutoModelForSequenceClassification, TextClassificationPipeline, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import fastkd
from fastkd.model.pipeline import EarlyExitPipeline

__all__ = ["one_thread"]

TEXTS = ["a good film", "the plot was dull and the actor was not very good", "boring", "great fun"]
PAIRS = [{"text": "who was cold", "text_pair": "the actor was cold"}, {"text": "what", "text_pair": "a film"}]
NAMES = {0: "bad", 1: "good", 2: "cold"}


def classifier(**options: Any) -> EarlyExitPipeline:
    model = early_exit_model(id2label=NAMES, **{"num_labels": 3} | options.pop("model", {}))
    made = pipeline("text-classification", model=model, tokenizer=tokenizer_of("bert"), **options)
    assert isinstance(made, EarlyExitPipeline)
    return made


def expected(classify: EarlyExitPipeline, inputs: Any, **exits: Any) -> dict[str, Any]:
    with torch.no_grad():
        text = (inputs["text"], inputs["text_pair"]) if isinstance(inputs, dict) else (inputs,)
        output = classify.model(**classify.tokenizer(*text, return_tensors="pt"), **exits)
    score, label = output.logits.softmax(-1).max(-1)
    return {
        "label": NAMES[int(label)], "score": pytest.approx(float(score), abs=1e-5), "exit_layer": int(output.exit_layer)
    }  # fmt: skip


@pytest.mark.parametrize(
    "exits", [{}, {"speed": 0.0}, {"speed": 0.6}, {"speed": 1.0}, {"speed": 0.7, "exit_layers": [2]}]
)
def test_options_act_in_a_call_and_in_the_pipeline(exits: dict[str, Any]) -> None:
    in_calls, made = classifier(), classifier(**exits)
    for inputs in [*TEXTS, *PAIRS]:
        wanted = expected(made, inputs, **exits)
        for answer in (in_calls(inputs, **exits), made(inputs)):
            assert (answer[0] if isinstance(inputs, str) else answer) == wanted
    wanted_all = [expected(made, inputs, **exits) for inputs in [*TEXTS, *PAIRS]]
    assert made([*TEXTS, *PAIRS]) == wanted_all
    assert in_calls([*TEXTS, *PAIRS], batch_size=4, **exits) == wanted_all


def test_a_call_wins_over_the_pipeline() -> None:
    classify = classifier(speed=0.5)
    assert classify(TEXTS[0], speed=1.0)[0]["exit_layer"] == 1
    assert classify(TEXTS, speed=0.0)[0]["exit_layer"] == 4
    assert classify(TEXTS[0]) == [expected(classify, TEXTS[0], speed=0.5)]
    by_margin = classify(TEXTS[0], criterion="margin")
    assert by_margin == [expected(classify, TEXTS[0], speed=0.5, criterion="margin")]


def test_lists_generators_and_data_sets_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    classify, calls = classifier(speed=0.5), []
    stream = fastkd.EarlyExitForSequenceClassification.stream
    monkeypatch.setattr(
        fastkd.EarlyExitForSequenceClassification,
        "stream",
        lambda self, *args, **options: calls.append(options) or stream(self, *args, **options),
    )
    wanted = [expected(classify, text, speed=0.5) for text in TEXTS]
    assert classify(TEXTS) == wanted
    assert list(classify(text for text in TEXTS)) == wanted
    assert list(classify(KeyDataset(datasets.Dataset.from_dict({"body": TEXTS}), "body"))) == wanted
    assert classify(TEXTS, top_k=1) == [[answer] for answer in wanted]
    assert len(calls) == 4
    assert calls[0]["speed"] == 0.5
    assert [len(row) for row in classify(TEXTS, top_k=None)] == [3] * 4
    assert all(
        entry["exit_layer"] == row["exit_layer"]
        for row, all_ in zip(wanted, classify(TEXTS, top_k=2), strict=True)
        for entry in all_
    )
    classify(TEXTS, function_to_apply="none")
    assert len(calls) == 4


def test_no_texts_have_no_answers() -> None:
    assert classifier()([]) == []


def test_a_generator_is_not_read_whole() -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield TEXTS[taken % 4]

    answers = iter(classifier(speed=0.5)(texts()))
    assert next(answers)["exit_layer"] >= 1
    assert taken < 2000


def test_long_texts_are_cut_when_asked_to() -> None:
    classify = classifier()
    long = "film " * 100
    for inputs in (long, [long]):
        with pytest.raises(ValueError, match="66"):
            classify(inputs)
    wanted = expected(classify, "film " * 10)
    cut = {"truncation": True, "max_length": 12}
    assert classify(long, **cut) == [wanted]
    assert classify([long], **cut) == [wanted]


@pytest.mark.parametrize(("bad", "message"), [("", "empty text"), (5, r"5 \(int\)")])
def test_what_is_no_text_is_named(bad: Any, message: str) -> None:
    classify = classifier()
    with pytest.raises(ValueError, match=rf"inputs: {message}"):
        classify(bad)
    with pytest.raises(ValueError, match=rf"inputs, row 2: {message}"):
        classify(["film", bad])


def test_wrong_options_are_refused_where_they_are_given() -> None:
    with pytest.raises(ValueError, match="speed"):
        classifier(speed=2.0)
    with pytest.raises(ValueError, match="criterion"):
        classifier()("film", criterion="unknown")
    with pytest.raises(ValueError, match="never trained"):
        classifier(model={"exits_trained": False}, speed=0.5)


def test_other_models_answer_as_they_did() -> None:
    model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]).eval()
    classify = pipeline("sentiment-analysis", model=model, tokenizer=tokenizer_of("bert"))
    plain = TextClassificationPipeline(model=model, tokenizer=tokenizer_of("bert"))
    for inputs in (TEXTS[0], TEXTS, PAIRS):
        assert classify(inputs) == plain(inputs)
    assert classify("") == plain("")
    with pytest.raises(ValueError, match="speed: a BertForSequenceClassification has no early exits"):
        classify("film", speed=0.5)


def test_a_regression_gives_its_number() -> None:
    model = early_exit_model(num_labels=1, problem_type="regression")
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer_of("bert"))
    single = [classify(text)[0] for text in TEXTS]
    assert classify(TEXTS) == [answer | {"score": pytest.approx(answer["score"], abs=1e-5)} for answer in single]
    assert single[0]["label"] == "LABEL_0"
