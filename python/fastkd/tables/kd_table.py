"""A grid of methods, students, tasks and seeds, and its table in the layout of the papers (Universal-KD, 2, 4 and 5).

The grid is a YAML file:

    title: Three-layer students of MiniLM
    data: ../shared/data              # what the folders of the tasks are relative to; itself relative to where you are
    seeds: [1, 2, 3]
    train_rows: 1000                  # of every student; drawn once, so all methods and seeds see the same
    dev_rows: 500                     # choose the best weights of a student; default: all dev rows, 0: the last weights
    eval_rows: 1000                   # of `eval_split`; where that is dev, students have no dev rows
    eval_split: test
    train: {epochs: 3, learning_rate: 1.0e-4, max_length: 64}     # any KDOptions
    teacher:
      checkpoint: minilm              # fine-tuned once a task, unless the task names a `teacher` folder
      train_rows: 4000
      train: {epochs: 3}
    tasks:
      RTE: {data: rte, metric: accuracy, train: {max_length: 96}}
      STS-B: {data: stsb, metric: [pearson, spearman], num_labels: 1}
      Stars: {data: stars, text_column: review, label_column: stars, labels_are: indices}
    blocks:
      - title: Intermediate layers
        student: layers:3
        methods: [none, kd, universal-il]
        train: {learning_rate: 5.0e-5}
        arguments: {universal-il: {intermediate_weight: 1.0}}
        trials:                       # of every method, as many for each; dev rows choose one for every task
          - {}
          - train: {learning_rate: 1.0e-4}
          - arguments: {kd: {temperature: 1}, universal-il: {attn_space: log_probs}}

Trials run with the first seed; the one with the best score on the dev rows is the method's, and runs with every seed.

Every finished cell is a JSON file, so an interrupted grid goes on where it stopped. Seeds come outermost: what an
interrupted grid has finished is a table with fewer seeds.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from fastkd.data.errors import DataError
from fastkd.data.files import check_fields, read_json, write_result, write_text
from fastkd.data.rows import DataFolder, Rows, load_folder
from fastkd.data.work_folders import claim_folder
from fastkd.data.yaml_text import load_yaml
from fastkd.kd.methods import Method, method_of
from fastkd.kd.options import KDOptions
from fastkd.kd.stage_run import BEST_METRIC
from fastkd.kd.teacher import PseudoClassifierOptions, Teacher
from fastkd.kd.trainer import KDTrainer, evaluate
from fastkd.model.checkpoints import checkpoint_path
from fastkd.training import metrics
from fastkd.training.harness import bf16_is_fast

Progress = Callable[[int, int, str], None]
_SPLITS = ("dev", "test")


class GridError(ValueError):
    """A grid that cannot be run: the message names the entry, what came and what was expected."""


@dataclass(frozen=True)
class Task:
    """One column.

    Attributes:
        data: folder with train and the split that is evaluated.
        metric: the number in the table; several are averaged.
        num_labels: 1 for a regression.
        text_column, pair_column, label_column, labels_are: of its rows, as for `fastkd.load_rows`.
        teacher: folder of a fine-tuned classifier; None: the grid's checkpoint is fine-tuned.
        teacher_rows: training rows of the teacher, instead of as many as the grid says.
        teacher_train: options of the teacher's training; they win over all others.
        train: options of every training on this task, the teacher's too; they win over the grid's and the block's.
    """

    data: str
    metric: tuple[str, ...]
    num_labels: int | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    labels_are: str | None = None
    teacher: str | None = None
    teacher_rows: int | None = None
    teacher_train: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherPlan:
    """How teachers are fine-tuned; dev rows choose the best epoch.

    `layers` says where a teacher's list of layers lies, as in "encoder.layers"; None: found by itself.
    """

    checkpoint: str = "minilm"
    train_rows: int | None = None
    dev_rows: int | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    layers: str | None = None


@dataclass(frozen=True)
class Block:
    """One part of the table: a student under several methods."""

    title: str
    student: str
    methods: tuple[str, ...]
    train: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class Trial:
    """Settings that every method of a block is tried with; they win over those of the block."""

    train: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """What `load_grid` reads; see the module for the file."""

    tasks: Mapping[str, Task]
    blocks: tuple[Block, ...]
    seeds: tuple[int, ...]
    title: str = "Knowledge distillation"
    data: str = "."
    train_rows: int | None = None
    dev_rows: int | None = None
    eval_rows: int | None = None
    eval_split: str = "test"
    rows_seed: int = 0
    train: Mapping[str, Any] = field(default_factory=dict)
    teacher: TeacherPlan = field(default_factory=TeacherPlan)

    @property
    def has_dev_rows(self) -> bool:
        """Whether students may choose weights; never by the rows that they are evaluated on."""
        return self.eval_split != "dev" and self.dev_rows != 0

    def cells(self) -> Iterator[Cell]:
        """Every cell once, in the order in which they are run; with trials the first seed has one for each."""
        seen = set()
        for seed in self.seeds:
            for task in self.tasks:
                for block in self.blocks:
                    trials = _numbers(block.trials) if block.trials and seed == self.seeds[0] else [None]
                    for trial, method in itertools.product(trials, block.methods):
                        cell = Cell(block, method, task, seed, trial)
                        # blocks may repeat a row, as the papers' tables do
                        if cell.name not in seen:
                            seen.add(cell.name)
                            yield cell

    def trials_of(self, cell: Cell) -> list[Cell]:
        """The cells whose dev scores choose among the trials of a cell's method."""
        return [replace(cell, seed=self.seeds[0], trial=number) for number in _numbers(cell.block.trials)]


