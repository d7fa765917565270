"""Early-exit BERT and knowledge distillation on the fused ops of fastkd_kernels.

Importing this package registers its models with transformers, so that `AutoModelForSequenceClassification`
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
    from fastkd.distiller import Distiller, KDOptions
    from fastkd.flops import flops
    from fastkd.input_format import with_input_format
    from fastkd.losses import (
        ALPKDLoss,
        AnnealingKDLoss,
        DIHLoss,
        DistilBertLoss,
        KDLoss,
        MHKDLoss,
        PKDLoss,
        RAILKDLoss,
        UniversalKDLoss,
        UniversalKDMixtureLoss,
        VanillaKDLoss,
    )
    from fastkd.modeling import EarlyExitForSequenceClassification, EarlyExitOutput
    from fastkd.probe import LayerProbe, PseudoClassifiers
    from fastkd.students import BiLSTMForSequenceClassification, GatedCNNForSequenceClassification, student_from_teacher
    from fastkd.teacher import Teacher
    from fastkd.teacher_cache import TeacherCache
    from fastkd.trace import ExitTrace, Sweep, SweepRow
    from fastkd.training import DistillOptions, FinetuneOptions, distill, finetune

# training needs datasets and the Trainer, whose import takes longer than everything else together
_HOME = {
    "ALPKDLoss": "fastkd.losses",
    "AnnealingKDLoss": "fastkd.losses",
    "BiLSTMForSequenceClassification": "fastkd.students",
    "Certificate": "fastkd.calibration",
    "DIHLoss": "fastkd.losses",
    "DistilBertLoss": "fastkd.losses",
    "DistillOptions": "fastkd.training",
    "Distiller": "fastkd.distiller",
    "EarlyExitConfig": "fastkd.configuration",
    "EarlyExitForSequenceClassification": "fastkd.modeling",
    "EarlyExitOutput": "fastkd.modeling",
    "ExitTrace": "fastkd.trace",
    "FinetuneOptions": "fastkd.training",
    "GatedCNNForSequenceClassification": "fastkd.students",
    "KDLoss": "fastkd.losses",
    "KDOptions": "fastkd.distiller",
    "LayerProbe": "fastkd.probe",
    "MHKDLoss": "fastkd.losses",
    "PKDLoss": "fastkd.losses",
    "PseudoClassifiers": "fastkd.probe",
    "RAILKDLoss": "fastkd.losses",
    "Sweep": "fastkd.trace",
    "SweepRow": "fastkd.trace",
    "Teacher": "fastkd.teacher",
    "TeacherCache": "fastkd.teacher_cache",
    "UniversalKDLoss": "fastkd.losses",
    "UniversalKDMixtureLoss": "fastkd.losses",
    "VanillaKDLoss": "fastkd.losses",
    "distill": "fastkd.training",
    "finetune": "fastkd.training",
    "flops": "fastkd.flops",
    "load_folder": "fastkd.data",
    "load_rows": "fastkd.data",
    "student_from_teacher": "fastkd.students",
    "with_input_format": "fastkd.input_format",
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
    importlib.import_module("fastkd.students")
    from fastkd.flops import flops  # a submodule of the same name hides it from __getattr__

__all__ = [
    "ALPKDLoss",
    "AnnealingKDLoss",
    "BiLSTMForSequenceClassification",
    "Certificate",
    "DIHLoss",
    "DistilBertLoss",
    "DistillOptions",
    "Distiller",
    "EarlyExitConfig",
    "EarlyExitForSequenceClassification",
    "EarlyExitOutput",
    "ExitTrace",
    "FinetuneOptions",
    "GatedCNNForSequenceClassification",
    "KDLoss",
    "KDOptions",
    "LayerProbe",
    "MHKDLoss",
    "PKDLoss",
    "PseudoClassifiers",
    "RAILKDLoss",
    "Sweep",
    "SweepRow",
    "Teacher",
    "TeacherCache",
    "UniversalKDLoss",
    "UniversalKDMixtureLoss",
    "VanillaKDLoss",
    "distill",
    "finetune",
    "flops",
    "load_folder",
    "load_rows",
    "student_from_teacher",
    "with_input_format",
]
