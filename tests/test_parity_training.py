"""parity="fastbert": every quirk of the official training code, by what can be seen of it, and all of them together."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from tiny_models import early_exit_model, one_thread, tokenizer_of  # noqa: F401  # a fixture
from torch import Tensor
from torch.nn import functional as F
from training_worker import load, rows, save_plain
from typer.testing import CliRunner

import fastkd
from fastkd.commands import app
from fastkd.data.batches import ShuffledOnceSampler, tokenize
from fastkd.encoders.label_scale import LabelScale
from fastkd.training.finetune import FinetuneOptions, finetune
from fastkd.training.harness import TrainOptions, TrainResult
from fastkd.training.optimizers import BiasedAdamW
from fastkd.training.self_distillation import DistillOptions, _SelfDistillation, distill

BATCH, ROWS, LENGTH = 8, 20, 16
QUICK = {"batch_size": BATCH, "max_length": LENGTH, "progress": False, "bf16": False, "logging_steps": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_plain(tmp_path_factory.mktemp("plain"))
    tokenizer_of("bert").save_pretrained(folder)
    return folder


def uer_model(plain: Path, dropout: float = 0.0) -> fastkd.EarlyExitForSequenceClassification:
    model = load(plain, num_labels=2, input_format="uer", head_dropout=dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    model.config.backbone.attention_probs_dropout_prob = dropout
    return model


def uer_tokenizer() -> Any:
    return fastkd.with_input_format(tokenizer_of("bert"), "uer")


def run(stage: str, model: Any, output: Path, options: TrainOptions, dev: int = 0) -> TrainResult:
    step: Any = finetune if stage == "finetune" else distill
    data = rows(ROWS), rows(dev, seed=1) if dev else None
    tokenizer = uer_tokenizer() if model.config.input_format == "uer" else tokenizer_of("bert")
    return step(model, *data, output, options, tokenizer)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# The options


def test_the_preset_names_every_quirk_and_nothing_is_on_by_default() -> None:
    tuned, distilled = FinetuneOptions.preset(parity="fastbert"), DistillOptions.preset(parity="fastbert")
    for options in (tuned, distilled):
        assert (options.weight_decay, options.max_grad_norm, options.bf16) == (0.0, 0.0, False)
        assert (options.schedule_epochs, options.bias_correction, options.adam_epsilon) == (3.0, False, 1e-6)
        assert (options.shuffle_once, options.seed, options.batch_size, options.max_length) == (True, 7, 32, 128)
    assert (tuned.epochs, tuned.learning_rate, tuned.head_learning_rate_factor) == (3, 2e-5, 1.0)
    assert (tuned.redraw_heads, tuned.keep_last) == (True, False)
    assert (distilled.epochs, distilled.learning_rate, distilled.direction) == (5, 2e-4, "forward")
    assert (distilled.frozen_dropout, distilled.keep_last, distilled.temperature) == (True, True, 1.0)
    assert distilled.head_temperatures == "none"
    for plain_options in (FinetuneOptions(), DistillOptions()):
        assert (plain_options.schedule_epochs, plain_options.bias_correction) == (None, True)
        assert (plain_options.shuffle_once, plain_options.keep_last) == (False, False)
        assert plain_options.weight_decay > 0
    assert (FinetuneOptions().redraw_heads, DistillOptions().frozen_dropout) == (False, False)


def test_what_is_given_wins_over_the_preset() -> None:
    options = DistillOptions.preset(parity="fastbert", learning_rate=1e-3, frozen_dropout=False)
    assert (options.learning_rate, options.frozen_dropout, options.keep_last) == (1e-3, False, True)
    with pytest.raises(ValueError, match="parity: got 'bitvoyage'"):
        DistillOptions.preset(parity="bitvoyage")
    with pytest.raises(ValueError, match="schedule_epochs: got 0"):
        DistillOptions(schedule_epochs=0)


# The quirks, one by one


def test_weight_decay_never_acts(plain: Path, tmp_path: Path) -> None:
    """The embedding of a token that never comes up has no gradient: only decay could move it."""
    unused = 300
    moved = {}
    for name, options in {
        "parity": FinetuneOptions.preset(parity="fastbert", **QUICK, epochs=1),
        "default": FinetuneOptions(**QUICK, epochs=1),
    }.items():
        model = uer_model(plain)
        before = weights(model)["bert.embeddings.word_embeddings.weight"][unused]
        run("finetune", model, tmp_path / name, options)
        moved[name] = (model.bert.embeddings.word_embeddings.weight[unused] - before).abs().max().item()
    assert moved["parity"] == 0 < moved["default"]


def test_distillation_learns_nothing_after_epoch_three(plain: Path, tmp_path: Path) -> None:
    results = {}
    for epochs in (3, 5):
        model = uer_model(plain, dropout=0.1)
        results[epochs] = run(
            "distill", model, tmp_path / str(epochs), DistillOptions.preset("fastbert", **QUICK, epochs=epochs)
        )
        results[epochs, "weights"] = weights(model)
    assert (results[3].steps, results[5].steps) == (9, 15)
    # 20 rows in batches of 8, the rest kept; int(20 * 3 / 8) + 1 = 8 steps of a schedule that 9 steps outlive
    rates = [entry["learning_rate"] for entry in results[5].log_history if "learning_rate" in entry]
    assert all(rate > 0 for rate in rates[1:8])
    assert set(rates[8:]) == {0.0}
    for name, value in results[3, "weights"].items():
        assert torch.equal(value, results[5, "weights"][name]), name

    longer = uer_model(plain, dropout=0.1)
    whole = DistillOptions.preset("fastbert", **QUICK, schedule_epochs=None)
    run("distill", longer, tmp_path / "whole", whole)
    assert any(not torch.equal(value, results[5, "weights"][name]) for name, value in weights(longer).items())


@pytest.mark.parametrize("frozen_dropout", [False, True])
def test_dropout_acts_in_the_frozen_teacher(frozen_dropout: bool) -> None:
    model = early_exit_model("bert", num_labels=2, head_dropout=0.1)
    objective = _SelfDistillation(model, DistillOptions(frozen_dropout=frozen_dropout), LabelScale()).train()
    batch = {"input_ids": torch.tensor([[2, 5, 7, 3]])}
    answers = [objective(**batch)["logits"][:, -1] for _ in range(2)]
    assert torch.equal(*answers) != frozen_dropout
    assert model.last_head.training == frozen_dropout
    assert all(head.training for head in model.early_heads)
    objective.eval()
    assert not any(module.training for module in model.modules())
    assert torch.equal(*[objective(**batch)["logits"] for _ in range(2)])


def test_adam_without_bias_correction_takes_a_longer_first_step() -> None:
    gradient = torch.tensor([0.3, -2.0])
    steps = {}
    for kind in (BiasedAdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = gradient.clone()
        kind([parameter], lr=1e-2, eps=1e-6, weight_decay=0.0).step()
        steps[kind] = parameter.detach() / -1e-2
    torch.testing.assert_close(steps[torch.optim.AdamW], gradient.sign(), atol=1e-5, rtol=0)
    # (1 - b1) / sqrt(1 - b2)
    torch.testing.assert_close(steps[BiasedAdamW], gradient.sign() * 0.1 / math.sqrt(0.001), atol=1e-3, rtol=0)


def test_biased_adamw_decays_and_remembers() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    idle = torch.nn.Parameter(torch.ones(1))
    optimizer = BiasedAdamW([{"params": [parameter, idle], "weight_decay": 0.1}], lr=0.1)
    mean = square = torch.zeros(3, dtype=torch.float64)
    expected = parameter.detach().clone()
    for step in range(4):
        gradient = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) * (step + 1)
        parameter.grad = gradient
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        expected = (expected - 0.1 * mean / (square.sqrt() + 1e-6)) * (1 - 0.1 * 0.1)
        torch.testing.assert_close(parameter.detach(), expected)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert idle.item() == 1
    assert optimizer.step(lambda: 2.5) == 2.5


def test_gradients_are_not_clipped(plain: Path, tmp_path: Path) -> None:
    """With an epsilon that dwarfs the second moment, Adam's step grows with the gradient, and clipping shows."""
    steps = {}
    for norm in (0.0, 1e-4):
        model = uer_model(plain)
        before = weights(model)
        options = FinetuneOptions.preset(
            "fastbert", **QUICK, max_steps=1, warmup=0.0, adam_epsilon=1e3, learning_rate=1e3, max_grad_norm=norm,
            redraw_heads=False,
        )  # fmt: skip
        run("finetune", model, tmp_path / str(norm), options)
        steps[norm] = sum((value - before[name]).norm() ** 2 for name, value in weights(model).items()) ** 0.5
    assert steps[0.0] > 100 * steps[1e-4] > 0
    assert FinetuneOptions.preset("fastbert").max_grad_norm == 0


