"""The column names under which tables have their texts, in the order in which they are looked for."""

PAIR_COLUMNS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
)
TEXT_COLUMNS = ("text_a", "text", "sentence", "content")
