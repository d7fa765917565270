"""Whole models on whole files: every engine at every speed, in one interleaved run.

    python bench/bench_end_to_end.py CHECKPOINT DATA.tsv --rows 2000 --batch-sizes 8,32 --output ag_news.json

CHECKPOINT is an early-exit model with distilled heads and its tokenizer. Rows are tokenised before anything is timed.
The full model (all layers, one head):

    transformers          transformers' own forward on batches in the order of the file, padded to their longest row
    transformers sorted   the same on batches sorted by length
    compiled sorted       the same through torch.compile (--compiled)
    packed                ours on the first one's batches, at speed 0
    packed sorted         the same on batches sorted by length, of 64 rows or more
    stream                the same as a stream; the faster of the last two is "best"

and the early-exit engines, all in the order of the file:

    fastbert loop         boolean compaction between layers in plain PyTorch, as FastBERT's code does it
    batch                 compaction between layers, padded
    packed                packed tokens, one batch after the other
    stream                packed tokens; survivors of many batches share runs; reads `batch size` rows at a time

"realised" is the wall-clock speed-up over a baseline divided by the FLOPs speed-up, in FastBERT's convention and for
the true lengths. Times are medians of interleaved passes. So that no contestant pays for another one, oneDNN may
remember all primitives (by default 1024, of which FastBERT's loop alone needs more) and freed memory is kept. Run it on
a quiet machine. Where there is none, --one-thread measures processor seconds of a single thread, which other programs
disturb less, and takes minima. --profile prints instead where the stream engine's time goes, and how much of it is
Python.

--rivals measures instead what people run on a CPU: OpenVINO and ONNX Runtime, float and int8, beside transformers and
ours in every dtype of --dtypes, for each of --forms (rows a batch, or "file"). It needs the extra `rivals`, and says
what is missing. The last rows of the file, which are not measured, calibrate OpenVINO's int8:

    python bench/bench_end_to_end.py CHECKPOINT DATA.tsv --rivals --rows 300 --forms 1 --output rivals.json
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, NamedTuple

# engines with many row counts must not make oneDNN forget what the others prepared; read when torch is loaded
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

import rival_table
import rivals
import torch
import typer
from torch import Tensor
from torch.profiler import profile, record_function
from transformers import AutoTokenizer

import fastkd
import fastkd_kernels as fk
from fastkd.data.batches import padding_collator, tokenize
from fastkd.data.files import write_json
from fastkd.data.rows import load_rows
from fastkd.encoders.layout import TokenLayout
from fastkd.engines.allocator import keep_freed_memory
from fastkd.engines.packed_encoder import encoder_of
from fastkd.inference.benchmark import machine_facts
from fastkd.inference.interleaved import interleaved
from fastkd.model.loading import DTYPES, in_dtype

Batch = dict[str, Tensor]

CALIBRATION_ROWS = 200
"""Of the end of the file, for OpenVINO's int8."""


@dataclass(frozen=True)
class Row:
    """One engine at one speed; times in seconds for all rows."""

    batch_size: int
    engine: str
    speed: float
    seconds: float
    rows_per_second: float
    accuracy: float
    average_layers: float
    flops_speedup: float
    over_padded: float  # wall-clock speed-up over transformers
    over_sorted: float
    over_best_full: float
    realised_sorted: float
    realised_best_full: float


@dataclass(frozen=True)
class Answers:
    predictions: Tensor
    exit_layers: Tensor