def _numbers(trials: Sequence[Trial]) -> list[int]:
    return list(range(1, len(trials) + 1))


@dataclass(frozen=True)
class Cell:
    """One training of one student.

    `trial` is its number from 1; None where a block has none, or the one that the dev rows choose.
    """

    block: Block
    method: str
    task: str
    seed: int
    trial: int | None = None

    @property
    def name(self) -> str:
        """Where its result lies, without a suffix."""
        trial = "" if self.trial is None else f"trial-{self.trial}/"
        return f"{_slug(self.task)}/{_slug(self.block.student)}/{self.method}/{trial}seed-{self.seed}"


@dataclass(frozen=True)
class Score:
    """One number of the table.

    Attributes:
        mean: over the finished seeds, of the task's metrics' mean, times 100.
        deviation: sample standard deviation over them; None for one seed.
        seeds: how many are finished.
    """

    mean: float
    deviation: float | None
    seeds: int

    def text(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


@dataclass(frozen=True)
class Row:
    """One row of the table; scores by task, "Avg" where every task has one, and the trial chosen for each task."""

    block: str
    student: str
    method: str
    title: str
    scores: dict[str, Score]
    trials: dict[str, int] = field(default_factory=dict)


def load_grid(path: str | Path, data: str | Path | None = None) -> Grid:
    """Read and check a grid.

    Args:
        path: the YAML file.
        data: takes the place of the grid's own `data`.

    Raises:
        GridError: anything that is wrong with it.
        OSError: no such file.
    """
    try:
        raw = load_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise GridError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    given = dict(_mapping(raw, str(path)))
    if data is not None:
        given["data"] = str(data)
    for name in ("tasks", "blocks", "seeds"):
        if not given.get(name):
            raise GridError(f"{path}: no {name}; a grid needs tasks, blocks and seeds")
    tasks = {str(name): _task(value, f"tasks.{name}") for name, value in _mapping(given["tasks"], "tasks").items()}
    blocks = tuple(_block(value, f"blocks[{index}]") for index, value in enumerate(_list(given["blocks"], "blocks")))
    seeds = tuple(_list(given["seeds"], "seeds"))
    if not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) < len(seeds):
        raise GridError(f"seeds: got {list(seeds)}, expected different whole numbers")
    teacher = _made(TeacherPlan, _mapping(given.get("teacher") or {}, "teacher"), "teacher")
    grid = _made(Grid, {**given, "tasks": tasks, "blocks": blocks, "seeds": seeds, "teacher": teacher}, str(path))
    if grid.eval_split not in _SPLITS:
        raise GridError(f"eval_split: got {grid.eval_split!r}, expected one of {', '.join(_SPLITS)}")
    if not grid.has_dev_rows and any(block.trials for block in grid.blocks):
        raise GridError("trials: dev rows choose among them; expected dev_rows other than 0, and eval_split test")
    for cell in grid.cells():
        _options(grid, cell)
    for task in grid.tasks:
        _teacher_options(grid, task)
    _check_shared_rows(grid)
    return grid


