"""A DataFrame in, a DataFrame with answers out, at a speed that is certified on rows that trained nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas
from made_up import columns, small_bert
from transformers import AutoTokenizer

import fastkd


def main() -> None:
    train, unseen = pandas.DataFrame(columns(1500, seed=1)), pandas.DataFrame(columns(400, seed=3))
    unseen = unseen[~unseen["text"].isin(train["text"])]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint = small_bert(folder / "plain", list(train["text"]))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = fastkd.EarlyExitForSequenceClassification.from_pretrained(checkpoint, num_labels=6, head="linear")
        tuning = fastkd.FinetuneOptions(learning_rate=2e-3, head_learning_rate_factor=1.0, epochs=4, progress=False)
        fastkd.finetune(model, train, None, folder / "tuned", tuning, tokenizer)
        distilling = fastkd.DistillOptions(learning_rate=1e-2, epochs=3, progress=False)
        fastkd.distill(model, train, None, folder / "model", distilling, tokenizer)

        certificate = model.calibrate(unseen, tokenizer=tokenizer, max_drop=0.03)
        print(f"speed {certificate.speed:.3f} changes {certificate.failures} of {certificate.n} answers")

        incoming = unseen.head(5).drop(columns="label")
        rows = list(model.stream(incoming, tokenizer, speed=certificate.speed))
        answered = incoming.assign(topic=[row.label for row in rows], layer=[row.exit_layer for row in rows])
        print(answered[["topic", "layer"]].to_string(index=False))


if __name__ == "__main__":
    main()
