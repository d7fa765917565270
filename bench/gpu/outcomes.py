"""A pytest plugin: tests of the ops come first, and every outcome is written down at once.

Loaded with `-p gpu.outcomes`; a run that is stopped by its time budget still tells what it knows. Works under
pytest-xdist too, where files whose tests share costly fixtures stay together.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from gpu.records import TESTS_OF_OP, Outcomes

FILE_VARIABLE = "FASTKD_TEST_OUTCOMES"
FIRST = tuple(dict.fromkeys(file for files in TESTS_OF_OP.values() for file in files))
"""These prove the rows of the report; the rest follows."""
MACHINE_CODE = re.compile(r"machine_code|spill|16_bytes|h200|bulk_copies_are_there")
"""Tests of what a compiler made of a kernel: a file of their own, because they say nothing about its results."""
TOGETHER = ("test_cuda_build", "test_training", "test_cli")


def rank(stem: str) -> int:
    """When the tests of a file run."""
    return FIRST.index(stem) if stem in FIRST else len(FIRST)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: rank(item.path.stem))
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.stem in TOGETHER or "cubins" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0" and session.items:
        for stem, count in Counter(_file(item.path.stem, item.name) for item in session.items).items():
            _write({"file": stem, "collected": count})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        _write({"file": Path(report.nodeid.split("::")[0]).stem, "test": "its collection", "outcome": "failed"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the controller hears of it too
    if report.failed or report.skipped or report.when == "call":
        path, _, test = report.nodeid.partition("::")
        _write({"file": _file(Path(path).stem, test), "test": test, "outcome": report.outcome})


def _file(stem: str, test: str) -> str:
    return f"{stem}, machine code" if MACHINE_CODE.search(test) else stem


def _write(line: dict[str, object]) -> None:
    path = os.environ.get(FILE_VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, Outcomes]:
    """What became of every test file, by its stem."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    found = {}
    for stem in dict.fromkeys(line["file"] for line in lines):
        of_file = [line for line in lines if line["file"] == stem]
        collected = max((line["collected"] for line in of_file if "collected" in line), default=0)
        outcome = {line["test"]: line["outcome"] for line in of_file if "test" in line}
        counts = Counter(outcome.values())
        failed = tuple(f"{stem}::{test}" for test, how in outcome.items() if how == "failed")
        ran = counts["passed"] + counts["failed"] + counts["skipped"]
        found[stem] = Outcomes(counts["passed"], failed, counts["skipped"], max(collected - ran, 0))
    return found