class Setting:
    """One model and file at one batch size."""

    def __init__(
        self, model: Any, encoded: list[dict[str, list[int]]], labels: Tensor, pad: Any, batch_size: int
    ) -> None:
        self.model = model
        self.encoded = encoded
        self.labels = labels
        self.lengths = [len(row["input_ids"]) for row in encoded]
        self.order = sorted(range(len(encoded)), key=self.lengths.__getitem__)
        self.batch_size = batch_size
        self.batches = self._batches(range(len(encoded)), batch_size, pad)
        self.sorted_batches = self._batches(self.order, batch_size, pad)
        # as many rows as its own engine would choose: a full model may batch as it likes
        self.large_batches = self._batches(self.order, max(batch_size, 64), pad)

    def _batches(self, order: Sequence[int], size: int, pad: Any) -> list[Batch]:
        return [
            {
                name: tensor.to(self.model.device)
                for name, tensor in pad([self.encoded[i] for i in order[at : at + size]]).items()
            }
            for at in range(0, len(order), size)
        ]

    def transformers(self, batches: list[Batch], encoder: Callable[..., Any]) -> Answers:
        """The full model by the encoder's own forward."""
        predictions = []
        for batch in batches:
            hidden_states = encoder(**batch).last_hidden_state
            layout = TokenLayout(batch["attention_mask"].bool())
            predictions.append(self.model.last_head(hidden_states, layout).argmax(-1))
        return Answers(torch.cat(predictions), torch.full((len(self.encoded),), self.model.num_layers))

    def forward(self, batches: list[Batch], speed: float, engine: str) -> Answers:
        outputs = [self.model(**batch, speed=speed, engine=engine) for batch in batches]
        return Answers(
            torch.cat([output.logits.argmax(-1) for output in outputs]), torch.cat([o.exit_layer for o in outputs])
        )

    def fastbert_loop(self, speed: float) -> Answers:
        with fk.backend("reference"):
            return self.forward(self.batches, speed, "batch")

    def stream(self, speed: float) -> Answers:
        rows = list(self.model.stream(self.encoded, speed=speed, look_ahead=self.batch_size))
        index = self.model.config.label2id
        return Answers(torch.tensor([index[row.label] for row in rows]), torch.tensor([row.exit_layer for row in rows]))

    def flops_speedup(self, exit_layers: Tensor) -> float:
        heads_before = {layer: sum(e <= layer for e in self.model.exit_layers) for layer in self.model.exit_layers}

        @cache
        def cost(length: int, layers: int, heads: int) -> int:
            return fastkd.flops(self.model.config, length, layers=layers, heads=heads)

        full = sum(cost(length, self.model.num_layers, 1) for length in self.lengths)
        pairs = zip(self.lengths, exit_layers.tolist(), strict=True)
        return full / sum(cost(length, layer, heads_before[layer]) for length, layer in pairs)


class Contestant(NamedTuple):
    """An engine at a speed; at speed 0 every layer runs."""

    engine: str
    speed: float = 0.0

    def __str__(self) -> str:
        return f"{self.engine} {self.speed:g}"


BASELINE, SORTED, COMPILED = map(Contestant, ("transformers", "transformers sorted", "compiled sorted"))
PACKED_SORTED, STREAM = Contestant("packed sorted"), Contestant("stream")
IN_LENGTH_ORDER = (SORTED, COMPILED, PACKED_SORTED)


@torch.inference_mode()
def measure(
    setting: Setting, speeds: Sequence[float], repeats: int, compiled: bool, loop: bool, one_thread: bool
) -> list[Row]:
    model = setting.model
    contestants: dict[Contestant, Callable[[], Answers]] = {
        BASELINE: partial(setting.transformers, setting.batches, model.backbone),
        SORTED: partial(setting.transformers, setting.sorted_batches, model.backbone),
        Contestant("packed"): partial(setting.forward, setting.batches, 0.0, "packed"),
        PACKED_SORTED: partial(setting.forward, setting.large_batches, 0.0, "packed"),
        STREAM: partial(setting.stream, 0.0),
    }
    if compiled:
        encoder = torch.compile(model.backbone, dynamic=True)
        contestants[COMPILED] = partial(setting.transformers, setting.sorted_batches, encoder)
    for speed in speeds:
        if loop:
            contestants[Contestant("fastbert loop", speed)] = partial(setting.fastbert_loop, speed)
        contestants[Contestant("batch", speed)] = partial(setting.forward, setting.batches, speed, "batch")
        contestants[Contestant("packed", speed)] = partial(setting.forward, setting.batches, speed, "packed")
        contestants[Contestant("stream", speed)] = partial(setting.stream, speed)
    passes = count(1)
    total = len(contestants) * (repeats + 1)
    on_gpu = model.device.type == "cuda"
    seconds, answers = interleaved(
        {str(contestant): run for contestant, run in contestants.items()},
        repeats,
        lambda name: print(f"\r{next(passes)}/{total} passes  {name:30}", end="", flush=True),
        synchronise=torch.cuda.synchronize if on_gpu else lambda: None,
        clock=time.process_time if one_thread else time.perf_counter,
    )
    print()
    typical = min if one_thread else statistics.median
    times = {contestant: typical(seconds[str(contestant)]) for contestant in contestants}
    return [row(setting, contestant, times, answers[str(contestant)]) for contestant in contestants]


