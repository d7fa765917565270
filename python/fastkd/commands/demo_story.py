"""The whole story in one command: fine-tune, self-distil, trace, sweep, measure, draw, and leave a model to use.

Without data it generates its own corpus (`fastkd.data.corpus`) and takes about three minutes of processor time; with
`--data DIR` it runs on real files. Finished stages are kept in the output folder: an interrupted demo, started again
with the same settings, goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from fastkd.commands.options import quoted
from fastkd.commands.screen import Screen, benchmark_table, share, strong, sweep_table, tell_slower
from fastkd.data import corpus
from fastkd.data.files import changed_settings, write_json, write_text
from fastkd.data.rows import DataFolder, Rows, load_folder
from fastkd.data.work_folders import claim_folder, forget_folders
from fastkd.exits.sweep import Sweep
from fastkd.exits.trace import ExitTrace
from fastkd.inference.benchmark import benchmark_rows, passes
from fastkd.inference.measurements import Benchmark
from fastkd.inference.trace_rows import trace_rows
from fastkd.model.checkpoints import checkpoint_path
from fastkd.model.loading import load_model, pick_device
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.report import figures, read_source, write_page
from fastkd.report.results import write_benchmark, write_sweeps
from fastkd.training.early_exit import DISTILLED, FINETUNED, TrainingPlan, distill_in, finetune_in
from fastkd.training.harness import bf16_is_fast
from fastkd.training.progress import counted


@dataclass(frozen=True)
class DemoOptions:
    """How a demo trains and measures.

    Attributes:
        training: of both steps; another plan is another demo, while what follows may change between runs.
        speeds: of the sweep.
        bench_speeds: those that are measured in seconds.
        bench_rows: rows of a measured pass.
        bench_repeats: interleaved passes.
        batch_sizes: that are measured.
        dtypes: that are measured.
        shown_speed: the one that the summary and the next command name.
        device: where the finished model is traced and measured, as for `fastkd.model.loading.pick_device`.
    """

    training: TrainingPlan
    speeds: tuple[float, ...] = tuple(number / 10 for number in range(11))
    bench_speeds: tuple[float, ...] = (0.1, 0.3, 0.5, 0.8)
    bench_rows: int = 512
    bench_repeats: int = 5
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    shown_speed: float = 0.5
    device: str = "auto"


def demo_options(data: Path | None, given: Mapping[str, Any]) -> DemoOptions:
    """The options for real files, or for the generated corpus where `data` is None; `given` names what differs."""
    if data is None:
        # what fits into three minutes; where bfloat16 is emulated, measuring it takes minutes and says nothing
        dtypes = ("fp32", "bf16") if bf16_is_fast() else ("fp32",)
        plan = TrainingPlan(
            train_rows=6400, epochs=1.0, distill_epochs=1.0, learning_rate=1e-4, distill_learning_rate=2e-3
        )
        options = DemoOptions(plan, bench_rows=64, bench_repeats=3, dtypes=dtypes, shown_speed=0.3)
    else:
        options = DemoOptions(TrainingPlan())
    planned = {field.name for field in fields(TrainingPlan)} & given.keys()
    plan = replace(options.training, **{name: given[name] for name in planned})
    return replace(options, training=plan, **{name: value for name, value in given.items() if name not in planned})


_SETTINGS = "settings.json"


@dataclass
class Timings:
    """Wall-clock and processor seconds of each stage."""

    stages: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        record: dict[str, Any] = {"stage": name, "seconds": 0.0, "processor_seconds": 0.0, "note": ""}
        self.stages.append(record)
        wall, processor = time.perf_counter(), time.process_time()
        yield record
        record["seconds"] = round(time.perf_counter() - wall, 2)
        record["processor_seconds"] = round(time.process_time() - processor, 2)

    def table(self) -> Table:
        table = Table(title="Time", title_justify="left")
        table.add_column("stage")
        table.add_column("seconds", justify="right")
        table.add_column("processor seconds", justify="right")
        table.add_column("")
        for record in self.stages:
            cells = (f"{record['seconds']:.1f}", f"{record['processor_seconds']:.1f}")
            table.add_row(record["stage"], *cells, record["note"])
        totals = [sum(record[name] for record in self.stages) for name in ("seconds", "processor_seconds")]
        table.add_section()
        table.add_row("all", *(f"{total:.1f}" for total in totals), "")
        return table


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; `to_dict` is what it writes to `report.json`."""

    output: Path
    full_accuracy: float | None
    exit_accuracies: list[float]
    sweep: Sweep
    benchmark: Benchmark
    timings: Timings
    files: list[Path]
    next_command: str

    @property
    def page(self) -> Path:
        return self.output / "report.html"

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": str(self.output / DISTILLED),
            "full_accuracy": self.full_accuracy,
            "accuracy_by_exit": self.exit_accuracies,
            "sweep": self.sweep.to_dicts(),
            "benchmark": self.benchmark.to_dict(),
            "stages": self.timings.stages,
            "files": [str(path) for path in (*self.files, self.page)],
            "next": self.next_command,
        }


