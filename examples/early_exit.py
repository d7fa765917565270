"""From a plain checkpoint to early answers: fine-tune, distil the heads, read every speed off one pass, answer."""

from __future__ import annotations

import tempfile
from pathlib import Path

from made_up import columns, small_bert
from transformers import AutoTokenizer

import fastkd


def main() -> None:
    train, test = columns(1500, seed=1), columns(300, seed=2)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint = small_bert(folder / "plain", train["text"])
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = fastkd.EarlyExitForSequenceClassification.from_pretrained(checkpoint, num_labels=6, head="linear")

        tuning = fastkd.FinetuneOptions(learning_rate=2e-3, head_learning_rate_factor=1.0, epochs=4, progress=False)
        done = fastkd.finetune(model, train, test, folder / "tuned", tuning, tokenizer)
        print(f"fine-tuned: accuracy {done.metrics['accuracy']:.1%}")

        distilling = fastkd.DistillOptions(learning_rate=1e-2, epochs=3, progress=False)
        fastkd.distill(model, train["text"], None, folder / "model", distilling, tokenizer)
        print("distilled: every layer has a head that may answer")

        trace = model.trace(test, tokenizer=tokenizer)
        for row in trace.sweep([0.0, 0.3, 0.6, 0.9]):
            print(f"speed {row.speed:.1f}: accuracy {row.accuracy:.1%}, {row.average_layers:.2f} layers a row")

        for answer in model.stream(test["text"][:3], tokenizer, speed=0.6):
            print(f"{answer.label} after layer {answer.exit_layer} of {model.num_layers}")


if __name__ == "__main__":
    main()
