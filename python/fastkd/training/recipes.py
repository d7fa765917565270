"""The old name of fine-tuning and self-distillation, for commands that still move."""

from fastkd.training.finetune import FinetuneOptions as FinetuneOptions
from fastkd.training.finetune import finetune as finetune
from fastkd.training.harness import bf16_is_fast as bf16_is_fast
from fastkd.training.self_distillation import DistillOptions as DistillOptions
from fastkd.training.self_distillation import distill as distill
