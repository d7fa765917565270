"""What an early-exit model is made of: encoder families, exit heads and configuration. Knows no engine."""