def run_demo(
    screen: Screen,
    output: Path,
    data: Path | None,
    options: DemoOptions,
    *,
    start_over: bool = False,
    reading: Mapping[str, str] | None = None,
) -> DemoResult:
    """Run every stage and write everything to `output`.

    Args:
        screen: where to tell the story.
        output: folder for the model, tables, pictures, `report.json` and `report.html`.
        data: folder with train and test (and dev) files; None generates a corpus.
        options: see there.
        start_over: forget what an earlier run left in `output`.
        reading: arguments of `fastkd.load_folder` about columns and labels of `data`.

    Raises:
        ModuleNotFoundError: the packaged checkpoint is asked for and not installed.
        DataError: anything wrong with the data.
        FileExistsError: `output` holds what no demo left there.
        ValueError: `output` holds a run with other settings; starting over would remove an input.
    """
    plan = options.training
    checkpoint_path(plan.checkpoint)
    pick_device(options.device)
    timings = Timings()
    with timings.stage("data") as record:
        _prepare(output, data, plan, start_over, reading or {})
        folder, test = _load(output, data, plan, reading or {})
        record["note"] = f"{len(folder.train)} training rows, {len(test)} test rows"
    screen.say(f"[bold]1[/] data: {record['note']}" + ("" if data else " of a generated corpus with graded difficulty"))
    with timings.stage("fine-tune") as record:
        record["note"] = finetune_in(output, folder, plan, screen)
    with timings.stage("self-distil") as record:
        record["note"] = distill_in(output, folder, plan, screen)
        model, tokenizer = load_model(str(output / DISTILLED), options.device)
    with timings.stage("trace") as record, screen.progress("tracing", None) as update:
        recorded = trace_rows(
            model, tokenizer, test, max_length=plan.max_length, on_batch=lambda done, total: update(done, "", total)
        )
        recorded.save(output / "trace.safetensors")
        record["note"] = f"{len(recorded)} test rows, every head"
    with timings.stage("sweep and pictures"):
        sweep = recorded.sweep(options.speeds)
        files = write_sweeps({_name_of(data): sweep}, output)
        files += _draw_difficulty(recorded, output, data, options.shown_speed)
    accuracies = _exit_accuracies(recorded)
    _tell_sweep(screen, sweep, accuracies)
    with timings.stage("measure seconds") as record:
        rows = test.sample(options.bench_rows, plan.seed)
        measured = _measure(screen, model, tokenizer, rows, options)
        record["note"] = f"{len(rows)} rows, median of {options.bench_repeats} interleaved passes"
    files += write_benchmark(measured, output, recorded.about)
    screen.out.print(benchmark_table(measured, screen.is_narrow))
    command = _write_examples(test, output, options.shown_speed)
    result = DemoResult(output, sweep[0].accuracy, accuracies, sweep, measured, timings, files, command)
    name = _name_of(data)
    write_page({name: (read_source(output, name), "entropy")}, result.page, speed=options.shown_speed)
    write_json(output / "report.json", result.to_dict())
    _tell_end(screen, result, options.shown_speed)
    return result


def _prepare(output: Path, data: Path | None, plan: TrainingPlan, start_over: bool, reading: Mapping[str, str]) -> None:
    """Take up an earlier run with the same settings, or make sure that there is none."""
    # None where nothing was chosen, as in the settings of versions that had no choice
    chosen = {"data": str(data.resolve()) if data else None, "reading": dict(reading) or None}
    settings = json.loads(json.dumps(asdict(plan) | chosen))
    path = output / _SETTINGS
    claim_folder(output, "demo")
    if start_over and path.exists():
        left = ("corpus", FINETUNED, DISTILLED, f"{FINETUNED}.checkpoints", f"{DISTILLED}.checkpoints")
        forget_folders([output / name for name in left])
        path.unlink(missing_ok=True)
    if path.exists():
        different = changed_settings(path, settings)
        if different:
            raise ValueError(
                f"output: {output} holds a demo with another {', '.join(different)}; choose another --output, or pass "
                "--start-over to replace it"
            )
        return
    write_json(path, settings)


def _load(output: Path, data: Path | None, plan: TrainingPlan, reading: Mapping[str, str]) -> tuple[DataFolder, Rows]:
    if data is None:
        if not (output / "corpus" / "difficulty.tsv").exists():
            corpus.write_corpus(output / "corpus", seed=plan.seed)
        data = output / "corpus"
    folder = load_folder(data, **dict[str, Any](reading))
    if folder.num_labels == 1:
        raise ValueError(
            f"data: {data} is a regression, but the demo needs classes; run fastkd finetune {plan.checkpoint} "
            f"--num-labels 1 --data {data} -o tuned, then fastkd distill tuned --data {data} -o model"
        )
    test = folder.test or folder.dev
    if test is None:
        raise ValueError(f"data: {data} has neither test nor dev rows; the demo needs some that it did not train on")
    return replace(folder, train=folder.train.sample(plan.train_rows, plan.seed)), test


