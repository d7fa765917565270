"""What workers write about the tests that they run, and what becomes of it: read without pytest."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from gpu.records import Outcomes
from gpu.store import read_lines

FOLDER_VARIABLE = "FASTKD_TESTS_FOLDER"
WORKER_VARIABLE = "FASTKD_TEST_WORKER"
MACHINE_CODE = re.compile(r"machine_code|spill|16_bytes|h200|bulk_copies_are_there")
"""Tests of what a compiler made of a kernel: a file of their own, because they say nothing about its results."""


def file_of(stem: str, test: str) -> str:
    return f"{stem}, machine code" if MACHINE_CODE.search(test) else stem


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """What all workers wrote."""
    return [line for path in sorted(folder.glob("outcomes-*.jsonl")) for line in read_lines(path)]


def read(folder: Path) -> dict[str, Outcomes]:
    """What became of every test file, by its stem."""
    lines = [line for line in lines_of(folder) if "file" in line]
    found = {}
    for stem in dict.fromkeys(line["file"] for line in lines):
        of_file = [line for line in lines if line["file"] == stem]
        collected = max((line["collected"] for line in of_file if "collected" in line), default=0)
        outcome: dict[str, str] = {}
        for line in of_file:
            if "test" in line and outcome.get(line["test"]) != "failed":  # what failed once has failed
                outcome[line["test"]] = line["outcome"]
        counts = Counter(outcome.values())
        failed = tuple(f"{stem}::{test}" for test, how in outcome.items() if how == "failed")
        ran = counts["passed"] + counts["failed"] + counts["skipped"]
        found[stem] = Outcomes(counts["passed"], failed, counts["skipped"], max(collected - ran, 0))
    return found
