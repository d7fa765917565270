"""Wall-clock beside FLOPs: an early-exit model against the full model at its best.

What is compared, and why it is fair:

* Every contestant gets the same tokenised rows, sorted by length, in the same batches, in the same dtype, on the same
  device and in the same process. Tokenising is outside the clock, padding and embedding are inside.
* The baseline is the faster of two ways to run the full model: ours at speed 0, and the forward of transformers
  followed by the last head. Every table says which one it was.
* Passes are interleaved (A B C, A B C, ...; the order turns by one each round), so that a busy machine slows all
  alike, and the median of each contestant counts.
* FLOPs are those of the rows' actual exits at their batch's padded length, under each convention.
"""

from __future__ import annotations

import copy
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.rows import Rows
from fastkd.encoders.layout import TokenLayout
from fastkd.exits.flops import CONVENTIONS, flops
from fastkd.exits.trace import correlation, predictions
from fastkd.inference.measurements import Benchmark, BenchmarkRow
from fastkd.model.loading import DTYPES
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.tokenizers import length_limit

Batch = Mapping[str, Tensor]

OUR_FULL = "fastkd"
TRANSFORMERS_FULL = "transformers"


@dataclass(frozen=True)
class Pass:
    """What one contestant answered."""

    predictions: Tensor
    exit_layers: Tensor | None = None


Contestant = Callable[[], Pass]
Name = TypeVar("Name", bound=Hashable)


def benchmark(
    model: EarlyExitForSequenceClassification,
    batches_of: Callable[[int], Iterable[Batch]],
    *,
    speeds: Sequence[float] = (0.1, 0.3, 0.5, 0.8),
    batch_sizes: Sequence[int] = (1, 8, 32),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    criterion: str | None = None,
    top_n: int | None = None,
    repeats: int = 5,
    on_progress: Callable[[str], None] = lambda done: None,
) -> Benchmark:
    """Measure every speed at every batch size in every dtype.

    Args:
        model: with distilled heads; it is not changed (each dtype works on a copy).
        batches_of: gives the batches for a batch size, sorted by length, with or without `labels`.
        speeds: each above 0 and at most 1; the full model is always measured.
        batch_sizes: rows a batch.
        dtypes: of `fastkd.model.loading.DTYPES`.
        criterion: uncertainty criterion; None takes the model's.
        top_n: classes that the "top_n" criterion looks at.
        repeats: interleaved passes; one more warms up and is not counted.
        on_progress: called after every pass with what was measured, `passes(...)` times in all.

    Returns:
        One row for each dtype, batch size and speed, in this order.

    Raises:
        ValueError: an unknown dtype, a speed outside (0, 1], no batches, a non-positive count.
    """
    _check(speeds, batch_sizes, dtypes, repeats)
    early = functools.partial(early_exit_pass, criterion=criterion, top_n=top_n)
    rows: list[BenchmarkRow] = []
    for dtype in dtypes:
        cast = copy.deepcopy(model).eval()
        nn.Module.to(cast, DTYPES[dtype])
        for batch_size in batch_sizes:
            batches = [_moved(batch, model.device) for batch in batches_of(batch_size)]
            if not batches:
                raise ValueError("batches_of: gave no batches; expected at least one row of data")
            setting = _Setting(cast, batches, dtype, batch_size, early)
            rows += setting.measure(speeds, repeats, lambda what: on_progress(what))
    return Benchmark(rows, machine_facts(model.device), criterion or model.config.criterion)


def benchmark_rows(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_length: int | None = None,
    **options: Any,
) -> Benchmark:
    """`benchmark` on the rows of a table, tokenised once.

    Args:
        model: as for `benchmark`, as are `options`.
        tokenizer: of the model.
        rows: with or without labels.
        max_length: tokens after which a text is cut; None takes the most that model and tokenizer allow.

    Raises:
        ValueError: as `benchmark`.
    """
    encoded = tokenize(rows, tokenizer, max_length or length_limit(model, tokenizer))
    return benchmark(model, lambda size: LengthSortedBatches(encoded, tokenizer, size), **options)


def passes(speeds: Sequence[float], batch_sizes: Sequence[int], dtypes: Sequence[str], repeats: int) -> int:
    """How often `benchmark` calls `on_progress`."""
    return len(dtypes) * len(batch_sizes) * (len(speeds) + 2) * (repeats + 1)


