"""Rank certificates: what they promise holds for new queries, and where they are not for a model, it ranks in full."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_traces import population
from test_ranking import QUERY, documents
from tiny_models import early_exit_model, one_thread, tokenizer_of

import fastkd
from fastkd.exits.calibration import CalibrationError
from fastkd.exits.certificate import CalibrationWarning
from fastkd.exits.flops import FlopsShape
from fastkd.exits.guarantees import binomial_interval
from fastkd.exits.rank_calibration import RankCertificate, half_width_path, needed_half_widths, queries_of, ranked
from fastkd.exits.ranking import RankRule
from fastkd.exits.scores import score_of
from fastkd.exits.trace import ExitTrace, TraceSource

__all__ = ["one_thread"]

K = 5


def pairs(queries: int, seed: int = 0, each: int = 30, noise: tuple[float, ...] = (0.8, 0.3, 0.1)) -> ExitTrace:
    """Scores of documents at four heads that come nearer to the last one's; some queries are harder than others."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(queries, each, 1, generator=generator)
    hardness = 2 * torch.rand(queries, 1, 1, generator=generator)
    # what moves all documents of a query alike
    shift = 3 * torch.randn(queries, 1, 3, generator=generator)
    early = full + shift + hardness * torch.tensor(noise) * torch.randn(queries, each, 3, generator=generator)
    rows = queries * each
    return ExitTrace(
        logits=torch.cat([early, full], dim=2).reshape(rows, 4, 1),
        labels=None,
        lengths=torch.full((rows,), 20, dtype=torch.int32),
        exit_layers=[1, 2, 3, 4],
        max_length=20,
        shape=FlopsShape.of(early_exit_model(num_labels=1).config),
        source=TraceSource(model="m" * 64, data=f"d{seed}"),
        queries=torch.arange(queries).repeat_interleave(each),
    )


def failures(trace: ExitTrace, certificate: RankCertificate) -> int:
    queries = queries_of(trace, score_of(1, None))
    return int((ranked(queries, certificate.rule).recall < certificate.recall).sum())


@pytest.mark.parametrize(("recall", "max_drop"), [(1.0, 0.05), (0.8, 0.05), (1.0, 0.2)])
def test_new_queries_keep_what_was_promised(recall: float, max_drop: float) -> None:
    new = pairs(1500, seed=999)
    rates = []
    for seed in range(20):
        certificate = fastkd.calibrate_ranking(pairs(300, seed), K, max_drop, recall=recall)
        assert certificate.bound <= max_drop
        assert certificate.speedup > 1
        rates.append(failures(new, certificate) / 1500)
    # a certificate may break its promise in one of twenty calibrations
    broken = sum(rate > max_drop for rate in rates)
    assert binomial_interval(broken, 20, 0.99)[0] <= 0.05


def test_a_certificate_says_what_it_counted() -> None:
    trace = pairs(400)
    certificate = fastkd.calibrate_ranking(trace, K)
    assert (certificate.n, certificate.documents, certificate.top_k) == (200, 30, K)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))[200:]
    held = trace.select(torch.cat([(trace.queries == query).nonzero()[:, 0] for query in order]))
    assert failures(held, certificate) == certificate.failures
    assert str(certificate).startswith(
        "with 95% confidence at most 5% of queries get a different top 5 from the full model's"
    )
    assert RankCertificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate
    loose = fastkd.calibrate_ranking(trace, K, recall=0.8)
    assert loose.speedup > certificate.speedup
    assert "less than 80% of the full model's top 5" in str(loose)


def test_other_queries_may_teach_the_half_widths() -> None:
    trace, others = pairs(100), pairs(100, seed=1)
    certificate = fastkd.calibrate_ranking(trace, K, reliability=others)
    assert certificate.n == 100
    path = half_width_path(queries_of(others, score_of(1, None)), K, 0.05)
    assert certificate.half_widths in path
    with pytest.raises(ValueError, match="voids the guarantee"):
        fastkd.calibrate_ranking(trace, K, reliability=trace)