def test_rows_are_shuffled_once_and_the_remainder_is_kept() -> None:
    sampler = ShuffledOnceSampler(11, seed=7)
    expected = list(range(11))
    random.Random(7).shuffle(expected)
    assert list(sampler) == list(sampler) == expected
    assert len(sampler) == 11


def test_heads_are_drawn_as_torch_draws_them(plain: Path, tmp_path: Path) -> None:
    options = FinetuneOptions.preset("fastbert", **QUICK, max_steps=1, learning_rate=1e-12)
    model = uer_model(plain)
    run("finetune", model, tmp_path / "drawn", options)
    narrow = model.heads["0"].narrow
    bound = 1 / math.sqrt(narrow.in_features)
    # uniform up to the bound, biases too; the backbone's own are normal and its biases 0
    assert 0.98 * bound < narrow.weight.abs().max() <= bound
    assert 0 < narrow.bias.abs().max() <= bound
    assert uer_model(plain).heads["0"].narrow.bias.abs().max() == 0


@pytest.mark.parametrize("keep_last", [False, True])
def test_distillation_keeps_its_last_weights(plain: Path, tmp_path: Path, keep_last: bool) -> None:
    """A learning rate far too high and still rising: the best evaluation is not the last."""
    options = DistillOptions.preset(
        "fastbert", **QUICK, epochs=2, learning_rate=3.0, warmup=0.5, schedule_epochs=4.0, keep_last=keep_last
    )
    result = run("distill", uer_model(plain), tmp_path / "out", options, dev=20)
    losses = [entry["eval_loss"] for entry in result.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses)
    assert result.metrics["loss"] == (losses[-1] if keep_last else min(losses))


