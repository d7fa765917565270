"""Fused early-exit and distillation ops for PyTorch.

Every op has three backends: `cuda` (Triton kernels and the CUDA extension), `cpu` (the C++ extension) and
`reference` (plain PyTorch, anywhere). `python -m fastkd_kernels.info` says which of them this installation has.
"""

from fastkd_kernels._backend import BackendUnavailableError, backend
from fastkd_kernels.ops.compact import compact
from fastkd_kernels.ops.distillation_loss import distillation_loss
from fastkd_kernels.ops.exit_gate import CRITERIA, ExitGateOutput, ExitRecord, exit_gate
from fastkd_kernels.ops.kd_loss import kd_loss
from fastkd_kernels.ops.student_head import StudentHeadWeights, student_head, student_head_exit
from fastkd_kernels.ops.universal_kd_loss import universal_kd_loss

__version__ = "0.1.0"

__all__ = [
    "CRITERIA",
    "BackendUnavailableError",
    "ExitGateOutput",
    "ExitRecord",
    "StudentHeadWeights",
    "__version__",
    "backend",
    "compact",
    "distillation_loss",
    "exit_gate",
    "kd_loss",
    "student_head",
    "student_head_exit",
    "universal_kd_loss",
]
