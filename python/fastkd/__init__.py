"""Early-exit BERT and knowledge distillation on the fused ops of fastkd_kernels.

Importing this package registers the early-exit model with transformers, so that `AutoModelForSequenceClassification`
and `pipeline("text-classification")` load saved models.
"""

from __future__ import annotations

import os
import sys

# the `fastkd` command imports what each of its commands needs, so that --help does not wait for torch
if os.path.basename(sys.argv[0] if getattr(sys, "argv", None) else "") not in ("fastkd", "fastkd.exe"):
    from fastkd.configuration import EarlyExitConfig
    from fastkd.flops import flops
    from fastkd.modeling import EarlyExitForSequenceClassification, EarlyExitOutput
    from fastkd.trace import ExitTrace, Sweep, SweepRow

__all__ = [
    "EarlyExitConfig",
    "EarlyExitForSequenceClassification",
    "EarlyExitOutput",
    "ExitTrace",
    "Sweep",
    "SweepRow",
    "flops",
]
