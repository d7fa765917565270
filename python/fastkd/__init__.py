"""Early-exit BERT and knowledge distillation on the fused ops of fastkd_kernels.

Importing this package registers its models with transformers, so that `AutoModelForSequenceClassification`
and `pipeline("text-classification")` load saved models.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastkd.losses.catalogue import LOSSES

if TYPE_CHECKING:
    from fastkd.data.input_format import with_input_format
    from fastkd.data.rows import load_folder, load_rows
    from fastkd.encoders.configuration import EarlyExitConfig
    from fastkd.engines.output import EarlyExitOutput
    from fastkd.exits.calibration import calibrate
    from fastkd.exits.certificate import Certificate
    from fastkd.exits.comparison import compare
    from fastkd.exits.flops import flops
    from fastkd.exits.rank_calibration import RankCertificate, calibrate_ranking
    from fastkd.exits.sweep import Sweep, SweepRow
    from fastkd.exits.threshold_path import threshold_path
    from fastkd.exits.trace import ExitTrace
    from fastkd.kd.cache import TeacherCache
    from fastkd.kd.options import KDOptions
    from fastkd.kd.probe import LayerProbe, PseudoClassifiers
    from fastkd.kd.students import (
        BiLSTMForSequenceClassification,
        GatedCNNForSequenceClassification,
        student_from_teacher,
    )
    from fastkd.kd.teacher import Teacher
    from fastkd.kd.trainer import KDTrainer
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
    from fastkd.model.loading import load_model
    from fastkd.model.modeling import EarlyExitForSequenceClassification
    from fastkd.training.finetune import FinetuneOptions, finetune
    from fastkd.training.self_distillation import DistillOptions, distill
    from fastkd.training.tuning import TuneOptions, TuneResult, tune

# training needs datasets and the Trainer, whose import takes longer than everything else together
_HOME = dict.fromkeys(LOSSES, "fastkd.losses") | {
    "BiLSTMForSequenceClassification": "fastkd.kd.students",
    "Certificate": "fastkd.exits.certificate",
    "DistillOptions": "fastkd.training.self_distillation",
    "EarlyExitConfig": "fastkd.encoders.configuration",
    "EarlyExitForSequenceClassification": "fastkd.model.modeling",
    "EarlyExitOutput": "fastkd.engines.output",
    "ExitTrace": "fastkd.exits.trace",
    "FinetuneOptions": "fastkd.training.finetune",
    "GatedCNNForSequenceClassification": "fastkd.kd.students",
    "KDOptions": "fastkd.kd.options",
    "KDTrainer": "fastkd.kd.trainer",
    "LayerProbe": "fastkd.kd.probe",
    "PseudoClassifiers": "fastkd.kd.probe",
    "RankCertificate": "fastkd.exits.rank_calibration",
    "Sweep": "fastkd.exits.sweep",
    "SweepRow": "fastkd.exits.sweep",
    "Teacher": "fastkd.kd.teacher",
    "TeacherCache": "fastkd.kd.cache",
    "TuneOptions": "fastkd.training.tuning",
    "TuneResult": "fastkd.training.tuning",
    "calibrate": "fastkd.exits.calibration",
    "calibrate_ranking": "fastkd.exits.rank_calibration",
    "compare": "fastkd.exits.comparison",
    "distill": "fastkd.training.self_distillation",
    "finetune": "fastkd.training.finetune",
    "flops": "fastkd.exits.flops",
    "load_folder": "fastkd.data.rows",
    "load_model": "fastkd.model.loading",
    "load_rows": "fastkd.data.rows",
    "student_from_teacher": "fastkd.kd.students",
    "threshold_path": "fastkd.exits.threshold_path",
    "tune": "fastkd.training.tuning",
    "with_input_format": "fastkd.data.input_format",
}


_OLDEST_TRANSFORMERS = (5, 17)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def _is_command() -> bool:
    """Whether this process is the `fastkd` command, whose --help does not wait for torch."""
    return os.path.basename(sys.argv[0] if getattr(sys, "argv", None) else "") in ("fastkd", "fastkd.exe")


def _is_lazy() -> bool:
    """Whether models wait for their first use: in the command, and in Ray Serve's proxy, which runs none."""
    return _is_command() or os.environ.get("FASTKD_LAZY") == "1"


def _problem_of_packages() -> str | None:
    """What is wrong with the packages that come with [models], or None."""
    remedy = "install the packages its models need: pip install 'fastkd-kernels[models]'"
    try:
        found = metadata.version("transformers")
        metadata.version("typer")
    except metadata.PackageNotFoundError as error:
        return f"fastkd needs the package {error.name}, which is not installed; {remedy}"
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, _OLDEST_TRANSFORMERS))
        return f"fastkd needs transformers {oldest} or newer, but {found} is installed; {remedy}"
    return None


_problem = _problem_of_packages()
if _problem is not None and _is_command():
    sys.exit(_problem)
if _problem is not None:
    raise ImportError(_problem)
if not _is_lazy():
    importlib.import_module("fastkd.model.pipeline")  # registers the model too
    importlib.import_module("fastkd.kd.students")

__all__ = [
    "ALPKDLoss",
    "AnnealingKDLoss",
    "BiLSTMForSequenceClassification",
    "Certificate",
    "DIHLoss",
    "DistilBertLoss",
    "DistillOptions",
    "EarlyExitConfig",
    "EarlyExitForSequenceClassification",
    "EarlyExitOutput",
    "ExitTrace",
    "FinetuneOptions",
    "GatedCNNForSequenceClassification",
    "KDLoss",
    "KDOptions",
    "KDTrainer",
    "LayerProbe",
    "MHKDLoss",
    "PKDLoss",
    "PseudoClassifiers",
    "RAILKDLoss",
    "RankCertificate",
    "Sweep",
    "SweepRow",
    "Teacher",
    "TeacherCache",
    "TuneOptions",
    "TuneResult",
    "UniversalKDLoss",
    "UniversalKDMixtureLoss",
    "VanillaKDLoss",
    "calibrate",
    "calibrate_ranking",
    "compare",
    "distill",
    "finetune",
    "flops",
    "load_folder",
    "load_model",
    "load_rows",
    "student_from_teacher",
    "threshold_path",
    "tune",
    "with_input_format",
]
