"""What a router or guardrail in front of a language model costs: one prompt after the other through a BERT-base.

    python bench/bench_router.py --lengths 128,512 --output bench/results/cpu-router.json

The encoder has the sizes of BERT-base and random weights: seconds do not depend on them, where rows leave does. So the
exits are imposed: prompts leave after layers that average 1.5 and 3 of 12, every head up to there is asked, and the
share of operations saved stands beside the share of seconds. OpenVINO and ONNX Runtime run all layers, in int8 and in
what else they do best. Every contestant gets the same prompts, one a call, in interleaved passes.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import rivals
import torch
import typer
from torch import Tensor
from transformers import BertConfig

import fastkd
from fastkd.data.files import write_json, write_text
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.engines.allocator import keep_freed_memory
from fastkd.inference.benchmark import machine_facts
from fastkd.inference.interleaved import interleaved
from fastkd.model.loading import in_dtype

PATTERNS = {1.5: (1, 2), 3.0: (1, 2, 3, 6)}
"""After which layers prompts leave, in turns, by the average."""
GOAL = 0.9
"""Share of the saved operations that is to be saved in seconds."""
_STAYS = 1e-9
"""A threshold that a head is asked for, and no random row is below."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class RouterRow:
    length: int
    contestant: str
    average_layers: float
    ms_per_prompt: float
    over_best_rival: float | None
    """None where no rival is installed."""
    over_own_full: float | None
    """None of a rival, which has no exits."""
    flops_speedup: float
    """Operations of the full model over those that were needed, attention and heads included."""

    @property
    def operations_saved(self) -> float:
        """Share of the full model's operations."""
        return 1 - 1 / self.flops_speedup

    @property
    def seconds_saved(self) -> float | None:
        """Share of our full model's seconds."""
        return None if self.over_own_full is None else 1 - 1 / self.over_own_full

    @property
    def share_reached(self) -> float | None:
        """Seconds saved over operations saved; None where all layers ran. The goal is `GOAL`."""
        if self.seconds_saved is None or self.flops_speedup <= 1:
            return None
        return self.seconds_saved / self.operations_saved

    def to_dict(self) -> dict[str, Any]:
        saved = {name: getattr(self, name) for name in ("operations_saved", "seconds_saved", "share_reached")}
        return asdict(self) | saved


def base_config() -> EarlyExitConfig:
    """Of a BERT-base with a head after every layer."""
    return EarlyExitConfig(backbone=BertConfig(), num_labels=2, exits_trained=True)


def base_model() -> fastkd.EarlyExitForSequenceClassification:
    """The model, with random weights."""
    torch.manual_seed(0)
    return fastkd.EarlyExitForSequenceClassification(base_config()).eval()


def speeds_for(layer: int, heads: int) -> list[float]:
    """Thresholds by which every row leaves after `layer`, and every head up to it is asked; `heads` below the last."""
    return [_STAYS] * (layer - 1) + [1.0] * (heads - layer + 1)


def check_prompts(prompts: int) -> None:
    """Raise BadParameter where a pattern would be cut, and its average be another one."""
    turn = math.lcm(*map(len, PATTERNS.values()))
    if prompts < 1 or prompts % turn:
        raise typer.BadParameter(f"prompts: got {prompts}, expected a multiple of {turn}, the length of the patterns")


def ours(model: Any, prompts: Sequence[Batch], layers: Sequence[int]) -> None:
    heads = len(model.exit_layers) - 1
    for number, prompt in enumerate(prompts):
        layer = layers[number % len(layers)]
        speed = 0.0 if layer == model.num_layers else speeds_for(layer, heads)
        output = model(**prompt, speed=speed)
        if int(output.exit_layer) != layer:
            raise AssertionError(f"a prompt left after layer {int(output.exit_layer)}, and {layer} was imposed")


def flops_speedup(config: Any, length: int, layers: Sequence[int]) -> float:
    count = partial(fastkd.flops, config, length, convention="all_matmuls")
    return count() * len(layers) / sum(count(layers=layer, heads=layer) for layer in layers)


