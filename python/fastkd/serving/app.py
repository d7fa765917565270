"""The HTTP of a server, one application for every way to run it: TEI's paths, `/v1/classify`, and a page to try it."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from fastkd.serving.errors import GoneError, Refusal
from fastkd.serving.guard import Guard
from fastkd.serving.metrics import CONTENT_TYPE
from fastkd.serving.schema import (
    ClassifyRequest,
    ClassifyResponse,
    ErrorBody,
    Prediction,
    PredictRequest,
    Rank,
    RerankRequest,
    texts_to_classify,
    texts_to_predict,
)
from fastkd.serving.service import Accepted, Answered, Coming, Ranked, Service
from fastkd.serving.worker import Text

_FOLDER = Path(__file__).parent
_NO_NETWORK = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
_GONE = 499  # nobody reads it, but for the log
_KINDS = {400: "Malformed", 404: "Validation", 413: "TooLarge", 405: "Validation", 503: "Unhealthy"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Not JSON"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    415: {"model": ErrorBody, "description": "The Content-Type is not JSON"},
    422: {"model": ErrorBody, "description": "Unusable input"},
    424: {"model": ErrorBody, "description": "The model failed, or cannot do this"},
    429: {"model": ErrorBody, "description": "The queue is full: try again after Retry-After"},
    503: {"model": ErrorBody, "description": "Starting, shutting down, or too slow: try again"},
    504: {"model": ErrorBody, "description": "deadline_ms passed before the first layer"},
}
Taken = TypeVar("Taken", bound=Coming)


def create_app(service: Service) -> FastAPI:
    """The application of `service`, which it starts and closes with itself."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title="fastkd serve", description="Early-exit classification.", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(Guard, service=service)
    _add_errors(app)
    _add_paths_of_tei(app, service)
    _add_own_paths(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse(Refusal("Malformed", "body: is not JSON").body, 400)
        # without the input, which may be anything, and nobody's business in a log
        place = ".".join(str(part) for part in first["loc"][1:2]) or "body"
        return JSONResponse(Refusal("Validation", f"{place}: {first['msg']}").body, 422)

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        body = {"error": str(error.detail), "error_type": _KINDS.get(error.status_code, "Validation")}
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(GoneError)
    async def gone(request: Request, error: GoneError) -> Response:
        return Response(status_code=_GONE)


def _add_paths_of_tei(app: FastAPI, service: Service) -> None:
    @app.post("/", include_in_schema=False)
    @app.post("/invocations", include_in_schema=False)
    @app.post("/predict", response_model=list[Prediction] | list[list[Prediction]], responses=_ERRORS)
    async def predict(body: PredictRequest, request: Request) -> Response:
        """Scores of all labels, the best first: one list for one input, a list of lists for a batch."""
        texts, is_batch = texts_to_predict(body.inputs)
        from_left = body.truncation_direction.lower() == "left"
        answers, headers = await _classified(service, request, texts, truncate=body.truncate, from_left=from_left)
        found = [_predictions(service, answer, body.raw_scores) for answer in answers]
        # huggingface_hub sends `parameters` and takes the first of a list
        is_nested = is_batch or body.parameters is not None
        return JSONResponse(found if is_nested else found[0], headers=headers)

    @app.post("/rerank", response_model=list[Rank], response_model_exclude_none=True, responses=_ERRORS)
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """How well each text answers the query, the best first; for a score, or the probability of one class."""
        pairs = [(body.query, text) for text in body.texts]
        coming = await _accept(
            service, request, pairs,
            service.accept_ranking(
                body.query, body.texts, top_k=body.top_k, speed=body.speed, label=body.label, truncate=body.truncate,
                from_left=body.truncation_direction.lower() == "left",
            ),
        )  # fmt: skip
        (found,), seconds = await _answers(service, request, len(pairs), coming)
        ranks = []
        for index, score in list(zip(found.order, found.scores, strict=True))[: body.top_k]:
            shown = score if body.raw_scores else float(torch.tensor(score).sigmoid())
            ranks.append({"index": index, "score": shown} | ({"text": body.texts[index]} if body.return_text else {}))
        return JSONResponse(ranks, headers=_headers(pairs, coming, [found], found.exit_layers, seconds))

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """The model, its limits and its certificate."""
        return service.info()

    @app.get("/ping", include_in_schema=False)
    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> Response:
        """200 where requests are answered."""
        if not service.is_healthy:
            return JSONResponse({"error": "unhealthy", "error_type": "Unhealthy"}, 503)
        return Response()

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/api-doc/openapi.json", include_in_schema=False)
    async def openapi() -> Any:
        return app.openapi()


def _add_own_paths(app: FastAPI, service: Service) -> None:
    @app.post("/v1/classify", response_model=ClassifyResponse, responses=_ERRORS)
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """Label, probability, exit layer and uncertainty of each input, at a speed of its own."""
        texts = texts_to_classify(body.inputs)
        accepted = await _accept(
            service, request, texts,
            service.accept(
                texts, speed=body.speed, criterion=body.criterion, top_n=body.top_n, deadline_ms=body.deadline_ms,
                truncate=body.truncate,
            ),
        )  # fmt: skip
        if body.stream:
            lines = _lines(service, accepted, body.scores)
            return StreamingResponse(lines, media_type="application/x-ndjson", headers=_speed_headers(accepted))
        answers, seconds = await _answers(service, request, len(texts), accepted)
        found = {
            "answers": [_classification(service, answer, body.scores) for answer in answers],
            "speed": accepted.speed,
            "criterion": accepted.rule.criterion,
            "layers": accepted.rule.last_layer,
            "tokens": accepted.tokens,
        }
        return JSONResponse(found, headers=_row_headers(texts, accepted, answers, seconds))

    @app.post("/admin/reload", responses={403: {"model": ErrorBody}, **_ERRORS})
    async def reload() -> dict[str, Any]:
        """Load the model folder anew; only for a server with a token."""
        if service.options.token is None:
            raise HTTPException(403, "reload: needs a server that was started with a token; or send the server SIGHUP")
        # what loads goes on where the client leaves, and is used
        return await asyncio.shield(service.reload())

    page = (_FOLDER / "page.html").read_text(encoding="utf-8")
    reference = (_FOLDER / "reference.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def try_it() -> Response:
        return HTMLResponse(page, headers=_NO_NETWORK)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(reference, headers=_NO_NETWORK)


async def _classified(
    service: Service, request: Request, texts: Sequence[Text], **options: Any
) -> tuple[list[Answered], dict[str, str]]:
    accepted = await _accept(service, request, texts, service.accept(texts, **options))
    answers, seconds = await _answers(service, request, len(texts), accepted)
    return answers, _row_headers(texts, accepted, answers, seconds)


async def _accept(
    service: Service, request: Request, texts: Sequence[Text], accepting: Coroutine[Any, Any, Taken]
) -> Taken:
    noted = {"rows": len(texts)} | ({"texts": texts} if service.options.log_texts else {})
    request.state.log = noted
    try:
        coming = await accepting
    except Refusal as error:
        service.metrics.classified(len(texts), 0.0, error.kind)
        raise
    noted["tokens"] = coming.tokens
    return coming


async def _answers(service: Service, request: Request, rows: int, coming: Coming) -> tuple[list[Any], float]:
    """The answers to what was accepted, and the seconds that they took."""
    began = time.monotonic()
    try:
        with _watched(request, partial(service.leave, coming)):
            answers = await service.answers(coming)
    except (Refusal, GoneError) as error:
        service.metrics.classified(rows, 0.0, error.kind if isinstance(error, Refusal) else "dropped")
        raise
    seconds = time.monotonic() - began + coming.tokenizing_seconds
    service.metrics.classified(rows, seconds, None)
    return answers, seconds


@contextmanager
def _watched(request: Request, leave: Callable[[], None]) -> Iterator[None]:
    """Calls `leave` where the client goes away meanwhile."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is None:
            leave()

    leaving = asyncio.ensure_future(_disconnected(request))
    leaving.add_done_callback(ended)
    try:
        yield
    finally:
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _lines(service: Service, accepted: Accepted, wants_scores: bool) -> AsyncIterator[str]:
    async for number, answer in service.answers_as_they_come(accepted):
        if isinstance(answer, Refusal):
            yield json.dumps({"index": number, **answer.body}) + "\n"
        else:
            yield json.dumps({"index": number, **_classification(service, answer, wants_scores)}) + "\n"


def _predictions(service: Service, answer: Answered, raw_scores: bool) -> list[dict[str, Any]]:
    names = service.worker.names
    scores = answer.logits if raw_scores or len(answer.logits) == 1 else _probabilities(answer.logits)
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    return [{"score": scores[number], "label": names[number]} for number in order]


def _classification(service: Service, answer: Answered, wants_scores: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "label": answer.label,
        "score": answer.score,
        "exit_layer": answer.exit_layer,
        "uncertainty": answer.uncertainty,
    }
    if wants_scores and len(answer.logits) > 1:
        names = service.worker.names
        found["scores"] = {names[number]: score for number, score in enumerate(_probabilities(answer.logits))}
    return found


def _probabilities(logits: Sequence[float]) -> list[float]:
    most = max(logits)
    powers = [math.exp(logit - most) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def _speed_headers(accepted: Accepted) -> dict[str, str]:
    speed = accepted.speed if isinstance(accepted.speed, list) else [accepted.speed]
    return {
        "x-fastkd-speed": ",".join(f"{value:g}" for value in speed),
        "x-fastkd-speed-raised": "true" if accepted.is_raised else "false",
    }


def _row_headers(
    texts: Sequence[Text], accepted: Accepted, answers: Sequence[Answered], seconds: float
) -> dict[str, str]:
    layers = [answer.exit_layer for answer in answers]
    return _speed_headers(accepted) | _headers(texts, accepted, answers, layers, seconds)


def _headers(
    texts: Sequence[Text], coming: Coming, answers: Sequence[Answered | Ranked], layers: Sequence[int], seconds: float
) -> dict[str, str]:
    """TEI's headers, in whole milliseconds; what is said of each row is a mean."""
    count = len(answers)

    def ms(value: float) -> str:
        return str(round(1000 * value))

    return {
        "x-compute-type": f"{coming.worker.model.device.type}+optimized",
        "x-compute-time": ms(seconds),
        "x-compute-characters": str(sum(len(part) for text in texts for part in text if part is not None)),
        "x-compute-tokens": str(coming.tokens),
        "x-total-time": ms(seconds),
        "x-tokenization-time": ms(coming.tokenizing_seconds / len(texts)),
        "x-queue-time": ms(sum(answer.queue_seconds for answer in answers) / count),
        "x-inference-time": ms(sum(answer.run_seconds for answer in answers) / count),
        "x-fastkd-exit-layers": ",".join(map(str, layers)),
    }
