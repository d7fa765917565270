"""What one sentence costs: percentiles of single calls, one sentence after the other, as a server sees them.

* Every sentence is tokenised before the clock starts, and is a batch of its own: `model(**row, speed=...)`.
* A call that meets a length for the first time counts like any other. Only the first sentence is run once beforehand.
* Dtypes and speeds take turns at every sentence, and the turn begins with the next one each time, so that a busy
  machine slows all alike and none always pays for a new length.
* Host time is what a call spends outside of operators, in Python and its bindings, by torch's profiler on some of the
  sentences. The profiler itself is in it, so it is at most that.
"""

from __future__ import annotations

import copy
import csv
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedTokenizerBase

from fastkd.data import corpus
from fastkd.data.batches import tokenize
from fastkd.data.files import atomic_path, write_json
from fastkd.data.rows import Rows, load_rows
from fastkd.inference.benchmark import machine_facts, synchronise
from fastkd.model.loading import PRECISIONS, in_dtype
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.tokenizers import length_limit

SENTENCES = 1000
"""That are measured where nothing else is asked for."""
PERCENTILES = (50, 90, 99)
_PROFILED = 40
_MOST_JOINED = 8
"""Sentences in the longest built-in text."""


@dataclass(frozen=True)
class LatencyRow:
    """Single calls in one dtype at one speed; times in milliseconds."""

    dtype: str
    speed: float
    sentences: int
    lengths: int
    """Different lengths among them, in tokens."""
    average_layers: float
    p50: float
    p90: float
    p99: float
    host: float
    """Mean time a call outside of operators; at most that."""
    quantiles: list[float]
    """The 0th to the 100th percentile."""

    @property
    def tail(self) -> float:
        """How many times the median the slowest hundredth takes at least."""
        return self.p99 / self.p50

    def to_dict(self) -> dict[str, Any]:
        """Flat, ready for CSV and JSON."""
        return {**asdict(self), "tail": self.tail}


@dataclass(frozen=True)
class Latency:
    """A table of single calls and what they were made on."""

    rows: list[LatencyRow]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "rows": [row.to_dict() for row in self.rows]}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_dict())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table without its quantiles; the file is either whole or absent."""
        rows = [{name: value for name, value in row.to_dict().items() if name != "quantiles"} for row in self.rows]
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def built_in_texts(count: int = SENTENCES, seed: int = 7) -> Rows:
    """Texts of the generated corpus, of one to eight sentences, so that their lengths differ."""
    sentences = iter(corpus.generate(count * (_MOST_JOINED + 1) // 2 + _MOST_JOINED, seed=seed))
    texts = [" ".join(next(sentences).text for _ in range(1 + number % _MOST_JOINED)) for number in range(count)]
    return load_rows([{"text_a": text} for text in texts], require_labels=False)


@torch.inference_mode()
def measure_latency(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    speeds: Sequence[float] = (0.0, 0.1, 0.3, 0.5),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    criterion: str | None = None,
    top_n: int | None = None,
    max_length: int | None = None,
    on_progress: Callable[[str], None] = lambda done: None,
) -> Latency:
    """Call the model with every row alone, in every dtype and at every speed.

    Args:
        model: with distilled heads where a speed is above 0; it is not changed.
        tokenizer: of the model.
        rows: with or without labels; at least one.
        speeds: from 0, the full model, to 1.
        dtypes: of `fastkd.model.loading.PRECISIONS`.
        criterion, top_n: as for `forward`.
        max_length: tokens after which a text is cut; None takes the most that model and tokenizer allow.
        on_progress: called after every row with what was done.

    Returns:
        One row for each dtype and speed.

    Raises:
        ValueError: an unknown dtype, no dtypes, speeds or rows; as `forward`.
    """
    if not dtypes or not set(dtypes) <= set(PRECISIONS):
        raise ValueError(f"dtypes: got {list(dtypes)}, expected some of {', '.join(PRECISIONS)}")
    if not speeds:
        raise ValueError("speeds: got none, expected numbers from 0, the full model, to 1")
    for speed in speeds:
        model.exit_rule(speed, criterion, top_n)
    batches = _single_rows(model, tokenizer, rows, max_length)
    models = {dtype: in_dtype(copy.deepcopy(model).eval(), dtype) for dtype in dtypes}
    settings = [(dtype, speed) for dtype in dtypes for speed in speeds]

    def call(setting: tuple[str, float], batch: Mapping[str, Tensor]) -> int:
        output = models[setting[0]](**batch, speed=setting[1], criterion=criterion, top_n=top_n)
        return int(output.exit_layer)

    for setting in settings:
        call(setting, batches[0])
    seconds: dict[tuple[str, float], list[float]] = {setting: [] for setting in settings}
    layers: dict[tuple[str, float], list[int]] = {setting: [] for setting in settings}
    for number, batch in enumerate(batches):
        start = number % len(settings)
        for setting in settings[start:] + settings[:start]:
            synchronise(model.device)
            started = time.perf_counter()
            layer = call(setting, batch)
            seconds[setting].append(time.perf_counter() - started)
            layers[setting].append(layer)
        on_progress(f"sentence {number + 1}")
    lengths = len({batch["input_ids"].shape[1] for batch in batches})
    some = batches[:: max(1, len(batches) // _PROFILED)]
    found = []
    for dtype, speed in settings:
        setting = dtype, speed
        quantiles = _quantiles([1e3 * value for value in seconds[setting]])
        found.append(
            LatencyRow(
                dtype=dtype,
                speed=float(speed),
                sentences=len(batches),
                lengths=lengths,
                average_layers=statistics.fmean(layers[setting]),
                p50=quantiles[50],
                p90=quantiles[90],
                p99=quantiles[99],
                host=_host_milliseconds(partial(call, setting), some),
                quantiles=quantiles,
            )
        )
    return Latency(found, machine_facts(model.device))


def _single_rows(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int | None
) -> list[dict[str, Tensor]]:
    """Every row as a batch of its own, on the device of the model."""
    encoded = tokenize(rows, tokenizer, max_length or length_limit(model, tokenizer)).to_list()
    if not encoded:
        raise ValueError("rows: got none; expected at least one row of data")
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded[0]]
    return [{name: torch.tensor([row[name]], device=model.device) for name in names} for row in encoded]


def _quantiles(values: Sequence[float]) -> list[float]:
    places = torch.linspace(0, 1, 101, dtype=torch.float64)
    return torch.quantile(torch.tensor(values, dtype=torch.float64), places).tolist()


def _host_milliseconds(call: Callable[[Mapping[str, Tensor]], Any], batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean time of a call that no operator accounts for."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in batches:
            with record_function(_CALL):
                call(batch)
    outside = sum(event.self_cpu_time_total for event in profiler.key_averages() if event.key == _CALL)
    return outside / 1e3 / len(batches)


_CALL = "fastkd call"