# All together, against a loop that states the official training


def official_schedule(step: int, total: int) -> float:
    warmup = 0.1 * total
    return step / max(1, warmup) if step < warmup else max(0.0, (total - step) / max(1.0, total - warmup))


def official_loop(model: Any, stage: str, epochs: int, learning_rate: float) -> None:
    """Plain PyTorch: rows shuffled once, remainder kept, Adam without correction, no clipping, no decay."""
    encoded = tokenize(rows(ROWS), uer_tokenizer(), LENGTH)
    order = list(range(ROWS))
    random.Random(7).shuffle(order)
    trained = [*model.bert.parameters(), *model.last_head.parameters()]
    if stage == "distill":
        trained = [parameter for head in model.early_heads for parameter in head.parameters()]
    moments = [[torch.zeros_like(parameter), torch.zeros_like(parameter)] for parameter in trained]
    total = int(ROWS * 3 / BATCH) + 1
    step = 0
    for _ in range(epochs):
        for start in range(0, ROWS, BATCH):
            chosen = encoded[order[start : start + BATCH]]
            width = max(chosen["length"])
            batch = {
                name: torch.tensor([row + [0] * (width - len(row)) for row in chosen[name]])
                for name in ("input_ids", "token_type_ids", "attention_mask")
            }
            logits = model.all_exit_logits(**batch)
            if stage == "finetune":
                loss = F.nll_loss(logits[:, -1].log_softmax(-1), torch.tensor(chosen["labels"]))
            else:
                target = logits[:, -1].softmax(-1).detach()
                loss = sum(
                    F.kl_div(logits[:, head].log_softmax(-1), target, reduction="batchmean")
                    for head in range(logits.shape[1] - 1)
                )
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            rate = learning_rate * official_schedule(step, total)
            with torch.no_grad():
                for parameter, gradient, (mean, square) in zip(trained, gradients, moments, strict=True):
                    if gradient is None:
                        continue
                    mean.mul_(0.9).add_(gradient, alpha=0.1)
                    square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                    parameter.sub_(rate * mean / (square.sqrt() + 1e-6))
            step += 1