def row(setting: Setting, contestant: Contestant, times: dict[Contestant, float], answers: Answers) -> Row:
    labels = setting.labels[setting.order] if contestant in IN_LENGTH_ORDER else setting.labels
    flops = setting.flops_speedup(answers.exit_layers) if contestant.speed else 1.0
    seconds = times[contestant]
    over_sorted, over_best = times[SORTED] / seconds, min(times[PACKED_SORTED], times[STREAM]) / seconds
    return Row(
        batch_size=setting.batch_size,
        engine=contestant.engine,
        speed=contestant.speed,
        seconds=seconds,
        rows_per_second=len(labels) / seconds,
        accuracy=(answers.predictions.cpu() == labels).double().mean().item(),
        average_layers=answers.exit_layers.double().mean().item(),
        flops_speedup=flops,
        over_padded=times[BASELINE] / seconds,
        over_sorted=over_sorted,
        over_best_full=over_best,
        realised_sorted=over_sorted / flops,
        realised_best_full=over_best / flops,
    )


@torch.inference_mode()
def show_profile(setting: Setting, speed: float) -> None:
    """Where the stream engine spends its time, and how much of it and of its layer steps is outside PyTorch's ops."""
    encoder = encoder_of(setting.model)
    layer = encoder.layer

    def recorded(*arguments: Any) -> Tensor:
        with record_function("layer step"):
            return layer(*arguments)

    setting.stream(speed)
    encoder.layer = recorded  # type: ignore[assignment, method-assign]
    try:
        with profile() as profiler, record_function("stream"):
            setting.stream(speed)
    finally:
        del encoder.layer  # type: ignore[method-assign]
    averages = profiler.key_averages()
    print(averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
    total = {event.key: event.cpu_time_total for event in averages}
    own = {event.key: event.self_cpu_time_total for event in averages}
    steps = own["layer step"] / total["layer step"]
    outside = (own["layer step"] + own["stream"]) / total["stream"]
    print(
        f"batch {setting.batch_size}, speed {speed:g}: Python takes {steps:.1%} of a layer step, {outside:.1%} of all"
    )


def table(rows: Sequence[Row]) -> str:
    head = (
        f"{'batch':>5}  {'engine':20} {'speed':>5} {'rows/s':>8} {'accuracy':>8} {'layers':>6} {'FLOPs x':>7} "
        f"{'padded x':>8} {'sorted x':>8} {'best x':>7} {'realised: sorted':>16} {'best':>5}"
    )
    lines = [head, "-" * len(head)]
    for r in rows:
        lines.append(
            f"{r.batch_size:5}  {r.engine:20} {r.speed:5.2g} {r.rows_per_second:8.1f} {r.accuracy:8.4f} "
            f"{r.average_layers:6.2f} {r.flops_speedup:7.2f} {r.over_padded:8.2f} {r.over_sorted:8.2f} "
            f"{r.over_best_full:7.2f} {r.realised_sorted:16.2f} {r.realised_best_full:5.2f}"
        )
    return "\n".join(lines)


def encoded_rows(dataset: Any, start: int, end: int) -> tuple[list[dict[str, list[int]]], Tensor]:
    """Some tokenised rows, each as what the tokenizer gave, and their labels."""
    columns = dataset[start:end]
    labels = torch.tensor(columns.pop("labels"))
    columns.pop("length")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], labels