def _measure(
    screen: Screen,
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    options: DemoOptions,
) -> Benchmark:
    speeds, sizes, dtypes, repeats = (
        options.bench_speeds, options.batch_sizes, options.dtypes, options.bench_repeats
    )  # fmt: skip
    with counted(screen, "measuring", passes(speeds, sizes, dtypes, repeats)) as on_progress:
        return benchmark_rows(
            model, tokenizer, rows, max_length=options.training.max_length, speeds=speeds, batch_sizes=sizes,
            dtypes=dtypes, repeats=repeats, on_progress=on_progress,
        )  # fmt: skip


def _exit_accuracies(recorded: ExitTrace) -> list[float]:
    if recorded.labels is None:
        return []
    right = recorded.logits.argmax(-1) == recorded.labels[:, None]
    return right.double().mean(0).tolist()


def _draw_difficulty(recorded: ExitTrace, output: Path, data: Path | None, speed: float) -> list[Path]:
    """Where rows of each difficulty left; only where the data says how difficult they are."""
    graded = corpus.read_difficulty(data or output / "corpus")
    if graded is None or recorded.rows is None or len(graded) != len(recorded):
        return []
    order = recorded.rows.tolist()
    exits = recorded.answers(speed).exit_layer.tolist()
    groups = {
        name: [layer for row, layer in zip(order, exits, strict=True) if graded[row] == name]
        for name in corpus.DIFFICULTIES
    }
    path = output / "exits_by_difficulty.png"
    figures.exits_by_group(
        groups, recorded.num_layers, path, f"Harder rows leave later (speed {speed:g})", recorded.about
    )
    return [path]


def _write_examples(test: Rows, output: Path, speed: float) -> str:
    """A few unlabelled rows to try the model on, and the command that does."""
    rows = test.dataset.select(range(min(10, len(test))))
    if test.is_pair:
        path = output / "examples.tsv"
        lines = ["text_a\ttext_b"] + [f"{row['text_a']}\t{row['text_b']}" for row in rows]  # type: ignore[index, call-overload]
    else:
        path = output / "examples.txt"
        lines = [str(row["text_a"]) for row in rows]  # type: ignore[index, call-overload]
    write_text(path, "\n".join(lines) + "\n")
    return f"fastkd predict {quoted(output / DISTILLED)} {quoted(path)} --speed {speed:g}"


def _tell_sweep(screen: Screen, sweep: Sweep, accuracies: list[float]) -> None:
    heads = ", ".join(f"{number}: {share(value)}" for number, value in enumerate(accuracies, start=1))
    screen.out.print(f"test accuracy after head {heads}")
    screen.out.print(sweep_table(sweep, "sweep", screen.is_narrow))
    tell_slower(screen, "sweep", sweep)


def _tell_end(screen: Screen, result: DemoResult, speed: float) -> None:
    screen.out.print(result.timings.table())
    shown = next((row for row in result.sweep if row.speed == speed), None)
    if shown is not None and shown.accuracy is not None and result.full_accuracy is not None:
        lost = 100 * (result.full_accuracy - shown.accuracy)
        measured = _measured_speedup(result.benchmark, speed)
        screen.out.print(
            f"At speed {speed:g}: {share(shown.accuracy)} of {share(result.full_accuracy)} ({lost:+.2f} points lost), "
            f"{shown.average_layers:.2f} layers on average, {shown.speedup['fastbert']:.2f}x fewer FLOPs{measured}."
        )
    screen.out.print(f"pictures and tables: {strong(result.output)}; all of it with a slider: {strong(result.page)}")
    screen.next_step(
        result.next_command, f"fastkd sweep {quoted(result.output / 'trace.safetensors')} --criterion margin"
    )


def _measured_speedup(measured: Benchmark, speed: float) -> str:
    """What a speed gained in seconds: by `fastkd predict`, which streams, and in batches; empty if not measured."""
    at_speed = [row for row in measured.rows if row.speed == speed]
    streamed = [row.speedup for row in at_speed if row.batch_size is None]
    batched = [row.speedup for row in at_speed if row.batch_size is not None]
    if not streamed or not batched:
        return ""
    return f", measured {_range(streamed)} in seconds as fastkd predict runs it, {_range(batched)} in batches"


def _range(speedups: Sequence[float]) -> str:
    low, high = f"{min(speedups):.2f}x", f"{max(speedups):.2f}x"
    return low if low == high else f"{low} to {high}"


def _name_of(data: Path | None) -> str:
    return data.name if data else "generated corpus"
