"""Rows of text: read, checked, tokenised, batched, or made from scratch; and output files that are whole or absent."""
