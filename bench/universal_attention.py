"""What Universal-KD's attention looks at, and what its term adds to the others, while a student learns.

    python bench/universal_attention.py TEACHER DATA [--rows 1000] [--student layers:3] [--space logits]
        [--pool mean] [--regression] [--unit standard] [--output FILE]

A student learns by `UniversalKDMixtureLoss` as in `fastkd kd` (IL). Before the training and after each epoch, on the
same dev rows, it is written down

* how far the hidden states of the student's layers are spread, beside the norm of their mean: a linear classifier
  that begins at 0 learns next to nothing of a small spread around a large mean;
* how many teacher layers the attention really uses (exp of its entropy), and the share of each, with raw, centred and
  log-probability features;
* how good the classifiers on the teacher's layers are, and the mixture that the student's layers learn from: accuracy,
  of a regression Pearson's correlation;
* the norm of the gradient that each weighted term sends into the student's body, and the angle between them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fastkd import LayerProbe, PseudoClassifiers, UniversalKDLoss, UniversalKDMixtureLoss, student_from_teacher
from fastkd.data.batches import padding_collator, tokenize
from fastkd.data.rows import Rows, load_folder
from fastkd.encoders.label_scale import LabelScale
from fastkd.kd.cache import TeacherCache, example_ids
from fastkd.kd.label_unit import standard_unit
from fastkd.kd.teacher import Teacher
from fastkd.training import metrics

SPACES = ("logits", "centred", "log_probs")
WEIGHTS = {"labels": (0.2, 0.0, 0.0), "answer": (0.0, 0.4, 0.0), "layers": (0.0, 0.0, 0.4)}
_KINDS = ("layer_logits",)


@dataclass(frozen=True)
class Batch:
    """Tokens, the teacher's layer logits [N, B, C] and labels."""

    tokens: dict[str, Tensor]
    teacher: Tensor
    labels: Tensor


