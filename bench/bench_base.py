"""This tree beside another commit, in one interleaved run: `python bench/bench_base.py MODEL DATA.tsv --base main`.

The other commit is unpacked into a temporary folder, and built there where its C++ differs. Each tree has a process of
its own, which loads the model once; the two take turns, so drift of the machine hits both. A speed is proved in both
trees before it is timed: the answers of `model.stream` must be those of the engine `batch` on the PyTorch reference.
Where they are not, the seconds are refused and the reason stands in their place.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
HERE, BASE = "here", "base"
MOST_DIFFERENT = 0.005
"""Share of rows that rounding may move across a speed."""
Answers = list[tuple[str, int]]
"""Label and exit layer of each row."""


@dataclass(frozen=True)
class Comparison:
    """Both trees at one speed; seconds are None where the proof of a tree failed."""

    speed: float
    seconds: dict[str, float | None]
    ratio: float | None
    """How many times faster this tree is: the median of neighbours."""
    same_answers: float | None
    """Share of rows that both trees answer alike."""
    refused: dict[str, str]


def different(answers: Answers, expected: Answers) -> float:
    """Share of rows with another label or exit layer."""
    if len(answers) != len(expected):
        return 1.0
    return sum(ours != theirs for ours, theirs in zip(answers, expected, strict=True)) / max(len(expected), 1)


def reason_to_refuse(answers: Answers, reference: Answers) -> str | None:
    """Why the seconds of these answers must not be shown, or None."""
    share = different(answers, reference)
    if share <= MOST_DIFFERENT:
        return None
    return f"{share:.1%} of its rows are not those of the reference, at most {MOST_DIFFERENT:.1%} may differ"


def unpack(base: str, folder: Path) -> None:
    """The files of a commit, with a compiled extension: this tree's where the C++ is the same, else its own.

    Raises:
        ValueError: git does not know the commit.
    """
    archive = subprocess.run(["git", "archive", "--format=tar", base], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise ValueError(f"base: git knows no {base!r}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    is_same = subprocess.run(["git", "diff", "--quiet", base, "--", "csrc", "setup.py"], cwd=ROOT).returncode == 0
    if not is_same:
        subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, check=True, stdout=sys.stderr
        )
        return
    for library in (ROOT / "fastkd_kernels").glob("_C*.so"):
        shutil.copy(library, folder / "fastkd_kernels" / library.name)


class Tree:
    """A process that runs the model with the code of one tree."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        paths = os.pathsep.join([str(folder), str(folder / "python")])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments],
            env=os.environ | {"PYTHONPATH": paths}, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a tree ended early; its error stands above")
        return json.loads(line)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(
    folders: Mapping[str, Path], arguments: Sequence[str], speeds: Sequence[float], repeats: int
) -> list[Comparison]:
    """Prove and time every speed in both trees, in turns."""
    with ExitStack() as stack:
        trees = {name: stack.enter_context(Tree(folder, arguments)) for name, folder in folders.items()}
        found = []
        for speed in speeds:
            proofs = {name: tree.ask(do="prove", speed=speed) for name, tree in trees.items()}
            answers = {name: [tuple(row) for row in proof["answers"]] for name, proof in proofs.items()}
            refused = {
                name: reason
                for name, proof in proofs.items()
                if (reason := reason_to_refuse(answers[name], [tuple(row) for row in proof["reference"]]))
            }
            seconds: dict[str, list[float]] = {name: [] for name in trees}
            for number in range(repeats if not refused else 0):
                # each goes first in half of the rounds
                for name in sorted(trees, reverse=bool(number % 2)):
                    seconds[name].append(trees[name].ask(do="time", speed=speed)["seconds"])
            ratios = [base / here for here, base in zip(seconds[HERE], seconds[BASE], strict=True)]
            found.append(
                Comparison(
                    speed,
                    {name: statistics.median(values) if values else None for name, values in seconds.items()},
                    statistics.median(ratios) if ratios else None,
                    None if refused else 1 - different(answers[HERE], answers[BASE]),
                    refused,
                )
            )
        return found


def table(found: Sequence[Comparison], base: str) -> str:
    """The comparisons as Markdown."""
    lines = [f"| speed | here, s | {base}, s | times faster | same answers |", "|---|---|---|---|---|"]
    for one in found:
        if one.refused:
            why = "; ".join(f"{base if name == BASE else name}: {reason}" for name, reason in one.refused.items())
            lines.append(f"| {one.speed:g} | refused | refused | {why} | |")
            continue
        here, there = one.seconds[HERE], one.seconds[BASE]
        lines.append(f"| {one.speed:g} | {here:.3f} | {there:.3f} | {one.ratio:.2f}x | {one.same_answers:.2%} |")
    return "\n".join(lines)


def work(model_folder: str, data: str, rows: int, dtype: str) -> None:
    """Answer questions from standard input, one JSON value a line; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch

    import fastkd
    import fastkd_kernels as fk
    from fastkd.data.batches import padding_collator, tokenize

    model, tokenizer = fastkd.load_model(model_folder, "cpu")
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    dataset = tokenize(fastkd.load_rows(data, require_labels=False), tokenizer, min(128, tokenizer.model_max_length))
    encoded = [
        {name: values for name, values in row.items() if name not in ("labels", "length")}
        for row in dataset.select(range(min(rows, len(dataset))))
    ]
    pad = padding_collator(tokenizer)

    def streamed(speed: float) -> Answers:
        return [(row.label, row.exit_layer) for row in model.stream(encoded, speed=speed)]

    def reference(speed: float) -> Answers:
        answers: Answers = []
        with fk.backend("reference"), torch.no_grad():
            for start in range(0, len(encoded), 32):
                out = model(**pad(encoded[start : start + 32]), speed=speed, engine="batch")
                labels = out.logits.argmax(-1).tolist()
                layers = out.exit_layer.tolist()
                answers += [(model.config.id2label[label], layer) for label, layer in zip(labels, layers, strict=True)]
        return answers

    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "prove":
            speed = question["speed"]
            reply: dict[str, Any] = {"answers": streamed(speed), "reference": reference(speed)}
        else:
            started = time.perf_counter()
            streamed(question["speed"])
            reply = {"seconds": time.perf_counter() - started}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main(
    model: Annotated[Path, typer.Argument(help="An early-exit model with distilled heads.")],
    data: Annotated[Path, typer.Argument(help="A file of rows.")],
    base: Annotated[str, typer.Option(help="The commit, branch or tag to compare with.")] = "main",
    rows: Annotated[int, typer.Option(min=1, help="Rows of a pass.")] = 400,
    speeds: Annotated[str, typer.Option(help="As in 0,0.3,0.5.")] = "0,0.3,0.5",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved passes; medians count.")] = 5,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    output: Annotated[Path | None, typer.Option(help="Write the comparison to this JSON file.")] = None,
) -> None:
    """Compare this tree with another commit."""
    with tempfile.TemporaryDirectory() as place:
        unpack(base, Path(place))
        arguments = [str(model.resolve()), str(data.resolve()), str(rows), dtype]
        chosen = [float(speed) for speed in speeds.split(",")]
        found = compare({HERE: ROOT, BASE: Path(place)}, arguments, chosen, repeats)
    print(table(found, base))
    if output is not None:
        output.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    if any(one.refused for one in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        folder, file, count, kind = sys.argv[2:]
        work(folder, file, int(count), kind)
    else:
        typer.run(main)
