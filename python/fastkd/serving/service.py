"""`Service`: what a server does with rows, whatever protocol they come by: admission, pressure, answers, reloading."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastkd.engines.rank_requests import RankAnswer, RankRequest
from fastkd.engines.request_stream import RequestAnswer, StreamRequest, StreamStep
from fastkd.engines.stream import NOT_FINITE
from fastkd.exits.certificate import Certificate
from fastkd.exits.drift import DriftMonitor
from fastkd.exits.rule import ExitRule
from fastkd.serving.errors import GoneError, Refusal, no_answer
from fastkd.serving.metrics import Metrics
from fastkd.serving.options import ServeOptions
from fastkd.serving.worker import Encoded, Ended, Text, Worker, problem_of

_LONG_QUEUE, _SHORT_QUEUE = 0.5, 0.25
"""Shares of `max_queue_tokens` at which pressure begins and ends: apart, so that the speed does not flutter."""
_NO_ANSWER = object()
_AT_LEAST = 0.05  # seconds over which the rate of tokens is measured

logger = logging.getLogger("fastkd.serving")


def log(event: str, **more: Any) -> None:
    """One line of JSON."""
    logger.info(json.dumps({"time": round(time.time(), 3), "event": event, **more}))


@dataclass
class Answered:
    """One row's answer, and how long it took."""

    logits: list[float]
    label: str | float
    score: float | None
    exit_layer: int
    uncertainty: float | None
    queue_seconds: float
    run_seconds: float


@dataclass
class Ranked:
    """A query's answer, and how long it took."""

    order: list[int]
    """Numbers of the documents that are given, the best first."""
    scores: list[float]
    """Of these."""
    exit_layers: list[int]
    """After which layer each document left, in the order of the request."""
    queue_seconds: float
    run_seconds: float


@dataclass(eq=False)
class _Waiting:
    """Who waits for a row, or a ranking."""

    future: asyncio.Future[Any] | None
    accepted: float
    number: int | None = None
    """Of a row that the monitor watches, among those at the server's speed."""
    is_early: bool = False


@dataclass
class Coming:
    """What was accepted of one request, on its way."""

    futures: list[asyncio.Future[Any]]
    requests: Sequence[StreamRequest | RankRequest]
    worker: Worker
    tokens: int
    tokenizing_seconds: float
    timeout: asyncio.TimerHandle
    """Refuses what has no answer by then."""


@dataclass
class Accepted(Coming):
    """The rows of one request."""

    rule: ExitRule
    speed: float | list[float]
    is_raised: bool


@dataclass(eq=False)
class _Admitted:
    """Tokenised texts that there is room for."""

    rows: Encoded
    tokens: int
    worker: Worker
    began: float
    tokenizing_seconds: float


class _Monitor:
    """Drift, measured on the rows at the server's own speed: some of them run to full depth too."""

    def __init__(self, worker: Worker, options: ServeOptions, metrics: Metrics) -> None:
        self.drift = DriftMonitor(
            worker.model, options.monitor, speed=options.pressure_speed or options.speed, criterion=options.criterion,
            top_n=options.top_n,
        )  # fmt: skip
        self._metrics = metrics
        self._next = 0
        self._halves: dict[int, tuple[bool, Any]] = {}
        metrics.drift(self.drift.report())

    def watched(self, rows: int) -> list[int | None]:
        """For each of the next rows its number, where it is watched."""
        numbers = range(self._next, self._next + rows)
        self._next += rows
        self.drift.rows += rows
        return [
            n if is_watched else None for n, is_watched in zip(numbers, self.drift.watches(list(numbers)), strict=True)
        ]

    def note(self, number: int, is_early: bool, label: Any) -> None:
        """One of the two answers of a watched row; `_NO_ANSWER` where it has none."""
        other = self._halves.pop(number, None)
        if other is None:
            self._halves[number] = is_early, label
            return
        early, full = (label, other[1]) if is_early else (other[1], label)
        if early is _NO_ANSWER or full is _NO_ANSWER:
            return
        had_drifted = self.drift.has_drifted
        self.drift.record(0, [early], [full])
        report = self.drift.report()
        self._metrics.drift(report)
        if report.has_drifted and not had_drifted:
            log("alarm", reason=str(report))


