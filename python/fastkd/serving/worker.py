"""`Worker`: one loaded model, the thread that runs its stream, and a future for each row that somebody waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import torch

from fastkd.data.input_format import encode, input_format_of
from fastkd.data.texts import text_problem
from fastkd.engines.rank_requests import RankAnswer, RankRequest, RankRequests
from fastkd.engines.request_stream import RequestAnswer, RequestStream, StreamRequest, StreamStep
from fastkd.engines.stream_reader import EncodedRow, longest_row
from fastkd.exits.certificate import Certificate
from fastkd.exits.fingerprints import model_fingerprint
from fastkd.exits.rank_calibration import RankCertificate
from fastkd.exits.rule import ExitRule
from fastkd.exits.scores import score_of
from fastkd.model.loading import load_model
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.ranking import label_number, rank_rule
from fastkd.serving.errors import Refusal, no_answer
from fastkd.serving.options import ServeOptions

_WARM_UP = ("warm", "warm up " * 40)
_SHORT = 2000
"""Characters that are tokenised at once: a hand-over to another thread would take as long."""
_MOST_STEPS = 16
"""Steps without an answer that the event loop hears of together: each time it wakes it takes Python from the stream."""
Text = tuple[str, str | None]
Encoded = list[tuple[list[int], list[int] | None]]
"""Token ids and segments of each text or pair."""
Ended = RequestAnswer | RankAnswer
"""What became of a row, or of a ranking."""


class Worker:
    """Made in any thread; its methods are called from the event loop, which gets the answers."""

    def __init__(
        self,
        options: ServeOptions,
        deliver: Callable[[Worker, Sequence[StreamStep], Sequence[Ended]], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Load the model of `options`, check that it can do what they say, and run every layer once.

        Args:
            options: of the server.
            deliver: called in the event loop with the steps since the last call, and at once with what has ended.
            loop: where the server runs.

        Raises:
            ValueError, OSError: a model that cannot be loaded, or that cannot answer as the options say.
        """
        self.model, self.tokenizer = load_model(options.model, options.device, options.dtype, safetensors_only=True)
        _own_weights(self.model)
        self.options = options
        config = self.model.config
        self.names = [str(name) for _, name in sorted((config.id2label or {}).items())]
        self.limit = longest_row(config, self.tokenizer, options.max_length)
        self.fingerprint = model_fingerprint(self.model)
        self.rule_of = lru_cache(maxsize=1024)(self._rule_of)
        self.default_rule = self.rule_of(None, None, None)
        self.pressure_rule = (
            None if options.pressure_speed is None else self.rule_of(options.pressure_speed, None, None)
        )
        check_pressure(self.model, options)
        rule = self.model.exit_rule(1.0 if config.exits_trained else 0.0)
        self._stream = RequestStream(self.model, rule=rule, tokens_per_run=options.tokens_per_run)
        self._rankings = RankRequests(self.model, tokens_per_run=options.tokens_per_run)
        self.rank_certificate = RankCertificate.of(config)
        self._rank_rule_of = lru_cache(maxsize=1024)(partial(rank_rule, self.model))
        self._deliver, self._loop = deliver, loop
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        # a fast tokenizer keeps how it cuts, so that two threads would change it for each other
        self._tokenizer_is_free = threading.Lock()
        self._wake = threading.Condition()
        self._is_stopping = self._is_aborting = False
        self._warm_up()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def _rule_of(self, speed: float | None, criterion: str | None, top_n: int | None) -> ExitRule:
        options = self.options
        return self.model.exit_rule(
            options.speed if speed is None else speed,
            options.criterion if criterion is None else criterion,
            options.top_n if top_n is None else top_n,
        )

    def _warm_up(self) -> None:
        for text in _WARM_UP:
            ids = encode(self.tokenizer, [text], None, self.limit, return_attention_mask=False)["input_ids"][0]
            self._stream.add([StreamRequest(ids, None, self.model.exit_rule(0.0))])
        if self.default_rule.leaves_early:
            self._stream.add([StreamRequest(ids, None, self.default_rule)])
        while not self._stream.is_idle:
            for answer in self._stream.step().answers:
                if answer.error is not None:
                    raise answer.error

    async def encode(self, texts: Sequence[Text], truncate: bool, from_left: bool) -> Encoded:
        """Token ids and segments of each text or pair.

        Raises:
            Refusal: a text that the tokenizer cannot take, or one that is too long; or others keep it busy too long.
        """
        is_short = sum(len(part) for text in texts for part in text if part is not None) <= _SHORT
        if is_short and self._tokenizer_is_free.acquire(blocking=False):
            try:
                return self._encode(texts, truncate, from_left)
            finally:
                self._tokenizer_is_free.release()
        encoding = self._loop.run_in_executor(self._tokenizing, self._encode_alone, texts, truncate, from_left)
        try:
            return await asyncio.wait_for(encoding, self.options.request_timeout)
        except asyncio.TimeoutError:
            raise no_answer(self.options.request_timeout, retry_after=1) from None

    def _encode_alone(self, texts: Sequence[Text], truncate: bool, from_left: bool) -> Encoded:
        with self._tokenizer_is_free:
            return self._encode(texts, truncate, from_left)

    def _encode(self, texts: Sequence[Text], truncate: bool, from_left: bool) -> Encoded:
        for number, text in enumerate(texts):
            for part in text if text[1] is not None else text[:1]:
                if problem := text_problem(part):
                    raise Refusal("Tokenizer" if part else "Empty", f"inputs: number {number + 1} has {problem}")
        if from_left and input_format_of(self.tokenizer) != "standard":
            raise Refusal(
                "Validation", "truncation_direction: got Left, but this model's input format cuts on the right"
            )
        found: list[Any] = [None] * len(texts)
        side = self.tokenizer.truncation_side
        try:
            self.tokenizer.truncation_side = "left" if from_left else "right"
            for is_pair in (False, True):
                numbers = [number for number, text in enumerate(texts) if (text[1] is not None) == is_pair]
                if numbers:
                    columns = self._columns([texts[number] for number in numbers], is_pair, truncate)
                    for number, column in zip(numbers, columns, strict=True):
                        found[number] = column
        finally:
            self.tokenizer.truncation_side = side
        for number, (ids, _) in enumerate(found):
            if not 1 <= len(ids) <= self.limit:
                raise Refusal(
                    "Validation",
                    f"inputs: number {number + 1} has {len(ids)} tokens, expected 1 to {self.limit}; shorten it, or "
                    "send truncate: true",
                )
        return found

    def _columns(self, texts: Sequence[Text], is_pair: bool, truncate: bool) -> list[Any]:
        second = [text[1] for text in texts] if is_pair else None
        try:
            batch = encode(
                self.tokenizer, [text[0] for text in texts], second, self.limit, truncate=truncate,
                return_attention_mask=False, verbose=False,
            )  # fmt: skip
        except Exception as error:  # a tokenizer may raise anything for a strange text
            raise Refusal("Tokenizer", f"inputs: {error}") from error
        segments = batch.get("token_type_ids") if is_pair else None
        return list(zip(batch["input_ids"], segments or [None] * len(texts), strict=True))

    def add(self, requests: Sequence[StreamRequest]) -> None:
        self._stream.add(requests)
        with self._wake:
            self._wake.notify()

    def rank_request(self, rows: Encoded, top_k: int | None, speed: float | None, label: str | None) -> RankRequest:
        """The ranking of encoded pairs by the class `label`, or where that is None by that of the certificate.

        Raises:
            Refusal: a classifier without either, or a speed or label that the model has not.
        """
        config = self.model.config
        certified = None if self.rank_certificate is None else self.rank_certificate.label
        if config.num_classes > 1 and label is None and certified is None:
            raise Refusal(
                "Backend",
                "rerank: this model is a classifier; send label, the class whose probability ranks the texts, one of "
                f"{', '.join(self.names)}",
            )
        try:
            number = label_number(config, certified if label is None else label)
            rule = self._rank_rule_of(min(top_k or len(rows), len(rows)), speed, number)
            score = score_of(config.num_classes, number)
        except ValueError as error:
            raise Refusal("Validation", str(error)) from None
        pairs = [
            EncodedRow(position, position + 1, len(ids), ids, segments, 0.0)
            for position, (ids, segments) in enumerate(rows)
        ]
        return RankRequest(pairs, rule, score)

    def rank(self, request: RankRequest) -> None:
        self._rankings.add(request)
        with self._wake:
            self._wake.notify()

    def cancel(self, requests: Sequence[StreamRequest | RankRequest]) -> None:
        for request in requests:
            request.is_cancelled = True
        self._stream.cancel([])
        with self._wake:
            self._wake.notify()

    def stop(self) -> None:
        """End the thread once everything accepted is answered; returns at once."""
        self._is_stopping = True
        with self._wake:
            self._wake.notify()
        self._tokenizing.shutdown(wait=False)

    def abort(self) -> None:
        """End the thread after the run that is on its way."""
        self._is_aborting = True
        self.stop()

    def join(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        """Whether anything that is added will be answered."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._run_steps()
        except BaseException as error:
            # nobody who waits is left to wait for ever
            ended: list[Ended] = [RequestAnswer(request, None, error=error) for request in self._stream.waiting()]
            ended += [RankAnswer(ranking, None, error) for ranking in self._rankings.waiting()]
            self._tell([], ended)
            raise

    def _run_steps(self) -> None:
        steps: list[StreamStep] = []
        while not self._is_aborting:
            if self._is_idle:
                with self._wake:
                    if self._is_idle:
                        if self._is_stopping or self._loop.is_closed():
                            return
                        self._wake.wait(1.0)
                continue
            ended: list[Ended] = []
            if not self._stream.is_idle:
                steps.append(self._stream.step())
                ended += steps[-1].answers
            if not self._rankings.is_idle:
                step, ranking = self._rankings.step()
                steps.append(step)
                ended += [ranking] if ranking is not None else []
            if ended or len(steps) >= _MOST_STEPS:
                self._tell(steps, ended)
                steps = []

    @property
    def _is_idle(self) -> bool:
        return self._stream.is_idle and self._rankings.is_idle

    def _tell(self, steps: Sequence[StreamStep], ended: Sequence[Ended]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, self, steps, ended)
        except RuntimeError:  # the event loop is closed, and nobody waits any more
            self._is_aborting = True


def _own_weights(model: torch.nn.Module) -> None:
    """Take the weights out of the file: loaded ones are its pages, and would change, or be lost, with it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def check_pressure(model: EarlyExitForSequenceClassification, options: ServeOptions) -> None:
    """Raise ValueError unless the certificate of `model` covers the pressure speed and every speed below it."""
    high = options.pressure_speed
    if high is None:
        return
    low = model.config.speed if options.speed is None else options.speed
    if isinstance(low, list) or low >= high:
        raise ValueError(f"pressure_speed: got {high}, expected a number above the speed {low}")
    certificate = Certificate.of(model.config)
    if certificate is None:
        raise ValueError(
            "pressure_speed: this model has no certificate, so nothing says what a higher speed costs; run "
            "`fastkd calibrate` first"
        )
    speeds = certificate.speed
    if certificate.method != "fixed-sequence" or isinstance(speeds, list) or not high <= speeds:
        raise ValueError(
            f"pressure_speed: got {high}, expected at most {speeds}, the certified speed of method fixed-sequence, "
            "below which every speed that was tested holds too"
        )
    wrong = certificate.mismatches(
        model.config, model.dtype, speed=speeds, criterion=options.criterion, top_n=options.top_n
    )
    if wrong or (changed := model.changed_weights()):
        raise ValueError(f"pressure_speed: the certificate is for another use: {'; '.join(wrong) or changed}")


def problem_of(answer: Ended) -> Refusal | None:
    """Why a row or a ranking has no answer; None where it has one."""
    if answer.error is not None:
        return Refusal("Backend", f"the model failed: {type(answer.error).__name__}")
    if isinstance(answer, RankAnswer):
        return Refusal("Unhealthy", "cancelled") if answer.found is None else None
    if answer.row is None:
        if answer.request.is_cancelled:
            return Refusal("Unhealthy", "cancelled")
        return Refusal("Deadline", "deadline_ms: passed before the first layer; give more time, or send less at once")
    return None if answer.row.problem is None else Refusal("Backend", answer.row.problem)
