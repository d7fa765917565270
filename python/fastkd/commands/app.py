"""The command `fastkd`, and every command that it has, in the order of `PANELS`.

Every command has a file of its name with a function of its name, which is registered here. Results go to standard
output, progress and warnings to standard error. With --json standard output is one JSON value and nothing else. Bad
input is one sentence and exit code 2, whatever was wrong. Heavy imports wait until a command runs, so that --help
answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastkd.commands.bench import bench
from fastkd.commands.calibrate import calibrate
from fastkd.commands.compare import compare
from fastkd.commands.demo import demo
from fastkd.commands.distill import distill
from fastkd.commands.finetune import finetune
from fastkd.commands.flags import options_of_command
from fastkd.commands.import_fastbert import import_fastbert
from fastkd.commands.info import info
from fastkd.commands.kd import kd
from fastkd.commands.kd_table import kd_table
from fastkd.commands.predict import predict
from fastkd.commands.report import report
from fastkd.commands.screen import run, wants_traceback
from fastkd.commands.serve import serve
from fastkd.commands.sweep import sweep
from fastkd.commands.table2 import table2
from fastkd.commands.trace import trace
from fastkd.commands.tune import tune
from fastkd.engines.allocator import keep_freed_memory

PANELS: dict[str, dict[Callable[..., None], str]] = {
    "Start": {
        demo: "run the [cyan]fastkd predict[/] command that the demo prints; it uses the model that the demo trained.",
    },
    "Train": {
        finetune: "[cyan]fastkd distill OUTPUT --data DATA -o DISTILLED[/] trains the early exits.",
        distill: "[cyan]fastkd sweep DISTILLED --data DATA[/] shows what each speed costs.",
        tune: "[cyan]fastkd calibrate OUTPUT --data DATA[/] on rows that tuning has not seen certifies the speed.",
        kd: "[cyan]fastkd kd-table GRID.yaml[/] compares methods on your tasks, with several seeds.",
        import_fastbert: "[cyan]fastkd sweep MODEL --data DATA[/] shows what each speed costs and saves.",
    },
    "Understand": {
        trace: "[cyan]fastkd sweep TRACE[/] reads the trace at every speed, without the model.",
        sweep: "pick the fastest speed whose accuracy you accept, then "
        "[cyan]fastkd bench MODEL DATA --speeds 0.3,0.5[/] to see it in seconds.",
        compare: "[cyan]fastkd calibrate MODEL --data DATA --criterion C[/] certifies the one you choose.",
        calibrate: "[cyan]fastkd info MODEL[/] shows the certificate that the model now carries.",
        bench: "[cyan]fastkd predict MODEL INPUT --speed S[/] answers at the speed you choose from this table.",
        report: "[cyan]fastkd predict MODEL INPUT --speed S[/] answers at the speed you chose on the page.",
        info: "[cyan]fastkd calibrate MODEL --data DATA[/] finds a speed with a guarantee.",
    },
    "Use": {
        predict: "[cyan]fastkd sweep MODEL --data DATA[/] shows what another --speed would cost in accuracy.",
        serve: "open the address that it prints, or send a request with curl as in docs/serving.md.",
    },
    "Papers": {
        table2: "[cyan]fastkd report OUTPUT/DATA[/] shows every speed of a data set's model.",
        kd_table: "[cyan]fastkd kd --method METHOD --teacher DIR[/] trains the student you liked best.",
    },
}
"""The panels of --help with their commands, both in the order of a model's life, and what each says to do next."""

app = typer.Typer(
    name="fastkd",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, commands in PANELS.items():
    for command, next_step in commands.items():
        app.command(rich_help_panel=panel, epilog=f"[bold]Next:[/] {next_step}")(command)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("fastkd-kernels")
    except PackageNotFoundError:
        from fastkd_kernels import __version__ as number
    typer.echo(f"fastkd {number}")
    raise typer.Exit


@app.callback(
    epilog="[bold]Start here:[/] [cyan]fastkd demo[/] trains, distils and measures a small model, in about three "
    "minutes of processor time."
)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the full traceback of an error.")] = False,
) -> None:
    """Early-exit BERT: easy sentences leave after the first layers, hard ones use them all.

    From a plain checkpoint to a fast model:

    \b
      1. [cyan]fastkd finetune[/]  backbone and last head learn the labels
      2. [cyan]fastkd distill[/]   the other heads learn from the last; no labels needed
      3. [cyan]fastkd trace[/]     one pass records what every head says
      4. [cyan]fastkd sweep[/]     accuracy and FLOPs at every speed: table, CSV, pictures
      5. [cyan]fastkd calibrate[/] the fastest speed that keeps a guarantee
      6. [cyan]fastkd bench[/]     measured seconds, against the full model at its best
      7. [cyan]fastkd report[/]    one page with a slider that shows all of it
      8. [cyan]fastkd predict[/]   answers for files and pipes, at the speed you chose
    """
    wants_traceback.set(traceback)
    group: Any = context.command
    command = group.get_command(context, context.invoked_subcommand)
    options_of_command.set([name for parameter in command.params for name in parameter.opts])


def main() -> None:
    """Entry point of the `fastkd` command."""
    keep_freed_memory()
    run(app)
