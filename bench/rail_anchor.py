"""Whether RAIL-KD's distance can be closed without the student: projections alone learn, a frozen student does not.

    python bench/rail_anchor.py TEACHER DATA [--rows 512] [--steps 600] [--output FILE]

Hidden states are those of real rows, means over tokens, of the teacher and of a student made of its layers. Both
projections, or with the teacher's anchored the student's alone, are trained on three quarters of the rows; what is
written down is the distance on the other quarter, between the same sentences and between different ones. A distance
that carries information tells the two apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from fastkd import LayerProbe, RAILKDLoss, student_from_teacher
from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.rows import Rows, load_folder
from fastkd.kd.teacher import Teacher


@torch.no_grad()
def hidden_states(model: torch.nn.Module, teacher: Teacher, rows: Rows, max_length: int) -> Tensor:
    """[L, n, H] of the rows, sorted by length in one way for every model."""
    probe = LayerProbe(model.eval(), "mean")
    batches = LengthSortedBatches(tokenize(rows, teacher.tokenizer, max_length), teacher.tokenizer, 64)
    found = []
    for batch in batches:
        batch.pop("labels", None)
        found.append(probe(**batch).hidden_states.float())
    probe.remove()
    # in the order of the rows, which has nothing to do with their lengths
    return torch.cat(found, dim=1)[:, torch.tensor(batches.order).argsort()]


def distances(loss: RAILKDLoss, student: Tensor, teacher: Tensor, steps: int, is_same: bool) -> tuple[float, float]:
    """Before and after the training, on rows that it did not see."""
    if not is_same:
        teacher = teacher.roll(1, dims=1)
    parts = 3 * student.shape[1] // 4
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def seen() -> float:
        with torch.no_grad():
            return loss(student[:, parts:], teacher[:, parts:]).item()

    before = seen()
    for step in range(steps):
        loss.resample(step // 100)
        chosen = torch.randint(parts, (32,), generator=generator)
        optimizer.zero_grad()
        loss(student[:, chosen], teacher[:, chosen]).backward()
        optimizer.step()
    return before, seen()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--student", default="layers:3")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    teacher = Teacher.load(options.teacher, "mean")
    rows = load_folder(options.data, num_labels=teacher.num_labels if teacher.num_labels == 1 else None).train
    rows = rows.sample(options.rows, 0)
    theirs = hidden_states(teacher.model, teacher, rows, options.max_length)
    ours = hidden_states(student_from_teacher(teacher.model, options.student), teacher, rows, options.max_length)
    found = {}
    for name, trains_teacher in (("anchored", False), ("trained along", True)):
        for pairs, is_same in (("the same sentences", True), ("other sentences", False)):
            torch.manual_seed(0)
            width = theirs.shape[-1]
            loss = RAILKDLoss(len(ours), width, width, train_teacher_projection=trains_teacher)
            found[f"{name}, {pairs}"] = distances(loss, ours, theirs, options.steps, is_same)
    text = json.dumps({name: [round(value, 4) for value in values] for name, values in found.items()}, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
