"""Fused early-exit and distillation ops for PyTorch.

Every op has three backends: `cuda` (Triton kernels and the CUDA extension), `cpu` (the C++ extension) and
`reference` (plain PyTorch, anywhere). `python -m fastkd_kernels.info` says which of them this installation has.
"""

from fastkd_kernels._backend import BackendUnavailableError, backend, missing_kernels
from fastkd_kernels._eager import is_unwatched
from fastkd_kernels._onednn import onednn_multiplies
from fastkd_kernels._packed_stage import PreparedRun, PreparedStage, RunOutput, StageOutput
from fastkd_kernels._stamps import ModuleStamp, ParameterStamp
from fastkd_kernels._student_head_weights import StudentHeadWeights
from fastkd_kernels.ops.compact import compact
from fastkd_kernels.ops.distillation_loss import distillation_loss
from fastkd_kernels.ops.encoder_layer import (
    EncoderLayerForm,
    EncoderLayerWeights,
    PackedEncoderLayer,
    QuantizedWeight,
    encoder_layer,
    encoder_layer_instructions,
    encoder_layers,
    pack_encoder_layer,
)
from fastkd_kernels.ops.exit_gate import CRITERIA, ExitGateOutput, ExitRecord, exit_gate
from fastkd_kernels.ops.fused_linear_kd_loss import SoftHardLoss, fused_linear_kd_loss
from fastkd_kernels.ops.kd_loss import kd_loss
from fastkd_kernels.ops.layer_norm import PreparedEmbedding, add_layer_norm, embed_layer_norm
from fastkd_kernels.ops.packed import PackedInput, compact_packed, pack, pack_tokens, unpack
from fastkd_kernels.ops.student_head import PreparedStudentHead, student_head, student_head_exit
from fastkd_kernels.ops.universal_kd_loss import universal_kd_loss
from fastkd_kernels.ops.varlen_attention import varlen_attention

__version__ = "0.1.0"

__all__ = [
    "CRITERIA",
    "BackendUnavailableError",
    "EncoderLayerForm",
    "EncoderLayerWeights",
    "ExitGateOutput",
    "ExitRecord",
    "ModuleStamp",
    "PackedEncoderLayer",
    "PackedInput",
    "ParameterStamp",
    "PreparedEmbedding",
    "PreparedRun",
    "PreparedStage",
    "PreparedStudentHead",
    "QuantizedWeight",
    "RunOutput",
    "SoftHardLoss",
    "StageOutput",
    "StudentHeadWeights",
    "__version__",
    "add_layer_norm",
    "backend",
    "compact",
    "compact_packed",
    "distillation_loss",
    "embed_layer_norm",
    "encoder_layer",
    "encoder_layer_instructions",
    "encoder_layers",
    "exit_gate",
    "fused_linear_kd_loss",
    "is_unwatched",
    "kd_loss",
    "missing_kernels",
    "onednn_multiplies",
    "pack",
    "pack_encoder_layer",
    "pack_tokens",
    "student_head",
    "student_head_exit",
    "universal_kd_loss",
    "unpack",
    "varlen_attention",
]
