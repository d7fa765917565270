"""Recipes of self-distillation: accuracy at a budget of operations, and certified speed-up, over tasks and seeds.

    python bench/bench_recipes.py DATA --work WORK --output bench/results/recipes

DATA holds a folder for each task (`TASKS`); the corpus of the demo is generated. Every task is fine-tuned once a seed.
Where the backbone is frozen in self-distillation, its hidden states are computed once a task and seed, and every such
recipe trains the early heads on them; the others are trainings of `fastkd.distill`. A cell is one recipe on one task
with one seed: one row of OUTPUT.jsonl, written when it is done, so that an interrupted study goes on where it stopped.
OUTPUT.md is the table of means.

What needs no training of its own is scored in every cell: which weights are kept (of the best evaluation, each head's
own best, the last), temperatures per head fitted on dev, thresholds per head, and a finer grid of certified speeds.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd.data.augmentation import with_altered_copies
from fastkd.data.batches import LengthGroupedSampler, tokenize
from fastkd.data.corpus import write_corpus
from fastkd.data.rows import DataFolder, Rows, load_rows
from fastkd.encoders.heads import build_head
from fastkd.encoders.label_scale import LabelScale
from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.recording import EncoderInputs
from fastkd.exits.calibration import SPEEDS, CalibrationError
from fastkd.exits.flops import FlopsShape
from fastkd.losses import label_loss
from fastkd.model.loading import load_model, load_plain
from fastkd.training.harness import Objective, take_labels
from fastkd.training.head_temperatures import agreement_temperatures, probability_temperatures
from fastkd.training.metrics import head_scores
from fastkd.training.model_parts import PartTraining, train_part
from fastkd.training.self_distillation import self_distillation_loss

BUDGETS = (3.0, 4.0, 5.0)
CHANGED = (0.005, 0.01, 0.02)
BATCH = 32
STACKED = 8
RATE = fastkd.DistillOptions().augmentation_rate
FINE = tuple(sorted({*SPEEDS, *(float(f"{value:.2g}") for value in numpy.geomspace(1e-5, 5e-3, 28))}))


@dataclass(frozen=True)
class Task:
    """Rows of a task: at most `train`, of which `held` are moved to the test rows, `dev` and `test`; drawn by the seed.

    Fine-tuned for three epochs of `train` rows, or `tune_steps` on up to 22,000 of the training file.
    """

    folder: str
    train: int = 2000
    dev: int = 500
    test: int = 1500
    held: int = 0
    max_length: int = 64
    tune_steps: int | None = None


TASKS = {
    "AG News": Task("ag_news", tune_steps=256),
    "SST-2": Task("sst2", tune_steps=700),
    "CoLA": Task("cola"),
    "MRPC": Task("mrpc"),
    "RTE": Task("rte", train=2240, held=700, max_length=96),
    "corpus": Task("corpus"),
}


@dataclass(frozen=True)
class Recipe:
    """How the early heads learn; the defaults are those of `fastkd.distill` before this study.

    Attributes:
        steps: of the optimiser; None: three epochs.
        smoothing: share of the uniform distribution mixed into the last head's.
        penalty: weight of the heads' negative entropy (confidence penalty).
        neighbours: weight of KL(next head || head), next to that from the last.
        agreement: share of the cross-entropy with the last head's class in the place of its probabilities.
        labels: the same share of cross-entropy with the labels.
        traffic: rows weigh as much as the heads before let them through at four times fewer operations.
        unlabelled: how many times as many rows are distilled as were labelled.
        copies: altered copies of every row, distilled along with it.
        tuning: heads that learn the labels beforehand: "last"; "joint", all; or "alternating", all in every second step
            (BERxiT, EACL 2021).
        backbone: learning rate of backbone and last head, which learn along what the last head said before; 0: frozen.
        ema: decay of a moving average of the weights, which is what is kept; 0: none.
    """

    steps: int | None = None
    learning_rate: float = 1e-3
    temperature: float = 1.0
    direction: str = "forward"
    head: str = "fastbert"
    pool: str = "cls"
    smoothing: float = 0.0
    penalty: float = 0.0
    neighbours: float = 0.0
    agreement: float = 0.0
    labels: float = 0.0
    traffic: bool = False
    unlabelled: int = 1
    copies: int = 0
    tuning: str = "last"
    backbone: float = 0.0
    ema: float = 0.0
    dropout: float = 0.1


INTRODUCTION = """# Recipes of self-distillation

    python bench/bench_recipes.py DATA --work WORK --output bench/results/recipes