def run_table(
    grid: Grid, output: str | Path, on_progress: Progress | None = None, tasks: Sequence[str] = ()
) -> list[Row]:
    """Run every cell that has no result yet, and write the table after each: `table.md` and `table.csv` in `output`.

    Args:
        grid: see `load_grid`.
        output: folder for teachers, their answers, cells and table.
        on_progress: called with cells done, all cells, and what runs now.
        tasks: run the cells of these alone, so that several processes can share a grid and its folder by tasks.

    Raises:
        FileExistsError: `output` holds what no table left there.
        GridError: an unknown task, or a result in `output` belongs to other settings.
        DataError: anything wrong with the data of a task.
    """
    unknown = [task for task in tasks if task not in grid.tasks]
    if unknown:
        raise GridError(f"tasks: the grid has no {', '.join(unknown)}, only {', '.join(grid.tasks)}")
    claim_folder(Path(output), "kd-table")
    runner = _Runner(grid, Path(output))
    cells = [cell for cell in grid.cells() if not tasks or cell.task in tasks]
    waiting = [cell for cell in cells if not runner.is_finished(cell)]
    for number, cell in enumerate(waiting, start=len(cells) - len(waiting)):
        if on_progress is not None:
            on_progress(number, len(cells), cell.name)
        runner.run(cell)
        write_table(grid, output)
    return write_table(grid, output)


def write_table(grid: Grid, output: str | Path) -> list[Row]:
    """Write the table of the results in `output`; its rows."""
    folder = Path(output)
    rows = table_rows(grid, folder)
    write_text(folder / "table.md", markdown(grid, rows))
    write_text(folder / "table.csv", csv_text(rows))
    return rows


def table_rows(grid: Grid, output: str | Path) -> list[Row]:
    """The rows that the finished results in `output` make: each block's teacher first, then its methods."""
    folder = Path(output)
    teacher = {
        task: _score(task, grid, [_read(folder / "teachers" / f"{_slug(task)}.json", grid.tasks[task].metric)])
        for task in grid.tasks
    }
    rows = []
    for block in grid.blocks:
        rows.append(_row(grid, block.title, "", "teacher", "Teacher", teacher, []))
        for method in block.methods:
            results = {
                task: [_result(grid, folder, Cell(block, method, task, seed)) for seed in grid.seeds]
                for task in grid.tasks
            }
            scores = {task: _score(task, grid, found) for task, found in results.items()}
            averages = [
                statistics.fmean(_number(grid.tasks[task], cast(Any, found[index])) for task, found in results.items())
                for index in range(len(grid.seeds))
                if all(found[index] is not None for found in results.values())
            ]
            row = _row(grid, block.title, block.student, method, method_of(method).title, scores, averages)
            cells = {task: _chosen(grid, folder, Cell(block, method, task, grid.seeds[0])) for task in grid.tasks}
            trials = {task: cell.trial for task, cell in cells.items() if cell is not None and cell.trial is not None}
            rows.append(replace(row, trials=trials))
    return rows


