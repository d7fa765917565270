"""Fixtures of the whole suite; set up before anything imports Triton."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

# without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are defined
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# without it cuBLAS warns at every product, because the fixture below asks for deterministic algorithms
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from interpreter import mend_interpreter

mend_interpreter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too, as CI does")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of many seconds each: those of the processes, trainings and compilers that rarely break."""
    if config.getoption("--slow") or os.environ.get("CI"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_configure() -> None:
    """Import everything once: pytest-xdist reads each worker's warnings in a thread, which imports what they name."""
    with contextlib.suppress(ImportError):
        import fastkd  # noqa: F401


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Uninitialised memory is never zero by luck: this mode fills it with NaN and the largest integers, in C++ too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