@torch.inference_mode()
def race(
    model: Any,
    encoded: list[dict[str, list[int]]],
    labels: Tensor,
    held_back: list[dict[str, list[int]]],
    pad: Any,
    forms: Sequence[str],
    dtypes: Sequence[str],
    speeds: Sequence[float],
    repeats: int,
    only: Sequence[str],
    facts: dict[str, Any],
    output: Path | None,
) -> None:
    """Ours and the rivals on every form of the rows."""
    models = {
        dtype: model if dtype == "fp32" else in_dtype(copy.deepcopy(model), dtype)
        for dtype in dict.fromkeys(["fp32", *dtypes])
    }
    calibration = [rival_table.arrays(pad([row])) for row in held_back]
    prepared = rivals.prepare(model, rival_table.arrays(pad(encoded[:2])), calibration, only)
    measured: list[rival_table.RivalRow] = []
    for form in forms:
        size = rival_table.FILE_BATCH if form == rival_table.FILE else int(form)
        settings = {dtype: Setting(one, encoded, labels, pad, size) for dtype, one in models.items()}
        measured += rival_table.measure_form(form, settings, prepared, speeds, repeats)
        print(rival_table.markdown([row for row in measured if row.form == form], facts))
        if output is not None:  # after every form, so that a run that is cut off leaves what it has
            rival_table.write(measured, facts, output)


def main(
    checkpoint: Path,
    data: Path,
    rows: int = 2000,
    speeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0.1,0.3,0.5,0.8",
    batch_sizes: Annotated[str, typer.Option(help="Separated by commas.")] = "1,8,32,128",
    dtype: str = "bf16",
    max_length: int = 128,
    repeats: int = 5,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also torch.compile.")] = False,
    loop: Annotated[bool, typer.Option(help="Also FastBERT's loop.")] = True,
    one_thread: Annotated[bool, typer.Option("--one-thread", help="Processor seconds of one thread.")] = False,
    profiled: Annotated[bool, typer.Option("--profile", help="Profile the stream engine instead.")] = False,
    with_rivals: Annotated[bool, typer.Option("--rivals", help="Other runtimes beside ours instead.")] = False,
    forms: Annotated[str, typer.Option(help="--rivals: rows a batch, or file.")] = "1,8,32,file",
    dtypes: Annotated[str, typer.Option(help="--rivals: of ours; fp32 is always there.")] = "fp32,bf16,int8",
    only: Annotated[str, typer.Option(help="--rivals: names of rivals, separated by commas.")] = "",
    output: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    """Time every engine on the first rows of a file."""
    keep_freed_memory()
    if one_thread:
        torch.set_num_threads(1)
    model = fastkd.EarlyExitForSequenceClassification.from_pretrained(
        checkpoint, dtype=DTYPES["fp32" if with_rivals else dtype]
    ).eval()
    model.to("cuda" if torch.cuda.is_available() and not with_rivals else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    source = load_rows(data, num_labels=model.config.num_labels)
    dataset = tokenize(source, tokenizer, min(max_length, tokenizer.model_max_length))
    encoded, labels = encoded_rows(dataset, 0, min(rows, len(dataset)))
    chosen_speeds = [float(speed) for speed in speeds.split(",")]
    if with_rivals:
        held_back = encoded_rows(dataset, max(len(labels), len(dataset) - CALIBRATION_ROWS), len(dataset))[0]
        facts = machine_facts(model.device) | {"data": data.parent.name, "rows": len(labels), "repeats": repeats}
        race(
            model, encoded, labels, held_back, padding_collator(tokenizer), forms.split(","), dtypes.split(","),
            chosen_speeds, repeats, list(filter(None, only.split(","))), facts, output,
        )  # fmt: skip
        return
    measured: list[Row] = []
    for size in map(int, batch_sizes.split(",")):
        setting = Setting(model, encoded, labels, padding_collator(tokenizer), size)
        if profiled:
            for speed in chosen_speeds:
                show_profile(setting, speed)
            continue
        measured += measure(setting, chosen_speeds, repeats, compiled, loop, one_thread)
        print(table([row for row in measured if row.batch_size == size]))
    if output is not None:
        facts = machine_facts(model.device) | {"dtype": dtype, "rows": len(labels), "repeats": repeats}
        facts["clock"] = "processor seconds, minimum" if one_thread else "wall-clock, median"
        write_json(output, {"machine": facts, "rows": [asdict(row) for row in measured]})


if __name__ == "__main__":
    typer.run(main)
