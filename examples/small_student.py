"""A student of one layer learns from a teacher of three, with and without its teacher's answers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from made_up import columns, small_bert

import fastkd


def main() -> None:
    train, few, test = columns(1000, seed=1), columns(300, seed=4), columns(300, seed=2)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint = small_bert(folder / "plain", train["text"])
        teaching = fastkd.KDOptions(learning_rate=2e-3, head_learning_rate_factor=1.0, epochs=4, progress=False)
        taught = fastkd.KDTrainer(None, checkpoint, "none", teaching).train(train, test, folder / "teacher")
        print(f"teacher, 3 layers, {len(train['text'])} rows: accuracy {taught.metrics['accuracy']:.1%}")

        teacher = fastkd.Teacher.load(folder / "teacher")
        for method in ("none", "kd", "universal-cg"):
            trainer = fastkd.KDTrainer(teacher, "layers:1", method, teaching)
            done = trainer.train(few, test, folder / method)
            print(f"student, 1 layer, {len(few['text'])} rows, {method}: accuracy {done.metrics['accuracy']:.1%}")


if __name__ == "__main__":
    main()
