"""The server without a port: TEI's shapes and codes, speeds, admission, deadlines, disconnects, pressure, reloading."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'fastkd-kernels[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'fastkd-kernels[serve]'")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed: pip install prometheus-client")
pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")

import httpx
import torch
from serving_client import TEXTS, save_model, serving
from tiny_models import one_thread

from fastkd.exits.certificate import Certificate
from fastkd.exits.rank_calibration import RankCertificate
from fastkd.model.loading import load_model
from fastkd.serving.options import ServeOptions, read_token
from fastkd.serving.service import Service, _Load
from fastkd.serving.worker import Worker

__all__ = ["one_thread"]

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("regression"), num_labels=1)


def asked(model: Path, path: str, body: Any, **options: Any) -> httpx.Response:
    """The answer to one request."""

    async def check(client: httpx.AsyncClient, service: Service) -> httpx.Response:
        return await client.post(path, content=json.dumps(body), headers=JSON)

    return serving(model, check, **options)


def expected_output(model: Path, texts: list[Any], **options: Any) -> Any:
    """What the model says of texts, by itself."""
    loaded, tokenizer = load_model(str(model), "cpu")
    batch = tokenizer(*map(list, zip(*texts, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        return loaded(**batch, **options)


# /predict: the shapes of TEI


def test_predict_answers_in_the_shapes_of_tei(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> list[Any]:
        bodies: list[dict[str, Any]] = [
            {"inputs": "good fun"},
            {"inputs": ["good fun"]},
            {"inputs": ["good", "bad"]},
            {"inputs": [["good fun"], ["good", "bad"]]},
            {"inputs": "good fun", "parameters": {}},
            {"inputs": "good fun", "raw_scores": True, "unknown": 1},
        ]
        return [(await client.post("/predict", json=body)).json() for body in bodies]

    one, listed, pair, batch, nested, raw = serving(model, check)
    assert one == listed
    assert nested == [one]
    assert [len(rows) for rows in batch] == [3, 3]
    assert batch[1] == [{**row, "score": pytest.approx(row["score"], abs=1e-6)} for row in pair]
    assert [row["score"] for row in one] == sorted((row["score"] for row in one), reverse=True)
    assert sum(row["score"] for row in one) == pytest.approx(1)
    logits = expected_output(model, [("good fun",)]).logits[0]
    names = [f"LABEL_{number}" for number in logits.argsort(descending=True).tolist()]
    assert [row["label"] for row in raw] == [row["label"] for row in one] == names
    assert [row["score"] for row in raw] == pytest.approx(logits.sort(descending=True).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_tei_answers_at_these_paths_too(model: Path, path: str) -> None:
    assert len(asked(model, path, {"inputs": "good"}).json()) == 3


REFUSED: list[tuple[str, Any, int, str, str]] = [
    ("/predict", {"inputs": []}, 422, "Validation", r"got \[\]"),
    ("/predict", {"inputs": ["a", "b", "c"]}, 422, "Validation", "3 texts"),
    ("/predict", {"inputs": [["a"], []]}, 422, "Validation", "inputs"),
    ("/predict", {"inputs": [["a", "b", "c"]]}, 422, "Validation", "inputs"),
    ("/predict", {"inputs": 5}, 422, "Validation", "inputs"),
    ("/predict", {"inputs": None}, 422, "Validation", "inputs"),
    ("/predict", {}, 422, "Validation", "inputs"),
    ("/predict", [], 422, "Validation", "body"),
    ("/predict", {"inputs": " "}, 422, "Tokenizer", "number 1 has empty text"),
    ("/predict", {"inputs": ""}, 400, "Empty", "number 1 has empty text"),
    ("/predict", {"inputs": [["a"], ["\ud800"]]}, 422, "Tokenizer", "number 2 has lone surrogate"),
    ("/predict", {"inputs": "good " * 99, "truncate": False}, 422, "Validation", "tokens, expected 1 to"),
    ("/predict", {"inputs": [["a"]] * 5}, 422, "Validation", "at most 4"),
    ("/predict", {"inputs": "a", "truncate": "yes"}, 422, "Validation", "truncate"),
    ("/predict", {"inputs": "a", "truncation_direction": "Up"}, 422, "Validation", "truncation_direction"),
    ("/v1/classify", {"inputs": []}, 422, "Validation", r"got \[\]"),
    ("/v1/classify", {"inputs": "a", "speed": 2}, 422, "Validation", "speed"),
    ("/v1/classify", {"inputs": "a", "speed": math.nan}, 422, "Validation", "speed"),
    ("/v1/classify", {"inputs": "a", "criterion": "mood"}, 422, "Validation", "expected one of entropy"),
    ("/v1/classify", {"inputs": "a", "criterion": "top_n"}, 422, "Validation", "top_n: got None"),
    ("/v1/classify", {"inputs": "a", "criterion": "learned"}, 422, "Validation", "learned"),
    ("/v1/classify", {"inputs": "a", "deadline_ms": 0}, 422, "Validation", "deadline_ms"),
    ("/v1/classify", {"inputs": [["a"]]}, 422, "Validation", "inputs"),
    ("/rerank", {"query": "a", "texts": ["b"]}, 424, "Backend", "this model is a classifier"),
    ("/rerank", {"query": "a", "texts": []}, 422, "Validation", "texts"),
    ("/rerank", {"query": "a", "texts": ["b"], "top_k": 0}, 422, "Validation", "top_k"),
    ("/rerank", {"query": "a", "texts": ["b"], "label": "none"}, 422, "Validation", "LABEL_0, LABEL_1"),
    ("/rerank", {"query": "a", "texts": ["b", " "], "label": "LABEL_1"}, 422, "Tokenizer", "number 2 has empty text"),
]


def test_bad_input_is_refused_with_the_reason(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        for path, body, status, kind, reason in REFUSED:
            answer = await client.post(path, content=json.dumps(body), headers=JSON)
            assert (answer.status_code, answer.json()["error_type"]) == (status, kind), (body, answer.text)
            assert re.search(reason, answer.json()["error"]), (body, answer.text)
        assert service._load.rows == 0

    serving(model, check, max_batch=4)


def test_what_is_no_json_is_refused(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        for content, headers, status, kind in [
            ("{", JSON, 400, "Malformed"),
            ("[" * 100_000, JSON, 400, "Malformed"),
            ("9" * 5000, JSON, 400, "Malformed"),
            (b"\xff\xfe", JSON, 400, "Malformed"),
            ('{"inputs": "a"}', {"content-type": "text/plain"}, 415, "MediaType"),
            (b"a" * 200_000, JSON, 413, "TooLarge"),
        ]:
            answer = await client.post("/predict", content=content, headers=headers)
            assert (answer.status_code, answer.json()["error_type"]) == (status, kind), (content[:20], answer.text)
        chunks = (b"a" * 5000 for _ in range(90))

        async def without_length() -> Any:
            for chunk in chunks:
                yield chunk

        answer = await client.post("/predict", content=without_length(), headers=JSON)
        assert answer.status_code == 413
        assert next(chunks, None) is not None, "it was read to its end"
        assert (await client.get("/nowhere")).status_code == 404
        assert (await client.get("/predict")).status_code == 405

    serving(model, check, max_body_bytes=150_000)


def test_a_long_text_is_cut_at_the_side_that_was_asked_for(model: Path) -> None:
    long = "bad " * 40 + "good fun"

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        limit = service.worker.limit
        answers = {}
        for side in ("Left", "Right"):
            body = {"inputs": long, "raw_scores": True, "truncate": True, "truncation_direction": side}
            answers[side] = await client.post("/predict", json=body)
            assert int(answers[side].headers["x-compute-tokens"]) == limit
        assert answers["Left"].json() != answers["Right"].json()
        cut = await client.post("/predict", json={"inputs": "bad " * (limit - 2), "raw_scores": True})
        assert cut.json() == answers["Right"].json()

    serving(model, check, max_length=16)


# /v1/classify, /rerank and what else is asked


def test_each_request_has_a_speed_and_criterion_of_its_own(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        for options in ({"speed": 0.0}, {"speed": 0.5}, {"speed": 0.4, "criterion": "margin"}, {"speed": 1}):
            body = {"inputs": [*TEXTS[:2], ["good", "bad"]], "scores": True, **options}
            answer = (await client.post("/v1/classify", json=body)).json()
            assert answer["speed"] == options["speed"]
            assert answer["criterion"] == options.get("criterion", "entropy")
            for text, row in zip([(TEXTS[0],), (TEXTS[1],), ("good", "bad")], answer["answers"], strict=True):
                expected = expected_output(model, [text], **options)
                assert row["exit_layer"] == int(expected.exit_layer)
                assert row["uncertainty"] == pytest.approx(float(expected.uncertainty), abs=1e-5)
                probabilities = expected.logits[0].softmax(-1).tolist()
                assert list(row["scores"].values()) == pytest.approx(probabilities, abs=1e-5)
                assert row["score"] == pytest.approx(max(probabilities), abs=1e-5)

    serving(model, check)


def test_answers_of_a_stream_come_as_their_rows_leave(model: Path) -> None:
    answer = asked(model, "/v1/classify", {"inputs": list(TEXTS), "stream": True, "speed": 0.5})
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert sorted(row["index"] for row in rows) == [0, 1, 2, 3]
    layers = [row["exit_layer"] for row in rows]
    assert layers == sorted(layers)


def test_regression_and_ranking(regression: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        logits = expected_output(regression, [("a good film", text) for text in TEXTS]).logits[:, 0]
        body = {"query": "a good film", "texts": list(TEXTS), "return_text": True}
        ranks = (await client.post("/rerank", json=body)).json()
        order = logits.argsort(descending=True).tolist()
        assert [rank["index"] for rank in ranks] == order
        assert [rank["text"] for rank in ranks] == [TEXTS[index] for index in order]
        scores = logits.sigmoid().sort(descending=True).values.tolist()
        assert [rank["score"] for rank in ranks] == pytest.approx(scores, abs=1e-5)
        raw = (await client.post("/rerank", json={**body, "raw_scores": True, "return_text": False})).json()
        assert raw[0] == {"index": order[0], "score": pytest.approx(float(logits.max()), abs=1e-4)}
        one = (await client.post("/predict", json={"inputs": ["a good film", TEXTS[0]]})).json()
        assert one == [{"score": pytest.approx(float(logits[0]), abs=1e-4), "label": "LABEL_0"}]
        assert "reranker" in (await client.get("/info")).json()["model_type"]

    serving(regression, check)


def rank_certified(folder: Path, num_labels: int, label: int | None) -> Path:
    """A model whose certificate for the top 2 says so; nobody calibrated it."""
    save_model(folder, num_labels=num_labels)
    loaded, _ = load_model(str(folder), "cpu")
    certificate = {
        "top_k": 2, "recall": 1.0, "method": "fixed-sequence", "max_drop": 0.05, "confidence": 0.95,
        "half_widths": [0.0] * (len(loaded.exit_layers) - 1), "factor": 1.0, "label": label,
        "exit_layers": list(loaded.exit_layers), "dtype": "float32", "n": 200, "failures": 1, "bound": 0.02,
        "mean_recall": 1.0, "documents": 20.0, "speedup": 1.5, "average_layers": 2.0, "seq_len": 16, "data": "",
        "model": "", "seen_as": None, "date": "2026-01-01", "version": "0",
    }  # fmt: skip
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rank_certificate"] = RankCertificate.from_dict(certificate).to_dict()
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("num_labels", "label"), [(1, None), (3, 1)])
@pytest.mark.parametrize("tokens_per_run", [1, 1024])
def test_rerank_is_model_rank(tmp_path: Path, num_labels: int, label: int | None, tokens_per_run: int) -> None:
    """By the certificate where so few are asked for, else by the full model, or by the speed that was asked for."""
    folder = rank_certified(tmp_path, num_labels, label)
    loaded, _ = load_model(str(folder), "cpu")
    texts = [f"{one} {other}" for one in TEXTS for other in ("film", "and fun", "bad")]
    query = "a good film"

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        early = 0
        for options in ({"top_k": 2}, {"top_k": 1}, {"top_k": 3}, {}, {"top_k": 3, "speed": 0.9}, {"top_k": 99}):
            told = await client.post("/rerank", json={"query": query, "texts": texts, "return_text": True, **options})
            assert told.status_code == 200, told.text
            top_k = options.get("top_k")
            expected = loaded.rank(query, texts, top_k, True, speed=options.get("speed"), label=label)
            # TEI squashes the number of a regression
            squash = torch.sigmoid if num_labels == 1 else torch.clone
            scores = squash(torch.tensor([entry["score"] for entry in expected])).tolist()
            assert told.json() == [
                {"index": entry["corpus_id"], "score": pytest.approx(score, abs=1e-5), "text": entry["text"]}
                for entry, score in zip(expected, scores, strict=True)
            ]
            layers = told.headers["x-fastkd-exit-layers"].split(",")
            assert list(map(int, layers)) == expected.exit_layers
            early += len(set(layers)) > 1
        assert early >= 3
        info = (await client.get("/info")).json()
        assert info["rank_top_k"] == 2
        assert service.accepted_rows == service.ended_rows == 6 * len(texts)
        assert service._load.rows == service._load.tokens == 0

    serving(folder, check, tokens_per_run=tokens_per_run)


def test_a_class_that_is_named_ranks(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        logits = expected_output(model, [("a good film", text) for text in TEXTS]).logits
        body = {"query": "a good film", "texts": list(TEXTS), "label": "LABEL_2"}
        ranks = (await client.post("/rerank", json=body)).json()
        expected = logits.softmax(-1)[:, 2].sort(descending=True)
        assert [rank["index"] for rank in ranks] == expected.indices.tolist()
        assert [rank["score"] for rank in ranks] == pytest.approx(expected.values.tolist(), abs=1e-5)
        raw = (await client.post("/rerank", json={**body, "raw_scores": True})).json()
        assert [rank["score"] for rank in raw] == pytest.approx(torch.logit(expected.values).tolist(), abs=1e-4)

    serving(model, check)


def test_a_ranking_that_fails_or_that_nobody_waits_for_ends(regression: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("a secret")

    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        body = {"query": "a good film", "texts": list(TEXTS)}
        with monkeypatch.context() as patch:
            patch.setattr(service.worker.model, "logits_after", broken)
            failed = await client.post("/rerank", json=body)
            assert (failed.status_code, failed.json()["error_type"]) == (424, "Backend")
        gate.clear()
        # the gate holds the thread in a step of the stream
        held, gone = classify(client), asyncio.ensure_future(client.post("/rerank", json=body))
        await until_waiting(service, 1 + len(TEXTS))
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        gate.set()
        assert (await held).status_code == 200
        await until_waiting(service, 0)
        text = service.metrics.text().decode()
        assert 'fastkd_rows_ended_total{how="cancelled"} 4.0' in text
        assert 'fastkd_rows_ended_total{how="failed"} 4.0' in text
        assert (await client.post("/rerank", json=body)).status_code == 200

    gated(regression, check)


def test_one_client_wakes_each_thread_once_a_request(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of layers runs: a hand-over costs more than many of them."""

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        calls: Counter[str] = Counter()
        loop = asyncio.get_running_loop()
        for name in ("call_soon_threadsafe", "run_in_executor"):
            original = getattr(loop, name)

            def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
                calls[name] += 1
                return original(*arguments)

            monkeypatch.setattr(loop, name, counted)
        for speed in (0.0, 0.1):
            calls.clear()
            for _ in range(5):
                assert (await classify(client, speed=speed)).status_code == 200
            assert calls == {"call_soon_threadsafe": 5}
        long = await client.post("/v1/classify", json={"inputs": ["good fun " * 2000]})
        assert long.status_code == 200
        assert calls["run_in_executor"] == 1

    serving(model, check)