def markdown(grid: Grid, rows: Sequence[Row]) -> str:
    """The table for people: one part a block, the best student of each column in bold."""
    columns = [*grid.tasks, "Avg"]
    most = max((score.seeds for row in rows for score in row.scores.values()), default=0)
    lines = [f"# {grid.title}", "", _caption(grid, most), ""]
    for block in grid.blocks:
        mine = [row for row in rows if row.block == block.title]
        best = {
            name: max((row.scores[name].mean for row in mine[1:] if name in row.scores), default=None)
            for name in columns
        }
        lines += [f"## {block.title}: student {block.student}", ""]
        lines += ["| Model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in mine:
            is_student = row.method != "teacher"
            cells = [_shown(row.scores.get(name), best[name], is_student, most) for name in columns]
            lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
        lines.append("")
        if block.trials:
            lines += _trials_shown(grid, block, mine)
    return "\n".join(lines)


def _trials_shown(grid: Grid, block: Block, rows: Sequence[Row]) -> list[str]:
    """What was tried, and which trial each method has."""
    lines = ["Trials of every method, by the dev rows with the first seed:", ""]
    for number, trial in enumerate(block.trials, start=1):
        parts = [f"{name} {value}" for name, value in trial.train.items()]
        parts += [
            f"{method_of(method).title}: " + ", ".join(f"{name} {value}" for name, value in given.items())
            for method, given in trial.arguments.items()
        ]
        lines.append(f"{number}. {'; '.join(parts) or 'the settings of the block'}")
    lines += ["", "| Chosen | " + " | ".join(grid.tasks) + " |", "|---" * (len(grid.tasks) + 1) + "|"]
    for row in rows[1:]:
        chosen = [str(row.trials.get(task, "")) for task in grid.tasks]
        lines.append(f"| {row.title} | " + " | ".join(chosen) + " |")
    return [*lines, ""]


def csv_text(rows: Sequence[Row]) -> str:
    """One line a number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["block", "student", "method", "task", "mean", "deviation", "seeds"])
    for row in rows:
        for task, score in row.scores.items():
            deviation = "" if score.deviation is None else f"{score.deviation:.4f}"
            writer.writerow([row.block, row.student, row.method, task, f"{score.mean:.4f}", deviation, score.seeds])
    return text.getvalue()


# Running


class _Runner:
    """Runs cells; keeps the data and teachers of every task that it has met."""

    def __init__(self, grid: Grid, output: Path) -> None:
        self.grid = grid
        self.output = output
        self._data: dict[str, tuple[DataFolder, Rows]] = {}
        self._teachers: dict[tuple[str, str | None], Teacher] = {}

    def is_finished(self, cell: Cell) -> bool:
        chosen = _chosen(self.grid, self.output, cell)
        if chosen is None:
            return False
        cell = chosen
        found = _read(_cell_path(self.output, cell), self.grid.tasks[cell.task].metric)
        if found is None:
            return False
        if found["settings"] != self._settings(cell):
            raise GridError(
                f"{_cell_path(self.output, cell)} was run with other settings; delete it to run it again, or choose "
                "another output folder"
            )
        return True

    def run(self, cell: Cell) -> None:
        chosen = _chosen(self.grid, self.output, cell)
        # seeds come outermost, so that the trials are behind us
        assert chosen is not None
        if chosen != cell and self.is_finished(chosen):
            return
        cell = chosen
        folder, evaluated = self._rows(cell.task)
        dev = self._dev(folder)
        train = folder.train if self.grid.train_rows is None else self._sampled(folder.train, self.grid.train_rows)
        options = _options(self.grid, cell)
        if dev is None:
            options = replace(options, trainer_arguments={**_UNSAVED, **options.trainer_arguments})
        method = method_of(cell.method)
        pool = options.pool or method.pool
        teacher = self._teacher(cell.task, pool)
        trainer = KDTrainer(
            teacher, cell.block.student, cell.method, options, cache=self._cache(cell, method, options, pool)
        )
        with tempfile.TemporaryDirectory(prefix=".cell-", dir=self.output) as scratch:
            done = trainer.train(train, dev, Path(scratch) / "student")
        assert trainer.model is not None
        found = evaluate(
            trainer.model, trainer.tokenizer, evaluated, max_length=options.max_length, bf16=_bf16(options)
        )
        result = {
            "settings": self._settings(cell),
            "train_rows": len(train),
            "dev_rows": 0 if dev is None else len(dev),
            "eval_rows": len(evaluated),
            "metrics": found,
            "dev_metrics": done.metrics,
            "steps": done.steps,
            "train_loss": done.train_loss,
            "seconds": round(done.seconds, 2),
        }
        write_result(_cell_path(self.output, cell), result)

    def _cache(self, cell: Cell, method: Method, options: KDOptions, pool: str | None) -> bool | Path:
        if "sequence_output" in method.teacher_kinds:
            return False
        name = f"{_slug(cell.task)}-{pool or 'default'}-{options.max_length}"
        # trials may train the teacher's pseudo-classifiers otherwise, or answer in another precision
        other = {"bf16": options.bf16, **asdict(options.pseudo_classifiers)}
        is_usual = other == {"bf16": None, **asdict(PseudoClassifierOptions())}
        return self.output / "answers" / (name if is_usual else f"{name}-{_digest(other)[:8]}")

    def _rows(self, task: str) -> tuple[DataFolder, Rows]:
        if task not in self._data:
            plan = self.grid.tasks[task]
            folder = _load_task(task, Path(self.grid.data) / plan.data, plan)
            rows = folder.test if self.grid.eval_split == "test" else folder.dev
            if rows is None:
                raise GridError(
                    f"tasks.{task}: {plan.data} has no {self.grid.eval_split} rows, which eval_split asks for"
                )
            metrics.check_names(plan.metric, cast(int, folder.num_labels))
            evaluated = rows if self.grid.eval_rows is None else self._sampled(rows, self.grid.eval_rows)
            self._data[task] = folder, evaluated
        return self._data[task]

    def _dev(self, folder: DataFolder) -> Rows | None:
        """The rows that choose a student's weights."""
        if not self.grid.has_dev_rows or folder.dev is None:
            return None
        limit = self.grid.dev_rows
        return folder.dev if limit is None else self._sampled(folder.dev, limit)

    def _sampled(self, rows: Rows, count: int) -> Rows:
        return rows.sample(count, self.grid.rows_seed)

    def _teacher(self, task: str, pool: str | None) -> Teacher:
        if (task, pool) not in self._teachers:
            self._teachers[task, pool] = Teacher.load(self._teacher_folder(task), pool, self.grid.teacher.layers)
        return self._teachers[task, pool]

    def _teacher_folder(self, task: str) -> Path:
        """The task's teacher, fine-tuned and evaluated where that is not done yet."""
        plan, (folder, evaluated) = self.grid.tasks[task], self._rows(task)
        target = self.output / "teachers" / _slug(task) if plan.teacher is None else Path(plan.teacher)
        record = self.output / "teachers" / f"{_slug(task)}.json"
        options = _teacher_options(self.grid, task)
        settings = _digest(
            {"grid": _settings_of(self.grid.teacher), "task": _settings_of(plan), "options": _settings_of(options)}
        )
        found = _read(record, plan.metric)
        if found is not None:
            if found["settings"] != settings:
                raise GridError(
                    f"{record} is of a teacher with other settings; choose another output folder, or delete this one"
                )
            return target
        if plan.teacher is None and not target.exists():
            count = plan.teacher_rows or self.grid.teacher.train_rows
            rows = folder.train if count is None else self._sampled(folder.train, count)
            checkpoint = checkpoint_path(self.grid.teacher.checkpoint)
            options = replace(options, metric=plan.metric, resume=True)
            limit, dev = self.grid.teacher.dev_rows, folder.dev
            dev = dev if dev is None or limit is None else self._sampled(dev, limit)
            KDTrainer(None, checkpoint, "none", options).train(rows, dev, target)
        teacher = Teacher.load(target)
        found = evaluate(
            teacher.model, teacher.tokenizer, evaluated, max_length=options.max_length, bf16=_bf16(options)
        )
        write_result(record, {"settings": settings, "metrics": found, "eval_rows": len(evaluated)})
        return target

    def _settings(self, cell: Cell) -> str:
        """A digest of all that a result depends on."""
        grid, options = self.grid, _options(self.grid, cell)
        parts = {
            "options": _settings_of(options),
            "student": cell.block.student,
            "method": cell.method,
            "task": _settings_of(grid.tasks[cell.task]),
            "teacher": _settings_of(grid.teacher),
            "rows": [grid.train_rows, grid.eval_rows, grid.eval_split, grid.rows_seed],
            "dev rows": grid.dev_rows if grid.has_dev_rows else 0,
        }
        return _digest(parts)


def _load_task(name: str, folder: Path, plan: Task) -> DataFolder:
    try:
        return load_folder(
            folder, num_labels=plan.num_labels, labels_are=plan.labels_are,
            **{argument: getattr(plan, key) for argument, key in _COLUMN_KEYS.items()},
        )  # fmt: skip
    except DataError as error:
        message = str(error)
        for argument, key in _COLUMN_KEYS.items():
            message = re.sub(rf"\b{argument}=", f"{key}: in the grid", message)
        raise DataError(f"tasks.{name}: {message}") from error


def _settings_of(plan: Task | TeacherPlan | KDOptions) -> dict[str, Any]:
    """All that a result depends on; what was added later counts where it is given, so that older results stay."""
    later = {*_COLUMN_KEYS.values(), "labels_are", "layers", "student_layers"}
    return {name: value for name, value in asdict(plan).items() if value is not None or name not in later}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _bf16(options: KDOptions) -> bool:
    return bf16_is_fast() if options.bf16 is None else options.bf16


# Settings

_COLUMN_KEYS = {"text_a": "text_column", "text_b": "pair_column", "label": "label_column"}
_FLOATS = {item.name for item in fields(KDOptions) if item.type in ("float", float)}
_CELL_REMEDY = "delete it to run it again"
_BY_CELL = {"seed": "seeds", "arguments": "the arguments of a block"}
# without dev rows nothing is chosen, so that no checkpoint would ever be read
_UNSAVED = {"save_strategy": "no"}


def _options(grid: Grid, cell: Cell) -> KDOptions:
    trial = Trial() if cell.trial is None else cell.block.trials[cell.trial - 1]
    task = grid.tasks[cell.task]
    train = {**grid.train, **cell.block.train, **task.train, **trial.train}
    where = f"{cell.block.title}, {cell.method}, {cell.task}"
    arguments = {**cell.block.arguments.get(cell.method, {}), **trial.arguments.get(cell.method, {})}
    for name in _BY_CELL.keys() & train:
        raise GridError(f"{where}: {name} in train; expected it as {_BY_CELL[name]}")
    options = _kd_options({**train, "seed": cell.seed, "arguments": arguments}, where)
    method = method_of(cell.method)
    try:
        method.check(options.arguments)
    except ValueError as error:
        raise GridError(f"{where}: {error}") from error
    return replace(options, metric=options.metric or task.metric)


def _teacher_options(grid: Grid, task: str) -> KDOptions:
    plan = grid.tasks[task]
    given = {**grid.train, **grid.teacher.train, **plan.train, **plan.teacher_train}
    return _kd_options(given, f"teacher of {task}")


def _kd_options(given: Mapping[str, Any], where: str) -> KDOptions:
    try:
        typed = {name: _typed(name, value) for name, value in given.items()}
        return _made(KDOptions, {"progress": False, **typed}, where)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, GridError) else GridError(f"{where}: {error}") from error


