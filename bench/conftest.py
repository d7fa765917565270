"""The `compare` fixture, and the table of ratios at the end of a benchmark run."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

# a torch without CUDA leaves Triton alone; bench_launch.py compiles kernels for a driver that runs nothing
os.environ.setdefault("TRITON_INTERPRET", "0")

import common
import pytest

_rows: list[common.Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", action="store_true", help="write the tables to bench/results/*.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=common.CLOCK))


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., list[common.Row]]:
    """`common.compare`, whose rows also go into the table at the end."""

    def compare_and_remember(*args: Any, **kwargs: Any) -> list[common.Row]:
        rows = partial(common.compare, benchmark)(*args, **kwargs)
        _rows.extend(rows)
        return rows

    return compare_and_remember


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _rows:
        return
    environment = ", ".join(f"{name} {value}" for name, value in common.environment().items())
    terminalreporter.write_line(f"\n{environment}")
    for op, rows_of_op in groupby(sorted(_rows, key=lambda row: row.op), key=lambda row: row.op):
        rows = list(rows_of_op)
        terminalreporter.write_sep("=", f"{op}: speedup = time of that row / time of {common.OURS}")
        terminalreporter.write_line(common.format_table(rows))
        if config.getoption("--save-results"):
            terminalreporter.write_line(f"saved {common.save_results(rows, Path(__file__).parent / 'results')}")
