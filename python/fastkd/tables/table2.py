"""Table 2 of FastBERT (Liu et al., ACL 2020) for your data, with the column that the paper lacks: seconds.

The models are the full one; students of fewer layers, distilled as DistilBERT is (Sanh et al., 2019: every second layer
of the teacher to start with, then its probabilities, the labels and the cosine of the last hidden states); and early
exit at several speeds. Accuracy is that on all test rows, FLOPs those of `ExitTrace.sweep`. Seconds are medians of
interleaved passes over the same rows in the same batches; the full model and each student run as fast as either we or
transformers run them.

Every data set has a folder in the output. What is finished there is kept: an interrupted table goes on where it
stopped, and a folder that `fastkd demo` left gives its models.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.files import changed_settings, check_fields, read_json, write_json, write_result, write_text
from fastkd.data.rows import Rows, load_folder
from fastkd.data.work_folders import check_work_folder, claim_folder, forget_folders
from fastkd.encoders.anatomy import keep_layers
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.exits.sweep import SweepRow
from fastkd.exits.trace import ExitTrace
from fastkd.inference import benchmark
from fastkd.inference.interleaved import interleaved
from fastkd.inference.trace_rows import trace_rows
from fastkd.kd.options import KDOptions
from fastkd.kd.probe import encoder_layers
from fastkd.kd.teacher import Teacher
from fastkd.kd.trainer import KDTrainer
from fastkd.model.loading import PRECISIONS, in_dtype, load_model
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.training.early_exit import DISTILLED, TrainingPlan, distill_in, finetune_in
from fastkd.training.log import LOG_FILE, read_log
from fastkd.training.progress import Progress, counted, training_progress

CONVENTION = "fastbert"
TABLE_MARKDOWN, TABLE_CSV = "table2.md", "table2.csv"
_STUDENT_SETTINGS = "students.json"
_RESULT = "table2.json"
_OWNERS = ("table2", ("demo",))


@dataclass(frozen=True)
class Table2Options:
    """What a table is made of.

    Attributes:
        early_exit: how the full model and its heads are trained where the folder has none yet.
        student_layers: one student for each number.
        student_rows: training rows of the students, drawn from those of `early_exit`; None: all of them.
        student_epochs: passes over them.
        student_learning_rate: its peak.
        speeds: of early exit.
        test_rows: that accuracy and FLOPs are measured on; None: all.
        bench_rows: rows of a timed pass.
        bench_repeats: interleaved passes; their median counts.
        batch_size: rows of a timed batch.
        dtype: of the timed models, one of `fastkd.model.loading.PRECISIONS`.
        device: where the models are measured, as for `fastkd.model.loading.pick_device`.
    """

    early_exit: TrainingPlan = field(default_factory=TrainingPlan)
    student_layers: tuple[int, ...] = (3, 1)
    student_rows: int | None = None
    student_epochs: float = 3.0
    student_learning_rate: float = 1e-4
    speeds: tuple[float, ...] = (0.1, 0.5, 0.8)
    test_rows: int | None = None
    bench_rows: int = 256
    bench_repeats: int = 3
    batch_size: int = 32
    dtype: str = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.student_layers or min(self.student_layers) < 1:
            raise ValueError(f"student_layers: got {self.student_layers}, expected numbers from 1")
        if not self.speeds or not all(0 < speed <= 1 for speed in self.speeds):
            raise ValueError(f"speeds: got {self.speeds}, expected numbers above 0 and at most 1")
        if self.dtype not in PRECISIONS:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Cell:
    """One model on one data set."""

    dataset: str
    model: str
    accuracy: float
    average_layers: float
    flops: float
    """Mean operations a row, fastbert convention, at the padded length of the longest row."""
    flops_speedup: float
    """Of the full model's operations."""
    seconds: float
    """Median of a pass over `timed_rows` rows."""
    speedup: float
    """The full model's seconds by these."""
    timed_rows: int
    engine: str
    """Who ran it: "fastkd", or "transformers" where that was faster."""


