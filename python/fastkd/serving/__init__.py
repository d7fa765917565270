"""A model behind an address: HTTP, admission, scheduling, metrics and reloading. Knows no training and no command."""
