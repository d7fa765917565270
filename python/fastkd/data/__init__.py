"""Rows of text: read or generated, checked, tokenised and batched; and output files that are whole or absent. Knows
tokenizers, not models.
"""
