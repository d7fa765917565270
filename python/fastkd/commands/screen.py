"""What a command shows: tables for people, one JSON value for machines, readable errors for both."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastkd.commands.flags import as_flags
from fastkd.data.files import check_output_file, is_disk_full, reading
from fastkd.data.text_counts import TextWarning

if TYPE_CHECKING:
    from fastkd.exits.sweep import Sweep
    from fastkd.inference.latency import Latency
    from fastkd.inference.measurements import Benchmark, BenchmarkRow
    from fastkd.training.harness import TrainResult

BAD_INPUT = 2
SECONDS_A_LINE = 5.0
"""How often progress is told where standard error is no terminal."""

wants_traceback: ContextVar[bool] = ContextVar("wants_traceback", default=False)


class Screen:
    """Where a command writes: people's tables, or one JSON value.

    Of several processes that `torchrun` or `accelerate launch` started, only the first one shows anything.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stdout = sys.stdout
        self.is_first = os.environ.get("RANK", "0") == "0"
        # tables are made for a wide screen; files and pipes have no width of their own
        width = None if self.stdout.isatty() else 140
        self.out = Console(file=self.stdout, highlight=False, quiet=as_json or not self.is_first, width=width)
        self.err = Console(stderr=True, highlight=False, quiet=not self.is_first)

    def speak_if_first_to_fail(self) -> None:
        """Of several processes the one that failed first tells it; the others are only taken along."""
        self.is_first = _is_first_to_fail()
        self.err.quiet = not self.is_first

    @property
    def is_narrow(self) -> bool:
        """Whether wide tables would be cut off."""
        return self.out.width < 135

    def say(self, text: str) -> None:
        """A line about what happens now; not part of the result."""
        self.err.print(text, soft_wrap=True)

    def result(self, value: Any) -> None:
        """The machine-readable result; printed with --json only."""
        if self.as_json and self.is_first:
            print(json.dumps(value, indent=2, ensure_ascii=False), file=self.stdout, flush=True)

    def next_step(self, *commands: str) -> None:
        """What to run next."""
        for index, command in enumerate(commands):
            self.out.print(f"{'next:' if index == 0 else '     '} [bold cyan]{escape(command)}[/]", soft_wrap=True)

    @contextlib.contextmanager
    def text_warnings(self) -> Iterator[None]:
        """Inside, what does not fit between texts and tokenizer is one line each, once."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", TextWarning)
            shown: Any = warnings.showwarning
            told: set[str] = set()

            def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
                if not issubclass(category, TextWarning):
                    shown(message, category, *place, **more)
                elif str(message) not in told:
                    told.add(str(message))
                    self.err.print(f"[bold yellow]warning:[/] {escape(str(message))}", soft_wrap=True)

            warnings.showwarning = show
            yield

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Inside, warnings are one line on standard error each, without the place in the code."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: self.err.print(
                f"[bold yellow]warning:[/] {escape(str(message))}", soft_wrap=True
            )
            yield

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[..., None]]:
        """A progress bar on standard error; call what it gives with (done so far, what is running, new total)."""
        if not self.err.is_terminal:
            with self._progress_lines(what, total) as update:
                yield update
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(what, total=total)

            def update(done: int, now: str = "", new_total: int | None = None) -> None:
                bar.update(task, completed=done, description=now or what, total=new_total or total)

            yield update

    @contextlib.contextmanager
    def _progress_lines(self, what: str, total: int | None) -> Iterator[Callable[..., None]]:
        lines, is_over = ProgressLines(what, total), threading.Event()

        def tell() -> None:
            # a thread, so that there is a line also while one step takes minutes
            while not is_over.wait(SECONDS_A_LINE):
                self.err.print(lines.line(), markup=False, soft_wrap=True)

        teller = threading.Thread(target=tell, daemon=True)
        if self.is_first:
            teller.start()
        try:
            yield lines.update
        finally:
            is_over.set()


def _is_first_to_fail() -> bool:
    """Asked once by each process that fails: True in one process, and where there is nobody to ask."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # that of the launcher, which outlives the processes
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"fastkd failures of start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except RuntimeError:
        return True


