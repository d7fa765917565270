"""Early-exit BERT and knowledge distillation on the fused ops of fastkd_kernels.

Importing this package registers the early-exit model with transformers, so that `AutoModelForSequenceClassification`
and `pipeline("text-classification")` load saved models.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

# the `fastkd` command imports what each of its commands needs, so that --help does not wait for torch
if os.path.basename(sys.argv[0] if getattr(sys, "argv", None) else "") not in ("fastkd", "fastkd.exe"):
    from fastkd.configuration import EarlyExitConfig
    from fastkd.flops import flops
    from fastkd.modeling import EarlyExitForSequenceClassification, EarlyExitOutput
    from fastkd.trace import ExitTrace, Sweep, SweepRow

# training needs datasets and the Trainer, whose import takes longer than everything else together
_ON_FIRST_USE = {
    "load_folder": "fastkd.data",
    "load_rows": "fastkd.data",
    "DistillOptions": "fastkd.training",
    "FinetuneOptions": "fastkd.training",
    "distill": "fastkd.training",
    "finetune": "fastkd.training",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)


__all__ = [
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
