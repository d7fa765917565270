"""Tests on the device: workers that are watched, ended where a test hangs, and started again behind it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.children import DEAD_CONTEXT, Child
from gpu.outcome_lines import FOLDER_VARIABLE, WORKER_VARIABLE, file_of
from gpu.store import append_line, read_lines

SECONDS_A_TEST = 60.0
"""Longer takes none on a GPU; a kernel that waits for ever is ended with its process."""
COLLECTING = 90.0
"""Seconds in which a worker begins its first test."""


@dataclass
class Worker:
    """One pytest process after the other, with the same number."""

    number: int
    child: Child
    folder: Path
    seconds_a_test: float
    begun_before: int = 0
    done: bool = False

    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / f"outcomes-{self.number}.jsonl")

    def running(self) -> dict[str, Any] | None:
        """The test that was begun last, unless the session has finished since."""
        for line in reversed(self.lines()):
            if "finished" in line:
                return None
            if "begun" in line:
                return line
        return None

    def why_stuck(self) -> str | None:
        running = self.running()
        if running is None or running["at"] < self.child.started:
            late = time.monotonic() - self.child.started > COLLECTING
            return f"it began no test within {COLLECTING:g} s" if late else None
        late = time.monotonic() - running["at"] > self.seconds_a_test
        return f"it took more than {self.seconds_a_test:g} s" if late else None

    def write(self, line: Mapping[str, Any]) -> None:
        append_line(self.folder / f"outcomes-{self.number}.jsonl", line)


@dataclass
class Proof:
    """Test files on several workers that use the device together.

    Attributes:
        arguments: of pytest: files and options.
        folder: outcomes and claims; another run of the same tests takes another one.
        count: of workers.
        problems: what ended workers, one sentence each.
    """

    arguments: Sequence[str]
    folder: Path
    logs: Path
    count: int
    environment: Mapping[str, str]
    seconds_a_test: float = SECONDS_A_TEST
    problems: list[str] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.workers = [
            Worker(number, self._child(number).start(self.logs), self.folder, self.seconds_a_test)
            for number in range(self.count)
        ]

    def _child(self, number: int) -> Child:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.outcomes", "--continue-on-collection-errors"]
        fixed = {
            FOLDER_VARIABLE: str(self.folder),
            WORKER_VARIABLE: str(number),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # what else an image holds has no part in this
            "PYTHONHASHSEED": "0",  # so that all workers collect the same tests in the same order
        }
        return Child(f"{self.folder.name} {number}", [*command, *self.arguments], {**self.environment, **fixed})

    def wait(self, deadline: float, tick: Callable[[], None] = lambda: None) -> tuple[str, str]:
        """Until all tests were run or the deadline; returns how it ended and a note."""
        while not all(worker.done for worker in self.workers):
            if time.monotonic() >= deadline:
                for worker in self.workers:
                    if not worker.done:
                        worker.child.end("its time was over")
                return "timed out", "the outcomes so far count"
            for worker in self.workers:
                if not worker.done:
                    self._look_after(worker, deadline)
            tick()
            time.sleep(0.1)
        lost = len(self.problems)
        return ("failed", f"{lost} times a worker ended before its tests did") if lost else ("done", "")

    def _look_after(self, worker: Worker, deadline: float) -> None:
        code = worker.child.code
        if code is None:
            why = worker.why_stuck()
            if why is None:
                return
            worker.child.end(why)
        lines = worker.lines()
        if code is not None and any("finished" in line for line in lines[-1:]):
            worker.done = True
            if code not in (0, 1, 2, 5):  # all passed, some failed, a file could not be collected, none was selected
                self.problems.append(f"{worker.child.name}: pytest ended with {code}: {worker.child.last_line()}")
            return
        self._blame(worker, code)
        begun = sum("begun" in line for line in lines)
        if begun == worker.begun_before:
            worker.done = True
            said = worker.child.last_line()
            self.problems.append(f"{worker.child.name}: not started again, it began no test before it ended: {said}")
            return
        worker.begun_before = begun
        if time.monotonic() < deadline - 5:
            worker.child.start(self.logs)
        else:
            worker.done = True

    def _blame(self, worker: Worker, code: int | None) -> None:
        """The test that was running has failed, whatever it was."""
        running = worker.running()
        if running is None or running["at"] < worker.child.started:
            return
        nodeid = running["begun"]
        why = (
            "it left a dead CUDA context" if code == DEAD_CONTEXT else worker.child.note or f"its process ended: {code}"
        )
        path, _, test = nodeid.partition("::")
        worker.write({"file": file_of(Path(path).stem, test), "test": test, "outcome": "failed", "why": why})
        self.problems.append(f"{nodeid}: {why}; its worker was started again behind it")
