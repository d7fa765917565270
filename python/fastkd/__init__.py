"""Early-exit BERT and knowledge distillation on the fused ops of fastkd_kernels."""