MiniLM, six layers; {tasks}; {seeds} seed(s). The early heads learn from 2,000 rows (RTE: 1,540) of a frozen model
that was fine-tuned on them, of AG News and SST-2 on up to 22,000 rows, of the corpus as `fastkd demo` does. With a
"trained backbone" all layers learn along, from what the last head said before. "Altered copies" are nine of each row,
in which 15 % of the tokens are replaced by other tokens of the rows. In "joint" and "alternating" fine-tuning all heads
learn the labels beforehand, in every step or in every second one (BERxiT), and are then distilled. 500 dev rows choose
the weights and fit temperatures, up to 1,500 test rows are scored. Temperatures: none; "soft" predict the last head's
probabilities; "hard" its answers, as `fastkd distill` does. "Certified" is the speed-up of `fastkd calibrate` for
at most 1 % of changed answers with 95 % confidence on the test rows, 1x where there is none, "its gain" the
geometric mean over the defaults (three epochs, no temperatures) in the same cells, "points" the mean difference of
accuracy from them. Cells are tasks and seeds; recipes with other numbers of cells compare by these two columns
alone. Five rows of 1,200 more or less decide a certificate, so that the speed-ups at a measured share of changed
answers stand beside it. What is not listed was not measured yet; the command goes on where it stopped."""
LONG = Recipe(steps=600)
RECIPES = {
    "defaults": Recipe(),
    "600 steps": LONG,
    "lr 5e-4": replace(LONG, learning_rate=5e-4),
    "lr 2e-3": replace(LONG, learning_rate=2e-3),
    "temperature 2": replace(LONG, temperature=2.0),
    "average of weights": replace(LONG, ema=0.99),
    "agreement": replace(LONG, agreement=0.5),
    "labels": replace(LONG, labels=0.5),
    "300 steps": replace(LONG, steps=300),
    "temperature 4": replace(LONG, temperature=4.0),
    "label smoothing 0.1": replace(LONG, smoothing=0.1),
    "confidence penalty 0.1": replace(LONG, penalty=0.1),
    "neighbours": replace(LONG, neighbours=0.5),
    "traffic": replace(LONG, traffic=True),
    "agreement alone": replace(LONG, agreement=1.0),
    "dropout 0.3": replace(LONG, dropout=0.3),
    "1500 steps": replace(LONG, steps=1500),
    "linear head": replace(LONG, head="linear"),
    "linear head, mean": replace(LONG, head="linear", pool="mean"),
    "head reads the mean": replace(LONG, pool="mean"),
    "10x unlabelled rows": replace(LONG, unlabelled=10),
    "altered copies": replace(LONG, copies=9),
    "altered copies, average of weights": replace(LONG, copies=9, ema=0.99),
    "altered copies, lr 2e-3": replace(LONG, copies=9, learning_rate=2e-3),
    "altered copies, 1500 steps": replace(LONG, copies=9, steps=1500),
    "joint fine-tuning": replace(LONG, tuning="joint"),
    "alternating fine-tuning": replace(LONG, tuning="alternating"),
    "trained backbone": replace(LONG, backbone=5e-5),
    "trained backbone, 1.5e-4": replace(LONG, backbone=1.5e-4),
    "trained backbone, altered copies": replace(LONG, backbone=5e-5, copies=9),
    "trained backbone, 10x unlabelled rows": replace(LONG, backbone=5e-5, unlabelled=10),
}


@dataclass(frozen=True)
class States:
    """Hidden states after every early layer, of rows that lie one behind the other, and the last head's logits."""

    hidden: list[Tensor]
    starts: Tensor
    lengths: Tensor
    last: Tensor
    labels: Tensor

    def batch(self, rows: Tensor) -> tuple[list[Tensor], TokenLayout]:
        """Padded states [B, T, H] of every early layer."""
        lengths = self.lengths[rows]
        tokens = torch.arange(int(lengths.max()))
        mask = tokens < lengths[:, None]
        places = (self.starts[rows, None] + tokens).where(mask, self.starts[rows, None])
        return [states[places] for states in self.hidden], TokenLayout(mask)