def test_with_the_half_widths_that_a_query_needs_it_loses_none() -> None:
    trace = pairs(50)
    for scores in queries_of(trace, score_of(1, None)):
        scores = scores[None]
        widths = needed_half_widths(scores, K)[0]
        assert ranked(scores, RankRule.within((widths + 1e-5).tolist(), K, [1, 2, 3, 4])).recall == 1
        for head in range(3):
            if widths[head] > 0.01:
                narrow = [100.0] * 3
                narrow[head] = float(widths[head]) - 0.005
                assert ranked(scores, RankRule.within(narrow, K, [1, 2, 3, 4])).recall < 1
    path = half_width_path(queries_of(trace, score_of(1, None)), K, 0.05)
    assert all(wide > narrow for wide, narrow in zip(path[0], path[1], strict=True))
    assert needed_half_widths(scores[:, :K], K).tolist() == [[0, 0, 0]]


def test_queries_may_have_as_many_documents_as_they_like() -> None:
    trace, short = pairs(60), pairs(40, seed=1, each=3)
    mixed = replace(
        trace,
        logits=torch.cat([trace.logits, short.logits]),
        lengths=torch.cat([trace.lengths, short.lengths]),
        queries=torch.cat([trace.queries, short.queries + 60]),
    )
    alone, queries = queries_of(trace, score_of(1, None)), queries_of(mixed, score_of(1, None))
    assert queries.shape == (100, 30, 4)
    for rule in (RankRule.within([0.3, 0.2, 0.1], K, [1, 2, 3, 4]), RankRule.at_speed(0.5, K, [1, 2, 3, 4])):
        expected, found = ranked(alone, rule), ranked(queries, rule)
        assert found.exit_layers[:60].equal(expected.exit_layers)
        assert found.recall[:60].equal(expected.recall)
        assert found.recall[60:].eq(1).all()
        assert found.exit_layers[60:, :3].eq(4).all()
        assert found.exit_layers[60:, 3:].eq(0).all()
    assert needed_half_widths(queries, K)[60:].eq(0).all()


def test_what_moves_all_documents_of_a_query_alike_costs_nothing() -> None:
    trace = pairs(200)
    moved = replace(trace, logits=trace.logits + torch.tensor([50.0, -20.0, 4.0, 0.0])[:, None])
    assert fastkd.calibrate_ranking(moved, K).factor == fastkd.calibrate_ranking(trace, K).factor


def test_classes_rank_by_their_log_odds() -> None:
    trace = pairs(200)
    two = replace(trace, logits=torch.cat([torch.zeros_like(trace.logits), trace.logits], dim=2))
    found, expected = (fastkd.calibrate_ranking(t, K, label=label) for t, label in ((two, 1), (trace, None)))
    assert found.half_widths == pytest.approx(expected.half_widths, rel=1e-4, abs=1e-5)
    assert (found.label, found.failures) == (1, expected.failures)