def _typed(name: str, value: Any) -> Any:
    """A value of YAML as `KDOptions` wants it."""
    if name == "pseudo_classifiers":
        return _made(PseudoClassifierOptions, _mapping(value, name), name)
    if name in ("metric", "assistants"):
        return tuple(_list(value, name))
    # YAML 1.1 reads 1e-4, without a point, as text
    return float(value) if isinstance(value, str) and name in _FLOATS else value


def _check_shared_rows(grid: Grid) -> None:
    """Blocks that share a row must mean the same by it."""
    seen: dict[tuple[str, str], tuple[Any, str]] = {}
    for block in grid.blocks:
        for method in block.methods:
            tried = [(dict(trial.train), dict(trial.arguments.get(method, {}))) for trial in block.trials]
            meant = (dict(block.train), dict(block.arguments.get(method, {})), tried)
            first, title = seen.setdefault((block.student, method), (meant, block.title))
            if first != meant:
                raise GridError(
                    f"blocks: {title!r} and {block.title!r} both have {method} with student {block.student}, but with "
                    "other train, arguments or trials; give them the same"
                )


def _task(raw: Any, where: str) -> Task:
    given = dict(_mapping(raw, where))
    if "data" not in given:
        raise GridError(f"{where}: no data; name the folder of its rows")
    metric = given.get("metric", "pearson" if given.get("num_labels") == 1 else "accuracy")
    given["metric"] = tuple(_list(metric, f"{where}.metric")) if not isinstance(metric, str) else (metric,)
    try:
        metrics.check_names(given["metric"], given.get("num_labels") or 2)
    except ValueError as error:
        raise GridError(f"{where}: {error}; a regression has num_labels: 1") from error
    return _made(Task, given, where)