def test_info_health_and_metrics(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        info = (await client.get("/info")).json()
        of_tei = {
            "model_id", "model_sha", "model_dtype", "served_model_name", "model_type", "max_concurrent_requests",
            "max_input_length", "max_batch_tokens", "max_batch_requests", "max_client_batch_size", "auto_truncate",
            "tokenization_workers", "version", "sha", "docker_label",
        }  # fmt: skip
        assert of_tei <= info.keys()
        assert info["model_type"]["classifier"]["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
        answer = await client.post("/v1/classify", json={"inputs": list(TEXTS), "speed": 0.5})
        assert answer.headers["x-fastkd-speed"] == "0.5"
        assert answer.headers["x-compute-characters"] == str(sum(map(len, TEXTS)))
        for name in ("x-compute-time", "x-queue-time", "x-inference-time", "x-tokenization-time", "x-total-time"):
            assert answer.headers[name].isdigit()
        for path in ("/health", "/ping"):
            assert (await client.get(path)).status_code == 200
        text = (await client.get("/metrics")).text
        left = [int(layer) for layer in answer.headers["x-fastkd-exit-layers"].split(",")]
        assert f'fastkd_exits_total{{layer="{left[0]}"}} {left.count(left[0])}.0' in text
        assert "fastkd_rows_accepted_total 4.0" in text
        assert 'te_request_count{method="batch"} 1.0' in text
        assert 'fastkd_requests_total{path="/v1/classify",status="200"} 1.0' in text
        assert "fastkd_queue_tokens 0.0" in text
        service.drain()
        assert (await client.get("/health")).json() == {"error": "unhealthy", "error_type": "Unhealthy"}
        refused = await client.post("/predict", json={"inputs": "good"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")

    serving(model, check)


def test_the_interface_says_every_path_and_code_and_its_pages_need_no_network(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        api = (await client.get("/openapi.json")).json()
        assert api == (await client.get("/api-doc/openapi.json")).json()
        assert {"/predict", "/v1/classify", "/rerank", "/info", "/health", "/metrics"} <= api["paths"].keys()
        assert {"413", "415", "422", "424", "429", "503"} <= api["paths"]["/predict"]["post"]["responses"].keys()
        for path in ("/", "/docs"):
            page = await client.get(path)
            assert not re.search(r"https?://|[\"(]//", page.text)
            assert "connect-src 'self'" in page.headers["content-security-policy"]

    serving(model, check)


# Under load


class Gated(Worker):
    """A worker whose stream waits until the test lets it go on."""

    def __init__(self, *arguments: Any) -> None:
        self.gate = threading.Event()
        self.gate.set()
        super().__init__(*arguments)
        step = self._stream.step

        def gated_step() -> Any:
            assert self.gate.wait(60)
            return step()

        self._stream.step = gated_step  # type: ignore[method-assign]


def gated(model: Path, check: Any, **options: Any) -> Any:
    """`serving`, with a gate that the test closes and opens."""

    async def with_gate(client: httpx.AsyncClient, service: Service) -> Any:
        gate = service.worker.gate  # type: ignore[attr-defined]
        try:
            return await check(client, service, gate)
        finally:
            gate.set()

    return serving(model, with_gate, worker=Gated, **options)


async def until_waiting(service: Service, rows: int) -> None:
    for _ in range(4000):
        if service._load.rows == rows:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{service._load.rows} rows wait, expected {rows}")


def classify(client: httpx.AsyncClient, text: str = "good fun", **options: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.ensure_future(client.post("/v1/classify", json={"inputs": text, **options}))


def test_a_full_queue_refuses_with_the_time_after_which_to_ask_again(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        gate.clear()
        accepted = [classify(client) for _ in range(5)]
        await until_waiting(service, 5)
        refused = await classify(client)
        assert (refused.status_code, refused.json()["error_type"]) == (429, "Overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        too_much = await client.post("/v1/classify", json={"inputs": ["good fun"] * 30})
        assert (too_much.status_code, too_much.json()["error_type"]) == (422, "Validation")
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*accepted)] == [200] * 5
        assert (await classify(client)).status_code == 200
        assert 'te_request_failure{err="overloaded"} 1.0' in service.metrics.text().decode()

    gated(model, check, max_queue_tokens=20)


def test_so_many_inputs_may_wait(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        gate.clear()
        first = asyncio.ensure_future(client.post("/v1/classify", json={"inputs": list(TEXTS[:3])}))
        await until_waiting(service, 3)
        assert (await client.post("/predict", json={"inputs": [["a"], ["b"]]})).status_code == 429
        gate.set()
        assert (await first).status_code == 200

    gated(model, check, max_concurrent_requests=4)


def test_when_to_ask_again_follows_the_rate_of_answers() -> None:
    load = _Load()
    assert load.seconds_of(1000) == 1
    load.rate = 100.0
    assert [load.seconds_of(tokens) for tokens in (1, 250, 10**9)] == [1, 3, 60]


def test_what_has_not_begun_by_its_deadline_never_does(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        gate.clear()
        late, patient = classify(client, deadline_ms=1), classify(client)
        await until_waiting(service, 2)
        await asyncio.sleep(0.01)
        gate.set()
        answer = await late
        assert (answer.status_code, answer.json()["error_type"]) == (504, "Deadline")
        assert (await patient).status_code == 200
        assert 'fastkd_rows_ended_total{how="expired"} 1.0' in service.metrics.text().decode()

    gated(model, check)


def test_what_is_not_answered_in_time_is_refused_with_a_code_to_try_again(regression: Path) -> None:
    """Whatever it asks for, its rows are not run, and its deadline changes nothing."""

    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        gate.clear()
        ranking = {"query": "good", "texts": ["good fun", "cold"]}
        first = classify(client)
        await until_waiting(service, 1)  # the worker's thread stands at the gate
        late = [
            first,
            classify(client, deadline_ms=600_000),
            asyncio.ensure_future(client.post("/predict", json={"inputs": [["a"], ["b"]]})),
            asyncio.ensure_future(client.post("/rerank", json=ranking)),
        ]
        for answer in await asyncio.gather(*late):
            assert (answer.status_code, answer.json()["error_type"]) == (503, "Unhealthy")
            assert "no answer within 0.5 seconds" in answer.json()["error"]
            assert int(answer.headers["retry-after"]) >= 1
        lines = (await classify(client, stream=True)).text.splitlines()
        assert [json.loads(line)["error_type"] for line in lines] == ["Unhealthy"]
        gate.set()
        await until_waiting(service, 0)
        assert 'fastkd_rows_ended_total{how="cancelled"} 7.0' in service.metrics.text().decode()

    gated(regression, check, request_timeout=0.5)


def test_a_tokenizer_that_is_kept_busy_holds_up_nobody_for_longer(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        with service.worker._tokenizer_is_free:
            answer = await classify(client)
        assert (answer.status_code, answer.json()["error_type"]) == (503, "Unhealthy")
        assert (await classify(client)).status_code == 200

    gated(model, check, request_timeout=0.5)


def test_a_handler_that_is_cancelled_costs_nothing_that_is_not_yet_running(model: Path) -> None:
    """As Ray Serve says that a client has gone."""

    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        gate.clear()
        gone = [classify(client) for _ in range(3)]
        staying = classify(client)
        await until_waiting(service, 4)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        gate.set()
        assert (await staying).status_code == 200
        await until_waiting(service, 0)
        text = service.metrics.text().decode()
        assert 'fastkd_rows_ended_total{how="cancelled"} 3.0' in text
        assert 'fastkd_rows_ended_total{how="answered"} 1.0' in text

    gated(model, check)


def test_a_client_that_disconnects_costs_nothing_that_is_not_yet_running(model: Path) -> None:
    """As uvicorn says it: by a message."""

    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        app: Any = client._transport.app  # type: ignore[attr-defined]
        has_left = asyncio.Event()
        messages = [{"type": "http.request", "body": b'{"inputs": "good fun"}', "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/predict",
            "raw_path": b"/predict", "query_string": b"", "scheme": "http", "root_path": "", "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"22"), (b"host", b"127.0.0.1")],
        }  # fmt: skip
        gate.clear()
        task = asyncio.ensure_future(app(scope, receive, send))
        await until_waiting(service, 1)
        has_left.set()
        await task
        gate.set()
        await until_waiting(service, 0)
        assert 'fastkd_rows_ended_total{how="cancelled"} 1.0' in service.metrics.text().decode()

    gated(model, check)


def test_a_run_that_fails_answers_424_and_the_server_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("a secret")

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(service.worker._stream, "_run_alone", broken)
            failed = await client.post("/predict", json={"inputs": "good fun"})
            assert (failed.status_code, failed.json()["error_type"]) == (424, "Backend")
            assert "secret" not in failed.text
        assert (await client.post("/predict", json={"inputs": "good fun"})).status_code == 200
        assert (await client.get("/health")).status_code == 200

    serving(model, check)


def test_a_thread_that_dies_leaves_nobody_waiting(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        gate.clear()
        left = classify(client)
        await until_waiting(service, 1)
        service.worker._stream._mend = None  # type: ignore[assignment, method-assign]
        gate.set()
        assert (await left).status_code == 424
        service.worker.join(10)
        assert (await client.get("/health")).status_code == 503
        assert (await client.post("/predict", json={"inputs": "good"})).status_code == 503

    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    gated(model, check)


def certified(folder: Path, speed: float = 0.6, **changes: Any) -> Path:
    """A model whose certificate says so; nobody calibrated it."""
    save_model(folder)
    loaded, _ = load_model(str(folder), "cpu")
    certificate = {
        "guarantee": "consistency", "method": "fixed-sequence", "max_drop": 0.05, "confidence": 0.95, "speed": speed,
        "position": speed, "criterion": "entropy", "top_n": None, "exit_layers": list(loaded.exit_layers),
        "dtype": "float32", "tolerance": None, "n": 500, "failures": 5, "bound": 0.02, "disagreements": 5,
        "speedup": 2.0, "average_layers": 2.0, "accuracy": None, "full_accuracy": None, "seq_len": 16, "data": "",
        "model": "", "seen_as": None, "date": "2026-01-01", "version": "0",
    }  # fmt: skip
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["certificate"] = Certificate.from_dict({**certificate, **changes}).to_dict()
    path.write_text(json.dumps(config))
    return folder


def test_a_thread_ends_with_its_event_loop(model: Path) -> None:
    loop = asyncio.new_event_loop()
    worker = Worker(ServeOptions(model=str(model)), lambda *_: None, loop)
    assert worker.is_alive
    loop.close()
    worker.join(10)
    assert not worker.is_alive


def test_speed_rises_under_pressure_and_says_so(tmp_path: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        gate.clear()
        calm = [classify(client) for _ in range(6)]
        await until_waiting(service, 6)
        pressed, chosen = classify(client), classify(client, speed=0.2)
        await until_waiting(service, 8)
        assert "fastkd_under_pressure 1.0" in service.metrics.text().decode()
        gate.set()
        raised = [answer.headers["x-fastkd-speed-raised"] for answer in await asyncio.gather(*calm)]
        assert set(raised) == {"false"}
        answer = await pressed
        assert (answer.headers["x-fastkd-speed"], answer.headers["x-fastkd-speed-raised"]) == ("0.6", "true")
        assert answer.json()["speed"] == 0.6
        assert (await chosen).headers["x-fastkd-speed"] == "0.2"
        assert (await classify(client)).headers["x-fastkd-speed"] == "0.1"
        text = service.metrics.text().decode()
        assert "fastkd_under_pressure 0.0" in text
        assert "fastkd_rows_at_pressure_speed_total 1.0" in text

    gated(certified(tmp_path), check, speed=0.1, pressure_speed=0.6, max_queue_tokens=44)


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {"pressure_speed": 0.7}, "at most 0.6"),
        ({}, {"pressure_speed": 0.05}, "above the speed 0.1"),
        ({}, {"pressure_speed": 0.5, "criterion": "margin"}, "criterion"),
        ({"method": "empirical", "confidence": None}, {"pressure_speed": 0.5}, "fixed-sequence"),
    ],
)
def test_pressure_never_leaves_what_is_certified(tmp_path: Path, changes: Any, options: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        asked(certified(tmp_path, **changes), "/predict", {}, speed=0.1, **options)


def test_pressure_without_a_certificate_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="no certificate"):
        asked(model, "/predict", {}, pressure_speed=0.5)


def test_a_certificate_that_is_no_longer_kept_raises_the_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        assert service._monitor is not None
        monkeypatch.setattr(service._monitor.drift, "_agree", lambda early, full: False)
        text = service.metrics.text().decode()
        assert "fastkd_agreement_alarm 0.0" in text
        assert "fastkd_agreement_promised 0.95" in text
        for _ in range(6):
            await client.post("/predict", json={"inputs": [[text] for text in TEXTS]})
        # what a client asked for at another speed says nothing of the certificate
        await classify(client, speed=0.2)
        await until_waiting(service, 0)
        text = service.metrics.text().decode()
        assert "fastkd_agreement_watched_rows 24.0" in text
        assert "fastkd_agreement_alarm 1.0" in text
        assert not service._monitor._halves

    monkeypatch.setattr(logging.getLogger("fastkd.serving"), "propagate", True)
    with pytest.warns(UserWarning, match="fall short"), caplog.at_level(logging.INFO, "fastkd.serving"):
        serving(certified(tmp_path), check, speed=0.6, monitor=1.0)
    assert any(json.loads(message)["event"] == "alarm" for message in caplog.messages)


def test_no_request_is_lost_or_answered_for_another(model: Path) -> None:
    """Many clients with texts, speeds and shapes of their own at once; each gets the answer to its own."""
    draw, bodies = random.Random(3), []
    words = ("good", "bad", "fun", "dull", "warm", "cold", "film", "a")
    for _ in range(120):
        inputs = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 4))]
        bodies.append({"inputs": inputs, "speed": draw.choice([0, 0.3, 0.5]), "scores": True})

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        alone = [(await client.post("/v1/classify", json=body)).json() for body in bodies]
        together = await asyncio.gather(*(client.post("/v1/classify", json=body) for body in bodies))
        for one, other in zip(alone, together, strict=True):
            for row, again in zip(one["answers"], other.json()["answers"], strict=True):
                assert row["label"] == again["label"]
                assert list(row["scores"].values()) == pytest.approx(list(again["scores"].values()), abs=1e-4)
        assert service.accepted_rows == service.ended_rows
        assert service._load.rows == service._load.tokens == 0
        assert not service._everybody

    serving(model, check)


def hostile(draw: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers of a request that no client of good will sends."""
    text = draw.choice(["a", "\ud800", "\0", "\u202e" * 50, "好" * 500, "a" * 9000, "💥" * 300, "", " ", "[CLS] [SEP]"])
    value: Any = draw.choice([text, [text], [[text]], [[text, text]], {}, 1e308, -1, True, None, [[[]]], [[text] * 3]])
    names = [
        "inputs",
        "speed",
        "criterion",
        "deadline_ms",
        "top_n",
        "truncate",
        "raw_scores",
        "stream",
        "query",
        "texts",
    ]
    odd = [value, math.nan, math.inf, "x", 10**400]
    body = {draw.choice(names): draw.choice(odd) for _ in range(draw.randint(0, 5))}
    content = json.dumps({**body, "inputs": value} if draw.random() < 0.7 else body).encode()
    if draw.random() < 0.3:
        at = draw.randrange(len(content))
        content = content[:at] + draw.randbytes(draw.randint(0, 9)) + content[at:]
    headers = dict(draw.choice([JSON, JSON, JSON, {}, {"content-type": "text/xml"}]))
    headers |= draw.choice(
        [{}, {}, {"authorization": "Bearer x"}, {"x-request-id": "'; DROP"}, {"host": "evil.example"}]
    )
    path = draw.choice(["/predict", "/v1/classify", "/rerank", "/", "/admin/reload", "/../etc/passwd", "/metrics"])
    return draw.choice(["POST", "POST", "POST", "GET", "PUT"]), path, content, headers


def test_hostile_requests_get_promised_codes_and_nothing_breaks(model: Path) -> None:
    draw = random.Random(7)
    promised = {200, 400, 403, 404, 405, 413, 415, 422, 424}

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        for _ in range(400):
            method, path, content, headers = hostile(draw)
            answer = await client.request(method, path, content=content, headers=headers)
            assert answer.status_code in promised, (method, path, content, answer.text)
            if answer.status_code >= 400:
                assert answer.json().keys() == {"error", "error_type"}
        assert (await client.post("/predict", json={"inputs": "good"})).status_code == 200
        await until_waiting(service, 0)
        assert not service._everybody

    serving(model, check)


# Safety


def test_a_token_is_asked_for_where_there_is_one(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        body, wrong = {"inputs": "good"}, ("Bearer wrong", "Basic secret", "Bearer", "x")
        for headers in ({}, *({"authorization": value} for value in wrong)):
            answer = await client.post("/predict", json=body, headers=headers)
            assert (answer.status_code, answer.content) == (401, b"")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/info")).status_code == 401
        assert (await client.post("/admin/reload")).status_code == 401
        assert (await client.post("/", json=body)).status_code == 401
        for path in ("/health", "/ping", "/metrics", "/", "/docs"):
            assert (await client.get(path)).status_code == 200
        right = {"authorization": "bearer secret"}
        assert (await client.post("/predict", json=body, headers=right)).status_code == 200

    serving(model, check, token="secret")


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTKD_API_KEY", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("FASTKD_API_KEY", "one")
    assert read_token(None) == "one"
    file = tmp_path / "token"
    file.write_text("two\n")
    assert read_token(file) == "two"
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_token(file)
    with pytest.raises(ValueError, match="printable ASCII"):
        ServeOptions(model="", token="schlüssel")


def test_another_site_s_name_for_this_machine_is_refused(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        for host, status in [("evil.example", 403), ("localhost:8080", 200), ("[::1]:80", 200), ("127.0.0.1", 200)]:
            answer = await client.post("/predict", json={"inputs": "good"}, headers={"host": host})
            assert answer.status_code == status

    serving(model, check)


def test_logs_have_no_texts_unless_asked(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fastkd.serving"), "propagate", True)
    for log_texts in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastkd.serving"):
            asked(model, "/predict", {"inputs": "good fun"}, log_texts=log_texts)
        lines = [json.loads(message) for message in caplog.messages if message.startswith("{")]
        line = next(entry for entry in lines if entry["event"] == "request")
        assert {"id", "method", "path", "status", "ms", "rows", "tokens"} <= line.keys()
        assert (line["path"], line["status"], line["rows"]) == ("/predict", 200, 1)
        assert ("good fun" in caplog.text) == log_texts


def test_requests_have_a_number(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service) -> None:
        given = await client.get("/health", headers={"x-request-id": "abc-1"})
        assert given.headers["x-request-id"] == "abc-1"
        for odd in ("a b", "x" * 65, "a;b"):
            made = (await client.get("/health", headers={"x-request-id": odd})).headers["x-request-id"]
            assert re.fullmatch("[0-9a-f]{32}", made)

    serving(model, check)


def test_weights_that_are_no_safetensors_are_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(model, folder)
    loaded, _ = load_model(str(folder), "cpu")
    torch.save(loaded.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match="safetensors"):
        asked(folder, "/predict", {})


# Reloading and ending


def test_a_reload_drops_nothing_and_changes_the_answers(tmp_path: Path) -> None:
    folder, other = save_model(tmp_path / "a"), save_model(tmp_path / "b", seed=1)
    token = {"authorization": "Bearer secret"}

    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        async def ask() -> Any:
            return (await client.post("/predict", json={"inputs": "good"}, headers=token)).json()

        before, first = await ask(), service.worker
        gate.clear()
        tasks = [asyncio.ensure_future(ask()) for _ in range(9)]
        await until_waiting(service, 9)
        for name in ("model.safetensors", "config.json"):
            shutil.copy(other / name, folder / name)
        told = await client.post("/admin/reload", headers=token)
        assert told.status_code == 200, told.text
        assert service.worker is not first
        assert await ask() != before
        gate.set()
        for answer in await asyncio.gather(*tasks):
            assert answer == [{**row, "score": pytest.approx(row["score"], abs=1e-6)} for row in before]
        assert (await client.get("/info", headers=token)).json()["model_sha"] == told.json()["model_sha"]
        await asyncio.to_thread(first.join, 10)
        assert not first.is_alive

    gated(folder, check, token="secret")


def test_a_reload_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    folder, token = save_model(tmp_path / "a"), {"authorization": "Bearer secret"}

    async def check(client: httpx.AsyncClient, service: Service) -> None:
        config = folder / "config.json"
        config.write_text("damaged")
        told = await client.post("/admin/reload", headers=token)
        assert (told.status_code, told.json()["error_type"]) == (424, "Backend")
        assert (await client.post("/predict", json={"inputs": "good"}, headers=token)).status_code == 200
        assert 'fastkd_reloads_total{outcome="failed"} 1.0' in service.metrics.text().decode()

    serving(folder, check, token="secret")


def test_only_a_server_with_a_token_is_told_to_reload(model: Path) -> None:
    assert asked(model, "/admin/reload", {}).status_code == 403


def test_what_cannot_be_answered_before_the_end_is_told_to_ask_again(model: Path) -> None:
    async def check(client: httpx.AsyncClient, service: Service, gate: threading.Event) -> None:
        gate.clear()
        left = classify(client)
        await until_waiting(service, 1)
        service.drain()
        service.give_up()
        answer = await left
        assert (answer.status_code, answer.json()["error_type"]) == (503, "Unhealthy")
        assert answer.headers["retry-after"] == "1"

    gated(model, check)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"port": 70000}, "port: got 70000"),
        ({"monitor": 2.0}, "monitor: got 2.0"),
        ({"request_timeout": 0}, "request_timeout: got 0, expected 0.1 to 3600"),
        ({"max_batch": 0}, "max_batch: got 0, expected at least 1"),
        ({"pressure_speed": 0.0}, "pressure_speed: got 0.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ServeOptions(model="", **options)