@dataclass
class _Load:
    """What was accepted and not yet answered."""

    rows: int = 0
    tokens: int = 0
    rate: float = 0.0
    """Tokens answered a second, lately."""
    _answered: int = 0
    _since: float = field(default_factory=time.monotonic)

    def answered(self, tokens: int) -> None:
        self._answered += tokens
        now = time.monotonic()
        seconds = now - self._since
        if seconds < _AT_LEAST:
            return
        rate = self._answered / seconds
        self.rate = rate if self.rate == 0 else 0.8 * self.rate + 0.2 * rate
        self._answered, self._since = 0, now

    def seconds_of(self, tokens: int) -> int:
        """Whole seconds in which so many tokens are answered, from 1 to 60."""
        return min(60, max(1, math.ceil(tokens / self.rate))) if self.rate else 1


class Service:
    """Lives in one event loop."""

    def __init__(self, options: ServeOptions, worker: Callable[..., Worker] = Worker) -> None:
        self.options = options
        self._make_worker = worker
        self._worker: Worker | None = None
        self._old: list[Worker] = []
        self._load = _Load()
        self._reloading = asyncio.Lock()
        self._monitor: _Monitor | None = None
        self._is_under_pressure = False
        self.is_draining = False
        self.accepted_rows = self.ended_rows = 0
        self._everybody: set[StreamRequest | RankRequest] = set()

    async def start(self) -> None:
        """Load the model."""
        self._worker = await self._loaded()
        self.metrics = Metrics(self.worker.model.exit_layers)
        self._watch()

    async def _loaded(self) -> Worker:
        loop = asyncio.get_running_loop()
        return await asyncio.to_thread(self._make_worker, self.options, self._deliver, loop)

    def _watch(self) -> None:
        rule = self.worker.pressure_rule or self.worker.default_rule
        if self.options.monitor and rule.leaves_early:
            self._monitor = _Monitor(self.worker, self.options, self.metrics)

    @property
    def worker(self) -> Worker:
        """The one that new requests go to."""
        assert self._worker is not None
        return self._worker

    @property
    def is_healthy(self) -> bool:
        return self._worker is not None and self._worker.is_alive and not self.is_draining

    async def reload(self) -> dict[str, Any]:
        """Load the model folder anew beside the old weights, and answer new requests by it; old ones end as they began.

        Raises:
            Refusal: another reload is in progress, or the folder cannot be loaded; the old model goes on.
        """
        if self._reloading.locked():
            raise Refusal("Overloaded", "reload: another reload is in progress", retry_after=5)
        async with self._reloading:
            try:
                worker = await self._loaded()
            except Exception as error:
                self.metrics.reloads.labels("failed").inc()
                log("reload", outcome="failed", reason=str(error))
                raise Refusal("Backend", f"reload: {error}; the previous model keeps answering") from error
            if self.is_draining:
                worker.stop()
                raise Refusal("Unhealthy", "reload: the server is shutting down")
            old, self._worker = self.worker, worker
            self._old = [before for before in [*self._old, old] if before.is_alive]
            self._monitor = None
            self._watch()
            old.stop()
            self.metrics.reloads.labels("done").inc()
            log("reload", outcome="done", model=worker.fingerprint)
            return {"model_sha": worker.fingerprint, "was": old.fingerprint}

    async def accept(
        self,
        texts: Sequence[Text],
        *,
        speed: float | None = None,
        criterion: str | None = None,
        top_n: int | None = None,
        deadline_ms: float | None = None,
        truncate: bool | None = None,
        from_left: bool = False,
    ) -> Accepted:
        """Queue the rows of one request.

        Raises:
            Refusal: rows that cannot be used, options that the model cannot follow, or no room.
        """
        self._rule(self.worker, speed, criterion, top_n)  # what is wrong with it is said before any work
        admitted = await self._admitted(texts, truncate, from_left)
        worker, now = admitted.worker, admitted.began
        rule, used, is_raised = self._rule(worker, speed, criterion, top_n)
        due = math.inf if deadline_ms is None else now + deadline_ms / 1000
        loop = asyncio.get_running_loop()
        at_own_speed = speed is None and criterion is None and top_n is None
        count = len(texts)
        watched = self._monitor.watched(count) if self._monitor and at_own_speed else [None] * count
        futures: list[asyncio.Future[Answered]] = []
        requests = []
        for (ids, segments), number in zip(admitted.rows, watched, strict=True):
            futures.append(loop.create_future())
            caller = _Waiting(futures[-1], now, number, is_early=True)
            requests.append(StreamRequest(ids, segments, rule, due, deadline_ms is not None, caller=caller))
            if number is not None:
                shadow = _Waiting(None, now, number)
                full = [StreamRequest(ids, segments, worker.rule_of(0.0, None, None), caller=shadow)]
                self._note_queued(full)
                worker.add(full)
        self._note_queued(requests)
        worker.add(requests)
        self._note_accepted(count)
        if is_raised:
            self.metrics.raised.inc(count)
        timeout = self._timeout(futures, now)
        return Accepted(
            futures, requests, worker, admitted.tokens, admitted.tokenizing_seconds, timeout, rule, used, is_raised
        )

    async def accept_ranking(
        self,
        query: str,
        texts: Sequence[str],
        *,
        top_k: int | None = None,
        speed: float | None = None,
        label: str | None = None,
        truncate: bool | None = None,
        from_left: bool = False,
    ) -> Coming:
        """Queue the ranking of texts by how well they answer a query; see `EarlyExitForSequenceClassification.rank`.

        Raises:
            Refusal: texts that cannot be used, options that the model cannot follow, or no room.
        """
        self.worker.rank_request([], top_k, speed, label)  # what is wrong with it is said before any work
        admitted = await self._admitted([(query, text) for text in texts], truncate, from_left)
        request = admitted.worker.rank_request(admitted.rows, top_k, speed, label)
        future: asyncio.Future[Ranked] = asyncio.get_running_loop().create_future()
        request.caller = _Waiting(future, admitted.began)
        self._note_queued([request])
        admitted.worker.rank(request)
        self._note_accepted(len(texts))
        timeout = self._timeout([future], admitted.began)
        return Coming([future], [request], admitted.worker, admitted.tokens, admitted.tokenizing_seconds, timeout)

    async def _admitted(self, texts: Sequence[Text], truncate: bool | None, from_left: bool) -> _Admitted:
        """Texts as the worker of now reads them, where there is room.

        Raises:
            Refusal: texts that cannot be used, or no room.
        """
        began = time.monotonic()
        self._check_open(len(texts))
        if len(texts) > self.options.max_batch:
            raise Refusal(
                "Validation", f"inputs: got {len(texts)}, expected at most {self.options.max_batch} in a request"
            )
        worker = self.worker
        should_cut = self.options.auto_truncate if truncate is None else truncate
        rows = await worker.encode(texts, should_cut, from_left)
        if worker is not self.worker:  # reloaded meanwhile: what was read by one tokenizer is no input of another
            return await self._admitted(texts, truncate, from_left)
        tokens = sum(len(ids) for ids, _ in rows)
        self._check_open(len(rows))
        self._check_room(tokens)
        return _Admitted(rows, tokens, worker, began, time.monotonic() - began)

    def _note_queued(self, requests: Sequence[StreamRequest | RankRequest]) -> None:
        self._everybody.update(requests)
        self._load.rows += sum(request.count for request in requests)
        self._load.tokens += sum(request.tokens for request in requests)
        self._note_load()

    def _note_accepted(self, rows: int) -> None:
        self.accepted_rows += rows
        self.metrics.accepted.inc(rows)

    def _check_open(self, rows: int) -> None:
        if self.is_draining:
            raise Refusal("Unhealthy", "the server is shutting down; try another server", retry_after=1)
        if not self.worker.is_alive:
            raise Refusal("Unhealthy", "the model's thread has died; restart the server")
        most = self.options.max_concurrent_requests
        if self._load.rows + rows > most:
            raise Refusal(
                "Overloaded", f"{self._load.rows} inputs are waiting, and the limit is {most}",
                retry_after=self._load.seconds_of(self._load.tokens),
            )  # fmt: skip

    def _check_room(self, tokens: int) -> None:
        most = self.options.max_queue_tokens
        if tokens > most:
            raise Refusal("Validation", f"inputs: {tokens} tokens together, expected at most {most}")
        excess = self._load.tokens + tokens - most
        if excess > 0:
            raise Refusal(
                "Overloaded", f"{self._load.tokens} tokens are waiting, and the limit is {most}",
                retry_after=self._load.seconds_of(excess),
            )  # fmt: skip

    def _rule(
        self, worker: Worker, speed: float | None, criterion: str | None, top_n: int | None
    ) -> tuple[ExitRule, float | list[float], bool]:
        """A request's rule, its speed, and whether that was raised."""
        if speed is None and criterion is None and top_n is None and worker.pressure_rule and self._is_under_pressure:
            assert self.options.pressure_speed is not None
            return worker.pressure_rule, self.options.pressure_speed, True
        try:
            rule = worker.rule_of(speed, criterion, top_n)
        except ValueError as error:
            raise Refusal("Validation", str(error)) from None
        own = worker.model.config.speed if self.options.speed is None else self.options.speed
        return rule, own if speed is None else speed, False

    def _note_load(self) -> None:
        fill = self._load.tokens / self.options.max_queue_tokens
        if self.worker.pressure_rule is not None:
            self._is_under_pressure = fill > (_SHORT_QUEUE if self._is_under_pressure else _LONG_QUEUE)
            self.metrics.under_pressure.set(self._is_under_pressure)
        own = self.worker.model.config.speed if self.options.speed is None else self.options.speed
        now = self.options.pressure_speed if self._is_under_pressure else own
        self.metrics.speed.set(now if isinstance(now, float) else float("nan"))
        self.metrics.queue(self._load.rows, self._load.tokens)

    def _timeout(self, futures: Sequence[asyncio.Future[Any]], began: float) -> asyncio.TimerHandle:
        left = self.options.request_timeout - (time.monotonic() - began)
        return asyncio.get_running_loop().call_later(left, self._refuse_late, futures)

    def _refuse_late(self, futures: Sequence[asyncio.Future[Any]]) -> None:
        _fail(futures, no_answer(self.options.request_timeout, self._load.seconds_of(self._load.tokens)))

    def cancel(self, accepted: Coming) -> None:
        """Nobody waits for these rows any more."""
        accepted.timeout.cancel()
        left = [request for request in accepted.requests if request in self._everybody]
        if left:
            accepted.worker.cancel(left)

    def leave(self, accepted: Coming) -> None:
        """The client has gone: `answers` ends with GoneError, which withdraws the rows."""
        _fail(accepted.futures, GoneError())

    async def answers(self, accepted: Coming) -> list[Any]:
        """All answers of a request, `Answered` or one `Ranked`; the others are given up where one row fails.

        Raises:
            Refusal: a row has no answer.
            GoneError: the client has left.
        """
        try:
            if len(accepted.futures) == 1:
                return [await accepted.futures[0]]
            return list(await asyncio.gather(*accepted.futures))
        finally:
            self.cancel(accepted)
            _retrieve(accepted.futures)

    async def answers_as_they_come(self, accepted: Accepted) -> AsyncIterator[tuple[int, Answered | Refusal]]:
        """Each row's number and its answer, the moment that it has one."""
        numbers = {future: number for number, future in enumerate(accepted.futures)}
        done: asyncio.Queue[asyncio.Future[Answered]] = asyncio.Queue()
        for future in accepted.futures:
            future.add_done_callback(done.put_nowait)
        try:
            for _ in numbers:
                future = await done.get()
                try:
                    yield numbers[future], future.result()
                except Refusal as refusal:
                    yield numbers[future], refusal
        finally:
            self.cancel(accepted)
            _retrieve(accepted.futures)

    def _deliver(self, worker: Worker, steps: Sequence[StreamStep], ended: Sequence[Ended]) -> None:
        for answer in ended:
            self._end(worker, answer)
        for step in steps:
            self.metrics.step(step, self.options.tokens_per_run)
        if ended:
            self._note_load()

    def _end(self, worker: Worker, answer: Ended) -> None:
        request, waiting = answer.request, answer.request.caller
        if request not in self._everybody:
            return
        self._everybody.remove(request)
        self._load.rows -= request.count
        self._load.tokens -= request.tokens
        problem = problem_of(answer)
        found = None
        if problem is None:
            self._load.answered(request.tokens)
            found = _ranked(answer) if isinstance(answer, RankAnswer) else _answered(answer)
        if isinstance(found, Ranked) and not all(map(math.isfinite, found.scores)):
            problem = Refusal("Backend", NOT_FINITE)
        if waiting.number is not None and worker is self._worker and self._monitor is not None:
            label = found.label if isinstance(found, Answered) else _NO_ANSWER
            self._monitor.note(waiting.number, waiting.is_early, label)
        if waiting.future is None:
            return
        self.ended_rows += request.count
        self.metrics.ended.labels(_how(answer, problem)).inc(request.count)
        if found is not None and problem is None:
            layers = [found.exit_layer] if isinstance(found, Answered) else found.exit_layers
            self.metrics.left(layers, time.monotonic() - waiting.accepted)
        if waiting.future.done():
            return
        if problem is not None:
            waiting.future.set_exception(problem)
        else:
            waiting.future.set_result(found)

    def drain(self) -> None:
        """Accept nothing more."""
        self.is_draining = True

    def give_up(self) -> None:
        """Refuse everything that has no answer yet, with a code that says to try again."""
        for request in list(self._everybody):
            future = request.caller.future
            if future is not None:
                _fail([future], Refusal("Unhealthy", "the server is shutting down; try another server", retry_after=1))
                _retrieve([future])

    async def close(self) -> None:
        """End the threads."""
        self.drain()
        workers = [*self._old, *([self._worker] if self._worker is not None else [])]
        for worker in workers:
            worker.abort()
        for worker in workers:
            await asyncio.to_thread(worker.join, 10.0)
        log("stopped", accepted=self.accepted_rows, ended=self.ended_rows)

    def info(self) -> dict[str, Any]:
        """What /info says: TEI's fields, and what only early exits have."""
        worker, options = self.worker, self.options
        config = worker.model.config
        names = {str(number): name for number, name in (config.id2label or {}).items()}
        kind = "reranker" if config.num_classes == 1 else "classifier"
        certificate = Certificate.of(config)
        return {
            "model_id": options.model.rstrip("/").rpartition("/")[2],
            "model_sha": worker.fingerprint,
            "model_dtype": str(worker.model.dtype).removeprefix("torch."),
            "served_model_name": options.model.rstrip("/").rpartition("/")[2],
            "model_type": {
                kind: {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
            },
            "max_concurrent_requests": options.max_concurrent_requests,
            "max_input_length": worker.limit,
            "max_batch_tokens": options.tokens_per_run,
            "max_batch_requests": None,
            "max_client_batch_size": options.max_batch,
            "auto_truncate": options.auto_truncate,
            "tokenization_workers": 1,
            "version": _version(),
            "sha": None,
            "docker_label": None,
            "layers": worker.model.num_layers,
            "exit_layers": list(worker.model.exit_layers),
            "exits_trained": config.exits_trained,
            "speed": config.speed if options.speed is None else options.speed,
            "pressure_speed": options.pressure_speed,
            "criterion": worker.default_rule.criterion,
            "max_queue_tokens": options.max_queue_tokens,
            "certificate": None if certificate is None else str(certificate),
            "rank_certificate": None if worker.rank_certificate is None else str(worker.rank_certificate),
            "rank_top_k": None if worker.rank_certificate is None else worker.rank_certificate.top_k,
        }


def _answered(answer: RequestAnswer) -> Answered:
    request, row, now = answer.request, answer.row, time.monotonic()
    assert row is not None
    assert row.label is not None
    assert row.exit_layer is not None
    assert answer.logits is not None
    assert request.started is not None
    return Answered(
        answer.logits, row.label, row.score, row.exit_layer, row.uncertainty,
        request.started - request.caller.accepted, now - request.started,
    )  # fmt: skip


def _ranked(answer: RankAnswer) -> Ranked:
    request, found, now = answer.request, answer.found, time.monotonic()
    assert found is not None
    assert request.started is not None
    reached = found.exit_layers == request.rule.layers[-1]
    order = found.scores.masked_fill(~reached, -math.inf).argsort(descending=True, stable=True)[: int(reached.sum())]
    return Ranked(
        order.tolist(), found.scores[order].tolist(), found.exit_layers.tolist(),
        request.started - request.caller.accepted, now - request.started,
    )  # fmt: skip


def _how(answer: Ended, problem: Refusal | None) -> str:
    if problem is None:
        return "answered"
    has_answer = answer.found is not None if isinstance(answer, RankAnswer) else answer.row is not None
    if answer.error is not None or has_answer:
        return "failed"
    return "cancelled" if answer.request.is_cancelled else "expired"


def _fail(futures: Sequence[asyncio.Future[Any]], error: Exception) -> None:
    """End the futures that have no answer yet with `error`."""
    for future in futures:
        if not future.done():
            future.set_exception(error)


def _retrieve(futures: Sequence[asyncio.Future[Any]]) -> None:
    """Tell asyncio that nobody has missed these errors."""
    for future in futures:
        if future.done() and not future.cancelled():
            future.exception()
        else:
            future.cancel()


def _version() -> str:
    from fastkd_kernels import __version__

    return __version__
