"""The tables of the two papers, made for your data: FastBERT's table 2 and Universal-KD's tables. Knows every training,
no command.
"""
