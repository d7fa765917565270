"""Wall-clock beside FLOPs: an early-exit model against the full model at its best.

What is compared, and why it is fair:

* First comes what `predict` does: the stream takes the rows one by one, in the order of their file, and pads nothing.
  Then come batches of each size, sorted by length, which is what a loop over `forward` gives.
* Every contestant gets the same tokenised rows in the same dtype, on the same device and in the same process.
  Tokenising and padding are outside the clock; embedding, and the packing of the stream, are inside.
* The baseline is the fastest way to run the full model. In batches: ours at speed 0, or the forward of transformers
  followed by the last head, in the same batches. For the stream: those two in batches of every size measured, or the
  stream at speed 0. Every table says which one it was.
* Passes are interleaved (A B C, A B C, ...; the order turns by one each round), so that a busy machine slows all
  alike, and the median of each contestant counts.
* FLOPs are those of the rows' actual exits under each convention, at the padded length of their batch, or in the
  stream at their own.
"""

from __future__ import annotations

import copy
import functools
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.rows import Rows
from fastkd.encoders.layout import TokenLayout
from fastkd.exits.flops import CONVENTIONS, flops
from fastkd.exits.trace import correlation, predictions
from fastkd.inference.interleaved import interleaved
from fastkd.inference.measurements import STREAM, Benchmark, BenchmarkRow
from fastkd.inference.predict import WINDOW
from fastkd.model.loading import PRECISIONS, in_dtype
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.tokenizers import length_limit

Batch = Mapping[str, Tensor]

OUR_FULL = "fastkd"
TRANSFORMERS_FULL = "transformers"

_STREAMED_COLUMNS = ("input_ids", "token_type_ids")


@dataclass(frozen=True)
class Pass:
    """What one contestant answered."""

    predictions: Tensor
    exit_layers: Tensor | None = None


Contestant = Callable[[], Pass]


def benchmark(
    model: EarlyExitForSequenceClassification,
    batches_of: Callable[[int], Iterable[Batch]],
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    speeds: Sequence[float] = (0.1, 0.3, 0.5, 0.8),
    batch_sizes: Sequence[int] = (1, 8, 32),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    criterion: str | None = None,
    top_n: int | None = None,
    repeats: int = 5,
    on_progress: Callable[[str], None] = lambda done: None,
) -> Benchmark:
    """Measure every speed as a stream and at every batch size, in every dtype.

    Args:
        model: with distilled heads; it is not changed (each dtype works on a copy).
        batches_of: gives the batches for a batch size, sorted by length, with or without `labels`.
        rows: the same rows for the stream, in the order of their file: lists of `input_ids`, and of `token_type_ids`
            where the model has them, without padding, with or without `labels`. None measures batches alone.
        speeds: each above 0 and at most 1; the full model is always measured.
        batch_sizes: rows a batch.
        dtypes: of `fastkd.model.loading.PRECISIONS`.
        criterion: uncertainty criterion; None takes the model's.
        top_n: classes that the "top_n" criterion looks at.
        repeats: interleaved passes; one more warms up and is not counted.
        on_progress: called after every pass with what was measured, `passes(...)` times in all.

    Returns:
        For each dtype one row for each speed of the stream, then one for each batch size and speed.

    Raises:
        ValueError: an unknown dtype, a speed outside (0, 1], no batches or rows, a non-positive count.
    """
    _check(speeds, batch_sizes, dtypes, repeats)
    batched = [_Batches(list(batches_of(size)), size, model.device) for size in batch_sizes]
    streamed = None if rows is None else _Streamed(rows)
    decision = {"criterion": criterion, "top_n": top_n}
    measured: list[BenchmarkRow] = []
    for dtype in dtypes:
        cast = copy.deepcopy(model).eval()
        in_dtype(cast, dtype)
        races: list[tuple[_Form, Sequence[_Form]]] = [(form, [form]) for form in batched]
        if streamed is not None:
            races.insert(0, (streamed, [streamed, *batched]))
        for form, rivals in races:
            setting = _Setting(cast, form, rivals, dtype, decision)
            measured += setting.measure(speeds, repeats, on_progress)
    return Benchmark(measured, machine_facts(model.device), criterion or model.config.criterion)


def benchmark_rows(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_length: int | None = None,
    **options: Any,
) -> Benchmark:
    """`benchmark` on the rows of a table, tokenised once, as a stream in their order and in batches sorted by length.

    Args:
        model: as for `benchmark`, as are `options`.
        tokenizer: of the model.
        rows: with or without labels.
        max_length: tokens after which a text is cut; None takes the most that model and tokenizer allow.

    Raises:
        ValueError: as `benchmark`.
    """
    encoded = tokenize(rows, tokenizer, max_length or length_limit(model, tokenizer))
    batches_of = functools.partial(LengthSortedBatches, encoded, tokenizer)
    return benchmark(model, batches_of, rows=encoded.to_list(), **options)