@pytest.mark.parametrize(
    ("trace", "options", "error", "message"),
    [
        ([("a", "b")], {}, TypeError, "trace: got a list, expected an ExitTrace.*model.calibrate_ranking"),
        (pairs(100), {}, CalibrationError, "got 50 queries, but .* takes at least 59, plus as many"),
        (pairs(200, noise=(9.0, 9.0, 9.0)), {}, CalibrationError, "queries fail"),
        (pairs(200), {"top_k": 30}, ValueError, "no query has more than top_k=30 documents"),
        (pairs(200), {"top_k": 0}, ValueError, "top_k: got 0"),
        (pairs(200), {"recall": 0}, ValueError, "recall: got 0"),
        (pairs(200), {"max_drop": 5}, ValueError, "max_drop: got 5"),
        (pairs(200), {"method": "guess"}, ValueError, "method: got 'guess'"),
        (pairs(200), {"label": 1}, ValueError, "label: got 1, but this model is a regression"),
        (population(100), {}, ValueError, "label: got None, expected the class"),
        (population(100), {"label": 1}, ValueError, "does not say which rows belong to the same query"),
    ],
)
def test_what_certifies_nothing_says_why(
    trace: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastkd.calibrate_ranking(trace, **{"top_k": K, **options})


def rows(queries: int = 130, each: int = 6) -> list[tuple[str, str]]:
    words = documents(queries)
    return [(f"{text} {number}", other) for number, text in enumerate(words) for other in documents(each)]


def test_rows_are_calibrated_on_and_the_model_keeps_the_certificate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = early_exit_model(num_labels=1), tokenizer_of("bert")
    with torch.no_grad():
        # heads that agree, or nothing could be certified
        for head in model.early_heads:
            head.load_state_dict(model.last_head.state_dict())
        for layer in list(model.layers)[1:]:
            for parameter in layer.parameters():
                parameter.mul_(0.01 if parameter.dim() > 1 else 1)
    model.confirm_weights()
    certificate = model.calibrate_ranking(rows(), 3, tokenizer=tokenizer, method="empirical", max_drop=0.5)
    assert certificate.n == 65
    certificate.apply(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kept = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert RankCertificate.of(kept.config) == certificate
    texts = documents()
    two, three = kept.rank(QUERY, texts, 2), kept.rank(QUERY, texts, 3)
    # the certificate is for three, so that is what runs
    assert two.exit_layers == three.exit_layers
    assert three[:2] == two
    assert set(three.exit_layers) != {4}
    assert set(kept.rank(QUERY, texts, 3, speed=0).exit_layers) == {4}
    # it does not reach further
    assert set(kept.rank(QUERY, texts, 4).exit_layers) == {4}
    assert set(kept.rank(QUERY, texts).exit_layers) == {4}
    with pytest.warns(
        CalibrationWarning, match="it is for dtype float32, but bfloat16 is in use, so the full model ranks"
    ):
        found = kept.to(torch.bfloat16).rank(QUERY, texts, 3)
    assert set(found.exit_layers) == {4}
    kept.config.last_head_was_trained()
    assert kept.config.rank_certificate is None


def test_traces_of_pairs_say_which_rows_are_of_one_query(tmp_path: Path) -> None:
    model, tokenizer = early_exit_model(num_labels=1), tokenizer_of("bert")
    trace = model.trace([("a film", "good"), ("the plot", "bad"), ("a film", "dull dull dull")], tokenizer=tokenizer)
    assert trace.queries is not None
    assert trace.queries[trace.rows.argsort()].tolist() == [0, 1, 0]
    trace.save(tmp_path / "pairs.safetensors")
    assert ExitTrace.load(tmp_path / "pairs.safetensors").queries.equal(trace.queries)
    assert trace.select(torch.tensor([1])).queries.shape == (1,)
    assert model.trace(["a film", "good"], tokenizer=tokenizer).queries is None


def test_rows_are_calibrated_on_and_compared_without_a_trace_in_between() -> None:
    model, tokenizer = early_exit_model(num_labels=2), tokenizer_of("bert")
    labelled = [{"text": text, "label": number % 2} for number, text in enumerate(documents(80))]
    trace = model.trace(labelled, tokenizer=tokenizer)
    options: dict[str, Any] = {"max_drop": 0.9, "speeds": [0.5]}
    found = model.calibrate(labelled, tokenizer=tokenizer, batch_size=7, **options)
    expected = fastkd.calibrate(trace, **options)
    assert (found.failures, found.n, found.speed) == (expected.failures, expected.n, expected.speed)
    swept = model.compare(labelled, tokenizer=tokenizer, reliability=labelled[:40], points=3)
    assert set(swept) == set(fastkd.compare(trace, points=3))
    for function in (fastkd.calibrate, fastkd.compare):
        with pytest.raises(TypeError, match=r"trace: got a list, expected an ExitTrace.*model\.\w+\(rows"):
            function(labelled)
    with pytest.raises(ValueError, match="tokenizer: got None"):
        model.calibrate(labelled)
