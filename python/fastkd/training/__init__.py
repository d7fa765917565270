"""Fine-tuning, self-distillation of the exit heads, and what every training shares. Knows no teacher model."""
