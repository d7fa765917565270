"""The early-exit model: puts encoder, heads and engines together, and reads plain and official checkpoints. Knows no
training.
"""