class Rig:
    """A student, its pseudo-classifiers and a teacher's cached answers."""

    def __init__(self, teacher: Teacher, cache: TeacherCache, student: Any, max_length: int, pool: str | None) -> None:
        self.teacher, self.cache, self.max_length = teacher, cache, max_length
        self.scale = LabelScale()
        self.student = student
        self.probe = LayerProbe(self.student, pool)
        config = self.student.config
        self.heads = PseudoClassifiers(self.probe.num_layers - 1, config.hidden_size, config.num_labels)
        for parameter in self.student.get_input_embeddings().parameters():
            parameter.requires_grad_(False)

    def batches(self, rows: Rows, size: int, seed: int | None) -> Iterator[Batch]:
        """All rows once, in the order of a seed."""
        tokens, ids = tokenize(rows, self.teacher.tokenizer, self.max_length), example_ids(rows)
        collate = padding_collator(self.teacher.tokenizer)
        generator = torch.Generator().manual_seed(seed or 0)
        order = torch.arange(len(rows)) if seed is None else torch.randperm(len(rows), generator=generator)
        for chosen in order.split(size):
            # the collator takes what it pads
            padded = dict(collate([{k: v for k, v in tokens[i].items() if k != "length"} for i in chosen.tolist()]))
            answers = self.cache.answers([ids[i] for i in chosen.tolist()], _KINDS)["layer_logits"]
            labels = padded.pop("labels")
            if labels.is_floating_point():
                labels, answers = self.scale.standardised(labels), self.scale.standardised(answers)
            yield Batch(padded, answers.transpose(0, 1).contiguous(), labels)

    def layer_logits(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = self.probe(**batch.tokens)
        return self.heads(output.hidden_states.float(), output.logits.float())

    @property
    def body(self) -> list[nn.Parameter]:
        return [value for value in self.student.base_model.parameters() if value.requires_grad]


def look(rig: Rig, batches: list[Batch], loss: UniversalKDLoss) -> dict[str, Any]:
    """What the module says is written down, as means over the rows."""
    rig.student.eval()
    with torch.no_grad():
        hidden = torch.cat([rig.probe(**batch.tokens).hidden_states.float() for batch in batches], dim=1)
    spread = [[layer.std(0).norm().item(), layer.mean(0).norm().item()] for layer in hidden]
    found: list[dict[str, Any]] = []
    for batch in batches:
        logits = rig.layer_logits(batch)
        found.append(
            {
                "rows": len(batch.labels),
                "attention": {space: _attention(space, logits.detach(), batch.teacher) for space in SPACES},
                "quality": _qualities(logits.detach(), batch, loss),
                "gradient": _gradients(rig, logits, batch, loss),
            }
        )
    return {"spread and mean": spread, **_mean(found)}


def _attention(space: str, student: Tensor, teacher: Tensor) -> dict[str, Any]:
    loss = UniversalKDLoss(attn_space=space)
    return {
        "effective_layers": loss.effective_layers(student, teacher).item(),
        "shares": loss.attention(student, teacher).mean((0, 1)).tolist(),
    }


def _qualities(student: Tensor, batch: Batch, loss: UniversalKDLoss) -> dict[str, list[float]]:
    mixture = torch.einsum("mbn,nbc->mbc", loss.attention(student, batch.teacher), batch.teacher)
    parts = {"teacher": batch.teacher, "student": student, "mixture": mixture}
    found = {name: [_quality(layer, batch.labels) for layer in layers] for name, layers in parts.items()}
    last = batch.teacher[-1]
    answer = last.squeeze(-1) if last.shape[-1] == 1 else last.argmax(-1)
    return found | {"mixture against the teacher's answer": [_quality(layer, answer) for layer in mixture]}


def _quality(logits: Tensor, labels: Tensor) -> float:
    metric = metrics.pearson if logits.shape[-1] == 1 else metrics.accuracy
    return metric(logits.float().numpy(), labels.numpy())


def _gradients(rig: Rig, logits: Tensor, batch: Batch, loss: UniversalKDLoss) -> dict[str, float]:
    gradients = {}
    for name, weights in WEIGHTS.items():
        term = UniversalKDMixtureLoss(loss, *weights, temperature=4.0)(logits, batch.teacher, batch.labels)
        parts = torch.autograd.grad(term, rig.body, retain_graph=True, allow_unused=True)
        gradients[name] = torch.cat([part.flatten() for part in parts if part is not None])
    found = {f"norm {name}": gradient.norm().item() for name, gradient in gradients.items()}
    pairs = (("layers", "answer"), ("layers", "labels"), ("answer", "labels"))
    return found | {f"cosine {a}, {b}": _cosine(gradients[a], gradients[b]) for a, b in pairs}


def _cosine(first: Tensor, second: Tensor) -> float:
    # the last layer gets no gradient from the inner layers' term
    size = min(len(first), len(second))
    return torch.nn.functional.cosine_similarity(first[:size], second[:size], dim=0).item()


def _mean(found: list[Any]) -> Any:
    """Of nested results of several batches."""
    if isinstance(found[0], dict):
        return {name: _mean([item[name] for item in found]) for name in found[0]}
    return numpy.mean(found, axis=0).round(4).tolist()


def train(rig: Rig, rows: Rows, watched: list[Batch], loss: UniversalKDLoss, options: argparse.Namespace) -> list[Any]:
    """Train the student and look at the beginning, after each epoch, and so at the end."""
    parameters = [{"params": rig.body}]
    new = [p for n, p in rig.student.named_parameters() if not n.startswith(rig.student.base_model_prefix)]
    parameters.append({"params": [*new, *rig.heads.parameters()], "lr": 10 * options.learning_rate})
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    steps = options.epochs * -(-len(rows) // options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(10 * step / steps, 1) * (1 - step / steps))
    mixture = UniversalKDMixtureLoss(loss, temperature=4.0)
    looks = [{"epoch": 0, **look(rig, watched, loss)}]
    for epoch in range(options.epochs):
        rig.student.train()
        for batch in rig.batches(rows, options.batch_size, epoch + options.seed):
            optimizer.zero_grad(set_to_none=True)
            mixture(rig.layer_logits(batch), batch.teacher, batch.labels).backward()
            nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
            optimizer.step()
            schedule.step()
        looks.append({"epoch": epoch + 1, **look(rig, watched, loss)})
    return looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--watched", type=int, default=512, help="dev rows that are looked at")
    parser.add_argument("--student", default="layers:3")
    parser.add_argument("--pool", help="cls, mean, max or last; default: as the models do")
    parser.add_argument("--space", default="logits", choices=("logits", "centred", "log_probs", "probs"))
    parser.add_argument("--regression", action="store_true")
    parser.add_argument("--unit", default="standard", choices=("standard", "labels"), help="of a regression's losses")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    folder = load_folder(options.data, num_labels=1 if options.regression else None)
    assert folder.dev is not None
    rows, dev = folder.train.sample(options.rows, 0), folder.dev.sample(options.watched, 0)
    teacher = Teacher.load(options.teacher, options.pool)
    with tempfile.TemporaryDirectory() as scratch:
        cache = TeacherCache(Path(scratch) / "cache", teacher, options.max_length, bf16=True)
        cache.ensure(rows, _KINDS)
        # the same classifiers answer for rows that they were not trained on
        cache._load_pseudo_classifiers = lambda rows: None  # type: ignore[method-assign]
        cache.ensure(dev, _KINDS)
        student = student_from_teacher(teacher.model, options.student)
        unit = standard_unit(student, rows, teacher.tokenizer, has_new_head=False)
        with unit if options.unit == "standard" else nullcontext() as scales:
            rig = Rig(teacher, cache, student, options.max_length, options.pool)
            if scales is not None:
                rig.scale = scales.labels
            watched = list(rig.batches(dev, 128, None))
            looks = train(rig, rows, watched, UniversalKDLoss(attn_space=options.space), options)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    text = json.dumps({"options": given, "looks": looks}, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