class _Setting:
    """One dtype at one batch size: the contestants and their clock."""

    def __init__(
        self,
        model: EarlyExitForSequenceClassification,
        batches: list[dict[str, Tensor]],
        dtype: str,
        batch_size: int,
        early_exit: Callable[..., Pass],
    ) -> None:
        self.model = model
        self.inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
        labels = [batch["labels"] for batch in batches if "labels" in batch]
        self.labels = torch.cat(labels).cpu() if len(labels) == len(batches) else None
        self.lengths = torch.cat([torch.full((len(ids),), ids.shape[1]) for ids in self._ids()])
        self.dtype = dtype
        self.batch_size = batch_size
        self.early_exit = early_exit

    def measure(self, speeds: Sequence[float], repeats: int, on_progress: Callable[[str], None]) -> list[BenchmarkRow]:
        full: dict[str, Contestant] = {
            OUR_FULL: lambda: early_exit_pass(self.model, self.inputs, 0.0),
            TRANSFORMERS_FULL: lambda: transformers_pass(self.model, self.inputs),
        }
        early: dict[str, Contestant] = {
            f"speed {speed:g}": functools.partial(self.early_exit, self.model, self.inputs, speed) for speed in speeds
        }
        place = f"{self.dtype}, batch {self.batch_size}"
        seconds, answers = interleaved(
            full | early,
            repeats,
            lambda name: on_progress(f"{place}, {name}"),
            functools.partial(synchronise, self.model.device),
        )
        engine = min(full, key=lambda name: statistics.median(seconds[name]))
        return [
            self._row(speed, seconds[name], answers[name], statistics.median(seconds[engine]), engine, answers[engine])
            for speed, name in zip(speeds, early, strict=True)
        ]

    def _row(
        self, speed: float, seconds: list[float], answer: Pass, full_seconds: float, engine: str, full: Pass
    ) -> BenchmarkRow:
        assert answer.exit_layers is not None
        median = statistics.median(seconds)
        speedups = self._flops_speedups(answer.exit_layers)
        return BenchmarkRow(
            device=device_name(self.model.device),
            dtype=self.dtype,
            batch_size=self.batch_size,
            speed=float(speed),
            rows=len(self.lengths),
            accuracy=self._accuracy(answer),
            full_accuracy=self._accuracy(full),
            average_layers=answer.exit_layers.double().mean().item(),
            flops_speedup=speedups["fastbert"],
            flops_speedups=speedups,
            seconds=median,
            seconds_p20=quantile(seconds, 0.2),
            seconds_p80=quantile(seconds, 0.8),
            full_seconds=full_seconds,
            full_engine=engine,
            speedup=full_seconds / median,
            pearson=self._pearson(answer),
            full_pearson=self._pearson(full),
        )

    def _flops_speedups(self, exit_layers: Tensor) -> dict[str, float]:
        """FLOPs of the full model (all layers, last head) over those of each row's way out, by convention."""
        pairs, counts = torch.stack([self.lengths, exit_layers.long()]).unique(dim=1, return_counts=True)
        config, exits = self.model.config, self.model.exit_layers
        speedups = {}
        for convention in CONVENTIONS:
            full = spent = 0
            for length, layer, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
                heads = sum(exit_layer <= layer for exit_layer in exits)
                full += count * flops(config, length, convention=convention)
                spent += count * flops(config, length, layers=layer, heads=heads, convention=convention)
            speedups[convention] = full / spent
        return speedups

    def _accuracy(self, answer: Pass) -> float | None:
        if self.labels is None or self.model.config.num_classes == 1:
            return None
        return (answer.predictions.cpu() == self.labels).double().mean().item()

    def _pearson(self, answer: Pass) -> float | None:
        if self.labels is None or self.model.config.num_classes > 1:
            return None
        return correlation(answer.predictions.cpu(), self.labels)

    def _ids(self) -> list[Tensor]:
        return [batch["input_ids"] for batch in self.inputs]


@torch.inference_mode()
def early_exit_pass(
    model: EarlyExitForSequenceClassification,
    batches: Sequence[Batch],
    speed: float,
    criterion: str | None = None,
    top_n: int | None = None,
) -> Pass:
    """Our model on every batch (without labels); at speed 0 it is the full model."""
    answers, exit_layers = [], []
    for batch in batches:
        output = model(**batch, speed=speed, criterion=criterion, top_n=top_n)
        answers.append(predictions(output.logits))
        exit_layers.append(output.exit_layer)
    return Pass(torch.cat(answers).cpu(), torch.cat(exit_layers).cpu())


@torch.inference_mode()
def transformers_pass(model: EarlyExitForSequenceClassification, batches: Sequence[Batch]) -> Pass:
    """The full model as transformers runs it: its own forward, then the last head."""
    answers = []
    for batch in batches:
        hidden_states = model.backbone(**batch).last_hidden_state
        mask = batch.get("attention_mask")
        logits = model.last_head(hidden_states, TokenLayout(None if mask is None else mask.bool()))
        answers.append(predictions(logits))
    return Pass(torch.cat(answers).cpu())


def interleaved(
    contestants: Mapping[Name, Contestant],
    repeats: int,
    on_pass: Callable[[Name], None] = lambda name: None,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[Name, list[float]], dict[Name, Any]]:
    """Seconds of `repeats` passes of each contestant, and its last answer.

    A first round warms up and is not counted. Each round starts with the next contestant, so that none always runs
    after the same neighbour.
    """
    names = list(contestants)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    answers: dict[Name, Any] = {}
    for number in range(repeats + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            synchronise()
            started = clock()
            answers[name] = contestants[name]()
            synchronise()
            elapsed = clock() - started
            if number:
                seconds[name].append(elapsed)
            on_pass(name)
    return seconds, answers


def synchronise(device: torch.device) -> None:
    """Wait for what was launched there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantile(values: Sequence[float], share: float) -> float:
    """The `share` quantile of `values`, interpolated."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), share).item()


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a timing."""
    import transformers

    return {
        "device": device_name(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu_columns": "measured" if device.type == "cuda" else "not yet measured",
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _moved(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _check(speeds: Sequence[float], batch_sizes: Sequence[int], dtypes: Sequence[str], repeats: int) -> None:
    if not speeds or not all(0 < speed <= 1 for speed in speeds):
        raise ValueError(
            f"speeds: got {list(speeds)}, expected numbers above 0 and at most 1 (the full model is always measured)"
        )
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes: got {list(batch_sizes)}, expected numbers from 1")
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise ValueError(f"dtypes: got {list(dtypes)}, expected some of {', '.join(DTYPES)}")
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