class ProgressLines:
    """How far long work is, as one line every few seconds: for log files, which cannot show a bar."""

    def __init__(self, what: str, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what, self._total, self._done = what, total, 0
        self._started, self._done_at_start = clock(), 0

    def update(self, done: int, now: str = "", new_total: int | None = None) -> None:
        if done < self._done or (new_total or self._total) != self._total:
            # other work under the same bar
            self._started, self._done_at_start = self._clock(), done
        self._done, self._total = done, new_total or self._total
        self._what = now or self._what

    def line(self) -> str:
        """What is done, and at which rate; the time that is left, where it can be told."""
        if not self._done:
            return f"{self._what}: {self._clock() - self._started:.0f} s so far"
        of_all = "" if self._total is None else f" of {self._total}"
        rate = (self._done - self._done_at_start) / max(self._clock() - self._started, 1e-9)
        left = ""
        if self._total is not None and rate > 0:
            left = f", {_duration((self._total - self._done) / rate)} left"
        return f"{self._what}: {self._done}{of_all}, {rate:.3g} per second{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Terminated(KeyboardInterrupt):
    """SIGTERM, which keeps what Ctrl-C keeps."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`; elsewhere than in the main thread Python allows no handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def open_standard_streams() -> None:
    """Give a process that was started with closed standard streams empty ones.

    Otherwise the next files that it opens would get their numbers, and be written to by whatever prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # the lowest free number, which is this one
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def forget_output() -> None:
    """What standard output did not take is dropped, so that Python does not try again at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(app: Callable[[], None]) -> None:
    """Run a program, whatever its standard streams are, and leave nothing for Python to flush in vain."""
    open_standard_streams()
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            forget_output()


@contextlib.contextmanager
def screen_for(
    as_json: bool, *, reads: Iterable[str | Path | None] = (), output: str | Path | None = None
) -> Iterator[Screen]:
    """The screen of one command: readable errors, and with --json nothing else on standard output.

    Exits with code 2 for bad input, 130 for an interrupt and 143 for SIGTERM; `wants_traceback` lets errors through as
    they are.

    Args:
        as_json: print one JSON value.
        reads: files and folders that no output of this command may replace.
        output: a file that is going to be written; checked at once.
    """
    screen = Screen(as_json)
    # libraries print where they like; with --json that must not be the standard output
    redirect = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with _terminable(), reading(*(path for path in reads if path is not None)):
            if output is not None:
                check_output_file(output)
            with redirect, screen.text_warnings():
                yield screen
            screen.stdout.flush()
    except Terminated:
        screen.speak_if_first_to_fail()
        screen.err.print("terminated; finished files are complete, unfinished ones were removed")
        raise typer.Exit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        screen.speak_if_first_to_fail()
        screen.err.print("interrupted; finished files are complete, unfinished ones were removed")
        raise typer.Exit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        # the reader (head, a pager) had enough
        forget_output()
        raise typer.Exit(0) from None
    except Exception as error:
        screen.speak_if_first_to_fail()
        if wants_traceback.get() or not _is_bad_input(error):
            if not screen.is_first:
                raise typer.Exit(1) from None
            raise
        message = as_flags(str(error).strip()) or type(error).__name__
        screen.err.print("error:", style="bold red", end=" ")
        screen.err.print(message, markup=False, soft_wrap=True)
        try:
            screen.result({"error": message})
            screen.stdout.flush()
        except OSError:
            forget_output()
        raise typer.Exit(BAD_INPUT) from None


def strong(value: object) -> str:
    """`value` in bold; what looks like markup in it, as in a folder called out[1], is text."""
    return f"[bold]{escape(str(value))}[/]"


def quieten() -> None:
    """Libraries keep their progress bars and hints to themselves; errors still come through."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _is_bad_input(error: Exception) -> bool:
    """What a user can cause and cure; anything else is a fault of ours and keeps its traceback."""
    return isinstance(error, (ValueError, OSError, ImportError)) or is_disk_full(error)


def show_training(screen: Screen, done: TrainResult) -> None:
    """What a training did, and where its model is."""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in done.metrics.items())
    screen.out.print(f"{done.steps} steps in {done.seconds:.0f} s; {metrics or 'no dev rows, so nothing evaluated'}")
    screen.out.print(f"model: {strong(done.output_dir)}")
    screen.result(
        {"model": str(done.output_dir), "steps": done.steps, "seconds": round(done.seconds, 2)}
        | {"train_loss": done.train_loss, "metrics": done.metrics}
    )


