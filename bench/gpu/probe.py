"""What this machine is and what is installed, as one line of JSON: asked in a process that may hang or crash.

python -m gpu.probe
"""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = ("triton", "transformers", "pytest", "matplotlib", "liger-kernel", "quack-kernels")
MARK = "facts: "


def facts() -> dict[str, Any]:
    """Everything that can be told without a GPU too; what is missing is a value, never an error."""
    import torch

    found: dict[str, Any] = {"device": "cpu", "python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cores"] = os.cpu_count() or 1
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "L2_MB": round(properties.L2_cache_size / 1e6),
            "cuda": torch.version.cuda,
            "free_GiB": round(torch.cuda.mem_get_info()[0] / 2**30, 1),
        }
    return found


def missing_kernels() -> dict[str, str]:
    """Why an op would fall back on a GPU here, by op; empty where none does."""
    import fastkd_kernels  # noqa: F401
    from fastkd_kernels._backend import registered_ops

    return {op: backends.cuda for op, backends in registered_ops().items() if backends.cuda is not None}


if __name__ == "__main__":
    print(MARK + json.dumps({"facts": facts(), "missing": missing_kernels()}), flush=True)
