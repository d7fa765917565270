"""The ops in a loop of your own: rows leave between two layers of any PyTorch model, and the batch shrinks."""

from __future__ import annotations

import torch
from torch import nn

import fastkd_kernels as fk

ROWS, WIDTH, CLASSES, LAYERS, SPEED = 32, 64, 4, 4, 0.6


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    heads = [nn.Linear(WIDTH, CLASSES) for _ in range(LAYERS)]
    hidden, ids = torch.randn(ROWS, WIDTH), torch.arange(ROWS)
    answers = torch.empty(ROWS, dtype=torch.long)
    for number, (layer, head) in enumerate(zip(layers, heads, strict=True), start=1):
        hidden = layer(hidden)
        # sharper from layer to layer, as trained heads are
        logits = head(hidden) * 3 * number
        answers[ids] = logits.argmax(-1)
        if number == LAYERS:
            print(f"layer {number}: the other {len(ids)} rows are answered here")
            break
        gate = fk.exit_gate(logits, SPEED)
        stay = int(gate.count)
        hidden, moved = fk.compact([hidden, ids], gate.survivors, gate.count)
        print(f"layer {number}: {len(ids) - stay} rows leave, {stay} go on")
        hidden, ids = hidden[:stay], moved[:stay]
    print(f"answers: {torch.bincount(answers, minlength=CLASSES).tolist()} rows in the {CLASSES} classes")


if __name__ == "__main__":
    main()