@torch.inference_mode()
def measure(
    models: Mapping[str, Any], prepared: Sequence[rivals.Prepared], length: int, prompts: int, repeats: int
) -> list[RouterRow]:
    model = models["fp32"]
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(1000, 30000, (1, length), generator=generator)} for _ in range(prompts)]
    full = (model.num_layers,)
    contestants: dict[tuple[str, float], Callable[[], Any]] = {}
    arrays = [rival_inputs(batch) for batch in batches]
    for one in prepared:
        # their lengths are all alike, so nothing is padded
        ready = one.ready(lambda pad_to: arrays)
        contestants[ready.name, float(full[0])] = partial(ready.run, arrays)
    for dtype, cast in models.items():
        contestants[f"fastkd {dtype}", float(full[0])] = partial(ours, cast, batches, full)
        for average, layers in PATTERNS.items():
            contestants[f"fastkd {dtype}", average] = partial(ours, cast, batches, layers)
    seconds, _ = interleaved(contestants, repeats, lambda key: print(f"\r{length}: {key[0]} {key[1]:g}   ", end=""))
    print()
    medians = {key: 1e3 * statistics.median(values) / prompts for key, values in seconds.items()}
    theirs = [value for (name, _), value in medians.items() if not name.startswith("fastkd")]
    rows = []
    for (name, average), taken in medians.items():
        is_ours = name.startswith("fastkd")
        rows.append(
            RouterRow(
                length=length,
                contestant=name,
                average_layers=average,
                ms_per_prompt=taken,
                over_best_rival=min(theirs) / taken if theirs else None,
                over_own_full=medians[name, float(full[0])] / taken if is_ours else None,
                flops_speedup=flops_speedup(model.config, length, PATTERNS.get(average, full)) if is_ours else 1.0,
            )
        )
    return rows


def rival_inputs(batch: Batch) -> rivals.Arrays:
    ids = batch["input_ids"]
    return {
        "input_ids": ids.numpy(),
        "attention_mask": torch.ones_like(ids).numpy(),
        "token_type_ids": torch.zeros_like(ids).numpy(),
    }


def markdown(rows: Sequence[RouterRow], facts: Mapping[str, Any]) -> str:
    lines = [
        "BERT-base, random weights, one prompt a call, exits imposed; "
        f"{facts['processor']}, {facts['instruction_set']}, {facts['threads']} threads, medians of {facts['repeats']} "
        f"interleaved passes of {facts['prompts']} prompts.",
        "",
        "| tokens | contestant | layers of 12 | ms a prompt | over the best rival | over our full model | operations "
        f"saved | seconds saved | share reached, goal {GOAL:g} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rival, own = ("" if over is None else f"{over:.2f}x" for over in (row.over_best_rival, row.over_own_full))
        saved = "| | |"
        if row.share_reached is not None:
            saved = f"| {row.operations_saved:.1%} | {row.seconds_saved:.1%} | {row.share_reached:.2f}"
        lines.append(
            f"| {row.length} | {row.contestant} | {row.average_layers:g} | {row.ms_per_prompt:.1f} | "
            f"{rival} | {own} {saved} |"
        )
    return "\n".join([*lines, ""])


def main(
    lengths: Annotated[str, typer.Option(help="Tokens a prompt, separated by commas.")] = "128,512",
    dtypes: Annotated[str, typer.Option(help="Of ours, besides fp32.")] = "bf16,int8",
    only: Annotated[str, typer.Option(help="Names of rivals, separated by commas.")] = "openvino bf16,openvino int8,"
    "onnxruntime int8",
    prompts: int = 8,
    repeats: int = 5,
    output: Annotated[Path | None, typer.Option(help="A JSON file; the table lies beside it.")] = None,
) -> None:
    """Time one prompt at a time, ours beside theirs."""
    check_prompts(prompts)
    keep_freed_memory()
    model = base_model()
    models = {"fp32": model} | {name: in_dtype(copy.deepcopy(model), name) for name in filter(None, dtypes.split(","))}
    sample = rival_inputs({"input_ids": torch.randint(1000, 30000, (1, 128))})
    prepared = rivals.prepare(model, sample, [sample] * 8, list(filter(None, only.split(","))))
    facts = machine_facts(model.device) | {"repeats": repeats, "prompts": prompts, "date": date.today().isoformat()}
    rows: list[RouterRow] = []
    for length in map(int, lengths.split(",")):
        rows += measure(models, prepared, length, prompts, repeats)
        if output is not None:
            write_json(output, {"machine": facts, "rows": [row.to_dict() for row in rows]})
            write_text(output.with_suffix(".md"), markdown(rows, facts))
    print(markdown(rows, facts))


if __name__ == "__main__":
    typer.run(main)