def passes(
    speeds: Sequence[float], batch_sizes: Sequence[int], dtypes: Sequence[str], repeats: int, stream: bool = True
) -> int:
    """How often `benchmark` calls `on_progress`; `stream` says whether it gets `rows`."""
    in_batches = len(batch_sizes) * (len(speeds) + 2)
    as_stream = len(speeds) + 1 + 2 * len(batch_sizes) if stream else 0
    return len(dtypes) * (as_stream + in_batches) * (repeats + 1)


class _Batches:
    """The rows in batches of one size; answers, labels and lengths are in the order of the batches."""

    def __init__(self, batches: Sequence[Batch], batch_size: int, device: torch.device) -> None:
        if not batches:
            raise ValueError("batches_of: gave no batches; expected at least one row of data")
        moved = [_moved(batch, device) for batch in batches]
        self.batch_size: int | None = batch_size
        self.name = f"batch {batch_size}"
        self.inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in moved]
        labels = [batch["labels"] for batch in moved if "labels" in batch]
        self.labels = torch.cat(labels).cpu() if len(labels) == len(moved) else None
        ids = [batch["input_ids"] for batch in moved]
        self.lengths = torch.cat([torch.full((len(rows),), rows.shape[1]) for rows in ids])

    def full(self, model: EarlyExitForSequenceClassification) -> dict[str, Contestant]:
        return {
            OUR_FULL: functools.partial(early_exit_pass, model, self.inputs, 0.0),
            TRANSFORMERS_FULL: functools.partial(transformers_pass, model, self.inputs),
        }

    def early(self, model: EarlyExitForSequenceClassification, speed: float, decision: Mapping[str, Any]) -> Contestant:
        return functools.partial(early_exit_pass, model, self.inputs, speed, **decision)


class _Streamed:
    """The rows one by one, as `predict` gives them to the stream; nothing is padded."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            raise ValueError("rows: got none; expected at least one row of data")
        self.batch_size: int | None = None
        self.name = STREAM
        self.rows = [{name: row[name] for name in _STREAMED_COLUMNS if name in row} for row in rows]
        labels = [row["labels"] for row in rows if "labels" in row]
        self.labels = torch.tensor(labels) if len(labels) == len(rows) else None
        self.lengths = torch.tensor([len(row["input_ids"]) for row in rows])

    def full(self, model: EarlyExitForSequenceClassification) -> dict[str, Contestant]:
        return {STREAM: functools.partial(stream_pass, model, self.rows, 0.0)}

    def early(self, model: EarlyExitForSequenceClassification, speed: float, decision: Mapping[str, Any]) -> Contestant:
        return functools.partial(stream_pass, model, self.rows, speed, **decision)


_Form = _Batches | _Streamed


class _Setting:
    """One dtype and one form of the rows: the contestants and their clock."""

    def __init__(
        self,
        model: EarlyExitForSequenceClassification,
        form: _Form,
        rivals: Sequence[_Form],
        dtype: str,
        decision: Mapping[str, Any],
    ) -> None:
        """`rivals` are the forms in which the full model may run, `decision` options of `forward` beside the speed."""
        self.model = model
        self.form = form
        self.dtype = dtype
        self.decision = decision
        self.full = {
            engine if rival is form else f"{engine}, {rival.name}": (engine, rival, contestant)
            for rival in rivals
            for engine, contestant in rival.full(model).items()
        }

    def measure(self, speeds: Sequence[float], repeats: int, on_progress: Callable[[str], None]) -> list[BenchmarkRow]:
        full = {name: contestant for name, (_, _, contestant) in self.full.items()}
        early = {f"speed {speed:g}": self.form.early(self.model, speed, self.decision) for speed in speeds}
        seconds, answers = interleaved(
            full | early,
            repeats,
            lambda name: on_progress(f"{self.dtype}, {self.form.name}, {name}"),
            functools.partial(synchronise, self.model.device),
        )
        best = min(full, key=lambda name: statistics.median(seconds[name]))
        return [
            self._row(speed, seconds[name], answers[name], best, statistics.median(seconds[best]), answers[best])
            for speed, name in zip(speeds, early, strict=True)
        ]

    def _row(
        self, speed: float, seconds: list[float], answer: Pass, best: str, full_seconds: float, full: Pass
    ) -> BenchmarkRow:
        assert answer.exit_layers is not None
        engine, rival, _ = self.full[best]
        median = statistics.median(seconds)
        speedups = self._flops_speedups(answer.exit_layers)
        return BenchmarkRow(
            device=device_name(self.model.device),
            dtype=self.dtype,
            batch_size=self.form.batch_size,
            speed=float(speed),
            rows=len(self.form.lengths),
            accuracy=self._accuracy(answer, self.form),
            full_accuracy=self._accuracy(full, rival),
            average_layers=answer.exit_layers.double().mean().item(),
            flops_speedup=speedups["fastbert"],
            flops_speedups=speedups,
            seconds=median,
            seconds_p20=quantile(seconds, 0.2),
            seconds_p80=quantile(seconds, 0.8),
            full_seconds=full_seconds,
            full_engine=engine,
            full_batch_size=rival.batch_size,
            speedup=full_seconds / median,
            pearson=self._pearson(answer, self.form),
            full_pearson=self._pearson(full, rival),
        )

    def _flops_speedups(self, exit_layers: Tensor) -> dict[str, float]:
        """FLOPs of the full model (all layers, last head) over those of each row's way out, by convention."""
        pairs, counts = torch.stack([self.form.lengths, exit_layers.long()]).unique(dim=1, return_counts=True)
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

    def _accuracy(self, answer: Pass, form: _Form) -> float | None:
        if form.labels is None or self.model.config.num_classes == 1:
            return None
        return (answer.predictions.cpu() == form.labels).double().mean().item()

    def _pearson(self, answer: Pass, form: _Form) -> float | None:
        if form.labels is None or self.model.config.num_classes > 1:
            return None
        return correlation(answer.predictions.cpu(), form.labels)


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


