"""Fine-tuning, self-distillation of the exit heads, tuning of its length, and what every training shares. Knows no
teacher model.
"""