@dataclass(frozen=True)
class Table2:
    """All cells, and what they were measured on."""

    cells: list[Cell]
    datasets: dict[str, dict[str, Any]]
    """By name: rows, length, training rows of model and students."""
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "datasets": self.datasets, "cells": [asdict(cell) for cell in self.cells]}

    def to_csv(self) -> str:
        """One line a cell."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, fieldnames=list(asdict(self.cells[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(cell) for cell in self.cells)
        return stream.getvalue()

    def to_markdown(self) -> str:
        """Models down, data sets across, as in the paper."""
        names = list(self.datasets)
        models = list(dict.fromkeys(cell.model for cell in self.cells))
        by_place = {(cell.dataset, cell.model): cell for cell in self.cells}
        headings = [part for name in names for part in (f"{name} acc", "FLOPs (speed-up)", "ms a row (speed-up)")]
        lines = [f"| Model | {' | '.join(headings)} |", "|---|" + "---|" * len(headings)]
        for model in models:
            parts = [_parts(by_place.get((name, model))) for name in names]
            lines.append(f"| {model} | {' | '.join(part for three in parts for part in three)} |")
        return "\n".join([*lines, "", *self._notes(), ""])

    def _notes(self) -> list[str]:
        machine = self.machine
        place = machine["processor"] if machine["device"] == "cpu" else machine["device"]
        notes = [
            f"* Timed on {place}, {machine['threads']} threads, torch {machine['torch']}, transformers "
            f"{machine['transformers']}; GPU: {machine['gpu_columns']}."
        ]
        for name, facts in self.datasets.items():
            timed = next(cell.timed_rows for cell in self.cells if cell.dataset == name)
            notes.append(
                f"* {name}: {facts['test_rows']} test rows, {timed} of them timed in batches of {facts['batch_size']} "
                f"({facts['dtype']}, median of {facts['bench_repeats']} interleaved passes); FLOPs at "
                f"{facts['seq_len']} tokens. Trained on: {facts['train_rows']} rows the full model and its exits, "
                f"{facts['student_rows']} rows x {facts['student_epochs']:g} epochs the students."
            )
        return notes


def _parts(cell: Cell | None) -> tuple[str, str, str]:
    if cell is None:
        return "", "", ""
    return (
        f"{100 * cell.accuracy:.2f}",
        f"{cell.flops / 1e6:.0f}M ({cell.flops_speedup:.2f}x)",
        f"{1000 * cell.seconds / cell.timed_rows:.2f} ({cell.speedup:.2f}x)",
    )


def run_table2(
    shown: Progress,
    data: Mapping[str, Path],
    output: Path,
    options: Table2Options,
    *,
    start_over: bool = False,
    reading: Mapping[str, str] | None = None,
) -> Table2:
    """Train what is missing, measure, and write `table2.md` and `table2.csv` to `output` after every data set.

    Args:
        shown: where to say what runs.
        data: by name, folders with train and test (or dev) rows.
        output: folder; each data set has a folder of its name in it.
        options: see there.
        start_over: train the students again, and measure again.
        reading: arguments of `fastkd.load_folder` about columns and labels, for all data sets.

    Raises:
        DataError: anything wrong with the data.
        FileExistsError: `output`, or a folder in it, holds what neither a table nor a demo left there.
        ValueError: `output` holds students that were trained otherwise; a student as deep as the model.
    """
    if not data:
        raise ValueError("data: got no data sets, expected at least one folder")
    for place in (output, *(output / name for name in data)):
        check_work_folder(place, *_OWNERS)
    cells: list[Cell] = []
    facts: dict[str, dict[str, Any]] = {}
    for name, folder in data.items():
        place = output / name
        result = _kept_result(place, options, start_over, reading or {}) or _run_dataset(
            shown, name, folder, place, options, start_over, reading or {}
        )
        cells += [Cell(**cell) for cell in result["cells"]]
        facts[name] = result["facts"]
        table = Table2(cells, facts, result["machine"])
        write_text(output / TABLE_MARKDOWN, table.to_markdown())
        write_text(output / TABLE_CSV, table.to_csv())
    return table


def _kept_result(
    place: Path, options: Table2Options, start_over: bool, reading: Mapping[str, str]
) -> dict[str, Any] | None:
    """What an earlier run with the same options measured."""
    path = place / _RESULT
    if start_over or not path.is_file():
        return None
    remedy = "delete it to measure again"
    result = read_json(path, "output", remedy)
    check_fields(result, {"options": dict, "machine": dict, "facts": dict, "cells": list}, path, "output", remedy)
    try:
        for cell in result["cells"]:
            Cell(**cell)
    except TypeError as error:
        raise ValueError(f"output: {path} holds cells of another form ({error}); {remedy}") from error
    # what was added later counts where it is given, so that older results stay
    return result if result["options"] == _settings(options, reading) else None


def _settings(options: Table2Options, reading: Mapping[str, str]) -> dict[str, Any]:
    settings = _as_json(options)
    if options.early_exit.layers is None:
        del settings["early_exit"]["layers"]
    return settings | ({"reading": dict(reading)} if reading else {})


def _as_json(options: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(options)))


def _run_dataset(
    shown: Progress,
    name: str,
    data: Path,
    place: Path,
    options: Table2Options,
    start_over: bool,
    reading: Mapping[str, str],
) -> dict[str, Any]:
    training = options.early_exit
    folder = load_folder(data, **dict[str, Any](reading))
    test = folder.test or folder.dev
    if test is None:
        raise ValueError(f"data: {data} has neither test nor dev rows; the table needs some that it did not train on")
    if options.test_rows is not None:
        test = test.sample(options.test_rows, training.seed)
    train = folder.train.sample(training.train_rows, training.seed)
    student_rows = train if options.student_rows is None else train.sample(options.student_rows, training.seed)
    for claimed in (place.parent, place):
        claim_folder(claimed, *_OWNERS)
    _check_students(place, options, student_rows, start_over)
    shown.say(f"[bold]{escape(name)}[/]: {len(train)} training rows, {len(test)} test rows")
    sampled = replace(folder, train=train)
    finetune_in(place, sampled, training, shown)
    distill_in(place, sampled, training, shown)
    model, tokenizer = load_model(str(place / DISTILLED), options.device)
    _check_depths(model, options.student_layers)
    students = {
        layers: _student(shown, model, tokenizer, layers, student_rows, folder.dev, place, options)
        for layers in options.student_layers
    }
    cells, seq_len = _measure(shown, name, model, students, tokenizer, test, options)
    facts = {
        "test_rows": len(test), "train_rows": _rows_seen(place), "student_rows": len(student_rows),
        "student_epochs": options.student_epochs, "batch_size": options.batch_size, "dtype": options.dtype,
        "bench_repeats": options.bench_repeats, "seq_len": seq_len,
    }  # fmt: skip
    result = {
        "options": _settings(options, reading),
        "machine": benchmark.machine_facts(model.device),
        "facts": facts,
        "cells": [asdict(cell) for cell in cells],
    }
    write_result(place / _RESULT, result)
    return result


# Students


def student_of(teacher: EarlyExitForSequenceClassification, layers: int) -> EarlyExitForSequenceClassification:
    """A model with `layers` of the teacher's layers, evenly spaced from the first, its embeddings and its last head.

    Half the layers are every second one, as DistilBERT starts (Sanh et al., 2019, section 3). Layers that share weights
    are called less often.

    Raises:
        ValueError: as many layers as the teacher has, or more.
    """
    if not 1 <= layers < teacher.num_layers:
        raise ValueError(f"layers: got {layers}, expected 1 to {teacher.num_layers - 1}, fewer than the teacher has")
    backbone = copy.deepcopy(teacher.config.backbone)
    chosen = [number * teacher.num_layers // layers for number in range(layers)]
    keep_layers(backbone, chosen)
    kept = (
        "head", "head_width", "head_attention_heads", "head_dropout", "id2label", "label2id", "problem_type", "layers",
        "pool", "input_format",
    )  # fmt: skip
    config = EarlyExitConfig(backbone, exit_layers=[layers], **{name: getattr(teacher.config, name) for name in kept})
    student = EarlyExitForSequenceClassification(config)
    own = student.state_dict()
    shared = {name: weight for name, weight in teacher.state_dict().items() if name in own}
    student.load_state_dict(shared, strict=False)
    teacher_layers = encoder_layers(teacher)
    if len(teacher_layers) == teacher.num_layers:  # else they share weights, as ALBERT's do, and have them already
        for number, layer in zip(chosen, encoder_layers(student), strict=True):
            layer.load_state_dict(teacher_layers[number].state_dict())
    student.last_head.load_state_dict(teacher.last_head.state_dict())
    return student.eval()


def _student(
    shown: Progress,
    teacher: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    layers: int,
    rows: Rows,
    dev: Rows | None,
    place: Path,
    options: Table2Options,
) -> EarlyExitForSequenceClassification:
    """The distilled student, from wherever an earlier run stopped."""
    folder = _student_folder(place, layers)
    if not folder.exists():
        full = copy.deepcopy(teacher)
        full.config.speed = 0.0
        training = options.early_exit
        chosen = KDOptions(
            epochs=options.student_epochs, learning_rate=options.student_learning_rate, head_learning_rate_factor=1.0,
            batch_size=training.batch_size, max_length=training.max_length, seed=training.seed, progress=False,
            resume=True,
        )  # fmt: skip
        # every token of the last layer is compared, which is too much to keep
        trainer = KDTrainer(Teacher(full, tokenizer), student_of(full, layers), "distilbert", chosen, cache=False)
        with training_progress(shown, f"student of {layers} layers") as callback:
            trainer.train(rows, dev, folder, [callback])
    return load_model(str(folder), options.device)[0]


def _student_folder(place: Path, layers: int) -> Path:
    return place / f"student-{layers}"


def _check_students(place: Path, options: Table2Options, rows: Rows, start_over: bool) -> None:
    """Students of an earlier run stay only if they were trained in the same way."""
    training = options.early_exit
    settings = {
        "rows": rows.digest(), "epochs": options.student_epochs, "learning_rate": options.student_learning_rate,
        "batch_size": training.batch_size, "max_length": training.max_length, "seed": training.seed,
    }  # fmt: skip
    path = place / _STUDENT_SETTINGS
    if start_over:
        forget_folders([folder for folder in place.glob("student-*") if folder.is_dir()])
        path.unlink(missing_ok=True)
    if not path.is_file():
        write_json(path, settings)
        return
    different = changed_settings(path, settings)
    if different:
        raise ValueError(
            f"output: {place} holds students that were trained with other {', '.join(different)}; choose another "
            "--output, or pass --start-over to train them again"
        )


def _check_depths(model: EarlyExitForSequenceClassification, student_layers: Sequence[int]) -> None:
    deep = [layers for layers in student_layers if layers >= model.num_layers]
    if deep:
        raise ValueError(f"student_layers: got {deep[0]}, but the full model has {model.num_layers}; name fewer")


def _rows_seen(place: Path) -> int:
    """Training rows of the early exits by their log: a model that was found here may have seen others than ours."""
    log = read_log(place / DISTILLED)
    file, remedy = place / DISTILLED / LOG_FILE, "train the model again"
    check_fields(log, {"train": dict}, file, "log", remedy)
    check_fields(log["train"], {"rows": int}, file, "log", remedy)
    return int(log["train"]["rows"])


# Measuring


def _measure(
    shown: Progress,
    name: str,
    model: EarlyExitForSequenceClassification,
    students: Mapping[int, EarlyExitForSequenceClassification],
    tokenizer: PreTrainedTokenizerBase,
    test: Rows,
    options: Table2Options,
) -> tuple[list[Cell], int]:
    """The cells of one data set, and the length for which operations were counted."""
    length = options.early_exit.max_length
    trace = _trace(shown, model, tokenizer, test, length)
    full, *early = trace.sweep([0.0, *options.speeds])
    timed = test.sample(options.bench_rows, options.early_exit.seed)
    seconds = _seconds(shown, model, students, tokenizer, timed, options)
    full_name = f"full model ({_layers(model.num_layers)})"
    swept: dict[str, SweepRow] = {full_name: full}
    for layers, student in students.items():
        own = _trace(shown, student, tokenizer, test, length)
        swept[_student_name(layers)] = own.sweep([0.0], seq_len=trace.max_length)[0]
    swept |= {_speed_name(row.speed): row for row in early}
    best = {model_name: min(found, key=lambda engine: found[engine]) for model_name, found in seconds.items()}
    timings = {model_name: seconds[model_name][engine] for model_name, engine in best.items()}
    cells = [
        Cell(
            dataset=name,
            model=model_name,
            accuracy=_known(row.accuracy),
            average_layers=row.average_layers,
            flops=row.flops[CONVENTION],
            flops_speedup=full.flops[CONVENTION] / row.flops[CONVENTION],
            seconds=timings[model_name],
            speedup=timings[full_name] / timings[model_name],
            timed_rows=len(timed),
            engine=best[model_name],
        )
        for model_name, row in swept.items()
    ]
    return cells, trace.max_length


def _trace(
    shown: Progress,
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_length: int,
) -> ExitTrace:
    with shown.progress("tracing", None) as update:
        return trace_rows(
            model, tokenizer, rows, max_length=max_length, on_batch=lambda done, total: update(done, "", total)
        )


def _seconds(
    shown: Progress,
    model: EarlyExitForSequenceClassification,
    students: Mapping[int, EarlyExitForSequenceClassification],
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    options: Table2Options,
) -> dict[str, dict[str, float]]:
    """Median seconds of a pass by model and engine; all contestants take turns in one process."""
    encoded = tokenize(rows, tokenizer, options.early_exit.max_length)
    batches = [
        {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        for batch in LengthSortedBatches(encoded, tokenizer, options.batch_size)
    ]
    contestants: dict[tuple[str, str], benchmark.Contestant] = {}
    fixed = {f"full model ({_layers(model.num_layers)})": model}
    fixed |= {_student_name(layers): student for layers, student in students.items()}
    cast_models = {name: _cast(fixed_model, options.dtype) for name, fixed_model in fixed.items()}
    for name, fixed_model in cast_models.items():
        contestants[name, benchmark.OUR_FULL] = partial(benchmark.early_exit_pass, fixed_model, batches, 0.0)
        contestants[name, benchmark.TRANSFORMERS_FULL] = partial(benchmark.transformers_pass, fixed_model, batches)
    early_exit = next(iter(cast_models.values()))
    for speed in options.speeds:
        contestants[_speed_name(speed), benchmark.OUR_FULL] = partial(
            benchmark.early_exit_pass, early_exit, batches, speed, "entropy"
        )
    with counted(shown, "measuring", len(contestants) * (options.bench_repeats + 1)) as on_progress:
        taken, _ = interleaved(
            contestants, options.bench_repeats, lambda contestant: on_progress(contestant[0]),
            partial(benchmark.synchronise, model.device),
        )  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for (name, engine), values in taken.items():
        found.setdefault(name, {})[engine] = statistics.median(values)
    return found


def _cast(model: EarlyExitForSequenceClassification, dtype: str) -> EarlyExitForSequenceClassification:
    return in_dtype(copy.deepcopy(model).eval(), dtype)


def _known(accuracy: float | None) -> float:
    if accuracy is None:
        raise ValueError("data: the test rows have no labels, so there is no accuracy; name labelled rows")
    return accuracy


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _student_name(layers: int) -> str:
    return f"DistilBERT-style ({_layers(layers)})"


def _speed_name(speed: float) -> str:
    return f"FastBERT (speed={speed:g})"