def _block(raw: Any, where: str) -> Block:
    given = dict(_mapping(raw, where))
    for name in ("student", "methods"):
        if not given.get(name):
            raise GridError(f"{where}: no {name}; a block needs a student and its methods")
    given["methods"] = tuple(_list(given["methods"], f"{where}.methods"))
    for method in given["methods"]:
        try:
            method_of(method)
        except ValueError as error:
            raise GridError(f"{where}.methods: {error}") from error
    unknown = set(given.get("arguments") or {}) - set(given["methods"])
    if unknown:
        raise GridError(f"{where}.arguments: {', '.join(sorted(unknown))} is not a method of this block")
    trials = _list(given.get("trials") or [], f"{where}.trials")
    given["trials"] = tuple(_trial(value, given["methods"], f"{where}.trials[{at}]") for at, value in enumerate(trials))
    given.setdefault("title", given["student"])
    return _made(Block, given, where)


def _trial(raw: Any, methods: Sequence[str], where: str) -> Trial:
    made = _made(Trial, _mapping(raw, where), where)
    unknown = set(_mapping(made.arguments, f"{where}.arguments")) - set(methods)
    if unknown:
        raise GridError(f"{where}.arguments: {', '.join(sorted(unknown))} is not a method of this block")
    return cast(Trial, made)


