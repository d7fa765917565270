"""`fastkd kd-table`: methods, students, tasks and seeds in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fastkd.commands.options import Json, words
from fastkd.commands.screen import quieten, screen_for, strong

if TYPE_CHECKING:
    from rich.table import Table

    from fastkd.tables.kd_table import Grid, Row


def kd_table(
    grid: Annotated[Path, typer.Argument(help="YAML file: tasks, blocks of students and methods, seeds.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for teachers, results and table.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks; default: the grid's.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Run only these tasks, as in CoLA,RTE; use it to share a grid among processes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare methods on your tasks: mean and deviation over seeds.

    Each task's teacher is fine-tuned once, unless the grid names one, and
    answers each row once. To continue an interrupted grid, run it again;
    table.md and table.csv are written after every cell. Seeds are the outermost
    loop, so half a grid is a whole table of fewer seeds.

    [bold]Examples[/]

    \b
      [cyan]fastkd kd-table bench/kd_table.yaml -o table[/]
      [cyan]fastkd kd-table bench/kd_table.yaml --data glue --task CoLA,RTE -o table[/]
    """
    with screen_for(as_json, reads=(grid, data)) as screen:
        quieten()

        from fastkd.tables import kd_table as tables

        plan = tables.load_grid(grid, data)
        with screen.progress("cells", None) as update:
            rows = tables.run_table(
                plan, output, lambda done, total, name: update(done, name, total), words(task or "")
            )
        for block in plan.blocks:
            screen.out.print(_shown(plan, block.title, rows))
        files = [output / "table.md", output / "table.csv"]
        screen.out.print(f"written: {strong(files[0])}, {strong(files[1])}", soft_wrap=True)
        screen.result(
            {
                "files": [str(path) for path in files],
                "rows": [
                    {"block": row.block, "student": row.student, "method": row.method}
                    | {"scores": {name: vars(score) for name, score in row.scores.items()}}
                    for row in rows
                ],
            }
        )


def _shown(plan: Grid, block: str, rows: list[Row]) -> Table:
    from rich.table import Table

    table = Table(title=escape(block), title_justify="left")
    table.add_column("model")
    columns = [*plan.tasks, "Avg"]
    for name in columns:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for row in rows:
        if row.block == block:
            scores = [row.scores.get(name) for name in columns]
            table.add_row(escape(row.title), *("" if score is None else score.text() for score in scores))
    return table