@torch.no_grad()
def states_of(
    model: fastkd.EarlyExitForSequenceClassification,
    rows: Rows,
    tokenizer: Any,
    max_length: int,
    copies: int = 0,
    seed: int = 0,
) -> States:
    tokens = tokenize(rows, tokenizer, max_length)
    if copies:
        tokens = with_altered_copies(tokens, tokenizer.all_special_ids, copies, RATE, seed)
    lengths = torch.tensor(tokens["length"][:])
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    layers = model.exit_layers[:-1]
    hidden = [torch.empty(int(starts[-1]), model.config.hidden_size, dtype=torch.bfloat16) for _ in layers]
    last = torch.empty(len(tokens), model.config.num_classes)
    order = lengths.argsort(descending=True, stable=True)
    names = [name for name in tokens.column_names if name not in ("length", "labels")]
    for chosen in order.split(64):
        columns = tokens[chosen.tolist()]
        batch = tokenizer.pad({name: columns[name] for name in names}, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        with torch.autocast("cpu", torch.bfloat16):
            found, layout = model.start(
                EncoderInputs(batch["input_ids"], mask, batch.get("token_type_ids"), None, None)
            )
            for number in range(1, model.num_layers + 1):
                found = model.run_layers(range(number, number + 1), found, layout)
                if number in layers:
                    places = (starts[chosen, None] + torch.arange(mask.shape[1]))[mask]
                    hidden[layers.index(number)][places] = found[mask].bfloat16()
            last[chosen] = model.logits_after(model.num_layers, found, layout).float()
    labels = torch.tensor(tokens["labels"][:]) if "labels" in tokens.column_names else torch.full((len(rows),), -1)
    return States(hidden, starts[:-1], lengths, last, labels)


class Stack(nn.Module):
    """The early heads of several recipes, [M, R, ...] weights of M heads and R recipes, which read the same batches.

    `fastkd.encoders.heads.FastBertHead` and `LinearHead`, computed together; every recipe starts from the same weights.
    """

    def __init__(self, heads: Sequence[nn.Module], recipes: int) -> None:
        super().__init__()
        self.attention_heads = getattr(heads[0], "num_attention_heads", 0)
        self.names = [name.replace(".", "_") for name, _ in heads[0].named_parameters()]
        for name, parts in zip(self.names, zip(*(head.parameters() for head in heads), strict=True), strict=True):
            weights = torch.stack([part.detach() for part in parts])
            self.register_parameter(
                name, nn.Parameter(weights[:, None].expand(-1, recipes, *weights.shape[1:]).clone())
            )

    def forward(self, hidden: Sequence[Tensor], mask: Tensor, dropout: Tensor) -> Tensor:
        """Logits [R, B, M, C] of states [B, T, H] of each layer; `dropout` [R] acts on the attention."""
        heads, recipes = self.out_proj_bias.shape[:2]
        first = torch.stack([states[:, 0] for states in hidden])
        if not self.attention_heads:
            return self._logits(first.repeat_interleave(recipes, 0))
        rows, tokens = mask.shape
        width = self.narrow_bias.shape[-1]
        narrow = torch.stack(
            [
                F.linear(states.flatten(0, 1), weight.flatten(0, 1), bias.flatten()).unflatten(-1, (recipes, width))
                for states, weight, bias in zip(hidden, self.narrow_weight, self.narrow_bias, strict=True)
            ]
        ).tanh()  # [M, B T, R, D]
        narrow = narrow.transpose(1, 2).flatten(0, 1)
        start = narrow.unflatten(1, (rows, tokens))[:, :, 0]
        split = (self.attention_heads, width // self.attention_heads)
        query = self._linear("query", start).unflatten(-1, split)  # [M R, B, h, d]
        key, value = (
            self._linear(name, narrow).unflatten(1, (rows, tokens)).unflatten(-1, split) for name in ("key", "value")
        )
        scores = torch.einsum("xbhd,xbthd->xbht", query, key) / split[1] ** 0.5
        attention = scores.float().masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        keep = 1 - dropout.repeat(heads)[:, None, None, None]
        if self.training:
            attention = attention * (torch.rand_like(attention) < keep) / keep
        attended = torch.einsum("xbht,xbthd->xbhd", attention.to(value.dtype), value).flatten(-2)
        return self._logits(self._linear("dense", self._linear("output", attended)).tanh())

    def _linear(self, name: str, inputs: Tensor) -> Tensor:
        weight, bias = (getattr(self, f"{name}_{part}").flatten(0, 1) for part in ("weight", "bias"))
        return torch.bmm(inputs, weight.transpose(1, 2)) + bias[:, None].to(inputs.dtype)

    def _logits(self, features: Tensor) -> Tensor:
        heads, recipes = self.out_proj_bias.shape[:2]
        return self._linear("out_proj", features).float().unflatten(0, (heads, recipes)).permute(1, 2, 0, 3)


def read(stack: Stack, states: States, rows: Tensor, recipes: Sequence[Recipe]) -> Tensor:
    """Logits [R, B, M, C]."""
    hidden, layout = states.batch(rows)
    if recipes[0].pool == "mean":
        means = [layout.with_mean_first(layer) for layer in hidden]
        hidden, layout = [layer for layer, _ in means], means[0][1]
    with torch.autocast("cpu", torch.bfloat16):
        return stack(hidden, layout.attention_mask, torch.tensor([recipe.dropout for recipe in recipes]))


@torch.no_grad()
def all_logits(stack: Stack, states: States, recipes: Sequence[Recipe]) -> Tensor:
    """[R, n, M + 1, C], the last head's at the end."""
    order = states.lengths.argsort(descending=True, stable=True)
    stack.eval()
    parts = torch.cat([read(stack, states, rows, recipes) for rows in order.split(64)], dim=1)
    logits = torch.empty_like(parts)
    logits[:, order] = parts
    return torch.cat([logits, states.last[None, :, None].expand(len(parts), -1, 1, -1)], dim=2)


def recipe_loss(recipe: Recipe, early: Tensor, last: Tensor, labels: Tensor) -> Tensor:
    """[B, M], before the mean over rows and the sum over heads."""
    heads, classes = early.shape[1], early.shape[2]
    target = (last / recipe.temperature).softmax(-1)
    if recipe.smoothing:
        target = (1 - recipe.smoothing) * target + recipe.smoothing / classes
    log_p, log_q = target.log()[:, None].expand_as(early), (early / recipe.temperature).log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1) * recipe.temperature**2
    plain = early.log_softmax(-1)
    for share, answer in ((recipe.agreement, last.argmax(-1)), (recipe.labels, labels)):
        if share:
            loss = (1 - share) * loss - share * plain.gather(-1, answer[:, None, None].expand(-1, heads, 1))[..., 0]
    if recipe.penalty:
        loss = loss + recipe.penalty * (plain.exp() * plain).sum(-1)
    if recipe.neighbours and heads > 1:
        above = plain[:, 1:].detach()
        closer = (above.exp() * (above - plain[:, :-1])).sum(-1)
        loss = loss + recipe.neighbours * F.pad(closer, (0, 1))
    return loss


def traffic(early: Tensor, share: float = 0.25) -> Tensor:
    """[B, M], 1 where the heads before let a row through when each lets the most certain 1 - share leave; else 0.1."""
    probabilities = early.detach().softmax(-1)
    uncertainty = -(probabilities * probabilities.clamp_min(1e-9).log()).sum(-1)
    stays = uncertainty > uncertainty.quantile(1 - share, dim=0)
    through = torch.cat([torch.ones_like(stays[:, :1]), stays[:, :-1].cumprod(1).bool()], dim=1)
    return through.float().clamp_min(0.1)


def train_stack(
    model: fastkd.EarlyExitForSequenceClassification,
    recipes: Sequence[Recipe],
    train: States,
    dev: States,
    seed: int,
) -> dict[str, Stack]:
    """Heads by which weights are kept, with the optimiser and the schedule of `fastkd.distill`.

    AdamW, a tenth of warm-up, linear decay, gradients of a recipe clipped at 1.
    """
    torch.manual_seed(seed)
    config = copy.deepcopy(model.config)
    config.head = recipes[0].head
    is_own = recipes[0].head == model.config.head
    stack = Stack(model.early_heads if is_own else [build_head(config) for _ in train.hidden], len(recipes))
    average, kept = copy.deepcopy(stack), {name: copy.deepcopy(stack) for name in ("best", "each")}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in stack.named_parameters()}
    epoch = math.ceil(len(train.lengths) / BATCH)
    lengths = torch.tensor([recipe.steps or 3 * epoch for recipe in recipes])
    rates = torch.tensor([recipe.learning_rate for recipe in recipes])
    decay = torch.tensor([recipe.ema for recipe in recipes])
    best = torch.full((len(recipes), len(train.hidden)), torch.inf)
    best_sum = torch.full((len(recipes),), torch.inf)
    for step, rows in enumerate(_batches(train, BATCH, seed), start=1):
        stack.train()
        early = read(stack, train, rows, recipes)
        losses = [
            recipe_loss(recipe, logits, train.last[rows], train.labels[rows])
            for recipe, logits in zip(recipes, early, strict=True)
        ]
        stack.zero_grad()
        torch.stack(losses).mean(1).sum().backward()
        warmup = (0.1 * lengths).ceil()
        share = torch.where(step <= warmup, step / warmup, (lengths - step + 1) / (lengths - warmup).clamp(min=1))
        _adamw(stack, moments, rates * share.clamp(min=0), step)
        _follow(average, stack, decay.clamp(max=step / (step + 10)))
        if step % epoch == 0 or step in lengths:
            logits = all_logits(average, dev, recipes)
            found = torch.stack([
                torch.stack([self_distillation_loss(of[:, [at]], of[:, -1]) for at in range(of.shape[1] - 1)])
                for of in logits
            ])  # fmt: skip
            running = step <= lengths
            _keep(kept["best"], average, (running & (found.sum(1) < best_sum))[:, None].expand_as(found))
            _keep(kept["each"], average, running[:, None] & (found < best))
            best_sum = torch.where(running, best_sum.minimum(found.sum(1)), best_sum)
            best = torch.where(running[:, None], best.minimum(found), best)
        if step == lengths.max():
            break
    return kept


