"""Early-exit BERT and knowledge distillation on the fused ops of fastkd_kernels.

Importing this package registers the early-exit model with transformers, so that `AutoModelForSequenceClassification`
and `pipeline("text-classification")` load saved models.
"""

from __future__ import annotations

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