def stream_pass(
    model: EarlyExitForSequenceClassification,
    rows: Sequence[Mapping[str, Any]],
    speed: float,
    criterion: str | None = None,
    top_n: int | None = None,
) -> Pass:
    """Our model on rows with `input_ids` as `predict` runs it; at speed 0 it is the full model.

    A row without an answer (not a finite number) counts as wrong, and as run through every layer.
    """
    answers = list(model.stream(rows, speed=speed, criterion=criterion, top_n=top_n, look_ahead=WINDOW))
    exit_layers = torch.tensor([answer.exit_layer or model.num_layers for answer in answers])
    if model.config.num_classes == 1:
        return Pass(torch.tensor([float("nan") if row.label is None else row.label for row in answers]), exit_layers)
    classes: dict[Any, int] = {name: int(index) for index, name in (model.config.id2label or {}).items()}
    return Pass(torch.tensor([classes.get(row.label, -1) for row in answers]), exit_layers)


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
        "instruction_set": instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu_columns": "measured" if device.type == "cuda" else "not yet measured",
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


_EXTENSIONS = (
    ("amx_bf16", "AMX-BF16"),
    ("amx_int8", "AMX-INT8"),
    ("avx512_fp16", "AVX512-FP16"),
    ("avx512_bf16", "AVX512-BF16"),
    ("avx512_vnni", "AVX512-VNNI"),
    ("avx_vnni", "AVX-VNNI"),
    ("asimddp", "dot product"),
    ("i8mm", "I8MM"),
    ("bf16", "BF16"),
    ("sve", "SVE"),
)
"""What Linux calls what speeds up products, and what it is called here."""


def instruction_set() -> str:
    """What the processor's products may use, as torch and Linux name it, and what limits oneDNN."""
    flags = _processor_line("flags", "Features").split()
    found = [torch.backends.cpu.get_cpu_capability(), *(name for flag, name in _EXTENSIONS if flag in flags)]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return ", ".join(found) + ("" if limit is None else f" (oneDNN limited to {limit})")


def _processor() -> str:
    return _processor_line("model name") or platform.processor() or platform.machine()


def _processor_line(*names: str) -> str:
    """The first line of /proc/cpuinfo with one of these names; empty where there is none."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(names):
                    return line.split(":", 1)[1].strip()
    return ""


def _moved(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _check(speeds: Sequence[float], batch_sizes: Sequence[int], dtypes: Sequence[str], repeats: int) -> None:
    if not speeds or not all(0 < speed <= 1 for speed in speeds):
        raise ValueError(
            f"speeds: got {list(speeds)}, expected numbers above 0 and at most 1 (the full model is always measured)"
        )
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes: got {list(batch_sizes)}, expected numbers from 1")
    if not dtypes or not set(dtypes) <= set(PRECISIONS):
        raise ValueError(f"dtypes: got {list(dtypes)}, expected some of {', '.join(PRECISIONS)}")
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
