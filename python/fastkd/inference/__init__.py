"""A finished model at work: answers for files and pipes, traces of rows, and what it all costs in seconds. Knows no
training.
"""
