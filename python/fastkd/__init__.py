"""Early-exit BERT and knowledge distillation on the fused ops of fastkd_kernels.

Importing this package registers the early-exit model with transformers, so that `AutoModelForSequenceClassification`
and `pipeline("text-classification")` load saved models.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.calibration import Certificate
    from fastkd.configuration import EarlyExitConfig
    from fastkd.data import load_folder, load_rows
    from fastkd.flops import flops
    from fastkd.modeling import EarlyExitForSequenceClassification, EarlyExitOutput
    from fastkd.trace import ExitTrace, Sweep, SweepRow
    from fastkd.training import DistillOptions, FinetuneOptions, distill, finetune

# training needs datasets and the Trainer, whose import takes longer than everything else together
_HOME = {
    "Certificate": "fastkd.calibration",
    "DistillOptions": "fastkd.training",
    "EarlyExitConfig": "fastkd.configuration",
    "EarlyExitForSequenceClassification": "fastkd.modeling",
    "EarlyExitOutput": "fastkd.modeling",
    "ExitTrace": "fastkd.trace",
    "FinetuneOptions": "fastkd.training",
    "Sweep": "fastkd.trace",
    "SweepRow": "fastkd.trace",
    "distill": "fastkd.training",
    "finetune": "fastkd.training",
    "flops": "fastkd.flops",
    "load_folder": "fastkd.data",
    "load_rows": "fastkd.data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    # importing fastkd.flops put the module under this name
    globals()[name] = value
    return value


def _is_command() -> bool:
    """Whether this process is the `fastkd` command, whose --help does not wait for torch."""
    return os.path.basename(sys.argv[0] if getattr(sys, "argv", None) else "") in ("fastkd", "fastkd.exe")


if not _is_command():
    importlib.import_module("fastkd.modeling")  # registers the model
    from fastkd.flops import flops  # a submodule of the same name hides it from __getattr__

__all__ = [
    "Certificate",
    "DistillOptions",
    "EarlyExitConfig",
    "EarlyExitForSequenceClassification",
    "EarlyExitOutput",
    "ExitTrace",
    "FinetuneOptions",
    "Sweep",
    "SweepRow",
    "distill",
    "finetune",
    "flops",
    "load_folder",
    "load_rows",
]