def show_written(screen: Screen, folder: Path, files: Sequence[Path]) -> None:
    """The folder that results were written to, and the names of its files."""
    screen.out.print(f"written: {strong(folder)} ({escape(', '.join(path.name for path in files))})", soft_wrap=True)


def quality(accuracy: float | None, pearson: float | None) -> str:
    """An accuracy as a percentage, or the correlation of a regression as a number."""
    return share(accuracy) if pearson is None else f"{pearson:.4f}"


def sweep_table(sweep: Sweep, name: str, is_narrow: bool = False) -> Table:
    """The sweep for people; a narrow one shows FLOPs in the fastbert convention only, as a speed-up.

    Rows per layer of a deep model are left to the CSV file: they would take the room of everything else.
    """
    rows = list(sweep)
    layers = len(rows[0].exits_per_layer)
    is_deep = layers > 12
    conventions = ["fastbert"] if is_narrow else list(rows[0].flops)
    table = Table(
        title=f"{escape(name)}: {sum(rows[0].exits_per_layer)} rows, FLOPs at {sweep.seq_len} tokens",
        title_justify="left",
        box=box.SIMPLE_HEAD if is_narrow else box.HEAVY_HEAD,
    )
    kind = "accuracy" if rows[0].pearson is None else "correlation"
    for heading in ("speed", kind, "layers", *([] if is_deep else [f"left after layer 1..{layers}"])):
        table.add_column(heading, justify="right", no_wrap=True)
    for convention in conventions:
        if not is_narrow:
            table.add_column(f"{convention}\nGFLOPs", justify="right", no_wrap=True)
        table.add_column("FLOPs" if is_narrow else "\nspeed-up", justify="right", no_wrap=True, style="bold")
    width = max(len(str(count)) for row in rows for count in row.exits_per_layer)
    for row in rows:
        costs = []
        for convention in conventions:
            costs += [] if is_narrow else [f"{row.flops[convention] / 1e9:.3f}"]
            times = f"{row.speedup[convention]:.2f}x"
            costs.append(f"[red]{times}[/]" if row.speedup[convention] < 1 else times)
        exits = " ".join(f"{count or '·':>{width}}" for count in row.exits_per_layer)
        cells = [f"{row.speed:g}", quality(row.accuracy, row.pearson), f"{row.average_layers:.2f}"]
        table.add_row(*cells, *([] if is_deep else [exits]), *costs)
    return table


def tell_slower(screen: Screen, name: str, sweep: Sweep) -> None:
    """One line where speeds of a sweep are slower than the full model."""
    found = ", ".join(f"{speed:g}" for speed in sweep.slower_than_full())
    if found:
        screen.out.print(
            f"[bold yellow]slower than the full model:[/] {escape(name)} at speed {found}; the heads cost more "
            "operations there than the early exits save",
            soft_wrap=True,
        )


