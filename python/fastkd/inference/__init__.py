"""A finished model at work: predictions for files and pipes, and what they cost in seconds."""
