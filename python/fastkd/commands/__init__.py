"""The command line: one file a command, and what they share. No other room knows it."""