def _made(kind: Any, given: Mapping[str, Any], where: str) -> Any:
    names = [item.name for item in fields(kind)]
    unknown = [str(name) for name in given if name not in names]
    if unknown:
        raise GridError(f"{where}: unknown {', '.join(unknown)}; expected some of {', '.join(names)}")
    return kind(**given)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise GridError(f"{where}: got {type(value).__name__}, expected names and values")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise GridError(f"{where}: got {value!r}, expected a list")
    return value


def _slug(text: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in text)


# The table


def _cell_path(output: Path, cell: Cell) -> Path:
    return output / "cells" / f"{cell.name}.json"


def _result(grid: Grid, output: Path, cell: Cell) -> dict[str, Any] | None:
    """What a cell left, with trials the chosen one; None where there is none yet."""
    chosen = _chosen(grid, output, cell)
    return None if chosen is None else _read(_cell_path(output, chosen), grid.tasks[cell.task].metric)


def _chosen(grid: Grid, output: Path, cell: Cell) -> Cell | None:
    """The cell itself, or with trials that of the best on the dev rows; None until all of them are finished."""
    if cell.trial is not None or not cell.block.trials:
        return cell
    scores = []
    for tried in grid.trials_of(cell):
        path = _cell_path(output, tried)
        found = _read(path, grid.tasks[cell.task].metric)
        if found is None:
            return None
        check_fields(found, {"dev_metrics": dict}, path, "output", _CELL_REMEDY)
        check_fields(found["dev_metrics"], {BEST_METRIC: (int, float)}, path, "output", _CELL_REMEDY)
        scores.append(found["dev_metrics"][BEST_METRIC])
    return replace(cell, trial=scores.index(max(scores)) + 1)


