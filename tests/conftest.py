"""Fixtures of the whole suite; set up before anything imports Triton."""

from __future__ import annotations

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

from fastkd_kernels._triton import interpreting, triton


def pytest_configure() -> None:
    """Triton 3.6's interpreter takes an array of one element for an index, which numpy 2.5 refuses; 3.7 does not."""
    if not interpreting or not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_its_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor_and_its_index


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Uninitialised memory is never zero by luck: this mode fills it with NaN and the largest integers, in C++ too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
