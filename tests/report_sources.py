"""A made-up model on the generated corpus, with everything that a report can show."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastkd.data import corpus
from fastkd.data.rows import Rows, load_rows
from fastkd.exits.flops import CONVENTIONS, FlopsShape
from fastkd.exits.trace import ExitTrace
from fastkd.inference.measurements import Benchmark, BenchmarkRow

LAYERS = 6
SHAPE = FlopsShape(
    hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_labels=4, embedding_size=32, head_width=16
)

LOGS: list[dict[str, Any]] = [
    {
        "stage": "finetune",
        "log_history": [
            {"loss": 1.0, "epoch": 0.5},
            {"eval_loss": 0.5, "eval_accuracy": 0.8, "epoch": 1.0},
            {"eval_loss": 0.4, "eval_accuracy": 0.9, "epoch": 2.0},
        ],
    },
    {
        "stage": "distill",
        "log_history": [
            {
                "eval_loss": 0.5, "eval_accuracy_layer_1": 0.7, "eval_accuracy_layer_6": 0.9, "epoch": 1.0,
                "eval_accuracy_speed_0.5": 0.85, "eval_flops_share_speed_0.5": 0.6,
            },
            {
                "eval_loss": 0.4, "eval_accuracy_layer_1": 0.8, "eval_accuracy_layer_6": 0.9, "epoch": 2.0,
                "eval_accuracy_speed_0.5": 0.89, "eval_flops_share_speed_0.5": 0.2,
            },
        ],
    },
]  # fmt: skip


def corpus_rows(seed: int = 5, folder: Path | None = None) -> Rows:
    """The test rows of a generated corpus."""
    with tempfile.TemporaryDirectory() as temporary:
        target = folder or Path(temporary) / "corpus"
        corpus.write_corpus(target, seed=seed, rows={"test": 240})
        return load_rows(target / "test.tsv")


def made_up_trace(
    rows: Rows,
    *,
    exit_layers: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    labelled: bool = True,
    numbered: bool = True,
) -> ExitTrace:
    """Heads that grow surer and more often right with every layer; rows in another order than in their file."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(rows), generator=generator)
    labels = torch.tensor(rows.dataset["label"][:])[order]
    classes = int(labels.max()) + 1
    noise = torch.randn(len(rows), len(exit_layers), classes, generator=generator)
    ease = 3 * torch.rand(len(rows), 1, 1, generator=generator)
    depth = torch.tensor(exit_layers).view(1, -1, 1) / LAYERS
    right = torch.nn.functional.one_hot(labels, classes)[:, None]
    return ExitTrace(
        logits=1.2 * noise + (1 + 2 * depth) * ease * right,
        labels=labels if labelled else None,
        lengths=torch.full((len(rows),), 9, dtype=torch.int32),
        exit_layers=list(exit_layers),
        max_length=24,
        shape=SHAPE,
        rows=order if numbered else None,
    )


def benchmark() -> Benchmark:
    """Measurements of no machine, as `fastkd bench` writes them."""
    rows = [
        BenchmarkRow(
            device="cpu", dtype=dtype, batch_size=size, speed=speed, rows=64, accuracy=0.9, full_accuracy=0.91,
            average_layers=2.0, flops_speedup=flops, flops_speedups=dict.fromkeys(CONVENTIONS, flops),
            seconds=1 / flops, seconds_p20=0.9 / flops, seconds_p80=1.1 / flops, full_seconds=0.8,
            full_engine="fastkd", full_batch_size=size or 32, speedup=0.8 * flops,
        )
        for dtype in ("fp32", "bf16")
        for size in (None, 1, 32)
        for speed, flops in ((0.1, 1.1), (0.3, 2.0), (0.8, 5.0))
    ]  # fmt: skip
    machine = {"device": "cpu", "processor": "none", "threads": 1, "torch": "0", "gpu_columns": "not yet measured"}
    return Benchmark(rows, machine)


def certificate() -> dict[str, Any]:
    return {"speed": 0.355, "criterion": "entropy", "max_drop": 0.01, "confidence": 0.95, "n": 1000, "failures": 3}


def report_folder(folder: Path, rows: Rows) -> Path:
    """A folder as `fastkd demo` leaves it, as far as a report looks at it."""
    corpus_rows(folder=folder / "corpus")
    made_up_trace(rows).save(folder / "trace.safetensors")
    benchmark().to_json(folder / "bench.json")
    names = {str(index): name for index, name in enumerate(rows.label_names or ())}
    for name, log in zip(("finetuned", "model"), LOGS, strict=True):
        (folder / name).mkdir()
        (folder / name / "trainer_log.json").write_text(json.dumps(log))
    (folder / "model" / "config.json").write_text(json.dumps({"id2label": names, "certificate": certificate()}))
    return folder