def _read(path: Path, metrics_wanted: Sequence[str]) -> dict[str, Any] | None:
    """The result in a file that a cell or a teacher left; None where there is none yet."""
    if not path.is_file():
        return None
    found = read_json(path, "output", _CELL_REMEDY)
    check_fields(found, {"settings": str, "metrics": dict}, path, "output", _CELL_REMEDY)
    check_fields(found["metrics"], dict.fromkeys(metrics_wanted, (int, float)), path, "output", _CELL_REMEDY)
    if not all(math.isfinite(found["metrics"][name]) for name in metrics_wanted):
        raise ValueError(f"output: {path} has a metric that is not a finite number; {_CELL_REMEDY}")
    return found


def _number(task: Task, result: Mapping[str, Any]) -> float:
    return 100 * statistics.fmean(result["metrics"][name] for name in task.metric)


def _score(task: str, grid: Grid, results: Sequence[dict[str, Any] | None]) -> Score | None:
    return _summary([_number(grid.tasks[task], result) for result in results if result is not None])


def _summary(values: Sequence[float]) -> Score | None:
    if not values:
        return None
    return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _row(
    grid: Grid,
    block: str,
    student: str,
    method: str,
    title: str,
    scores: Mapping[str, Score | None],
    averages: Sequence[float],
) -> Row:
    found = {task: score for task, score in scores.items() if score is not None}
    average = _summary(averages)
    if average is None and len(found) == len(grid.tasks):
        average = Score(statistics.fmean(score.mean for score in found.values()), None, 1)
    if average is not None:
        found["Avg"] = average
    return Row(block, student, method, title, found)


def _caption(grid: Grid, seeds: int) -> str:
    tasks = "; ".join(f"{name} {' and '.join(task.metric)}" for name, task in grid.tasks.items())
    rows = "all training rows" if grid.train_rows is None else f"at most {grid.train_rows} training rows"
    teachers = "; ".join(f"{name} {_teacher_rows(grid, task)}" for name, task in grid.tasks.items())
    limit = "all" if grid.eval_rows is None else f"at most {grid.eval_rows}"
    return (
        f"Mean and sample standard deviation over {seeds} seed{'s' if seeds != 1 else ''}, times 100 ({tasks}), of "
        f"students trained on {rows} a task and evaluated on {limit} {grid.eval_split} rows; {_dev_shown(grid)}. The "
        f"best student of a column is bold. Teachers: {teachers}."
    )


def _dev_shown(grid: Grid) -> str:
    if not grid.has_dev_rows:
        return "their last weights"
    return f"{'all' if grid.dev_rows is None else f'at most {grid.dev_rows}'} dev rows choose their weights"


def _teacher_rows(grid: Grid, task: Task) -> str:
    if task.teacher is not None:
        return f"from {Path(task.teacher).name}"
    count = task.teacher_rows or grid.teacher.train_rows
    return f"{grid.teacher.checkpoint} fine-tuned on {'all' if count is None else f'at most {count}'} rows"


def _shown(score: Score | None, best: float | None, is_student: bool, most: int) -> str:
    if score is None:
        return ""
    text = f"**{score.text()}**" if is_student and score.mean == best else score.text()
    return text if score.seeds == most or not is_student else f"{text} (of {score.seeds})"