def benchmark_table(measured: Benchmark, is_narrow: bool = False) -> Table:
    """The measurements for people; a narrow one leaves out what the CSV file also has."""
    facts = measured.machine
    table = Table(
        title=f"Measured on {_machine(facts)}; {measured.rows[0].rows} rows per pass",
        caption="stream: rows in their order, as fastkd predict runs them; batches: sorted by length. Speed-up against "
        "the full model at its best, same rows, dtype and device. " + _gpu_note(facts),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD if is_narrow else box.HEAVY_HEAD,
    )
    previous = None
    for number, row in enumerate(measured.rows):
        if previous not in (None, (row.dtype, row.batch_size)):
            table.add_section()
        previous = (row.dtype, row.batch_size)
        cells = _benchmark_cells(row)
        shown = {name: cell for name, cell in cells.items() if not (is_narrow and name in _WIDE_ONLY)}
        if number == 0:
            for name in shown:
                table.add_column(name, justify="right", no_wrap=True, style="bold" if name == "measured" else None)
        table.add_row(*shown.values())
    return table


_WIDE_ONLY = ("full", "layers", "realised", "rows/s", "full rows/s")


def _benchmark_cells(row: BenchmarkRow) -> dict[str, str]:
    loses = row.speedup < 1
    return {
        "dtype": row.dtype,
        "batch": row.form.removeprefix("batch "),
        "speed": f"{row.speed:g}",
        "accuracy" if row.pearson is None else "correlation": quality(row.accuracy, row.pearson),
        "full": quality(row.full_accuracy, row.full_pearson),
        "layers": f"{row.average_layers:.2f}",
        "FLOPs": f"{row.flops_speedup:.2f}x",
        "measured": f"[red]{row.speedup:.2f}x[/]" if loses else f"{row.speedup:.2f}x",
        "realised": f"{row.realised:.2f}",
        "rows/s": f"{row.rows_per_second:,.0f}",
        "full rows/s": f"{row.rows / row.full_seconds:,.0f}",
        "best full": row.full_form,
    }


def latency_table(measured: Latency, is_narrow: bool = False) -> Table:
    """Single calls for people; a narrow one leaves out what the CSV file also has."""
    facts, first = measured.machine, measured.rows[0]
    table = Table(
        title=f"One sentence at a time on {_machine(facts)}; {first.sentences} sentences of {first.lengths} lengths",
        caption="Milliseconds per call, without tokenisation. host: the part of a mean call outside operators, as "
        "torch's profiler sees it, including the profiler's own cost. " + _gpu_note(facts),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD if is_narrow else box.HEAVY_HEAD,
    )
    for number, row in enumerate(measured.rows):
        cells = {
            "dtype": row.dtype,
            "speed": f"{row.speed:g}",
            "layers": f"{row.average_layers:.2f}",
            "p50": f"{row.p50:.2f}",
            "p90": f"{row.p90:.2f}",
            "p99": f"{row.p99:.2f}",
            "p99 / p50": f"{row.tail:.2f}",
            "host": f"{row.host:.2f}",
        }
        if number == 0:
            for name in cells:
                table.add_column(name, justify="right", no_wrap=True, style="bold" if name == "p50" else None)
        elif measured.rows[number - 1].dtype != row.dtype:
            table.add_section()
        table.add_row(*cells.values())
    return table


def _machine(facts: Mapping[str, Any]) -> str:
    """Processor or device, instruction set, threads and torch."""
    name = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return f"{name}{_instruction_set(facts)}, {threads}, torch {facts['torch']}"


def _instruction_set(facts: Mapping[str, Any]) -> str:
    """What the processor multiplies with; nothing for measurements that did not note it, or of a GPU."""
    known = facts.get("instruction_set") if facts["device"] == "cpu" else None
    return "" if known is None else f", {known}"


def _gpu_note(facts: Mapping[str, Any]) -> str:
    return "" if facts["gpu_columns"] == "measured" else "GPU: not yet measured."


def share(value: float | None) -> str:
    """A share of rows in percent; a dash for None."""
    return "-" if value is None else f"{100 * value:.2f}%"
