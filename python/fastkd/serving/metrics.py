"""What a server counts, in Prometheus' text format: our names, and those that TEI's dashboards read."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fastkd.engines.request_stream import StreamStep
from fastkd.exits.drift import DriftReport

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TEI_SECONDS = tuple(1e-5 * 1.5**power for power in range(35))
_POWERS = tuple(float(1 << power) for power in range(15))
_FILL = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, exit_layers: Sequence[int]) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "fastkd_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "fastkd_request_seconds", "Seconds from the first byte to the answer, by path.", ["path"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.row_seconds = Histogram(
            "fastkd_row_seconds", "Seconds from accepting a row to answering it.", buckets=_SECONDS, registry=registry
        )
        self.accepted = Counter("fastkd_rows_accepted", "Rows accepted.", registry=registry)
        self.ended = Counter(
            "fastkd_rows_ended", "Accepted rows by outcome: answered, failed, cancelled, expired.", ["how"],
            registry=registry,
        )  # fmt: skip
        self.queue_tokens = Gauge("fastkd_queue_tokens", "Tokens accepted and not yet answered.", registry=registry)
        self.queue_rows = Gauge("fastkd_queue_rows", "Rows accepted and not yet answered.", registry=registry)
        self.fill = Histogram(
            "fastkd_run_fill", "Tokens in a run as a share of a full run, by the last layer of the run.", ["layer"],
            buckets=_FILL, registry=registry,
        )  # fmt: skip
        self.runs = Counter("fastkd_runs", "Runs by last layer.", ["layer"], registry=registry)
        self.run_seconds = Counter(
            "fastkd_run_seconds", "Seconds spent in runs, by last layer.", ["layer"], registry=registry
        )
        self.exits = Counter("fastkd_exits", "Rows answered, by exit layer.", ["layer"], registry=registry)
        self.speed = Gauge("fastkd_speed", "Current speed of requests that name none.", registry=registry)
        self.under_pressure = Gauge("fastkd_under_pressure", "1 while pressure raises the speed.", registry=registry)
        self.raised = Counter("fastkd_rows_at_pressure_speed", "Rows answered at the raised speed.", registry=registry)
        self.watched = Gauge("fastkd_agreement_watched_rows", "Rows that also ran to full depth.", registry=registry)
        self.agreement = Gauge(
            "fastkd_agreement",
            "Share of watched rows with the full model's answer, and its interval.",
            ["bound"],
            registry=registry,
        )
        self.promised = Gauge(
            "fastkd_agreement_promised", "Agreement that the certificate promises; NaN without one.", registry=registry
        )
        self.alarm = Gauge("fastkd_agreement_alarm", "1 if the certificate no longer holds.", registry=registry)
        self.reloads = Counter("fastkd_reloads", "Reloads by outcome.", ["outcome"], registry=registry)
        self.promised.set(float("nan"))
        self._layers: dict[int, tuple[Counter, Counter, Histogram]] = {}
        for layer in map(str, exit_layers):
            self.exits.labels(layer)
            self.runs.labels(layer)
        # gauges, because a counter of this client would be called ..._total
        self._tei_count = Gauge(
            "te_request_count", "Requests, counted as TEI counts them.", ["method"], registry=registry
        )
        self._tei_success = Gauge("te_request_success", "Answered requests.", ["method"], registry=registry)
        self._tei_failure = Gauge("te_request_failure", "Refused requests.", ["err"], registry=registry)
        self._tei_queue = Gauge("te_queue_size", "Rows in the queue.", registry=registry)
        self._tei_duration = Histogram(
            "te_request_duration", "Seconds per request.", buckets=_TEI_SECONDS, registry=registry
        )
        self._tei_size = Histogram("te_batch_next_size", "Rows per run.", buckets=_POWERS, registry=registry)
        self._tei_tokens = Histogram("te_batch_next_tokens", "Tokens per run.", buckets=_POWERS, registry=registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def request(self, path: str, status: int, seconds: float) -> None:
        """One request is over."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def classified(self, rows: int, seconds: float, failure: str | None) -> None:
        """One request for answers is over."""
        method = "single" if rows == 1 else "batch"
        self._tei_count.labels(method).inc()
        if failure is None:
            self._tei_success.labels(method).inc()
            self._tei_duration.observe(seconds)
        else:
            self._tei_failure.labels(failure.lower()).inc()

    def left(self, layers: Sequence[int], seconds: float) -> None:
        """Rows were answered, which left after these layers."""
        for layer in layers:
            self.exits.labels(str(layer)).inc()
            self.row_seconds.observe(seconds)

    def queue(self, rows: int, tokens: int) -> None:
        self.queue_rows.set(rows)
        self.queue_tokens.set(tokens)
        self._tei_queue.set(rows)

    def _of_layer(self, layer: int) -> tuple[Counter, Counter, Histogram]:
        """Those of runs that end there; kept, because looking one up takes longer than counting."""
        if layer not in self._layers:
            name = str(layer)
            self._layers[layer] = self.runs.labels(name), self.run_seconds.labels(name), self.fill.labels(name)
        return self._layers[layer]

    def step(self, step: StreamStep, tokens_per_run: int) -> None:
        if step.layer is None:
            return
        runs, seconds, fill = self._of_layer(step.layer)
        runs.inc()
        seconds.inc(step.seconds)
        fill.observe(step.tokens / tokens_per_run)
        self._tei_size.observe(step.rows)
        self._tei_tokens.observe(step.tokens)

    def drift(self, report: DriftReport) -> None:
        self.watched.set(report.watched)
        if report.agreement is not None:
            self.agreement.labels("measured").set(report.agreement)
        self.agreement.labels("low").set(report.low)
        self.agreement.labels("high").set(report.high)
        if report.promised is not None:
            self.promised.set(report.promised)
        self.alarm.set(report.has_drifted)
