"""What a command shows: tables for people, one JSON value for machines, readable errors for both."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from fastkd.benchmark import Benchmark
    from fastkd.trace import Sweep

BAD_INPUT = 2

wants_traceback: ContextVar[bool] = ContextVar("wants_traceback", default=False)


class Screen:
    """Where a command writes: people's tables, or one JSON value."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stdout = sys.stdout
        # tables are made for a wide screen; files and pipes have no width of their own
        width = None if self.stdout.isatty() else 140
        self.out = Console(file=self.stdout, highlight=False, quiet=as_json, width=width)
        self.err = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """A line about what happens now; not part of the result."""
        self.err.print(text)

    def result(self, value: Any) -> None:
        """The machine-readable result; printed with --json only."""
        if self.as_json:
            print(json.dumps(value, indent=2, ensure_ascii=False), file=self.stdout, flush=True)

    def next_step(self, *commands: str) -> None:
        """What to run next."""
        for index, command in enumerate(commands):
            self.out.print(f"{'next:' if index == 0 else '     '} [bold cyan]{command}[/]", soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[..., None]]:
        """A progress bar on standard error; call what it gives with (done so far, what is running, new total)."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
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
def screen_for(as_json: bool) -> Iterator[Screen]:
    """The screen of one command: readable errors, and with --json nothing else on standard output.

    Exits with code 2 for bad input and 130 for an interrupt; `wants_traceback` lets errors through as they are.
    """
    screen = Screen(as_json)
    # libraries print where they like; with --json that must not be the standard output
    redirect = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with redirect:
            yield screen
    except KeyboardInterrupt:
        screen.err.print("interrupted; finished files are whole, unfinished ones were removed")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # the reader (head, a pager) had enough; Python must not try to flush the rest at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except Exception as error:
        if wants_traceback.get() or not _is_bad_input(error):
            raise
        message = _as_flags(str(error).strip()) or type(error).__name__
        screen.err.print("error:", style="bold red", end=" ")
        screen.err.print(message, markup=False, soft_wrap=True)
        screen.result({"error": message})
        raise typer.Exit(BAD_INPUT) from None


def _as_flags(message: str) -> str:
    """Remedies that name a Python argument, in the words of the command line."""
    for argument, flag in (
        ("resume=True", "--resume"),
        ("overwrite=True", "--overwrite"),
        ("resume=False", "without it"),
    ):
        message = message.replace(argument, flag)
    return re.sub(r"\bnum_labels=(\d+)", r"--num-labels \1", message)


def _is_bad_input(error: Exception) -> bool:
    """What a user can cause and cure; anything else is a fault of ours and keeps its traceback."""
    return isinstance(error, (ValueError, OSError, ImportError))


def sweep_table(sweep: Sweep, name: str) -> Table:
    """The sweep for people."""
    rows = list(sweep)
    layers = len(rows[0].exits_per_layer)
    conventions = list(rows[0].flops)
    table = Table(
        title=f"{name}: {sum(rows[0].exits_per_layer)} rows, FLOPs at {sweep.seq_len} tokens", title_justify="left"
    )
    for heading in ("speed", "accuracy", "layers", f"rows that left after layer 1..{layers}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for convention in conventions:
        table.add_column(f"{convention}\nGFLOPs", justify="right", no_wrap=True)
        table.add_column("\nspeed-up", justify="right", no_wrap=True, style="bold")
    width = max(len(str(count)) for row in rows for count in row.exits_per_layer)
    for row in rows:
        costs = [
            cell
            for convention in conventions
            for cell in (f"{row.flops[convention] / 1e9:.3f}", f"{row.speedup[convention]:.2f}x")
        ]
        exits = " ".join(f"{count or '·':>{width}}" for count in row.exits_per_layer)
        table.add_row(f"{row.speed:g}", share(row.accuracy), f"{row.average_layers:.2f}", exits, *costs)
    return table


def benchmark_table(measured: Benchmark) -> Table:
    """The measurements for people."""
    facts = measured.machine
    table = Table(
        title=f"Measured on {facts['processor'] if facts['device'] == 'cpu' else facts['device']}, "
        f"{facts['threads']} {'thread' if facts['threads'] == 1 else 'threads'}, torch {facts['torch']}; {measured.rows[0].rows} rows a pass, sorted by length",
        caption="Speed-up against the full model at its best, same rows, order, dtype and device. "
        + ("" if facts["gpu_columns"] == "measured" else "GPU: not yet measured."),
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("dtype", "batch", "speed", "accuracy", "full", "layers", "FLOPs", "measured", "realised"):
        table.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == "measured" else None)
    for heading in ("rows/s", "full rows/s", "best full"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in measured.rows:
        if previous not in (None, (row.dtype, row.batch_size)):
            table.add_section()
        previous = (row.dtype, row.batch_size)
        table.add_row(
            row.dtype, str(row.batch_size), f"{row.speed:g}", share(row.accuracy), share(row.full_accuracy),
            f"{row.average_layers:.2f}", f"{row.flops_speedup:.2f}x",
            f"{row.speedup:.2f}x" if row.speedup >= 1 else f"[red]{row.speedup:.2f}x[/]", f"{row.realised:.2f}",
            f"{row.rows_per_second:,.0f}", f"{row.rows / row.full_seconds:,.0f}", row.full_engine,
        )  # fmt: skip
    return table


def share(value: float | None) -> str:
    """A share of rows in percent; a dash for None."""
    return "-" if value is None else f"{100 * value:.2f}%"