@pytest.mark.parametrize(("stage", "epochs", "rate"), [("finetune", 3, 2e-5), ("distill", 5, 2e-4)])
def test_the_whole_preset_trains_as_the_official_loop(
    plain: Path, tmp_path: Path, stage: str, epochs: int, rate: float
) -> None:
    """Without dropout, whose random numbers no two programs share."""
    options_class: Any = FinetuneOptions if stage == "finetune" else DistillOptions
    changes = {"redraw_heads": False} if stage == "finetune" else {}
    model, oracle = uer_model(plain), uer_model(plain)
    before = weights(model)
    run(stage, model, tmp_path / "out", options_class.preset("fastbert", **QUICK, **changes))
    official_loop(oracle, stage, epochs, rate)
    moved = 0
    for name, value in weights(model).items():
        expected = weights(oracle)[name]
        travelled = (expected - before[name]).abs().max().item()
        moved += travelled > 0
        # key biases have a gradient of 0 but for rounding, which Adam blows up
        if not name.endswith("key.bias"):
            assert (value - expected).abs().max().item() <= 0.02 * travelled, name
    assert moved > 10


# The commands


def test_commands_take_the_preset_and_what_is_given_wins(plain: Path, tmp_path: Path) -> None:
    lines = ["label\ttext_a", *(f"{number % 2}\tthe film was {('bad', 'good')[number % 2]}" for number in range(16))]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def logged(*arguments: object) -> dict[str, Any]:
        done = CliRunner().invoke(app.app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return json.loads((Path(str(arguments[arguments.index("-o") + 1])) / "trainer_log.json").read_text())

    data = ["--train", tmp_path / "train.tsv", "--parity", "fastbert"]
    log = logged("finetune", plain, *data, "-o", tmp_path / "tuned", "--epochs", 1, "--max-length", 16)
    assert (log["options"]["epochs"], log["options"]["max_length"], log["options"]["learning_rate"]) == (1, 16, 2e-5)
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["input_format"] == "uer"
    log = logged("distill", tmp_path / "tuned", *data, "-o", tmp_path / "model", "--max-steps", 2)
    assert (log["options"]["max_steps"], log["options"]["learning_rate"]) == (2, 2e-4)
    assert log["options"]["frozen_dropout"]

    refused = CliRunner().invoke(app.app, ["distill", str(tmp_path / "tuned"), *map(str, data[:3]), "other", "-o", "x"])
    assert refused.exit_code == 2
    assert "parity: got 'other'" in " ".join(refused.output.split())


def test_a_tokenizer_of_another_format_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format 'standard', .*with_input_format\(tokenizer, 'uer'\)"):
        finetune(uer_model(plain), rows(8), None, tmp_path / "out", FinetuneOptions(**QUICK), tokenizer_of("bert"))
