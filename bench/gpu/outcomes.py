"""A pytest plugin for tests on a device that may die: workers share the tests, and every outcome is written at once.

Loaded with `-p gpu.outcomes`. Each worker collects everything and claims chunks of tests by creating files, so that one
that is started again goes on behind the case that ended it. After every test the device is waited for: an error that
arrives late is blamed on the test that caused it, and a worker whose CUDA context is dead ends.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha1
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import pytest

from gpu import device
from gpu.outcome_lines import FOLDER_VARIABLE, WORKER_VARIABLE, file_of, lines_of
from gpu.records import TESTS_OF_OP
from gpu.store import append_line

FIRST = tuple(dict.fromkeys(file for files in TESTS_OF_OP.values() for file in files))
"""These prove the rows of the report; the rest follows."""
TOGETHER = ("test_cuda_build", "test_training", "test_cli")
"""Files whose tests share costly fixtures."""
CHUNK = 8


def rank(stem: str) -> int:
    """When the tests of a file run."""
    return FIRST.index(stem) if stem in FIRST else len(FIRST)


def pytest_collection() -> None:
    """What a compiler makes of a kernel for other GPUs was looked at elsewhere: here it would cost minutes."""
    with suppress(ImportError):
        cubins = import_module("cubins")
        cubins.compile_kernels = _compile_nothing  # type: ignore[attr-defined]


def _compile_nothing(*_: Any, **__: Any) -> NoReturn:
    pytest.skip("machine code of all architectures needs no GPU and is looked at without one")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: rank(item.path.stem))


def pytest_collection_finish(session: pytest.Session) -> None:
    for stem, count in Counter(file_of(item.path.stem, item.name) for item in session.items).items():
        _write({"file": stem, "collected": count})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write({"file": Path(report.nodeid.split("::")[0]).stem, "test": "its collection", "outcome": "failed"})


def chunks(items: Sequence[pytest.Item]) -> Iterator[list[pytest.Item]]:
    """Neighbours that one worker runs: a few of a file, or all that share costly fixtures."""

    def whole(item: pytest.Item) -> bool:
        return item.path.stem in TOGETHER

    for (_, together), group in groupby(items, lambda item: (item.path, whole(item))):
        of_file = list(group)
        size = len(of_file) if together else CHUNK
        yield from (of_file[start : start + size] for start in range(0, len(of_file), size))


def _mine(chunk: Sequence[pytest.Item], folder: Path, worker: str) -> bool:
    """Whether this worker has or gets a chunk; one that was started again has what it had."""
    name = sha1("\n".join(item.nodeid for item in chunk).encode(), usedforsecurity=False).hexdigest()
    path = folder / "claims" / name
    path.parent.mkdir(exist_ok=True)
    try:
        with path.open("x") as claim:
            claim.write(worker)
    except FileExistsError:
        return path.read_text() == worker
    return True


def _claimed(items: Sequence[pytest.Item], folder: Path, worker: str) -> Iterator[pytest.Item]:
    begun = {line["begun"] for line in lines_of(folder) if "begun" in line}
    for chunk in chunks(items):
        if _mine(chunk, folder, worker):
            yield from (item for item in chunk if item.nodeid not in begun)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> object:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None or session.config.option.collectonly:
        return None
    claimed = _claimed(session.items, Path(folder), os.environ.get(WORKER_VARIABLE, "0"))
    item = next(claimed, None)
    while item is not None:
        following = next(claimed, None)  # pytest tears down what the next test does not need
        _write({"begun": item.nodeid, "at": time.monotonic()})
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        _leave_if_dead(item)
        item = following
    return True


def _leave_if_dead(item: pytest.Item) -> None:
    why = device.why_dead()
    if why is None:
        return
    # after a test that passed, too: its kernels had not ended yet
    _write_outcome(item.nodeid, "failed", f"it left a dead CUDA context: {why}")
    device.leave(f"{item.nodeid}: {why}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed or report.skipped or report.when == "call":
        why = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", ""))
        _write_outcome(report.nodeid, report.outcome, why if report.failed else "")


def pytest_sessionfinish(session: pytest.Session) -> None:
    _write({"finished": True})


def _write_outcome(nodeid: str, outcome: str, why: str) -> None:
    path, _, test = nodeid.partition("::")
    line = {"file": file_of(Path(path).stem, test), "test": test, "outcome": outcome, "of": nodeid}
    _write({**line, "why": " ".join(why.split())[:300]} if why else line)


def _write(line: dict[str, Any]) -> None:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is not None:
        path = Path(folder) / f"outcomes-{os.environ.get(WORKER_VARIABLE, '0')}.jsonl"
        append_line(path, line)
