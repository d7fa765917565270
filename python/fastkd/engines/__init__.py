"""Ways to run an early-exit model; all of them give the same answers."""
