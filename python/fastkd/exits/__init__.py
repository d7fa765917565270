"""What a threshold is worth: criteria, traces, costs, guarantees and drift. Knows logits, not models."""