@torch.no_grad()
def _adamw(stack: Stack, moments: dict[str, tuple[Tensor, Tensor]], rates: Tensor, step: int) -> None:
    """One step, with a learning rate and a clipped norm for each recipe."""
    squares = sum(value.grad.square().transpose(0, 1).flatten(1).sum(1) for value in stack.parameters())
    clip = (1 / (squares.sqrt() + 1e-6)).clamp(max=1)
    for name, value in stack.named_parameters():
        shape = (1, -1, *(1,) * (value.dim() - 2))
        mean, square = moments[name]
        gradient = value.grad * clip.view(shape)
        mean.lerp_(gradient, 0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        rate = rates.view(shape)
        if value.dim() > 3:
            value.mul_(1 - rate * 0.01)
        denominator = (square / (1 - 0.999**step)).sqrt_().add_(1e-8)
        value.sub_(mean / (1 - 0.9**step) / denominator * rate)


@torch.no_grad()
def _follow(average: Stack, stack: Stack, decay: Tensor) -> None:
    for ours, theirs in zip(average.parameters(), stack.parameters(), strict=True):
        ours.lerp_(theirs, (1 - decay).view(1, -1, *(1,) * (ours.dim() - 2)).expand_as(ours))


@torch.no_grad()
def _keep(kept: Stack, stack: Stack, which: Tensor) -> None:
    """Take the heads `which` [R, M] of `stack`."""
    for ours, theirs in zip(kept.parameters(), stack.parameters(), strict=True):
        ours[which.T] = theirs[which.T]


def _batches(states: States, batch: int, seed: int) -> Iterator[Tensor]:
    sampler = LengthGroupedSampler(states.lengths.tolist(), batch, seed)
    for epoch in range(10**6):
        sampler.epoch = epoch
        yield from torch.tensor(list(sampler)).split(batch)


def trace_of(logits: Tensor, states: States, model: Any, max_length: int) -> fastkd.ExitTrace:
    return fastkd.ExitTrace(
        logits.contiguous(), states.labels, states.lengths.int(), list(model.exit_layers), max_length,
        FlopsShape.of(model.config),
    )  # fmt: skip


def scores(trace: fastkd.ExitTrace, dev: fastkd.ExitTrace) -> dict[str, float]:
    """Accuracy at each budget, certified speed-ups, and how good the heads are."""
    uncertainty = trace.uncertainties()[:, :-1]
    speeds = uncertainty.flatten().double().quantile(torch.linspace(0, 1, 161).double()).clamp(0, 1).unique().tolist()
    rows = trace.sweep(sorted({0.0, *speeds, 1.0}))
    share = numpy.array([1 / row.speedup["fastbert"] for row in rows])
    accuracy = numpy.array([row.accuracy for row in rows])
    order = numpy.argsort(share, kind="stable")
    full = trace.logits[:, -1].argmax(-1)
    answers = trace.logits.argmax(-1)
    found = {f"accuracy at {budget:g}x": float(numpy.interp(1 / budget, share[order], accuracy[order]))
             for budget in BUDGETS}  # fmt: skip
    changed = [(trace.answers(row.speed).prediction != full).double().mean().item() for row in rows]
    found |= {
        f"speed-up at {allowed:.1%} changed": max(
            (row.speedup["fastbert"] for row, share in zip(rows, changed, strict=True) if share <= allowed), default=1.0
        )
        for allowed in CHANGED
    }
    found |= {
        "full accuracy": (full == trace.labels).double().mean().item(),
        "agreement, head 1": (answers[:, 0] == full).double().mean().item(),
        "agreement, head 2": (answers[:, 1] == full).double().mean().item(),
        "certified": _certified(trace, SPEEDS, None),
        "certified, fine grid": _certified(trace, FINE, None),
        "certified, path": _certified(trace, FINE, fastkd.threshold_path(dev)),
    }
    return found


def _certified(trace: fastkd.ExitTrace, speeds: Sequence[float], path: Any) -> float:
    try:
        return fastkd.calibrate(trace, 0.01, 0.95, speeds=speeds, path=path).speedup
    except CalibrationError:
        return 1.0


def cells_of(
    model: Any, task: Task, recipes: Sequence[Recipe], states: dict[str, States], seed: int
) -> Iterator[tuple[float, dict[str, dict[str, fastkd.ExitTrace]]]]:
    """Processor seconds and traces of each recipe; they share what heads they have, what these read, and their rows."""
    train = states[_rows_of(recipes[0])]
    started = time.process_time()
    kept = train_stack(model, recipes, train, states["dev"], seed)
    seconds = (time.process_time() - started) / len(recipes)
    logits = {
        name: {part: all_logits(stack, states[part], recipes) for part in ("dev", "test")}
        for name, stack in kept.items()
    }
    for number in range(len(recipes)):
        yield (
            seconds,
            {
                name: {part: trace_of(of[number], states[part], model, task.max_length) for part, of in parts.items()}
                for name, parts in logits.items()
            },
        )


def cells_with_backbone(
    folder: Path, task: Task, recipes: Sequence[Recipe], rows: dict[str, Rows], seed: int
) -> Iterator[tuple[float, dict[str, dict[str, fastkd.ExitTrace]]]]:
    """The same of recipes that train the backbone, each from the fine-tuned model in `folder`, by `fastkd.distill`."""
    for recipe in recipes:
        model, tokenizer = load_model(str(folder), "cpu")
        options = fastkd.DistillOptions(
            max_steps=recipe.steps, learning_rate=recipe.learning_rate, batch_size=BATCH, max_length=task.max_length,
            augmented_copies=recipe.copies, train_backbone=True, backbone_learning_rate=recipe.backbone,
            head_temperatures="none", seed=seed, progress=False, overwrite=True,
        )  # fmt: skip
        train = rows["unlabelled" if recipe.unlabelled > 1 else "train"]
        started = time.process_time()
        fastkd.distill(model, train, rows["dev"], folder.with_name(f"{folder.name}-trained"), options, tokenizer)
        seconds = time.process_time() - started
        settings = {"tokenizer": tokenizer, "max_length": task.max_length, "batch_size": 64}
        yield seconds, {"best": {part: model.trace(rows[part], **settings) for part in ("dev", "test")}}


def scores_by_temperature(dev: fastkd.ExitTrace, test: fastkd.ExitTrace) -> dict[str, dict[str, Any]]:
    """Of the heads as they are, and with temperatures fitted on `dev`."""
    early, last = dev.logits[:, :-1], dev.logits[:, -1]
    divided = {"none": dev.logits.new_ones(early.shape[1])}
    divided["soft"] = torch.tensor(probability_temperatures(early, last))
    divided["hard"] = torch.tensor(agreement_temperatures(early, last))
    found: dict[str, dict[str, Any]] = {}
    for kind, values in divided.items():
        by = torch.cat([values, values.new_ones(1)])[:, None]
        found[kind] = scores(replace(test, logits=test.logits / by), replace(dev, logits=dev.logits / by))
        found[kind]["temperatures"] = [round(value, 3) for value in values.tolist()]
    return found


def rescored(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    """The scores of a cell from its traces; as they were where these are gone."""
    found: dict[str, Any] = {}
    for kept in ("best", "each"):
        name = f"{line['task']}, {line['seed']}, {line['recipe']}, {kept}"
        paths = {part: folder / f"{name}, {part}.safetensors" for part in ("dev", "test")}
        if not all(path.exists() for path in paths.values()):
            return line["scores"]
        traces = {part: fastkd.ExitTrace.load(path) for part, path in paths.items()}
        found |= {f"{kept}, {kind}": of for kind, of in scores_by_temperature(**traces).items()}
    return found


def finished(folder: str, task: Task, data: Path, seed: int) -> dict[str, Any]:
    """Scores of a model that `fastkd distill` left, on the rows of a task, by the weights that it has."""
    model, tokenizer = load_model(folder, "cpu")
    rows = {"dev": task.dev, "test": task.test}
    traces = {
        part: model.trace(
            (found := load_rows(data / task.folder, split=part)).sample(min(count, len(found)), seed),
            tokenizer=tokenizer, max_length=task.max_length, batch_size=64,
        )
        for part, count in rows.items()
    }  # fmt: skip
    return {f"best, {kind}": of for kind, of in scores_by_temperature(**traces).items()}


def rows_of(task: Task, data: Path, seed: int, unlabelled: int) -> dict[str, Rows]:
    """The drawn rows of each part; `unlabelled` is how many times the labelled ones, fewer where there are no more."""
    train, dev, test = (load_rows(data / task.folder, split=split) for split in ("train", "dev", "test"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(task.train, len(train)) - task.held
    parts = {
        "train": train.dataset.select(order[:count]),
        "dev": dev.sample(min(task.dev, len(dev)), seed).dataset,
        "test": test.sample(min(task.test, len(test)), seed).dataset,
        "unlabelled": train.dataset.select(order[: len(order) - task.held][: count * unlabelled]),
    }
    if task.tune_steps is not None:
        parts["tune"] = train.sample(min(22_000, len(train)), seed).dataset
    if task.held:
        import datasets

        parts["test"] = datasets.concatenate_datasets([parts["test"], train.dataset.select(order[-task.held :])])
    return {name: load_rows(rows) for name, rows in parts.items()}


class AllHeads(Objective):
    """Cross-entropy of all heads with the labels, summed; where it alternates, of the last head alone in odd steps."""

    def __init__(self, model: fastkd.EarlyExitForSequenceClassification, alternates: bool) -> None:
        super().__init__()
        self.model = model
        self.alternates = alternates
        self.steps = 0

    @property
    def core(self) -> fastkd.EarlyExitForSequenceClassification:
        return self.model

    def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        heads = self.model.all_exits(**batch)[0].transpose(0, 1)
        self.steps += self.training
        learns_last = not self.training or (self.alternates and self.steps % 2 == 1)
        return {"loss": label_loss(heads[-1:] if learns_last else heads, labels), "logits": heads[-1]}


def finetuned(task: Task, rows: dict[str, Rows], folder: Path, seed: int, tuning: str = "last") -> tuple[Any, Any]:
    if not folder.exists():
        parts = DataFolder(rows["train"], rows["dev"], None)
        model, tokenizer = load_plain("minilm", parts, "fastbert", None, seed)
        options = fastkd.FinetuneOptions(
            max_steps=task.tune_steps, learning_rate=1e-4, seed=seed, progress=False, overwrite=True, resume=True,
            max_length=task.max_length if task.tune_steps is None else 128,
        )  # fmt: skip
        train = rows["train"] if task.tune_steps is None else rows["tune"]
        if tuning == "last":
            fastkd.finetune(model, train, rows["dev"], folder, options, tokenizer)
        else:
            _finetune_all_heads(
                AllHeads(model, tuning == "alternating"), train, rows["dev"], folder, options, tokenizer
            )
    return load_model(str(folder), "cpu")


def _finetune_all_heads(
    objective: AllHeads, train: Rows, dev: Rows, folder: Path, options: fastkd.FinetuneOptions, tokenizer: Any
) -> None:
    model = objective.core
    take_labels(model, train)
    training = PartTraining(
        name="finetune",
        model=model,
        objective=objective,
        adapter=None,
        trained=list(model.parameters()),
        scale=LabelScale(),
        scaled=[],
        learning_rates={"model.heads.": options.learning_rate * options.head_learning_rate_factor},
        metrics=lambda found: head_scores(numpy.asarray(found.predictions), numpy.asarray(found.label_ids)),
        best_metric="accuracy",
        reads_labels=True,
        trains_exits=False,
    )
    train_part(training, train, dev, folder, options, tokenizer, [])


_Cells = dict[tuple[str, int], dict[str, Any]]


def markdown(cells: Sequence[dict[str, Any]]) -> str:
    """Means over tasks and seeds of every recipe and kind of temperature, and what each task says."""
    by_recipe: dict[str, _Cells] = {}
    for line in cells:
        by_recipe.setdefault(line["recipe"], {})[line["task"], line["seed"]] = line["scores"]
    tasks = list(dict.fromkeys(line["task"] for line in cells))
    columns = ["full accuracy", *(f"accuracy at {budget:g}x" for budget in BUDGETS)]
    speeds = [f"speed-up at {allowed:.1%} changed" for allowed in CHANGED]
    base = by_recipe.get("defaults", {})
    parts = [INTRODUCTION.format(seeds=len({line["seed"] for line in cells}), tasks=", ".join(tasks))]
    for title, kept in (("Weights of the best evaluation", "best"), ("Every head's own best weights", "each")):
        rows: list[tuple[str, ...]] = [
            ("recipe", "temperatures", "cells", *columns, "points at 4x", *speeds, "certified", "its gain")
        ]
        for recipe, found in by_recipe.items():
            for kind in ("none", "soft", "hard"):
                scores = [of[key] for of in found.values() if (key := f"{kept}, {kind}") in of]
                if not scores:
                    continue
                means = [f"{100 * sum(of[column] for of in scores) / len(scores):.1f}" for column in columns]
                more, gain = _compared(found, base, f"{kept}, {kind}")
                certified = sum(of["certified"] for of in scores) / len(scores)
                fast = [f"{sum(of[name] for of in scores) / len(scores):.2f}x" for name in speeds]
                rows.append((recipe, kind, str(len(scores)), *means, more, *fast, f"{certified:.2f}x", gain))
        parts.append(f"## {title}\n\n{_table(rows)}")
    rows = [("recipe", "temperatures", *(f"{task}{what}" for task in tasks for what in (", points", ", gain")))]
    for recipe, found in by_recipe.items():
        for kind in ("none", "hard"):
            line = [recipe, kind]
            for task in tasks:
                line += _compared({cell: of for cell, of in found.items() if cell[0] == task}, base, f"best, {kind}")
            rows.append(tuple(line))
    parts.append(f"## Each task beside the defaults, weights of the best evaluation\n\n{_table(rows)}")
    rows = [("task", "seed", "full model", "accuracy at 4x", "certified")]
    for (task, seed), of in base.items():
        own = of["best, none"]
        share = [f"{100 * own[name]:.1f}" for name in ("full accuracy", "accuracy at 4x")]
        rows.append((task, str(seed), *share, f"{own['certified']:.2f}x"))
    parts.append(f"## What the defaults give\n\n{_table(rows)}")
    return "\n\n".join(parts) + "\n"


def _compared(found: _Cells, base: _Cells, key: str) -> tuple[str, str]:
    """Points of accuracy at 4x and gain in certified speed-up over the defaults, means over the cells of both."""
    pairs = [(of[key], base[cell]["best, none"]) for cell, of in found.items() if cell in base]
    if not pairs:
        return "", ""
    points = [100 * (ours["accuracy at 4x"] - theirs["accuracy at 4x"]) for ours, theirs in pairs]
    gains = [math.log(ours["certified"] / theirs["certified"]) for ours, theirs in pairs]
    return f"{sum(points) / len(points):+.1f}", f"{math.exp(sum(gains) / len(gains)):.2f}x"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_tuning(recipes: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in recipes:
        found.setdefault(RECIPES[name].tuning, []).append(name)
    return found


def _groups(recipes: Sequence[str]) -> Iterator[list[str]]:
    """Recipes that one stack can train, at most `STACKED`."""
    left = list(recipes)
    while left:
        first = RECIPES[left[0]]
        alike = [name for name in left if _kind(RECIPES[name]) == _kind(first)][:STACKED]
        left = [name for name in left if name not in alike]
        yield alike


def _rows_of(recipe: Recipe) -> str:
    """The name of the states that a recipe with a frozen backbone learns from."""
    if recipe.unlabelled > 1:
        return "unlabelled"
    return f"{recipe.copies} altered copies" if recipe.copies else "train"


def _kind(recipe: Recipe) -> tuple[object, ...]:
    return recipe.head, recipe.pool, _rows_of(recipe), (recipe.steps or 0) > 600, recipe.backbone > 0


def main(
    data: Path,
    work: Annotated[Path, typer.Option(help="Folder for the corpus and the fine-tuned models.")],
    output: Annotated[Path, typer.Option(help="OUTPUT.jsonl gets the cells, OUTPUT.md the table.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks, between commas.")] = ",".join(TASKS),
    recipes: Annotated[str, typer.Option(help="Names of recipes, between semicolons.")] = ";".join(RECIPES),
    seeds: Annotated[str, typer.Option(help="Numbers, between commas.")] = "1",
    rescore: Annotated[bool, typer.Option(help="Score the kept traces of all cells anew.")] = False,
    models: Annotated[
        str,
        typer.Option(help="Score finished models instead: 'AG News=FOLDER', between commas; as recipe 'whole file'."),
    ] = "",
) -> None:
    """Train the early heads by every recipe on every task, and score them."""
    torch.set_num_threads(1)
    (work / "traces").mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".jsonl")
    cells = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if rescore:
        cells = [{**line, "scores": rescored(work / "traces", line)} for line in cells]
        file.write_text("".join(json.dumps(line) + "\n" for line in cells))
    for name, folder in (pair.split("=") for pair in models.split(",") if pair):
        line = {"task": name, "seed": 1, "recipe": "whole file", "scores": finished(folder, TASKS[name], data, 1)}
        cells.append(line)
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
    done = {(line["task"], line["seed"], line["recipe"]) for line in cells}
    for seed in map(int, seeds.split(",") if not models else ()):
        for name in tasks.split(","):
            missing = [recipe for recipe in recipes.split(";") if (name, seed, recipe) not in done]
            if not missing:
                continue
            task = TASKS[name]
            folder = data / task.folder
            if task.folder == "corpus":
                folder = work / f"corpus-{seed}"
                if not folder.exists():
                    write_corpus(folder, seed=seed)
            times = max(RECIPES[recipe].unlabelled for recipe in missing)
            rows = rows_of(replace(task, folder=folder.name), folder.parent, seed, times)
            for tuning, names in _by_tuning(missing).items():
                suffix = "tuned" if tuning == "last" else tuning
                tuned = work / f"{task.folder}-{seed}-{suffix}"
                model, tokenizer = finetuned(task, rows, tuned, seed, tuning)
                frozen = [RECIPES[recipe] for recipe in names if not RECIPES[recipe].backbone]
                wanted = {part: 0 for part in ("dev", "test") if frozen} | {_rows_of(of): of.copies for of in frozen}
                states = {
                    part: states_of(model, rows.get(part, rows["train"]), tokenizer, task.max_length, copies, seed)
                    for part, copies in wanted.items()
                }
                for group in _groups(names):
                    alike = [RECIPES[recipe] for recipe in group]
                    if alike[0].backbone:
                        found = cells_with_backbone(tuned, task, alike, rows, seed)
                    else:
                        found = cells_of(model, task, alike, states, seed)
                    for recipe, (seconds, traces) in zip(group, found, strict=True):
                        line = {
                            "task": name,
                            "seed": seed,
                            "recipe": recipe,
                            "seconds": round(seconds, 1),
                            "scores": {},
                        }
                        for kept, parts in traces.items():
                            for part, trace in parts.items():
                                trace.save(work / "traces" / f"{name}, {seed}, {recipe}, {kept}, {part}.safetensors")
                            for kind, of in scores_by_temperature(**parts).items():
                                line["scores"][f"{kept}, {kind}"] = of
                        cells.append(line)
                        with file.open("a") as lines:
                            lines.write(json.dumps(line) + "\n")
                        typer.echo(f"{name}, seed {seed}, {recipe}: {seconds:.0f} s")
    output.with_suffix(".md").write_text(markdown(cells))


if __name__ == "__main__":
    typer.run(main)
